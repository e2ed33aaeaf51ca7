"""The functions for programs: from data to a student, and on bare arrays."""

from __future__ import annotations

import ast
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kdfast
from kdfast import cli
from kdfast.api.data import open_data
from kdfast.api.selection import prune, score
from kdfast.api.teacher import cache, evaluate, load_teacher
from kdfast.api.training import Run, distill
from kdfast.data.readers.bare_labels import from_labels
from kdfast.data.source import Source, compute_normalization
from kdfast.data.views import Normalization
from kdfast.distillation.folder import METADATA_KEY
from kdfast.distillation.train import Monitoring
from kdfast.errors import CheckpointError, DataError, DataWarning, SubsetError, UsageError
from kdfast.pruning.score_file import open_scores, write_scores
from kdfast.teacher.cache import TeacherCache


def run_command(command: str) -> None:
    """Run a command of kdfast in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kdfast", *command.split()])
        try:
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert not stop.value.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


class Tiny(nn.Module):
    """A network of the user's own, which returns its logits beside other values."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.classifier = nn.Linear(32, num_classes)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(images)
        return {"logits": self.classifier(features), "features": features}


@pytest.fixture(scope="module")
def data() -> Source:
    return open_data("digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def teacher(data: Source, folder: Path) -> Run:
    return distill(data, "resnet8", folder / "teacher", alpha=0, epochs=4, batch_size=32, lr=0.1, schedule="cosine")


@pytest.fixture(scope="module")
def cached(data: Source, teacher: Run, folder: Path) -> TeacherCache:
    return cache(data, teacher.student, folder / "cache", views=2)


def test_whole_flow(data: Source, teacher: Run, cached: TeacherCache, tmp_path: Path) -> None:
    assert teacher.result["test_top1"] > 80
    assert cached.n_views == 2
    scores = score(data, "el2n", cache=cached)
    ids = prune(data, 0.2, scores=scores, out=tmp_path / "idx.npy")
    assert len(ids) == round(0.2 * len(data.train))
    assert (np.diff(ids) > 0).all()
    steps: list[int] = []
    run = distill(
        data, "resnet8", tmp_path / "run", subset=ids, cache=cached, epochs=2, batch_size=32, seed=3,
        monitoring=Monitoring(on_epoch_end=lambda trainer: steps.append(trainer.step)),
    )  # fmt: skip
    per_epoch = -(-len(ids) // 32)
    assert steps == [per_epoch, 2 * per_epoch]
    found = evaluate(run.student, data, teacher=teacher.student)
    assert found["top1"] == pytest.approx(run.result["test_top1"])
    logits = [_logits(model, data) for model in (run.student, teacher.student)]
    agreement = 100 * (logits[0].argmax(1) == logits[1].argmax(1)).float().mean().item()
    assert found["agreement"] == pytest.approx(agreement)
    again = distill(data, "resnet8", tmp_path / "run", subset=ids, cache=cached, epochs=2, batch_size=32, seed=3)
    assert again.result == run.result


def _logits(model: object, data: Source) -> torch.Tensor:
    images = torch.from_numpy(data.test.read(np.arange(len(data.test)))).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.normalization.mean, model.normalization.std))  # type: ignore[attr-defined]
    with torch.no_grad():
        return model.net((images - mean) / std)  # type: ignore[attr-defined]


def test_weights_equal_those_of_the_command(data: Source, cached: TeacherCache, tmp_path: Path) -> None:
    ids = prune(data, 0.1, method="moderate", cache=cached, out=tmp_path / "idx.npy")
    run = distill(
        data, "resnet8", tmp_path / "python", subset=ids, cache=cached, alpha=0.5, epochs=2, batch_size=32, lr=0.01
    )
    command = (
        f"distill --data digits --student resnet8 --subset {tmp_path / 'idx.npy'} --cache {cached.path} --alpha 0.5 "
        f"--epochs 2 --batch-size 32 --lr 0.01 --out {tmp_path / 'command'}"
    )
    run_command(command)
    result = json.loads((tmp_path / "command" / "result.json").read_text())
    assert result["weights"] == run.result["weights"]
    config, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("command", "python"))
    assert {k: v for k, v in config.items() if k != METADATA_KEY} == {
        k: v for k, v in other.items() if k != METADATA_KEY
    }


def test_subset_of_the_command_is_that_of_prune(data: Source, cached: TeacherCache, tmp_path: Path) -> None:
    options = {"steps": 3}
    ids = prune(data, 0.2, method="if-beta", options=options, cache=cached, out=tmp_path / "a.npy", seed=5)
    command = f"prune --data digits --method if-beta --option steps=3 --cache {cached.path} --fraction 0.2 --seed 5"
    run_command(f"{command} --out {tmp_path / 'b.npy'}")
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), ids)
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert first["scores"] == second["scores"]


