from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdfast.data.stateless_random import (
    Purpose,
    hash64,
    mix64,
    permutation_element,
    permutation_prefix,
    uniform,
    uniform_below,
)

WORD = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def scalar_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def scalar_hash(*words: int) -> int:
    state = 0
    for word in words:
        state = scalar_mix(((state ^ (word & WORD)) + GAMMA) & WORD)
    return state


def scalar_shuffle(size: int, key: int) -> list[int]:
    """The whole permutation, by rounds of swaps on a list instead of the evaluation of single positions."""
    positions = list(range(size))  # positions[x]: where the element that began at x is now
    for r in range(1, 33):
        word = scalar_mix((key + r * GAMMA) & WORD)
        offset = ((word >> 32) * size) >> 32
        for i, x in enumerate(positions):
            partner = (offset - x) % size
            h = (word & 0xFFFFFFFF) ^ max(x, partner)
            h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
            h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
            if (h ^ (h >> 16)) & 1:
                positions[i] = partner
    return positions


def scalar_prefix(size: int, key: int) -> list[int]:
    pool = list(range(size))
    for j in range(size):
        drawn = j + (((scalar_mix((key + (j + 1) * GAMMA) & WORD) >> 32) * (size - j)) >> 32)
        pool[j], pool[drawn] = pool[drawn], pool[j]
    return pool


def keys(count: int, seed: int = 0):
    return hash64(99, seed, np.arange(count))


def chi_square(counts) -> float:
    """p-value of equal expected counts."""
    return float(stats.chisquare(np.asarray(counts).ravel()).pvalue)


def test_values_never_change():
    # The last value is the published first output of SplitMix64 for seed 0.
    mixed = mix64(np.array([0, 1, WORD, GAMMA], np.uint64))
    assert mixed.tolist() == [0, 0x5692161D100B05E5, 0xB4D055FCF2CBBD7B, 0xE220A8397B1DCDAF]
    hashed = hash64(Purpose.VIEW_INDEX, -1, np.array([0, 1, 2**40]), 5)
    assert hashed.tolist() == [0x767803E6C511131A, 0xE2F60C787C845153, 0xA9159FE4A5484CE8]
    three = hash64(1, 2, np.arange(3))
    assert permutation_element(np.array([0, 1, 2]), 162, three).tolist() == [36, 115, 116]
    assert permutation_prefix(5, 161, three).tolist() == [
        [73, 90, 50, 41, 59],
        [10, 31, 96, 159, 139],
        [52, 87, 15, 29, 7],
    ]


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=5))
def test_hash_agrees_with_scalar_arithmetic(words):
    assert hash64(*words).tolist() == [scalar_hash(*words)]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), st.integers(0, 9))
def test_hash_of_an_array_is_elementwise(ids, epoch):
    assert hash64(3, np.array(ids), epoch).tolist() == [scalar_hash(3, i, epoch) for i in ids]


def test_hash_depends_on_words_order_and_count():
    small = [w for n in (1, 2, 3) for w in itertools.product(range(8), repeat=n)]
    assert len({int(hash64(*w)[0]) for w in small}) == len(small)


def test_every_input_bit_flips_half_of_the_output_bits():
    base = keys(2000)
    for bit in range(64):
        changed = hash64(base) ^ hash64(base ^ np.uint64(1 << bit))
        flips = np.unpackbits(changed.view(np.uint8)).reshape(2000, 64).mean(axis=0)
        assert np.abs(flips - 0.5).max() < 0.06  # 5.4 standard deviations


def test_uniform_and_uniform_below_are_uniform():
    words = keys(200_000)
    assert uniform_below(np.array([0, WORD], np.uint64), 7).tolist() == [0, 6]
    assert uniform_below(np.array([WORD, WORD], np.uint64), np.array([3, 2**32])).tolist() == [2, 2**32 - 1]
    assert chi_square(np.bincount(uniform_below(words, 37), minlength=37)) > 1e-3
    assert 0 <= uniform(np.array([0], np.uint64))[0] < uniform(np.array([WORD], np.uint64))[0] < 1
    assert stats.kstest(uniform(words), "uniform").pvalue > 1e-3


@settings(max_examples=40)
@given(st.integers(1, 200), st.integers(0, WORD))
def test_shuffled_at_matches_scalar_rounds_and_is_a_bijection(size, key):
    positions = permutation_element(np.arange(size), size, np.array([key], np.uint64)).tolist()
    assert positions == scalar_shuffle(size, key)
    assert sorted(positions) == list(range(size))


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(0, WORD), st.data())
def test_shuffled_prefix_matches_fisher_yates(size, key, data):
    count = data.draw(st.integers(0, size))
    assert permutation_prefix(count, size, np.array([key], np.uint64)).tolist() == [scalar_prefix(size, key)[:count]]


def test_prefix_does_not_depend_on_the_number_of_keys():
    many = permutation_prefix(3, 1000, keys(5000))  # several blocks
    assert many[4321:4324].tolist() == permutation_prefix(3, 1000, keys(5000)[4321:4324]).tolist()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_permutations_of_few_elements_are_equally_frequent(size):
    k = keys(60_000)
    for rows in (
        permutation_prefix(size, size, k),
        np.stack([permutation_element(np.array([i]), size, k) for i in range(size)], axis=1),
    ):
        _, counts = np.unique(rows @ size ** np.arange(size), return_counts=True)
        assert len(counts) == [1, 1, 2, 6, 24][size]
        assert chi_square(counts) > 1e-3


@pytest.mark.parametrize("size", [9, 81, 162])
@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 4), (0, 8)])
def test_single_positions_and_pairs_are_uniform(size, first, second):
    k = keys(150_000, seed=1)
    a, b = (permutation_element(np.array([p]), size, k) for p in (first, second))
    assert chi_square(np.bincount(a, minlength=size)) > 1e-3
    step = np.bincount((b - a) % size, minlength=size)
    assert step[0] == 0
    assert chi_square(step[1:]) > 1e-3
    coarse = np.histogram2d(a, b, bins=3, range=[[0, size], [0, size]])[0]
    third = size // 3
    expected = np.where(np.eye(3, dtype=bool), third * (third - 1), third * third)
    assert stats.chisquare(coarse.ravel(), (expected / expected.sum() * len(k)).ravel()).pvalue > 1e-3


@pytest.mark.parametrize("size", [0, 2**32])
def test_rejects_sizes_out_of_range(size):
    with pytest.raises(ValueError, match="elements"):
        permutation_element(np.array([0]), size, keys(1))
    with pytest.raises(ValueError, match="elements"):
        permutation_prefix(0, size, keys(1))
    with pytest.raises(ValueError, match="4 of 3"):
        permutation_prefix(4, 3, keys(1))
