"""Bad input: one clear line, the documented exit code, and no file lost or overwritten."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.data.views import Normalization
from kdfast.nets.checkpoint import load_model, save_model

# What a run says of its images and of its steps, once it has started.
STARTED = ("kdfast: images are ", "distill resnet8: ")


def expect(outcome, code: int, pattern: str, *, started: bool = False) -> None:
    assert outcome.code == code, f"exit code {outcome.code}, stderr: {outcome.err}"
    assert re.search(pattern, outcome.err), outcome.err
    lines = [line for line in outcome.err.splitlines() if not (started and line.startswith(STARTED))]
    assert len(lines) == 1, f"one line, not: {outcome.err}"
    assert "Traceback" not in outcome.err


def distill(kdfast, data, out, *more, alpha="0", student="resnet8"):
    return kdfast("distill", "--data", data, "--student", student, "--epochs", 1, "--batch-size", 20, "--alpha", alpha,
                  "--out", out, *more)  # fmt: skip


SUBSETS = {
    "mask of other data": (np.ones(119, bool), r"boolean mask \(119,\).*120"),
    "mask of integers": (np.ones(120, np.int64), "either a mask, or indices"),
    "float": (np.arange(30.0), "int64"),
    "rank 2": (np.arange(30)[:, None], "one-dimensional|1-D|dimension"),
    "negative": (np.array([-1, *range(30)]), "-1"),
    "past the end": (np.array([*range(30), 120]), "120"),
    "a thousand million": (np.array([*range(30), 10**9]), "1000000000"),
    "duplicates": (np.array([*range(30), 3]), "twice|duplicate|more than once|repeat"),
    "empty": (np.empty(0, np.int64), "empty|no "),
    "less than a batch": (np.arange(10), "batch"),
}


@pytest.mark.parametrize("name", SUBSETS)
def test_rejects_invalid_subset_files(kdfast, tiny: Path, tmp_path: Path, name: str) -> None:
    ids, pattern = SUBSETS[name]
    np.save(tmp_path / "idx.npy", ids)
    expect(distill(kdfast, tiny, tmp_path / "run", "--subset", tmp_path / "idx.npy"), 3, pattern)
    assert not (tmp_path / "run").exists()


def test_accepts_an_unsorted_subset(kdfast, tiny: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "idx.npy", np.arange(40)[::-1].copy())
    assert distill(kdfast, tiny, tmp_path / "run", "--subset", tmp_path / "idx.npy").code == 0


def test_rejects_a_subset_of_other_data(kdfast, tiny: Path, tmp_path: Path) -> None:
    assert kdfast("prune", "--data", "digits", "--fraction", 0.05, "--out", tmp_path / "idx.npy").code == 0
    expect(distill(kdfast, tiny, tmp_path / "run", "--subset", tmp_path / "idx.npy"), 3, "other data|another data")


def test_rejects_a_pickled_subset(kdfast, tiny: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "idx.npy", np.array([{}], dtype=object), allow_pickle=True)
    expect(distill(kdfast, tiny, tmp_path / "run", "--subset", tmp_path / "idx.npy"), 3, r"idx\.npy")


def test_rejects_missing_or_truncated_data(kdfast, tiny: Path, tmp_path: Path) -> None:
    expect(distill(kdfast, tmp_path / "nowhere", tmp_path / "run"), 3, "nowhere")
    cut = tmp_path / "cut.npz"
    cut.write_bytes(tiny.read_bytes()[:2000])
    expect(distill(kdfast, cut, tmp_path / "run"), 3, r"cut\.npz")


def test_rejects_negative_labels(kdfast, tiny: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(tiny))
    arrays["train_labels"] = arrays["train_labels"] - 1
    np.savez(tmp_path / "bad.npz", **arrays)
    expect(distill(kdfast, tmp_path / "bad.npz", tmp_path / "run"), 3, "label|class")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_runs_no_code_from_a_teacher_file(kdfast, tiny: Path, tmp_path: Path) -> None:
    trap, bomb = tmp_path / "executed", tmp_path / "bomb.pt"
    torch.save({"state_dict": Bomb(trap)}, bomb)
    outcome = distill(kdfast, tiny, tmp_path / "run", "--teacher", bomb, alpha="1")
    expect(outcome, 3, r"bomb\.pt")
    imported = kdfast("teacher", "import", bomb, "--data", tiny, "--net", "resnet8", "--mean", "0,0,0",
                      "--std", "1,1,1", "--out", tmp_path / "t.pt")  # fmt: skip
    expect(imported, 3, r"bomb\.pt")
    expect(kdfast("eval", "--data", tiny, "--model", bomb), 3, r"bomb\.pt")
    assert not trap.exists()
    assert not (tmp_path / "t.pt").exists()


def test_runs_no_code_from_a_cifar_archive(kdfast, tmp_path: Path) -> None:
    folder, trap = tmp_path / "cifar-10-batches-py", tmp_path / "executed"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps(Bomb(trap), protocol=2))
    expect(kdfast("data", "info", folder), 3, "cifar")
    assert not trap.exists()


def test_rejects_a_checkpoint_of_another_network_or_class_count(
    kdfast, tiny: Path, teacher: Path, tmp_path: Path
) -> None:
    weights = torch.load(teacher, weights_only=True)["state_dict"]
    torch.save(weights, tmp_path / "foreign.pt")
    command = (
        "teacher",
        "import",
        tmp_path / "foreign.pt",
        "--mean",
        "0,0,0",
        "--std",
        "1,1,1",
        "--out",
        tmp_path / "t",
    )
    expect(kdfast(*command, "--data", tiny, "--net", "resnet14"), 3, "resnet14|missing|layer")
    expect(kdfast(*command, "--data", "digits", "--net", "resnet8"), 3, "class")
    assert not (tmp_path / "t").exists()
    expect(distill(kdfast, "digits", tmp_path / "run", "--teacher", teacher, alpha="1"), 3, "classes")


def test_rejects_a_cache_of_other_data_or_another_teacher(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    expect(distill(kdfast, "digits", tmp_path / "run", "--cache", cache, alpha="1"), 3, "data")
    other = tmp_path / "other.pt"
    assert kdfast("teacher", "train", "--data", tiny, "--net", "resnet8", "--epochs", 1, "--out", other).code == 0
    outcome = distill(kdfast, tiny, tmp_path / "run", "--cache", cache, "--teacher", other, alpha="1")
    expect(outcome, 3, "teacher")
    assert not (tmp_path / "run").exists()


def test_detects_a_flipped_bit_in_every_cache_file(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = sorted(f.name for f in cache.iterdir() if f.is_file() and not f.name.startswith("."))
    assert {"manifest.json", "features.npy"} <= set(names)
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(cache, copy)
        data = bytearray((copy / name).read_bytes())
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        (copy / name).write_bytes(data)
        outcome = distill(kdfast, tiny, tmp_path / "run", "--cache", copy, alpha="1")
        expect(outcome, 3, "")
        shutil.rmtree(copy)


def test_rejects_a_cache_that_does_not_cover_the_run(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "idx.npy", np.arange(40))
    made = kdfast("cache", "--data", tiny, "--teacher", teacher, "--subset", tmp_path / "idx.npy", "--views", 2,
                  "--out", tmp_path / "cache")  # fmt: skip
    assert made.code == 0, made.err
    expect(distill(kdfast, tiny, tmp_path / "run", "--cache", tmp_path / "cache", alpha="1"), 3, "80")


def test_rejects_more_views_than_cached(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    outcome = distill(kdfast, tiny, tmp_path / "run", "--cache", cache, "--views", 9, alpha="1")
    expect(outcome, 2, "--views is 9, but the cache holds 3")


def test_rejects_a_teacher_with_nan_outputs(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    content = torch.load(teacher, weights_only=True)
    content["state_dict"]["fc.bias"][0] = float("nan")
    torch.save(content, tmp_path / "nan.pt")
    outcome = kdfast("cache", "--data", tiny, "--teacher", tmp_path / "nan.pt", "--views", 1, "--out", tmp_path / "c")
    expect(outcome, 3, "finite|NaN|nan")
    assert not (tmp_path / "c" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (("--alpha", "1.5"), r"--alpha.*\[0, 1\]"),
        (("--alpha", "-0.1"), r"--alpha.*\[0, 1\]"),
        (("--alpha", "much"), "--alpha"),
        (("--alpha", "0.5"), "--cache or --teacher"),
        (("--temperature", "1e-30"), "--temperature is 1e-30: must be a positive number"),
        (("--temperature", "0"), "--temperature is 0.0: must be a positive number"),
        (("--temperature", "nan"), "--temperature"),
        (("--epochs", "0"), "--epochs"),
        (("--batch-size", "500"), "--batch-size.*120"),
        (("--lr", "-1"), "--lr"),
        (("--momentum", "1"), "--momentum"),
        (("--warmup-epochs", "2"), "--warmup-epochs"),
        (("--student", "resnet9"), "resnet"),
        (("--schedule", "linear"), "--schedule"),
        (("--loader", "magic"), "magic"),
        (("--device", "tpu"), "--device"),
        (("--resume", "maybe"), "--resume"),
    ],
)
def test_rejects_options_out_of_range(kdfast, tiny: Path, tmp_path: Path, flags: tuple[str, str], pattern: str) -> None:
    expect(distill(kdfast, tiny, tmp_path / "run", *flags), 2, pattern)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("fraction", ["0", "-1", "1.5", "nan", "0.005", "0.01"])
def test_rejects_fractions_that_keep_nothing_or_empty_a_class(
    kdfast, tiny: Path, tmp_path: Path, fraction: str
) -> None:
    outcome = kdfast("prune", "--data", tiny, "--fraction", fraction, "--out", tmp_path / "idx.npy")
    expect(outcome, 2 if fraction == "nan" else 3, "fraction|class")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("distill", "--bogus"), "No such option: --bogus.*see kdfast distill --help"),
        (("prune", "--fraction", "abc"), "'--fraction'.*see kdfast prune --help"),
        (("prune", "--seed", "-1"), "'--seed'.*see kdfast prune --help"),
        (("distil",), "No such command 'distil'.*see kdfast --help"),
        (("teacher", "import"), "checkpoint.*see kdfast teacher import --help"),
    ],
)
def test_wrong_usage_prints_one_line(kdfast, arguments, message: str) -> None:
    expect(kdfast(*arguments), 2, message)


def test_does_not_replace_a_subset_it_did_not_write(kdfast, tiny: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", np.arange(7))
    command = ("prune", "--data", tiny, "--fraction", 0.5, "--out")
    expect(kdfast(*command, tmp_path / "mine.npy"), 4, "mine.npy exists, and kdfast did not write it")
    assert np.load(tmp_path / "mine.npy").tolist() == list(range(7))
    assert kdfast(*command, tmp_path / "own.npy").code == 0
    expect(kdfast(*command, tmp_path / "own.npy", "--seed", 1), 4, "own.npy exists and holds another result.*--force")
    assert kdfast(*command, tmp_path / "own.npy", "--seed", 1, "--force").code == 0


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "student.pt", "result.json", "checkpoints/x"])
@pytest.mark.parametrize("dry", [False, True])
def test_rejects_a_folder_with_foreign_files(kdfast, tiny: Path, tmp_path: Path, name: str, dry: bool) -> None:
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"mine": 1}')
    outcome = distill(kdfast, tiny, tmp_path / "mine", *(["--dry-run"] if dry else []))
    expect(outcome, 4, f"holds {name.split('/')[0]}, which was not written by a run")
    assert file.read_text() == '{"mine": 1}'
    assert [f for f in (tmp_path / "mine").rglob("*") if f.is_file() and f.name != ".kdfast.lock"] == [file]


def test_never_overwrites_the_result_of_another_run(kdfast, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert distill(kdfast, tiny, run).code == 0
    before = (run / "result.json").read_bytes()
    (run / "config.json").rename(run / "config.bak")
    expect(distill(kdfast, tiny, run, student="resnet14"), 4, "which was not written by a run")
    assert (run / "result.json").read_bytes() == before
    (run / "config.bak").rename(run / "config.json")
    (run / "student.pt").rename(tmp_path / "student.pt")
    assert distill(kdfast, tiny, run).code == 0
    digests = [torch.load(f, weights_only=True)["digest"] for f in (run / "student.pt", tmp_path / "student.pt")]
    assert digests[0] == digests[1], "the student is written again, from the last checkpoint"
    (run / "result.json").write_text('{"accuracy": 5}')
    expect(distill(kdfast, tiny, run), 3, "missing required field test_top1")


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--views", "1000"), 2, "1000 views per sample, but the data has"),
        (("--device", "cuda:99"), 2, "cuda"),
        (("--out", "{run}"), 4, "not part of a cache"),
    ],
)
def test_dry_run_of_cache_rejects_what_the_run_rejects(kdfast, tiny, teacher, tmp_path, more, code, message) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    more = [str(word).replace("{run}", str(tmp_path / "run")) for word in more]
    outcome = kdfast("cache", "--data", tiny, "--teacher", teacher, "--out", tmp_path / "c", *more, "--dry-run")
    expect(outcome, code, message)


def test_rejects_a_damaged_finished_cache(kdfast, tiny, teacher, cache, tmp_path: Path) -> None:
    copied = shutil.copytree(cache, tmp_path / "c")
    manifest = json.loads((copied / "manifest.json").read_text())
    options = ("--views", manifest["views"]["n_views"], "--view-seed", manifest["views"]["view_seed"])
    command = ("cache", "--data", tiny, "--teacher", teacher, "--out", copied, *options)
    assert kdfast(*command).code == 0
    (copied / "logits-00000.npy").write_bytes(b"")
    expect(kdfast(*command), 3, "logits-00000.npy")


def test_rejects_invalid_config_files(kdfast, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    for text, pattern in (
        ("studnet: x", "studnet"),
        ("- 1", "mapping"),
        ("a: [", "cannot be read"),
        ("epochs: true", "epochs is True"),
        ("dry-run: 3", "dry-run is 3"),
        ("epochs: null", "epochs is None"),
        ("student: [resnet8]", "student is .'resnet8'., but that option has a single value"),
    ):
        config.write_text(text)
        expect(kdfast("distill", "--config", config), 2, pattern)


def test_rejects_a_folder_with_another_run(kdfast, tiny: Path, tmp_path: Path) -> None:
    assert distill(kdfast, tiny, tmp_path / "run").code == 0
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    expect(distill(kdfast, tiny, tmp_path / "run", "--seed", 1), 2, "seed was 0, is 1")
    expect(distill(kdfast, tiny, tmp_path / "run", "--resume", "never"), 4, "already holds a run")
    assert before == {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}


def test_divergence_names_the_step_and_keeps_the_checkpoint(kdfast, tiny: Path, tmp_path: Path) -> None:
    outcome = distill(kdfast, tiny, tmp_path / "run", "--lr", "1e30", "--checkpoint-seconds", 0, "--log-every", 1)
    expect(outcome, 5, "not finite at step [1-9]", started=True)
    step = int(re.search(r"at step (\d+)", outcome.err)[1])
    kept = sorted((tmp_path / "run" / "checkpoints").glob("step-*.pt"))
    assert kept, "the last good checkpoint is kept"
    assert torch.load(kept[-1], weights_only=True)["step"] == step
    assert '"failed"' in (tmp_path / "run" / "status.json").read_text()


def unwritable(tmp_path: Path) -> Path:
    """Return a path below a file, which nobody can write, not even root."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "out"


