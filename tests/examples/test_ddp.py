import pytest
import torch
import torch.distributed as dist

from kdfast.examples import ddp

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_share_a_batch_as_one_would_take_it(processes):
    result = ddp.main(processes)
    assert result.largest > 0.05
    assert result.difference < 1e-6 * result.largest


def test_the_shards_count_unevenly_so_that_a_mean_of_means_would_differ():
    labels = ddp.make_batch().labels
    first, second = labels.chunk(2)
    assert (first != ddp.IGNORE).sum() < 0.7 * (second != ddp.IGNORE).sum()
    assert torch.equal(labels, ddp.make_batch().labels), "every process must draw the same batch"
