"""Measured rates against networks of a known speed, and planned bytes against files."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kdfast.data.readers.registry import open_source
from kdfast.distillation.config import Execution, RunConfig
from kdfast.distillation.losses.settings import parse_terms
from kdfast.distillation.plan import Plan
from kdfast.distillation.record_dynamics import RecordingConfig
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.trainer import Trainer
from kdfast.errors import UsageError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.planning import networks
from kdfast.planning.networks import PLAIN, time_cache, time_evaluation, time_step
from kdfast.planning.plan import FlowPlan, make_plan
from kdfast.planning.request import CacheSettings, PlanRequest, recording_for
from kdfast.planning.sample import Sample, cache_stand_in
from kdfast.planning.selection import time_selection
from kdfast.planning.stages import Stage
from kdfast.pruning.request import PruneRequest
from kdfast.teacher.build import build_cache
from kdfast.teacher.row_format import RowFormat, TopK

CPU = torch.device("cpu")
IMAGE = 0.002  # seconds of an image


class Slow(nn.Module):
    """Takes a known time for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(IMAGE * len(images))
        return self.fc(images.mean((2, 3)))


@pytest.fixture(scope="module")
def digits():
    return open_source("digits")


@pytest.fixture
def slow(digits) -> Model:
    return Model(Slow().eval(), "slow", 10, digits.classes, PLAIN)


@pytest.fixture(scope="module")
def teacher(digits) -> Model:
    torch.manual_seed(0)
    return Model(build_net("resnet8", 10).eval(), "resnet8", 10, digits.classes, PLAIN)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def plan(digits, model: Model | None, method: str | None = None, **changes) -> FlowPlan:
    config = changes.pop("config", RunConfig("resnet8", epochs=2, batch_size=32, alpha=1.0, views=3))
    selection = PruneRequest((0.2,), method=method, **changes.pop("selection", {}))
    recording = recording_for(selection, changes.pop("runs", 1), 10)
    recorded = RunConfig("resnet8", epochs=12, batch_size=32)
    request = PlanRequest(0.2, config, selection, recorded=recorded, recording=recording, seconds=0.1, **changes)
    return make_plan(request, digits, model)


def names(found: FlowPlan) -> list[str]:
    return [stage.name for stage in (*found.pruned.once, found.pruned.each)]


def test_an_image_of_a_cache_and_a_further_view(digits, slow: Model) -> None:
    sample = Sample.take(digits, "auto", CPU, kept=64, decoded=64)
    rows = RowFormat(10, np.dtype("float16"))
    first, view = time_cache(sample, slow, views=9, rows=rows, precision="float32", device=CPU, budget=1.0)
    assert IMAGE <= first < 3 * IMAGE
    assert IMAGE / 2 < view < 3 * IMAGE


def test_a_test_image(digits, slow: Model) -> None:
    sample = Sample.take(digits, "auto", CPU, kept=64, decoded=64)
    assert IMAGE <= time_evaluation(sample, slow, device=CPU, budget=0.5) < 3 * IMAGE


def test_a_step_with_the_teacher_online(digits, slow: Model) -> None:
    sample = Sample.take(digits, "auto", CPU, kept=70, decoded=70)
    config = RunConfig("resnet8", batch_size=32, alpha=1.0, views=1)
    execution = Execution()
    seconds = time_step(sample, config, TeacherTargets(model=slow), device=CPU, execution=execution, budget=0.5)
    assert seconds >= IMAGE
    labels = RunConfig("resnet8", batch_size=32, views=1)
    assert time_step(sample, labels, TeacherTargets(), device=CPU, execution=execution, budget=0.5) < seconds


@pytest.mark.parametrize("share", [1, 20])
def test_a_selection_grows_with_the_samples(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def select(request, labels, *_rest) -> float:
        counts.append(len(labels))
        return 1e-4 * len(labels)

    monkeypatch.setattr("kdfast.planning.selection._select", select)
    labels = np.arange(5000 * share) % 10
    found = time_selection(
        PruneRequest((0.1,)), labels, classes=10, features=4, epochs=1, recording=RecordingConfig(), budget=1.0
    )
    assert found == pytest.approx(0.5 * share)
    assert counts == [4000, 5000] if share == 1 else counts == [4000, 10_000]


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        (None, []),
        ("el2n", ["cache for scores"]),
        ("dual", ["dynamics"]),
        ("tdds", ["dynamics"]),
        ("influence-fvm", ["flatten", "score"]),
        ("if-beta", ["cache for scores"]),
    ],
)
def test_stages_of_a_method(digits, teacher: Model, tmp_path: Path, method: str | None, stages: list[str]) -> None:
    found = plan(digits, teacher, method, selection={"teacher": Path("T.pt")})
    assert names(found) == [*stages, "prune", "cache", "distill"]
    assert all(stage.seconds > 0 for stage in (*found.pruned.once, found.pruned.each))
    assert list(tmp_path.iterdir()) == []


