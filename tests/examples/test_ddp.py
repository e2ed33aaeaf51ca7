import pytest
import torch
import torch.distributed as dist
import typer

from kdfast.examples import ddp

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_share_a_batch_as_one_would_take_it(processes):
    result = ddp.main(processes)
    assert result.largest > 0.05
    assert result.difference < 1e-6 * result.largest


@pytest.mark.parametrize("processes", [0, 5])
def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(processes):
    with pytest.raises(typer.BadParameter, match="evenly"):
        ddp.main(processes)


def test_a_batch_in_which_nothing_counts_has_loss_zero(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda x: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    batch = ddp.make_batch()
    batch.labels[:] = ddp.IGNORE
    assert ddp.shard_loss(ddp.make_net(), batch, slice(None)).item() == 0


def test_the_shards_count_unevenly_so_that_a_mean_of_means_would_differ():
    labels = ddp.make_batch().labels
    first, second = labels.chunk(2)
    assert (first != ddp.IGNORE).sum() < 0.7 * (second != ddp.IGNORE).sum()
    assert torch.equal(labels, ddp.make_batch().labels), "every process must draw the same batch"
