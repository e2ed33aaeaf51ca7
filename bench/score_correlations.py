r"""Rank correlation between scores of the same samples.

    kdfast score --data cifar-10-batches-py --method influence-fvm --teacher flat.pt --out fvm.npz
    python bench/score_correlations.py --data cifar-10-batches-py --cache cache --dynamics dyn \
        --scores fvm=fvm.npz [--lissa 2000] [--teacher teacher.pt --network-lissa 100]

Scores of files, by the names given; from the cache the teacher's cross-entropy, EL2N, gradient norm and the influence
of its head; from the dynamics EL2N, the area under the margin, forgetting and DUAL. "lissa" is the influence on the
mean loss of held-out samples, g_val^T H^-1 g_i, with H^-1 g_val by LiSSA's recursion over Hessians of random batches:
on the teacher's softmax head or, with --network-lissa, on all weights of a network. All signs are such that a high
score is a hard or harmful sample. Prints Spearman's correlation of every pair and writes
bench/results/score_correlations.json.

Source of LiSSA: Agarwal et al., Second-Order Stochastic Optimization for Machine Learning in Linear Time, JMLR 2017, as
used by Koh and Liang, Understanding Black-box Predictions via Influence Functions, ICML 2017, section 3.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import table, write_results
from scipy.stats import spearmanr
from torch import Tensor

import kdfast
from kdfast.data.holdout import hold_out
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source
from kdfast.data.views import apply_views
from kdfast.dynamics.reader import Dynamics
from kdfast.nets.checkpoint import load_model
from kdfast.pruning.score_file import read_scores
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.registry import compute_score
from kdfast.teacher.cache import TeacherCache

# Method, options, input, and the sign that makes a high score a hard or harmful sample.
SCORES = (
    ("medium", {}, "cache", 1),
    ("el2n", {"use": "cache"}, "cache", 1),
    ("grand", {"use": "cache"}, "cache", 1),
    ("influence", {"kind": "self"}, "cache", 1),
    ("influence", {"kind": "removal"}, "cache", -1),
    ("el2n", {"use": "dynamics"}, "dynamics", 1),
    ("aum", {}, "dynamics", 1),
    ("forgetting", {}, "dynamics", 1),
    ("dual", {}, "dynamics", 1),
)
DAMPING = 0.01
BATCH = 128


def lissa(product: Callable[[Tensor], Tensor], v: Tensor, scale: float, steps: int) -> Tensor:
    """Estimate (H + DAMPING)^-1 v by h <- v + h - (H_batch + DAMPING) h / scale, which converges to scale times that.

    Args:
        product: Multiplies by the Hessian of the mean loss of another random batch at each call.
        v: The vector.
        scale: At least the largest eigenvalue of every batch's Hessian.
        steps: Number of steps.
    """
    h = v.clone()
    for _ in range(steps):
        h = v + h - (product(h) + DAMPING * h) / scale
        if not bool(h.isfinite().all()):
            raise SystemExit(f"LiSSA diverged with scale {scale:g}")
    return h / scale


def head_lissa(cache: TeacherCache, labels: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """Return minus the influence of each sample on the loss of the held-out samples, on the teacher's own head."""
    x, z = (torch.tensor(np.asarray(a)).double() for a in (cache.features(), cache.identity_logits()))
    y, rng = torch.from_numpy(labels), np.random.default_rng(seed)
    _, held = hold_out(labels, z.shape[1], seed=seed)
    inputs = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    residuals = z.softmax(1) - torch.nn.functional.one_hot(y, z.shape[1])

    def product(h: Tensor) -> Tensor:
        rows = torch.from_numpy(rng.choice(len(y), BATCH, replace=False))
        return kdfast.head_hvp(x[rows], z[rows], h[None], l2=0.0)[0]

    # The softmax's curvature is at most 1/2.
    scale = float(inputs.square().sum(1).max()) / 2
    solved = lissa(product, residuals[held].mT @ inputs[held] / len(held), scale, steps)
    return -((inputs @ solved.mT) * residuals).sum(1).numpy()


