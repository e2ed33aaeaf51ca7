"""Tests of the compiled seeded permutation that draws views."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdfast.data.stateless_random import hash64, permutation_element
from kdfast.ops import native


@pytest.mark.parametrize("size", [1, 2, 3, 9, 81, 162, 1000, 2**31 + 5, 2**32 - 1])
@pytest.mark.parametrize("count", [0, 1, 1000, 50_001])
def test_native_equals_the_reference(size: int, count: int) -> None:
    keys = hash64(7, np.arange(count)) if count else np.empty(0, np.uint64)
    for position in {0, size // 3, size - 1}:
        expected = permutation_element(np.array([position]), size, keys)
        assert (native.permutation_element(position, size, keys) == expected).all()


def test_result_does_not_depend_on_thread_count() -> None:
    keys = hash64(1, np.arange(50_000))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native.permutation_element(5, 162, keys))
    finally:
        torch.set_num_threads(before)
    assert all((results[0] == other).all() for other in results[1:])


@pytest.mark.parametrize(("position", "size"), [(0, 0), (-1, 5), (5, 5), (0, 2**32)])
def test_rejects_out_of_range_position_or_size(position: int, size: int) -> None:
    with pytest.raises(ValueError, match="shuffled_at"):
        native.permutation_element(position, size, np.zeros(3, np.uint64))
