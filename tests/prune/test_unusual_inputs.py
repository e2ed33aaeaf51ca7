"""Any input gives the result of the plain arrays or an error of kdfast, in every function that takes arrays."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdfast.dynamics import Dynamics, DynamicsRecorder
from kdfast.errors import DataError, KdfastError
from kdfast.pruning.if_beta import IFBeta
from kdfast.pruning.if_beta.proxy import ProxyTrainingConfig
from kdfast.pruning.if_beta.search import Schedule
from kdfast.pruning.rules.apply import select_subset
from kdfast.pruning.rules.registry import RULES
from kdfast.pruning.score_file import ScoreFile, read_scores, write_scores
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.registry import SCORES, compute_score

N, C, D = 60, 3, 4
RNG = np.random.default_rng(0)
PLAIN = {
    "labels": np.arange(N) % C,
    "scores": RNG.random(N),
    "mean_p": RNG.random(N),
    "logits": RNG.normal(size=(N, C)).astype(np.float32),
    "features": RNG.normal(size=(N, D)).astype(np.float32),
    "mask": np.arange(N) % 7 > 0,
    "ids": np.arange(N),
}
IF_BETA = IFBeta(budget=ProxyTrainingConfig(steps=2), schedule=Schedule(steps=1), score="residual")


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


# The same numbers, stored in another way.
STORED = {
    "negative strides": lambda x: x[::-1].copy()[::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "read-only": read_only,
    "Fortran order": np.asfortranarray,
    "every second row": lambda x: x.repeat(2, axis=0)[::2],
}
# Numbers that a function may accept or refuse.
CHANGED = {
    "list": lambda x: x.tolist(),
    "ragged list": lambda x: [*x.tolist()[:-1], [1, 2, 3]],
    "None": lambda x: None,
    "number": lambda x: 3,
    "text": lambda x: "abc",
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "longdouble": lambda x: x.astype(np.longdouble),
    "complex": lambda x: x.astype(complex),
    "bool": lambda x: x > 0,
    "objects": lambda x: x.astype(object),
    "strings": lambda x: x.astype(str),
    "uint64": lambda x: x.astype(np.uint64),
    "masked": np.ma.masked_array,
    "empty": lambda x: x[:0],
    "0-d": lambda x: np.array(1.0),
    "another dimension": lambda x: x[None],
    "one row less": lambda x: x[:-1],
    "NaN": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, np.nan, x),
    "infinite": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, np.inf, x),
    "huge": lambda x: x.astype(np.float64) * 1e200,
    "large integers": lambda x: (x * 1e15).astype(np.int64),
    "negative": lambda x: -x.astype(np.float32) - 1 if x.dtype.kind == "f" else -x.astype(np.int64) - 1,
    "tensor": lambda x: torch.tensor(x),
    "tensor with a gradient": lambda x: torch.tensor(x, dtype=torch.float32, requires_grad=True),
    "sparse tensor": lambda x: torch.tensor(x).to_sparse(),
}


def select(rule: str) -> Callable[..., np.ndarray]:
    def run(scores: Any, labels: Any, features: Any, mean_p: Any) -> np.ndarray:
        return select_subset(scores, labels, 0.3, rule=rule, features=features, extras={"mean_p": mean_p}).ids

    return run


def score(name: str) -> Callable[..., np.ndarray]:
    def run(labels: Any, logits: Any, features: Any) -> np.ndarray:
        return compute_score(name, ScoreInputs(labels, 0, logits=logits, features=features)).values

    return run


def write_and_read(scores: Any, mean_p: Any, *, tmp_path: Path) -> np.ndarray:
    (tmp_path / "s.npz").unlink(missing_ok=True)
    write_scores(tmp_path / "s.npz", ScoreFile(scores, "own", "f" * 64, {"mean_p": mean_p}))
    held = read_scores(tmp_path / "s.npz", n=np.size(scores), fingerprint="f" * 64)
    return np.stack([held.scores, held.extras["mean_p"]])


def search(logits: Any, features: Any, labels: Any, scores: Any) -> np.ndarray:
    return IF_BETA.fit(logits, features, labels, 0.3, scores=scores).ids


COUNTER = itertools.count()


def record(labels: Any, mask: Any, ids: Any, logits: Any, features: Any, *, tmp_path: Path) -> np.ndarray:
    path = tmp_path / f"dyn{next(COUNTER)}"
    with DynamicsRecorder(path, N, labels, epochs=1, mask=mask, feature_epochs=(0,)) as recorder:
        recorder.update(ids, logits, features)
        recorder.end_epoch()
    held = Dynamics.open(path, labels=labels)
    return np.concatenate([held.margin(0)[0], held.mask(0), held.features(0, 0).ravel()])


# Function, and the arrays that it takes.
CALLS = {
    **{f"rule {name}": (select(name), ("scores", "labels", "features", "mean_p")) for name in RULES},
    **{
        f"score {name}": (score(name), ("labels", "logits", "features"))
        for name, entry in SCORES.items()
        if not entry.needs or "cache" in entry.needs
    },
    "IF-Beta": (search, ("logits", "features", "labels", "scores")),
    "score file": (write_and_read, ("scores", "mean_p")),
    "recorder": (record, ("labels", "mask", "ids", "logits", "features")),
}
SITES = [(call, name) for call, (_, names) in CALLS.items() for name in names]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., np.ndarray]:
    def call(name: str, changed: dict[str, Any] | None = None) -> np.ndarray:
        function, names = CALLS[name]
        place = {"tmp_path": tmp_path} if name in ("score file", "recorder") else {}
        return function(**{part: PLAIN[part] for part in names} | (changed or {}), **place)

    return call


@pytest.mark.parametrize(("call", "name"), SITES)
def test_storage_does_not_matter(run, call: str, name: str) -> None:
    expected = run(call)
    for how, change in STORED.items():
        given = change(PLAIN[name])
        assert np.array_equal(given, PLAIN[name])
        np.testing.assert_array_equal(run(call, {name: given}), expected, err_msg=how)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("call", "name"), SITES)
def test_other_values_give_a_result_or_an_error_of_kdfast(run, call: str, name: str) -> None:
    refused = []
    for how, change in CHANGED.items():
        try:
            found = run(call, {name: change(PLAIN[name])})
        except KdfastError as error:
            refused.append(str(error))
        else:
            assert len(found), how
    assert len(refused) > 5


def test_lists_and_float64_give_the_result_of_arrays(run) -> None:
    for rule in ("hard", "strata", "d2"):
        for name in ("labels", "scores", "features"):
            np.testing.assert_array_equal(run(f"rule {rule}", {name: PLAIN[name].tolist()}), run(f"rule {rule}"))
    np.testing.assert_array_equal(run("rule d2", {"features": PLAIN["features"].astype(float)}), run("rule d2"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (PLAIN["labels"].astype(float), "`labels` are float64"),
        (PLAIN["labels"] - 1, "`labels` go from -1 to 1"),
        (PLAIN["labels"] * 10**9, "number the classes 0, 1, 2"),
        ([[0, 1], [2]], "`labels` are not an array"),
    ],
)
def test_messages_about_labels(labels, message: str) -> None:
    for function in (select("hard"), select("d2")):
        with pytest.raises(DataError, match=message):
            function(PLAIN["scores"], labels, PLAIN["features"], PLAIN["mean_p"])
    with pytest.raises(DataError, match=message):
        score("influence")(labels, PLAIN["logits"], PLAIN["features"])
    with pytest.raises(DataError, match=message):
        IF_BETA.fit(PLAIN["logits"], PLAIN["features"], labels, 0.3)


def test_influence_with_one_class_present_is_refused() -> None:
    for label in (0, C - 1):
        with pytest.raises(DataError, match="two classes"):
            score("influence")(np.full(N, label), PLAIN["logits"], PLAIN["features"])
