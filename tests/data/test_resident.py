import numpy as np
import pytest
import torch

from kdfast.data.loaders import ResidentLoader
from kdfast.errors import SubsetError, UsageError


@pytest.mark.parametrize("batch_size", [1, 7, 20, 60, 100])
def test_batches_follow_the_ids(split, batch_size):
    data = split(60)
    ids = np.random.default_rng(0).permutation(60)[:40]
    batches = [batch.clone() for batch in ResidentLoader(data).batches(ids, batch_size)]
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert np.array_equal(torch.cat(batches).numpy(), data.images[ids])
    assert batches[0].dtype == torch.uint8


def test_split_is_read_in_blocks(split, monkeypatch):
    class Lazy:
        def __init__(self, data):
            self.labels, self.shape, self.read = data.labels, data.shape, data.read

        def __len__(self):
            return len(self.labels)

    monkeypatch.setattr("kdfast.data.source._BLOCK_BYTES", 7 * 8 * 8 * 3)
    data = split(60)
    (batch,) = ResidentLoader(Lazy(data)).batches(np.arange(60), 60)
    assert np.array_equal(batch.numpy(), data.images)


def test_memory_of_the_split_is_shared_and_the_buffer_reused(split):
    data = split(60)
    loader = ResidentLoader(data)
    data.images[0] = 99
    batches = loader.batches([0, 1], 1)
    first = next(batches)
    assert (first == 99).all()
    second = next(batches)
    assert first.data_ptr() == second.data_ptr()
    assert np.array_equal(first[0].numpy(), data.images[1])


def test_later_changes_of_the_ids_have_no_effect(split):
    data = split(60)
    ids = np.arange(10)
    batches = ResidentLoader(data).batches(ids, 5)
    ids[:] = 3
    assert np.array_equal(torch.cat([batch.clone() for batch in batches]).numpy(), data.images[:10])


@pytest.mark.parametrize("ids", [[60], [-1], [1, 1], [], [0.5], np.ones(60, bool)])
def test_rejects_invalid_ids_at_the_call(split, ids):
    with pytest.raises(SubsetError):
        ResidentLoader(split(60)).batches(ids, 4)


def test_rejects_use_after_close(split):
    loader = ResidentLoader(split(60))
    loader.close()
    with pytest.raises(UsageError, match="closed"):
        loader.batches([0], 1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda(split):
    data = split(60)
    (batch,) = ResidentLoader(data, "cuda").batches([5, 3], 2)
    assert batch.device.type == "cuda"
    assert np.array_equal(batch.cpu().numpy(), data.images[[5, 3]])