@pytest.mark.parametrize("method", ["el2n", "grand", "moderate", "influence", "medium"])
def test_arrays_give_the_scores_of_the_cache(data: Source, cached: TeacherCache, method: str) -> None:
    labels, logits, features = data.train.labels, cached.identity_logits(), cached.features()
    ours = score(labels, method, logits=logits, features=features)
    theirs = score(data, method, cache=cached)
    np.testing.assert_array_equal(ours.scores, theirs.scores)
    np.testing.assert_array_equal(
        prune(labels, 0.3, method=method, logits=logits, features=features, seed=2),
        prune(data, 0.3, method=method, cache=cached, seed=2),
    )


def test_arrays_need_no_images(cached: TeacherCache, data: Source) -> None:
    labels = list(map(int, data.train.labels))
    assert len(prune(labels, 0.1)) == round(0.1 * len(labels))
    ids = prune(labels, 0.1, scores=np.arange(len(labels)), balance="unbalanced")
    assert ids.min() == len(labels) - len(ids)
    selected = prune(
        labels, 0.1, method="if-beta", options={"steps": 2}, logits=cached.identity_logits(), features=cached.features()
    )
    assert len(selected) == len(ids)
    with pytest.raises(DataError, match="labels without images"):
        from_labels(labels).train.read([0])


UNKNOWN = "`normalization` is not given"
of_modules = pytest.mark.filterwarnings(f"ignore:{UNKNOWN}")


@of_modules
def test_own_modules(data: Source, teacher: Run, tmp_path: Path) -> None:
    own = Tiny(10)
    model = load_teacher(load_teacher(own, data).net, data)
    assert len(own._forward_hooks) == 1
    assert evaluate(own, data)["top1"] == pytest.approx(evaluate(model, data)["top1"])
    run = distill(
        data, Tiny, tmp_path / "run", teacher=teacher.student, epochs=1, subset=np.arange(len(data.train)) < 99
    )
    assert run.result["kept"] == 99
    assert isinstance(run.student.net, Tiny)
    made = cache(data, own, tmp_path / "cache", views=1)
    assert np.isfinite(made.identity_logits()).all()