@pytest.mark.parametrize("command", ["distill", "prune", "cache", "train", "import"])
def test_reports_output_that_cannot_be_written(kdfast, command: str, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    out = unwritable(tmp_path)
    arguments = {
        "distill": ("distill", "--data", tiny, "--student", "resnet8", "--alpha", 0, "--out", out),
        "prune": ("prune", "--data", tiny, "--fraction", 0.5, "--out", out / "idx.npy"),
        "cache": ("cache", "--data", tiny, "--teacher", teacher, "--out", out),
        "train": ("teacher", "train", "--data", tiny, "--net", "resnet8", "--out", out / "t.pt"),
        "import": ("teacher", "import", tmp_path / "w.pt", "--data", tiny, "--net", "resnet8", "--mean", "0,0,0",
                   "--std", "1,1,1", "--out", out / "t.pt"),
    }[command]  # fmt: skip
    torch.save(torch.load(teacher, weights_only=True)["state_dict"], tmp_path / "w.pt")
    expect(kdfast(*arguments), 4, "cannot write")


def test_full_disk_loses_nothing(kdfast, tiny: Path, tmp_path: Path) -> None:
    """A file-size limit simulates a full disk: a write fails in the middle of a file."""
    run = tmp_path / "run"
    command = ["distill", "--data", tiny, "--student", "resnet8", "--alpha", 0, "--epochs", 2, "--batch-size", 20,
               "--out", run]  # fmt: skip
    limited = ["bash", "-c", 'ulimit -f 100; trap "" XFSZ; exec "$@"', "-", sys.executable, "-m", "kdfast",
               *map(str, command)]  # fmt: skip
    outcome = subprocess.run(limited, capture_output=True, text=True)
    assert outcome.returncode == 4, outcome.stderr
    (line,) = [line for line in outcome.stderr.splitlines() if not line.startswith(STARTED)]
    assert "cannot write" in line
    assert not (run / "result.json").exists()
    assert not list((run / "checkpoints").glob("*.pt"))
    assert kdfast(*command).code == 0


@pytest.mark.slow
def test_rejects_bad_input_within_five_seconds(tiny: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "idx.npy", np.array([0, 10**9]))
    started = time.perf_counter()
    outcome = subprocess.run(
        [sys.executable, "-m", "kdfast", "distill", "--data", tiny, "--student", "resnet8", "--alpha", "0", "--subset",
         tmp_path / "idx.npy", "--out", tmp_path / "run"], capture_output=True
    )  # fmt: skip
    assert time.perf_counter() - started < 5
    assert outcome.returncode == 3


def stopped_run(kdfast, command: tuple[object, ...], out: Path) -> None:
    """Make a run with a checkpoint and no result."""
    assert kdfast(*command, "--keep-checkpoints", "--out", out).code == 0
    (out / "result.json").unlink()


def test_does_not_resume_with_another_teacher(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    model = load_model(teacher)
    save_model(other, dataclasses.replace(model, normalization=Normalization((0.1, 0.2, 0.3), model.normalization.std)))
    command = ("distill", "--data", tiny, "--student", "resnet8", "--epochs", 1, "--batch-size", 20, "--alpha", 1)
    stopped_run(kdfast, (*command, "--teacher", teacher), tmp_path / "run")
    expect(
        kdfast(*command, "--teacher", other, "--out", tmp_path / "run"),
        2,
        r"other settings: --teacher \(mean\) was \[[\d., ]+\], is \[0\.1, 0\.2, 0\.3\]\. Choose",
    )
    assert kdfast(*command, "--teacher", teacher, "--out", tmp_path / "run").code == 0


def test_does_not_resume_with_other_settings(kdfast, tiny: Path, tmp_path: Path) -> None:
    command = ("distill", "--data", tiny, "--student", "resnet8", "--epochs", 1, "--batch-size", 20, "--alpha", 0)
    stopped_run(kdfast, command, tmp_path / "run")
    outcome = kdfast(*command, "--view-seed", 7, "--lr", 0.01, "--out", tmp_path / "run")
    expect(outcome, 2, r"other settings: --lr was 0\.05, is 0\.01; --view-seed was 0, is 7\. Choose another --out, or")


def test_does_not_resume_with_another_cache(kdfast, tiny: Path, teacher: Path, cache: Path, tmp_path: Path) -> None:
    made = kdfast(
        "cache", "--data", tiny, "--teacher", teacher, "--views", 3, "--dtype", "float32", "--out", tmp_path / "c"
    )
    assert made.code == 0, made.err
    command = ("distill", "--data", tiny, "--student", "resnet8", "--epochs", 1, "--batch-size", 20, "--alpha", 1)
    stopped_run(kdfast, (*command, "--cache", cache), tmp_path / "run")
    expect(
        kdfast(*command, "--cache", tmp_path / "c", "--out", tmp_path / "run"),
        2,
        r"other settings: --teacher \(cache\) was \"[0-9a-f]{12}\.\.\.\", is \"[0-9a-f]{12}\.\.\.\"\. Choose",
    )


def test_uses_the_view_seed_of_the_cache_and_rejects_another(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    cached = ("--view-seed", 4, "--out", tmp_path / "c")
    assert kdfast("cache", "--data", tiny, "--teacher", teacher, "--views", 3, *cached).code == 0
    run = tmp_path / "run"
    outcome = distill(kdfast, tiny, run, "--cache", tmp_path / "c", "--view-seed", 5, alpha="1")
    expect(outcome, 3, "view seed|view_seed|seed")
    assert not run.exists()
    assert distill(kdfast, tiny, run, "--cache", tmp_path / "c", alpha="1").code == 0
    assert '"view_seed": 4' in (run / "config.json").read_text()


def test_never_saves_weights_that_are_not_finite(kdfast, tiny: Path, tmp_path: Path) -> None:
    flags = ("--lr", "1e38", "--weight-decay", "100", "--batch-size", 120, "--checkpoint-seconds", 0)
    outcome = kdfast("distill", "--data", tiny, "--student", "resnet8", "--alpha", 0, "--epochs", 1, *flags, "--out",
                     tmp_path / "run")  # fmt: skip
    expect(outcome, 5, "weights are not finite at step 0", started=True)
    assert not list((tmp_path / "run").rglob("*.pt"))


def test_does_not_evaluate_a_model_with_other_classes(kdfast, teacher: Path) -> None:
    expect(kdfast("eval", "--data", "digits", "--model", teacher), 3, "class")


def test_rejects_a_last_batch_of_one_with_batch_norm(kdfast, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (33, 4, 4, 3), dtype=np.uint8), np.arange(33) % 2
    np.savez(tmp_path / "d.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    command = ("distill", "--data", tmp_path / "d.npz", "--student", "resnet8", "--alpha", 0, "--epochs", 1)
    expect(kdfast(*command, "--batch-size", 32, "--out", tmp_path / "run"), 2, "last batch.*--batch-size")
    assert not (tmp_path / "run").exists()
    assert kdfast(*command, "--batch-size", 11, "--out", tmp_path / "run").code == 0


def test_does_not_overwrite_models(kdfast, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "t.pt").write_text("mine")
    common = ("--data", tiny, "--net", "resnet8", "--out", tmp_path / "t.pt")
    expect(kdfast("teacher", "train", *common), 4, "exists")
    imported = kdfast("teacher", "import", tmp_path / "t.pt", "--mean", "0,0,0", "--std", "1,1,1", *common)
    expect(imported, 4, "which is also CHECKPOINT")
    assert (tmp_path / "t.pt").read_text() == "mine"


def test_unexpected_error_prints_one_line(kdfast, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("kdfast.pruning.select.select_subset", fail)
    outcome = kdfast("prune", "--data", tiny, "--fraction", 0.5, "--out", tmp_path / "idx.npy")
    expect(outcome, 1, "unexpected ZeroDivisionError: oh .KDFAST_DEBUG=1")


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"}, {"WORLD_SIZE": "2"}])
def test_rejects_an_inconsistent_launcher_environment(
    kdfast, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expect(distill(kdfast, tiny, tmp_path / "run"), 2, "WORLD_SIZE")


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (("prune", "--fraction", 0.5, "--out", "idx.npy"), "--fraction"),
        (("distill", "--student", "resnet8", "--alpha", 0, "--out", "run"), "--kd-weight"),
        (("teacher", "flatten", "--teacher", "t.pt", "--out", "f.pt"), "--held"),
    ],
    ids=str,
)
def test_nan_is_no_number(kdfast, tiny: Path, tmp_path: Path, monkeypatch, command: tuple, flag: str) -> None:
    (tmp_path / "t.pt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    expect(kdfast(*command, "--data", tiny, flag, "nan"), 2, f"{flag} is nan: pass a number")
    assert [path.name for path in tmp_path.iterdir()] == ["t.pt"]
