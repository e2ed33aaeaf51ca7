"""Stateless random numbers: hashes of (purpose, seed, sample, ...).

A draw depends only on its arguments, so it is the same on any machine, rank, batch split and numpy version, and can be
computed without the other draws. Subsets, orders and teacher caches depend on these functions, so their values never
change; the tests pin them by literals.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]
WordArray: TypeAlias = npt.NDArray[np.uint64]

_GAMMA = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF
_ROUNDS = 32  # of the swap-or-not shuffle
_LIMIT = 1 << 32
_BLOCK = 1 << 20  # pool elements in memory at a time


class Purpose(IntEnum):
    """First word of every hash, so that draws for different purposes with the same seed are independent."""

    ORDER = 1
    VIEW_INDEX = 2
    VIEW_TABLE = 3
    CROP = 4
    SCORE = 5
    TIE = 6
    KEEP = 7
    FLIP = 8
    HOLDOUT = 9
    RULE = 10
    PROXY = 11
    FLATTEN = 12
    NEGATIVES = 13
    POLICY = 14
    MIX = 15
    SPLIT = 16
    GALLERY = 17
    NETWORK = 18


def mix64(words: WordArray) -> WordArray:
    """Mix 64-bit words by the output function of SplitMix64, a bijection.

    Args:
        words: `(...)` uint64, at least one-dimensional.

    Returns:
        `(...)` uint64, a new array.

    Source:
        Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators; the constants are variant 13 of
        Stafford's mixers.
    """
    x = words ^ (words >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hash64(*words: int | IntArray | WordArray) -> WordArray:
    """Hash a sequence of integers: `h = mix64((h ^ word) + gamma)` over the words, starting at `h = 0`.

    Args:
        words: Integers (of any size, taken modulo 2**64) and integer arrays, which broadcast against each other.

    Returns:
        uint64 of the broadcast shape, at least one-dimensional.
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        item = np.array([word & _MASK], np.uint64) if isinstance(word, int) else np.atleast_1d(word).astype(np.uint64)
        state = mix64((state ^ item) + np.uint64(_GAMMA))
    return state


def uniform_below(words: WordArray, bound: int | IntArray) -> IntArray:
    """Map uniform words to uniform integers in `[0, bound)` using the upper 32 bits; `bound` is at most 2**32."""
    limit = np.uint64(bound) if isinstance(bound, int) else bound.astype(np.uint64)
    return (((words >> np.uint64(32)) * limit) >> np.uint64(32)).astype(np.int64)


def uniform(words: WordArray) -> npt.NDArray[np.float64]:
    """Map uniform words to uniform float64 in [0, 1) using the upper 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation_element(positions: IntArray, size: int, keys: WordArray) -> IntArray:
    """Return the elements at given positions of a random permutation of `[0, size)` without building it.

    This is the swap-or-not shuffle: in each of 32 rounds the key determines a pairing `x <-> k - x (mod size)` of the
    elements and a coin for each pair, which decides whether the two are swapped. Each key gives a bijection. The tests
    find no deviation from uniformity in single elements or pairs.

    Args:
        positions: `(...)` integers in `[0, size)`.
        size: Length of the permutation, in `[1, 2**32)`.
        keys: uint64 that broadcast against `positions`; one permutation for each key.

    Returns:
        `(...)` int64 in `[0, size)`, of the broadcast shape.

    Source:
        Hoang, Morris and Rogaway 2012, An enciphering scheme based on a card shuffle.
    """
    if not 1 <= size < _LIMIT:
        raise ValueError(f"`size` is {size} elements: must be 1 to 2**32 - 1")
    x = np.broadcast_to(positions, np.broadcast_shapes(positions.shape, keys.shape))
    for r in range(1, _ROUNDS + 1):
        words = mix64(keys + np.uint64(r * _GAMMA & _MASK))
        partner = uniform_below(words, size) - x
        partner += np.where(partner < 0, size, 0)
        coin = _mix32(words.astype(np.uint32) ^ np.maximum(x, partner).astype(np.uint32)) & np.uint32(1)
        x = np.where(coin, partner, x)
    return x


def permutation_prefix(count: int, size: int, keys: WordArray) -> IntArray:
    """Return the first `count` elements of a random permutation of `[0, size)` for each key.

    This is the Fisher-Yates shuffle, stopped early. It is exactly uniform, and a longer prefix begins with the shorter
    one. The cost grows with `count`, so a single distant element is cheaper by `permutation_element`, which is a
    different permutation.

    Args:
        count: Number of elements, in `[0, size]`.
        size: Length of the permutation, in `[1, 2**32)`.
        keys: `(n,)` uint64; one permutation for each.

    Returns:
        `(n, count)` int64 in `[0, size)`, distinct within a row.
    """
    if not (1 <= size < _LIMIT and 0 <= count <= size):
        raise ValueError(f"{count} of {size} elements: `count` must be 0 to `size`, `size` 1 to 2**32 - 1")
    out = np.empty((len(keys), count), np.int64)
    block = max(1, _BLOCK // size)
    for start in range(0, len(keys), block):
        part = keys[start : start + block]
        rows = np.arange(len(part))
        pool = np.tile(np.arange(size, dtype=np.min_scalar_type(size)), (len(part), 1))
        for j in range(count):
            drawn = j + uniform_below(mix64(part + np.uint64((j + 1) * _GAMMA & _MASK)), size - j)
            out[start : start + block, j] = pool[rows, drawn]
            pool[rows, drawn] = pool[:, j]
    return out


def _mix32(x: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Mix 32-bit words by the finalizer of MurmurHash3."""
    x = x ^ (x >> np.uint32(16))
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x