def test_a_module_without_its_normalization_is_a_warning(data: Source) -> None:
    norm = Normalization((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert load_teacher(Tiny(10), data, normalization=norm).normalization == norm
    with pytest.warns(DataWarning, match=UNKNOWN):
        assert load_teacher(Tiny(10), data).normalization == compute_normalization(data.train)
    with pytest.warns(DataWarning, match=UNKNOWN):
        evaluate(Tiny(10), data)


@of_modules
def test_evaluate_leaves_modules_in_training_as_they_are(data: Source) -> None:
    own, other = Tiny(10), Tiny(10)
    own.features.eval()  # a part that is frozen
    modes = [module.training for module in own.modules()]
    evaluate(own, data, teacher=other)
    assert [module.training for module in own.modules()] == modes
    assert other.training
    assert own(torch.zeros(2, 3, 8, 8)).keys() == {"logits", "features"}
    adapted = load_teacher(own, data).net
    evaluate(adapted, data)
    assert adapted(torch.zeros(2, 3, 8, 8)).shape == (2, 10), "what load_teacher did stays"


def test_numbers_and_tensors_of_other_libraries(
    data: Source, teacher: Run, cached: TeacherCache, tmp_path: Path
) -> None:
    labels, logits = data.train.labels, cached.identity_logits()
    expected = score(labels, "el2n", logits=logits)
    tensor = torch.tensor(logits, requires_grad=True)
    np.testing.assert_array_equal(score(labels, "el2n", logits=tensor).scores, expected.scores)
    rounded = score(labels, "el2n", logits=tensor.bfloat16()).scores
    np.testing.assert_allclose(rounded, expected.scores, atol=0.1)
    for seed in np.arange(2, dtype=np.int32):
        np.testing.assert_array_equal(prune(data, 0.1, seed=seed), prune(data, 0.1, seed=int(seed)))
    assert len(prune(data, np.float32(0.5), out=tmp_path / "idx.npy")) == 721
    views = {"views": np.int64(2), "view_seed": np.int64(0)}
    assert cache(data, teacher.student, cached.path, **views).n_views == 2, "the cache that was built with ints"
    recipe = {"alpha": 0, "epochs": 1, "batch_size": 32, "lr": 0.125, "subset": np.arange(64)}
    plain = distill(data, "resnet8", tmp_path / "plain", **recipe)
    kinds = {"epochs": np.int64(1), "batch_size": np.int64(32), "lr": np.float32(0.125), "seed": np.uint8(0)}
    again = distill(data, "resnet8", tmp_path / "plain", **{**recipe, **kinds})
    assert again.result == plain.result


def test_scores_are_written_and_read(data: Source, cached: TeacherCache, tmp_path: Path) -> None:
    scores = score(data, "el2n", cache=cached)
    write_scores(tmp_path / "s.npz", scores)
    np.testing.assert_array_equal(open_scores(tmp_path / "s.npz", data).scores, scores.scores)
    np.testing.assert_array_equal(prune(data, 0.2, scores=tmp_path / "s.npz"), prune(data, 0.2, scores=scores))


def test_own_scores_may_be_high_for_easy_samples(data: Source, tmp_path: Path) -> None:
    hardness = np.random.default_rng(0).normal(size=len(data.train))
    np.savez(tmp_path / "own.npz", margin=-hardness, loss=2 * hardness)
    expected = prune(data, 0.2, scores=hardness, rule="hard", balance="unbalanced")
    np.testing.assert_array_equal(expected, np.sort(np.argsort(-hardness)[: len(expected)]))
    file = tmp_path / "own.npz"
    for scores, reading in [
        (-hardness, {"higher": "easy"}),
        (file, {"key": "margin", "higher": "easy"}),
        (file, {"key": "loss"}),
    ]:
        found = prune(data, 0.2, scores=scores, rule="hard", balance="unbalanced", **reading)
        np.testing.assert_array_equal(found, expected)
    for scores, reading, message in [
        (hardness, {"key": "loss"}, "`key` chooses an array of a file"),
        (hardness, {"higher": "up"}, "`higher` is 'up'"),
        (None, {"higher": "easy"}, "says how to read `scores`"),
        (file, {"key": "margin"}, "pass `higher` easy or hard"),
    ]:
        with pytest.raises(UsageError, match=message):
            prune(data, 0.2, scores=scores, **reading)


def test_two_indexed_data_sets() -> None:
    items = [(np.full((8, 8), 10 * i, np.uint8), i % 2) for i in range(6)]
    data = open_data((items, items[:2]))
    assert len(data.train) == 6
    assert data.classes == ("0", "1")


@of_modules
def test_bad_input_is_one_clear_line(data: Source, cached: TeacherCache, teacher: Run, tmp_path: Path) -> None:
    labels, logits = data.train.labels, cached.identity_logits()
    other = score(labels, "el2n", logits=logits)
    local = lambda classes: Tiny(classes)  # noqa: E731
    for error, message, call in [
        (UsageError, "kdfast.open_data", lambda: score("digits", "el2n")),
        (UsageError, "`logits` take the place of `cache`", lambda: score(data, "el2n", cache=cached, logits=logits)),
        (UsageError, "without `logits`", lambda: score(data, "el2n", features=logits)),
        (UsageError, "nearest|did you mean", lambda: score(data, "el2m", cache=cached)),
        (UsageError, "needs a teacher's cache|needs training dynamics", lambda: score(labels, "el2n")),
        (DataError, "of other data", lambda: prune(data, 0.1, scores=other)),
        (DataError, "one per sample", lambda: prune(data, 0.1, scores=[1.0, 2.0])),
        (SubsetError, "fraction", lambda: prune(data, 0.0)),
        (UsageError, "class names", lambda: load_teacher(Tiny(10))),
        (CheckpointError, "does not fit|classes", lambda: load_teacher(Tiny(7), data)),
        (UsageError, "top level", lambda: distill(data, local, tmp_path / "r", alpha=0)),
        (UsageError, "top level", lambda: distill(data, Tiny(10), tmp_path / "r", alpha=0)),
        (UsageError, "`cache` or `teacher`", lambda: distill(data, "resnet8", tmp_path / "r")),
        (SubsetError, "twice|times", lambda: distill(data, "resnet8", tmp_path / "r", alpha=0, subset=[1, 1, 2])),
        (SubsetError, "mask .*: pass", lambda: distill(data, "resnet8", tmp_path / "r", alpha=0, subset=[True, False])),
        (SubsetError, "keeps no", lambda: distill(data, "resnet8", tmp_path / "r", alpha=0, subset=labels < 0)),
        (DataError, "not an array", lambda: distill(data, "resnet8", tmp_path / "r", alpha=0, subset=[[1], [2, 3]])),
        (UsageError, "`seed` is 1.5: pass an integer", lambda: prune(data, 0.1, seed=1.5)),
        (UsageError, "`seed` is -1", lambda: score(data, "random", seed=-1)),
        (UsageError, "`epochs` is 1.5", lambda: distill(data, "resnet8", tmp_path / "r", alpha=0, epochs=1.5)),
        (UsageError, "kdfast.open_data", lambda: distill("digits", "resnet8", tmp_path / "r", alpha=0)),
        (UsageError, "kdfast.open_data", lambda: evaluate(teacher.student, "digits")),
        (UsageError, "kdfast.open_data", lambda: cache("digits", teacher.student, tmp_path / "r")),
        (UsageError, "a list: pass a path", lambda: open_data([[], []])),
        (TypeError, "epoch", lambda: distill(data, "resnet8", tmp_path / "r", alpha=0, epoch=3)),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert not (tmp_path / "r").exists()


def test_type_checkers_see_every_public_name() -> None:
    """Without this, `kdfast.NAME` has the type Any: the names are imported on first use."""
    (block,) = [node for node in ast.parse(Path(kdfast.__file__).read_text()).body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: (node.module, alias.name) for node in imports for alias in node.names}
    assert seen == {name: (module, name) for name, module in kdfast._PUBLIC.items()}