def test_rules_that_need_features_need_a_cache_too(digits, teacher: Model) -> None:
    found = plan(digits, teacher, "forgetting", selection={"rule": "bws"})
    assert names(found) == ["dynamics", "cache for scores", "prune", "cache", "distill"]


def test_terms_of_activations_need_the_teacher_online(digits, teacher: Model) -> None:
    config = RunConfig("resnet8", epochs=8, batch_size=32, alpha=1.0, terms=parse_terms(["ab"], []))
    found = plan(digits, teacher, config=config)
    assert names(found) == ["prune", "distill"]
    assert found.amounts.initial == 1 / 8
    assert found.rates.initial > 0


def test_labels_alone_need_no_teacher(digits) -> None:
    found = plan(digits, None, config=RunConfig("resnet8", epochs=2, batch_size=32, views=3))
    assert names(found) == ["prune", "distill"]
    # 288 of 1442 samples in batches of 32, for 2 epochs; 46 batches of all.
    assert (found.amounts.steps, found.amounts.all_steps) == (18, 92)


def test_steps_in_place_of_epochs(digits) -> None:
    found = plan(digits, None, config=RunConfig("resnet8", steps=27, batch_size=32, views=3))
    assert (found.amounts.steps, found.amounts.all_steps) == (27, 138)
    assert found.amounts.images == 27 * 288 / 9


def test_steps_do_not_bound_the_measurement(digits, teacher: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    class Measured(Trainer):
        def __init__(self, plan: Plan) -> None:
            super().__init__(plan)
            lengths.append(self.total_steps)

    monkeypatch.setattr(networks, "Trainer", Measured)
    config = RunConfig("resnet8", steps=19, batch_size=32, alpha=1.0, terms=parse_terms(["ab"], []))
    found = plan(digits, teacher, config=config)
    # An initial phase of one whole epoch, 9 steps of 32 samples.
    assert (found.amounts.steps, found.amounts.initial) == (19, 9 / 19)
    assert found.rates.initial > 0
    assert len(lengths) >= 2
    assert min(lengths) > 10_000


@pytest.mark.parametrize(
    "settings",
    [
        CacheSettings(),
        CacheSettings(dtype="float32"),
        CacheSettings(top_k=TopK(3, 4.0)),
        CacheSettings(kind="features"),
    ],
    ids=["logits", "float32", "top-k", "features"],
)
def test_bytes_of_a_cache(digits, teacher: Model, tmp_path: Path, settings: CacheSettings) -> None:
    found = plan(digits, teacher, cache=settings)
    (stage,) = (stage for stage in found.pruned.once if stage.name == "cache")
    out = tmp_path / "cache"
    build_cache(
        digits,
        teacher,
        out,
        ids=np.arange(found.amounts.kept),
        n_views=3,
        dtype=settings.dtype,
        top_k=settings.top_k,
        kind=settings.kind,
    )
    written = sum(file.stat().st_size for file in out.glob("*.npy"))
    assert stage.size == pytest.approx(written, abs=6000)  # headers, ids of the samples, the classifier


def test_a_teacher_that_is_missing(digits) -> None:
    with pytest.raises(UsageError, match="needs the teacher: pass `teacher`"):
        plan(digits, None)


def test_parts_add_up() -> None:
    assert Stage("", "", {"a": 1.5, "b": 2.0}).seconds == 3.5


def test_images_that_are_streamed_are_read_as_in_a_run(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for split, each in (("train", 24), ("test", 4)):
        for label in ("a", "b"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(each):
                pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    source = open_source(tmp_path / "data")
    sample = Sample.take(source, "files", CPU, kept=40, decoded=16)
    assert (sample.loader, len(sample.ids), len(sample.source.train)) == ("files", 40, 48)
    config = RunConfig("resnet8", batch_size=8, alpha=1.0, views=2)
    model = Model(build_net("resnet8", 2).eval(), "resnet8", 2, source.classes, PLAIN)
    cache = cache_stand_in(
        sample, model, tmp_path / "cache", features=64, views=2, dtype="float16", top_k=None, kind="logits"
    )
    seconds = time_step(sample, config, TeacherTargets(cache=cache), device=CPU, execution=Execution(), budget=0.1)
    assert seconds > 0
