"""The score d2 passes options to the score that it starts from; with the rule d2, the public pipeline follows."""

import numpy as np
import pytest
import torch

from kdfast.dynamics import Dynamics, DynamicsRecorder
from kdfast.errors import UsageError
from kdfast.pruning.options import complete_options
from kdfast.pruning.rules.apply import select_subset
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.registry import SCORES, compute_score

N, C, EPOCHS = 240, 3, 8
RNG = np.random.default_rng(0)
LABELS = RNG.permutation(np.arange(N) % C)
LOGITS = RNG.normal(0, 1.5, (EPOCHS, N, C)) + np.eye(C)[LABELS] * RNG.normal(1, 1.5, (N, 1))
FEATURES = RNG.normal(size=(N, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def dynamics(tmp_path_factory: pytest.TempPathFactory) -> Dynamics:
    path = tmp_path_factory.mktemp("dynamics") / "dyn"
    with DynamicsRecorder(path, N, LABELS, epochs=EPOCHS) as recorder:
        for epoch in range(EPOCHS):
            recorder.update(np.arange(N), torch.from_numpy(LOGITS[epoch]))
            recorder.end_epoch()
    return Dynamics.open(path)


def scored(dynamics: Dynamics | None, **options):
    return compute_score("d2", ScoreInputs(LABELS, 0, LOGITS[-1], FEATURES, dynamics, options=options))


@pytest.mark.parametrize(
    ("start", "options"),
    [
        ("el2n", {"epoch": 3}),
        ("el2n", {"epochs": "1..5"}),
        ("forgetting", {"never_learned": "zero"}),
        ("aum", {"margin": "probability"}),
    ],
)
def test_options_reach_the_score_to_start_from(dynamics: Dynamics, start: str, options: dict) -> None:
    found = scored(dynamics, score=start, **options)
    own = compute_score(start, ScoreInputs(LABELS, 0, LOGITS[-1], FEATURES, dynamics, options=options))
    plain = compute_score(start, ScoreInputs(LABELS, 0, LOGITS[-1], FEATURES, dynamics))
    assert (found.values == own.values).all()
    assert (found.values != plain.values).any()
    assert {name: found.used[name] for name in own.used} == own.used
    assert found.used["score"] == start


def test_options_have_no_default_of_their_own() -> None:
    options = complete_options("d2", SCORES["d2"].options, {})
    assert options.pop("score") == "el2n"
    assert set(options.values()) == {None}


def test_rejects_options_of_another_score(dynamics: Dynamics) -> None:
    with pytest.raises(UsageError, match="never_learned=zero: the score el2n, which d2 starts from, does not have it"):
        scored(dynamics, never_learned="zero")
    with pytest.raises(UsageError, match="use=cache: the score forgetting"):
        scored(dynamics, score="forgetting", use="cache")
    with pytest.raises(UsageError, match="never_learned=never: must be one of"):
        scored(dynamics, score="forgetting", never_learned="never")


def test_the_area_under_the_margin_is_there_for_the_cut(dynamics: Dynamics) -> None:
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(2, keepdims=True)
    own = np.take_along_axis(p, np.broadcast_to(LABELS[:, None], (EPOCHS, N, 1)), 2)[:, :, 0]
    other = np.where(np.eye(C, dtype=bool)[LABELS], 0, p).max(2)
    found = scored(dynamics, score="forgetting", margin="probability").extras["aum"]
    np.testing.assert_allclose(found, -(own - other).mean(0), atol=1e-3)  # recorded in half precision
    logit = compute_score("aum", ScoreInputs(LABELS, 0, dynamics=dynamics)).values
    assert (scored(dynamics).extras["aum"] == logit).all()
    assert "aum" not in scored(None).extras, "a cache has no epochs"


def test_the_whole_public_pipeline_from_a_recording(dynamics: Dynamics) -> None:
    """The samples cut are those of the lowest accumulated probability margin in the public code, over all classes."""
    found = scored(dynamics, score="forgetting", never_learned="zero", margin="probability")
    correct = LOGITS.argmax(2) == LABELS
    events = np.zeros(N)
    last = np.zeros(N, bool)
    for now in correct:
        events += last & ~now
        last = now
    assert (found.values == events).all()
    accumulated = np.zeros(N)
    for p_y, p_other in zip(dynamics.p_y(0), dynamics.p_other(0), strict=True):
        accumulated += p_y.astype(np.float64) - p_other
    kept = select_subset(
        found.values,
        LABELS,
        0.6,
        rule="d2",
        balance="equal",
        features=FEATURES,
        extras=found.extras,
        options={"cut_by": "aum", "cut": 0.4},
    )
    left = np.argsort(accumulated)[int(0.4 * N) :]
    assert set(kept.ids.tolist()) == set(left.tolist()), "as many are kept as the cut leaves"
    assert kept.options["cut_by"] == "aum"
