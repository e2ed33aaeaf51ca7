import pytest
import torch.distributed as dist
import typer

from kdfast.examples.text import fsdp

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")


@pytest.mark.slow
def test_gradient_of_processes_equals_that_of_one():
    result = fsdp.main(2)
    assert result.largest > 0.01
    assert result.difference < 1e-5 * result.largest


def test_rejects_processes_that_do_not_divide_batch():
    with pytest.raises(typer.BadParameter, match="evenly"):
        fsdp.main(3)


def test_processes_have_different_numbers_of_ignored_labels():
    _, labels = fsdp.make_batch()
    first, second = labels.chunk(2)
    assert (first != fsdp.IGNORE).sum() < 0.5 * (second != fsdp.IGNORE).sum()