def network_lissa(source: Source, path: str, steps: int, seed: int) -> np.ndarray:
    """Return minus the influence of each sample on the loss of the held-out samples, on all weights of a network."""
    model = load_model(path)
    net, labels = model.net.eval(), torch.from_numpy(source.train.labels)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    rng = np.random.default_rng(seed)
    _, held = hold_out(source.train.labels, model.classes, seed=seed)

    def images(ids: np.ndarray) -> Tensor:
        views = np.full(len(ids), source.view_spec.identity)
        pixels = torch.from_numpy(source.train.read(ids))
        return apply_views(pixels, views, source.view_spec, model.normalization, sample_ids=ids)

    def product(h: Tensor) -> Tensor:
        ids = rng.choice(len(labels), BATCH, replace=False)
        return kdfast.network_hvp(net, images(ids), labels[ids], h, kind="gauss_newton")

    total = [torch.zeros_like(p) for p in parameters.values()]
    for ids in np.array_split(held, -(-len(held) // BATCH)):
        loss = torch.nn.functional.cross_entropy(net(images(ids)), labels[ids], reduction="sum")
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        total = [t + g / len(held) for t, g in zip(total, gradients, strict=True)]
    v = torch.cat([t.flatten() for t in total])
    solved = lissa(product, v, 1.2 * largest_eigenvalue(product, v), steps)
    pieces = solved.split([p.numel() for p in parameters.values()])
    vectors = {name: part.view_as(p) for part, (name, p) in zip(pieces, parameters.items(), strict=True)}
    blocks = np.array_split(np.arange(len(labels)), -(-len(labels) // BATCH))
    return -torch.cat([kdfast.grad_dots(net, images(ids), labels[ids], vectors) for ids in blocks]).numpy()


def largest_eigenvalue(product: Callable[[Tensor], Tensor], v: Tensor, steps: int = 10) -> float:
    """Return the largest norm of the product with a unit vector in power iteration over random batches."""
    norms = []
    for _ in range(steps):
        v = product(v / v.norm())
        norms.append(float(v.norm()))
    return max(norms)


def main() -> None:
    """Compute the scores, print the matrix and write the JSON."""
    options = parse_arguments()
    source = open_source(options.data)
    labels = source.train.labels
    base = {"labels": labels, "seed": options.seed}
    inputs, values, seconds = {}, {}, {}
    for text in options.scores:
        name, _, path = text.partition("=")
        held = read_scores(path, n=len(labels), fingerprint=source.fingerprint)
        values[name], seconds[name] = held.scores, held.seconds
    if options.cache:
        cache = TeacherCache.open(options.cache, source=source)
        inputs["cache"] = ScoreInputs(**base, logits=cache.identity_logits(), features=cache.features())
    if options.dynamics:
        dynamics = Dynamics.open(options.dynamics, labels=labels, fingerprint=source.fingerprint)
        inputs["dynamics"] = ScoreInputs(**base, dynamics=dynamics)

    def add(name: str, compute: Callable[[], np.ndarray]) -> None:
        started = time.perf_counter()
        values[name] = compute()
        seconds[name] = time.perf_counter() - started

    for method, given, origin, sign in SCORES:
        if origin in inputs:
            part = ScoreInputs(**{**vars(inputs[origin]), "options": given})
            name = f"{method} {given.get('kind', '')}".strip()
            add(f"{name}, {origin}", lambda m=method, p=part, s=sign: s * compute_score(m, p).values)
    if options.lissa and options.cache:
        add("lissa, head", lambda: head_lissa(cache, labels, options.lissa, options.seed))
    if options.network_lissa:
        add("lissa, network", lambda: network_lissa(source, options.teacher, options.network_lissa, options.seed))
    if len(values) < 2:
        raise SystemExit("pass at least two scores: --scores, --cache or --dynamics")
    matrix = spearmanr(np.stack(list(values.values())), axis=1).statistic
    matrix = np.atleast_2d(matrix) if len(values) > 2 else np.array([[1, matrix], [matrix, 1]])
    rows = [
        {"score": name, "seconds": f"{seconds[name]:.1f}", **{str(k + 1): f"{c:+.3f}" for k, c in enumerate(line)}}
        for name, line in zip(values, matrix, strict=True)
    ]
    print(table([{"": index + 1, **row} for index, row in enumerate(rows)]))
    path = write_results(options.name, rows, data=Path(options.data).name, samples=len(labels))
    print(f"\nwritten to {path}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--scores", action="append", default=[], metavar="NAME=FILE", help="score file; repeatable")
    parser.add_argument("--cache", help="the teacher's cache of the data")
    parser.add_argument("--dynamics", help="dynamics of a run on the data")
    parser.add_argument("--lissa", type=int, default=2000, help="steps of LiSSA on the head; 0: none")
    parser.add_argument("--teacher", help="the network of --network-lissa")
    parser.add_argument("--network-lissa", type=int, default=0, help="steps of LiSSA on all weights; 0: none")
    parser.add_argument("--name", default="score_correlations", help="name of the result file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.network_lissa and not options.teacher:
        parser.error("--network-lissa needs --teacher")
    return options


if __name__ == "__main__":
    main()
