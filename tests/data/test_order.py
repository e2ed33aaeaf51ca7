from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdfast.data.order import batch_count, epoch_order, split_batches_by_rank
from kdfast.errors import SubsetError, UsageError


def test_values_never_change():
    ids = np.arange(10)
    assert epoch_order(ids, 0, 0).tolist() == [3, 1, 9, 6, 2, 4, 7, 8, 0, 5]
    assert epoch_order(ids, 0, 1).tolist() == [5, 9, 1, 7, 0, 4, 3, 6, 2, 8]
    assert epoch_order(ids, 1, 0).tolist() == [8, 1, 9, 7, 2, 6, 5, 4, 0, 3]


@given(
    st.lists(st.integers(0, 2**40), unique=True, max_size=50), st.integers(0, 2**64), st.integers(0, 1000), st.data()
)
def test_order_is_a_permutation_independent_of_the_order_of_its_input(ids, seed, epoch, data):
    order = epoch_order(np.array(ids, np.int64), seed, epoch)
    assert sorted(order.tolist()) == sorted(ids)
    again = epoch_order(np.array(data.draw(st.permutations(ids)), np.int64), seed, epoch)
    assert order.tolist() == again.tolist()


def test_orders_are_uniform_and_change_with_the_epoch():
    ids = np.arange(4)
    rows = np.stack([epoch_order(ids, 0, epoch) for epoch in range(24_000)])
    _, counts = np.unique(rows @ 4 ** np.arange(4), return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
    step = np.bincount((rows[1:, 0] - rows[:-1, 0]) % 4, minlength=4)
    assert stats.chisquare(step).pvalue > 1e-3


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 6), st.data())
def test_shares_join_to_the_global_batches_from_any_start(n, batch, world, data):
    world = min(world, batch)
    order = epoch_order(np.arange(n), 3, 0)
    whole = [order[i : i + batch].tolist() for i in range(0, n, batch)]
    assert batch_count(n, batch) == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    shares = [list(split_batches_by_rank(order, batch, start=start, rank=rank, world=world)) for rank in range(world)]
    assert all(len(share) == len(whole) - start for share in shares)
    for step, expected in enumerate(whole[start:]):
        parts = [share[step].tolist() for share in shares]
        assert [i for part in parts for i in part] == expected
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_no_share_of_a_smaller_batch_is_larger():
    for world in range(1, 17):
        sizes = np.zeros((65, world), np.int64)
        for count in range(1, 65):
            order = np.arange(max(count, world) + count)
            shares = [
                list(split_batches_by_rank(order, max(count, world), rank=rank, world=world)) for rank in range(world)
            ]
            joined = [part for parts in zip(*shares, strict=True) for part in parts]
            assert np.array_equal(np.concatenate(joined), order)
            sizes[count] = [len(share[1]) for share in shares]
            assert np.ptp(sizes[count]) <= 1
        assert (np.diff(sizes, axis=0) >= 0).all()  # hence for any batch and any smaller last batch


def test_one_rank_gets_the_global_batches():
    batches = [b.tolist() for b in split_batches_by_rank(np.arange(7), 3)]
    assert batches == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    "options",
    [{"start": 4}, {"start": -1}, {"rank": 2, "world": 2}, {"rank": -1}, {"world": 0}, {"world": 4}],
)
def test_rejects_invalid_arguments_before_the_first_batch(options):
    with pytest.raises(UsageError):
        split_batches_by_rank(np.arange(7), 3, **options)


def test_rejects_an_epoch_without_batches():
    with pytest.raises(SubsetError, match="0 samples do not make a batch of 8"):
        split_batches_by_rank(np.arange(0), 8)
    with pytest.raises(SubsetError, match="0 samples"):
        batch_count(0, 8)
    with pytest.raises(UsageError, match="`batch_size` is 0"):
        batch_count(7, 0)
