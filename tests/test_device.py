import pytest
import torch

from kdfast.device import resolve_device
from kdfast.errors import UsageError


def test_auto_and_cpu() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["", "gpu", "cpu:0", "cuda:x", "cuda:99", "mps"])
def test_rejects_unknown_devices(name: str) -> None:
    with pytest.raises(UsageError, match="`device` is"):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_message_about_missing_cuda_counts_the_devices() -> None:
    with pytest.raises(UsageError, match="torch sees 0 CUDA devices"):
        resolve_device("cuda")
