"""D2 at the size of CIFAR: time and peak memory of the neighbor search and of the greedy selection.

`python bench/bench_d2.py` writes results/d2.json; `--samples`, `--depth` and `--device` change the problem. The
neighbors of some rows are checked against scikit-learn's brute force, and the first selected samples against a scan.
The time of the neighbor search grows as N^2 D, and rows of kind "stated" are extrapolated from the measured rate to
1.28 million samples.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

import harness
import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from kdfast.pruning.rules.d2 import pass_messages
from kdfast.pruning.rules.d2_graph import nearest_neighbors, undirected_graph
from kdfast.pruning.rules.d2_greedy import select_greedily

LARGE = 1_281_167
K = 5


def make_features(samples: int, depth: int, classes: int = 10) -> np.ndarray:
    """Return clustered features, one center per class, similar to those of a network."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(classes, depth)) * 2
    return (centers[rng.integers(0, classes, samples)] + rng.normal(size=(samples, depth))).astype(np.float32)


def check_neighbors(features: np.ndarray, found: np.ndarray, distances: np.ndarray) -> None:
    rows = np.random.default_rng(1).integers(0, len(features), 64)
    exact = NearestNeighbors(n_neighbors=K + 1, algorithm="brute").fit(features.astype(np.float64))
    expected, ids = exact.kneighbors(features[rows].astype(np.float64))
    np.testing.assert_allclose(distances[rows], expected[:, 1:], rtol=1e-5)
    assert (found[rows] == ids[:, 1:]).mean() > 0.999


def check_selection(u: np.ndarray, starts: np.ndarray, ends: np.ndarray, weights: np.ndarray) -> None:
    count = min(300, len(u))
    remaining, expected = u.copy(), []
    for _ in range(count):
        best = int(remaining.argmax())
        edges = slice(starts[best], starts[best + 1])
        remaining[ends[edges]] -= weights[edges] * remaining[best]
        remaining[best] = -np.inf
        expected.append(best)
    assert select_greedily(u, starts, ends, weights, np.arange(len(u)), count).tolist() == expected


def timed(function, *arguments, **keywords):
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments, **keywords)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def measure(samples: int, depth: int, device: str) -> dict[str, object]:
    features = make_features(samples, depth)
    score = np.random.default_rng(2).random(samples)
    warm = nearest_neighbors(features[:2000], K, device=device)
    select_greedily(score[:2000], *undirected_graph(*warm), np.arange(2000), 100)
    (found, distances), neighbors_s, neighbors_cpu = timed(nearest_neighbors, features, K, device=device)
    check_neighbors(features, found, distances)
    starts, ends, lengths = undirected_graph(found, distances)
    u = pass_messages(score, starts, ends, np.exp(-lengths))
    reverse = np.exp(-0.1 * lengths)
    check_selection(u, starts, ends, reverse)
    _, greedy_s, _ = timed(select_greedily, u, starts, ends, reverse, np.arange(samples), samples // 10)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "samples": samples,
        "depth": depth,
        "groups": 1,
        "k": K,
        "device": device,
        "neighbours_s": round(neighbors_s, 2),
        "neighbours_cpu_s": round(neighbors_cpu, 2),
        "greedy_s": round(greedy_s, 3),
        "peak_rss_gib": round(memory, 2),
        "kind": "measured",
    }


def extrapolate(row: dict[str, object], depth: int, groups: int = 1, samples: int = LARGE) -> dict[str, object]:
    """Extrapolate a measured row to other data: time grows as N^2 D per group for the neighbors, N for the selection.

    Args:
        row: The measured row.
        depth: Width of the features.
        groups: Number of equal groups of samples: 1, or the number of classes if each has its own budget.
        samples: Number of samples in all groups.
    """
    pairs = samples**2 / groups * depth / (int(row["samples"]) ** 2 * int(row["depth"]))
    return {
        **row,
        "samples": samples,
        "depth": depth,
        "groups": groups,
        "neighbours_s": round(float(row["neighbours_s"]) * pairs),
        "neighbours_cpu_s": round(float(row["neighbours_cpu_s"]) * pairs),
        "greedy_s": round(float(row["greedy_s"]) * samples / int(row["samples"]), 1),
        "peak_rss_gib": round((samples * depth * 4 * (1 + 2 / groups) + 3 * 2**27) / 2**30, 1),
        "kind": "stated",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--depth", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    row = measure(arguments.samples, arguments.depth, arguments.device)
    rows = [row, extrapolate(row, row["depth"]), extrapolate(row, 2048), extrapolate(row, 2048, groups=1000)]
    print(harness.table(rows))
    print(harness.write_results("d2", rows, threads=arguments.threads))


if __name__ == "__main__":
    main()
