import pytest
import torch

from kdfast.device import is_slower_than_float32, resolve_device, resolve_precision
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


@pytest.mark.parametrize(
    ("capabilities", "fast"), [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx512_f": True}, False)]
)
def test_bf16_is_for_cpus_with_instructions_for_it(
    capabilities: dict[str, bool], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == ("bf16" if fast else "fp32")
    assert resolve_precision("fp32", cpu) == "fp32"
    assert resolve_precision("bf16", cpu) == "bf16"
    assert is_slower_than_float32("bf16", cpu) is not fast
    assert is_slower_than_float32("fp16", cpu)
    assert not is_slower_than_float32("fp32", cpu)
    assert not is_slower_than_float32("fp16", torch.device("cuda"))


def test_torch_without_capabilities_trains_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32")])
def test_bf16_is_for_gpus_since_ampere(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", torch.device("cuda")) == precision
