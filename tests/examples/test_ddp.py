import pytest
import torch
import torch.distributed as dist
import typer

from kdfast.examples import ddp

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")


@pytest.mark.slow  # test_commands.py runs the command with two processes
@pytest.mark.parametrize("processes", [2, 3])
def test_gradient_of_processes_equals_that_of_one(processes):
    result = ddp.main(processes)
    assert result.largest > 0.05
    assert result.difference < 1e-6 * result.largest


@pytest.mark.parametrize("processes", [0, 5])
def test_rejects_processes_that_do_not_divide_batch(processes):
    with pytest.raises(typer.BadParameter, match="evenly"):
        ddp.main(processes)


def test_loss_is_zero_if_all_labels_are_ignored(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda x: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    batch = ddp.make_batch()
    batch.labels[:] = ddp.IGNORE
    assert ddp.shard_loss(ddp.make_net(), batch, slice(None)).item() == 0


def test_shards_have_different_numbers_of_ignored_labels():
    labels = ddp.make_batch().labels
    first, second = labels.chunk(2)
    assert (first != ddp.IGNORE).sum() < 0.7 * (second != ddp.IGNORE).sum()
    assert torch.equal(labels, ddp.make_batch().labels), "every process must generate the same batch"
