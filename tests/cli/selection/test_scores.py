"""`kdfast dynamics` and `kdfast score`: from data to a score file."""

import json
import random
import re
import shutil
import signal
import subprocess
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.errors import DataWarning
from kdfast.nets.checkpoint import load_model, save_model

METHODS = {
    "random": [],
    "forgetting": [],
    "grand": [],
    "el2n": [],
    "moderate": [],
    "d2": [],
    "dual": ["--option", "window=2"],
    "dyn-unc": ["--option", "window=2"],
    "tdds": ["--option", "window=3"],
    "ccs": [],
    "aum": [],
    "influence": [],
    "medium": [],
}


def expect(outcome, code: int, pattern: str) -> None:
    assert outcome.code == code, f"exit code {outcome.code}, stderr: {outcome.err}"
    assert re.search(pattern, outcome.err), outcome.err
    # How images are augmented by default is said when the work starts.
    said = [line for line in outcome.err.splitlines() if not line.startswith("kdfast: images are ")]
    assert len(said) == 1, f"one line, not: {outcome.err}"
    assert "Traceback" not in outcome.err


# What the fixture `dynamics` records.
RECORDED = ["--runs", 2, "--features-every", 1, "--top-k", 3]


def dynamics_command(data, out, *more, epochs=3) -> list[object]:
    return ["dynamics", "--data", data, "--net", "resnet8", "--epochs", epochs, "--batch-size", 20, "--out", out, *more]


@pytest.fixture(scope="module")
def dynamics(fork, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of three epochs on the tiny data."""
    out = tmp_path_factory.mktemp("dynamics") / "dyn"
    finish(fork, dynamics_command(tiny, out, *RECORDED))
    return out


def finish(fork, command: list[object]) -> float:
    started = time.perf_counter()
    process = fork(*command)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return time.perf_counter() - started


def arrays_of(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in sorted(folder.rglob("*")):
        assert ".kdtmp-" not in file.name, "a finished command leaves no temporary file"
        if file.suffix == ".npy" or file.name in ("plan.json", "sealed.json", "manifest.json"):
            found[file.relative_to(folder).as_posix()] = file.read_bytes()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_computes_every_score(kdfast, tiny, cache, dynamics, tmp_path, method) -> None:
    out = tmp_path / "s.npz"
    ran = kdfast("score", "--data", tiny, "--cache", cache, "--dynamics", dynamics, "--method", method,
                 *METHODS[method], "--out", out)  # fmt: skip
    assert ran.code == 0, ran.err
    with np.load(out) as held:
        assert held["scores"].shape == (120,)
        about = json.loads(str(held["about"]))
    assert about["method"] == method
    assert about["seconds"] > 0
    assert set(about["sources"]) <= {"cache", "dynamics"}
    assert re.search(r"scored 120 samples by [\w-]+ in [\d.]+ s", ran.out)


def test_computes_memorization_from_masked_runs(kdfast, tiny, tmp_path) -> None:
    assert kdfast(*dynamics_command(tiny, tmp_path / "d", "--runs", 2, "--keep", 0.5, epochs=1)).code == 0
    masks = [np.unpackbits(np.load(tmp_path / "d" / f"run-0{run}" / "mask.npy")) for run in (0, 1)]
    assert np.array_equal(masks[0] + masks[1], np.ones(120))
    ran = kdfast("score", "--data", tiny, "--dynamics", tmp_path / "d", "--method", "memorization", "--out",
                 tmp_path / "s.npz")  # fmt: skip
    assert ran.code == 0, ran.err
    with np.load(tmp_path / "s.npz") as held:
        assert (held["extra.stderr"] > 0).all()
        median = np.median(held["extra.stderr"])
    assert f"median standard error of a score is {median:.2g}; four times as many runs halve it" in ran.out


def test_computes_grand_of_a_full_network(kdfast, tiny, teacher, tmp_path) -> None:
    arguments = ("score", "--data", tiny, "--method", "grand", "--option", "network=full", "--out", tmp_path / "s.npz")
    expect(kdfast(*arguments), 2, r"train one with kdfast teacher train and pass --teacher to kdfast score")
    ran = kdfast(*arguments, "--teacher", teacher)
    assert ran.code == 0, ran.err


def test_computes_the_influence_of_a_flattened_teacher(kdfast, tiny, teacher, tmp_path) -> None:
    flat, out = tmp_path / "flat.pt", tmp_path / "s.npz"
    arguments = ("score", "--data", tiny, "--method", "influence-fvm", "--out", out)
    expect(kdfast(*arguments), 2, r"needs a network .* kdfast teacher flatten and pass --teacher to kdfast score")
    expect(kdfast(*arguments, "--teacher", teacher, "--option", "fisher=validation"), 2, "was not flattened on one")
    with warnings.catch_warnings():
        warnings.simplefilter("always", DataWarning)
        expect(kdfast(*arguments, "--teacher", teacher), 0, "network was not flattened.* kdfast teacher flatten")
    ran = kdfast("teacher", "flatten", "--data", tiny, "--teacher", teacher, "--iterations", 3, "--out", flat)
    assert ran.code == 0, ran.err
    for fisher in ("train", "validation"):
        options = ["--option", f"fisher={fisher}", "--option", "views=2"]
        ran = kdfast(*arguments, "--teacher", flat, *options, "--force", "--quiet")
        assert (ran.code, ran.err) == (0, "")
        with np.load(out) as held:
            about = json.loads(str(held["about"]))
        assert "flattened, sharpness fsam, rho 0.05, iterations 3, batch_size 128" in about["parameters"]["network"]
        assert about["parameters"]["fisher"] == fisher
        assert set(about["sources"]) == {"teacher"}
    kept = kdfast("prune", "--data", tiny, "--scores", out, "--fraction", 0.5, "--out", tmp_path / "idx.npy")
    assert kept.code == 0, kept.err
    expect(
        kdfast("prune", "--data", tiny, "--method", "influence-fvm", "--fraction", 0.5, "--out", tmp_path / "idx.npy"),
        2,
        "pass --teacher to kdfast score or kdfast prune",
    )


def test_scoring_is_deterministic_but_for_the_seconds(kdfast, tiny, dynamics, tmp_path) -> None:
    abouts = []
    for name in ("a", "b"):
        kdfast("score", "--data", tiny, "--dynamics", dynamics, "--method", "aum", "--out", tmp_path / f"{name}.npz")
        with np.load(tmp_path / f"{name}.npz") as held:
            abouts.append(json.loads(str(held["about"])))
    assert abouts[0]["digest"] == abouts[1]["digest"]


def test_does_not_repeat_a_finished_recording(kdfast, tiny, dynamics) -> None:
    before = arrays_of(dynamics)
    ran = kdfast(*dynamics_command(tiny, dynamics, *RECORDED))
    assert ran.code == 0
    assert "recorded 2 runs of 3 epochs on 120 samples" in ran.out
    assert arrays_of(dynamics) == before
    assert not list(dynamics.rglob("checkpoints"))


def test_records_in_mixed_precision(kdfast, tiny, tmp_path) -> None:
    from kdfast.dynamics.reader import Dynamics

    assert kdfast(*dynamics_command(tiny, tmp_path / "d", "--precision", "bf16")).code == 0
    assert Dynamics.open(tmp_path / "d").correct(0)[-1].mean() > 0.9


def test_records_every_other_epoch(kdfast, tiny, tmp_path) -> None:
    from kdfast.dynamics.reader import Dynamics

    for name, more in (("all", []), ("half", ["--record-every", 2])):
        assert kdfast(*dynamics_command(tiny, tmp_path / name, *more, epochs=4)).code == 0
    whole, half = (Dynamics.open(tmp_path / name) for name in ("all", "half"))
    assert (whole.epochs, half.epochs) == (4, 2)
    assert np.array_equal(whole.margin(0)[1::2], half.margin(0))
    expect(kdfast(*dynamics_command(tiny, tmp_path / "odd", "--record-every", 2)), 2, "does not divide")
    assert not (tmp_path / "odd").exists()


def test_processes_can_share_runs(kdfast, tiny, dynamics, tmp_path) -> None:
    for run in (1, 0):
        assert not (tmp_path / "d" / "manifest.json").exists()
        command = dynamics_command(tiny, tmp_path / "d", *RECORDED, "--only", run)
        assert kdfast(*command).code == 0
    assert arrays_of(tmp_path / "d") == arrays_of(dynamics)
    expect(kdfast(*dynamics_command(tiny, tmp_path / "d", "--runs", 2, "--only", 2)), 2, "0 to 1")


def test_run_r_uses_seed_plus_r(dynamics, kdfast, tiny, tmp_path) -> None:
    from kdfast.dynamics.reader import Dynamics

    both = Dynamics.open(dynamics)
    assert not np.array_equal(both.margin(0), both.margin(1))
    assert kdfast(*dynamics_command(tiny, tmp_path / "d", "--seed", 1)).code == 0
    assert np.array_equal(Dynamics.open(tmp_path / "d").margin(0), both.margin(1))


def test_dry_runs_write_nothing(kdfast, tiny, dynamics, tmp_path) -> None:
    ran = kdfast(*dynamics_command(tiny, tmp_path / "d", "--dry-run"))
    assert ran.code == 0
    assert "would train resnet8 1 times for 3 epochs" in ran.out
    ran = kdfast("score", "--data", tiny, "--dynamics", dynamics, "--method", "aum", "--out", tmp_path / "s.npz",
                 "--dry-run")  # fmt: skip
    assert "would score 120 samples by aum from dynamics" in ran.out
    assert list(tmp_path.iterdir()) == []


BAD_SCORES = {
    "a typo": (["--method", "forgeting"], 2, "did you mean 'forgetting'"),
    "an option's typo": (["--method", "dual", "--option", "windw=2"], 2, "did you mean 'window'"),
    "an option without a value": (["--method", "dual", "--option", "window"], 2, "name=value"),
    "an option out of range": (["--method", "dual", "--option", "window=1"], 2, "from 2 to"),
    "no dynamics": (["--method", "aum"], 2, "with kdfast dynamics and pass --dynamics"),
    "no cache": (["--method", "influence"], 2, "with kdfast cache and pass --cache"),
    "neither": (["--method", "el2n"], 2, "kdfast dynamics .* kdfast cache"),
    "no network": (["--method", "grand", "--option", "network=full"], 2, "train and pass --teacher to kdfast score"),
    "no folder": (["--method", "aum", "--dynamics", "absent"], 3, "holds no dynamics"),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_rejects_bad_score_commands(kdfast, tiny, tmp_path, case) -> None:
    more, code, pattern = BAD_SCORES[case]
    expect(kdfast("score", "--data", tiny, "--out", tmp_path / "s.npz", *more), code, pattern)
    assert list(tmp_path.iterdir()) == []


def test_messages_of_scores_name_no_option_of_another_command(kdfast, tiny, dynamics, tmp_path) -> None:
    command = ("prune", "--data", tiny, "--fraction", 0.25, "--out", tmp_path / "idx.npy", "--method")
    expect(kdfast(*command, "grand", "--score-option", "network=full"), 2,
           "pass --teacher to kdfast score or kdfast prune; .* the file of kdfast score as --scores")  # fmt: skip
    expect(kdfast(*command, "memorization", "--dynamics", dynamics), 3,
           "with kdfast dynamics, at least 20 runs, each of which trains on less than the whole training split, for "
           "example keep=0.7 .standard error of a score at most 0.24 with 20 runs, ")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_rejects_another_suffix_before_the_work(kdfast, tiny, tmp_path) -> None:
    expect(kdfast("score", "--data", tiny, "--out", tmp_path / "s.npy", "--method", "random"), 2, r"named \.npz")


def test_rejects_foreign_and_stale_inputs(kdfast, tiny, cache, dynamics, tmp_path) -> None:
    out = tmp_path / "s.npz"
    expect(kdfast("score", "--data", "digits", "--dynamics", dynamics, "--method", "aum", "--out", out), 3,
           "other data")  # fmt: skip
    expect(kdfast("score", "--data", "digits", "--cache", cache, "--method", "el2n", "--out", out), 3,
           "belongs to other data")  # fmt: skip
    assert kdfast("data", "flip", tiny, tmp_path / "noisy").code == 0
    for more in (["--cache", cache, "--method", "el2n"], ["--dynamics", dynamics, "--method", "aum"]):
        expect(
            kdfast("score", "--data", tmp_path / "noisy", *more, "--out", out), 3, "other data|belongs to other data"
        )
    assert not out.exists()


def test_rejects_a_partial_cache(kdfast, tiny, teacher, tmp_path) -> None:
    np.save(tmp_path / "idx.npy", np.arange(50))
    assert kdfast("cache", "--data", tiny, "--teacher", teacher, "--views", 1, "--subset", tmp_path / "idx.npy",
                  "--out", tmp_path / "cache").code == 0  # fmt: skip
    expect(kdfast("score", "--data", tiny, "--cache", tmp_path / "cache", "--method", "el2n", "--out",
                  tmp_path / "s.npz"), 3, "lacks 70 of the samples")  # fmt: skip


def test_rejects_unfinished_dynamics(kdfast, tiny, dynamics, tmp_path) -> None:
    shutil.copytree(dynamics, tmp_path / "d")
    (tmp_path / "d" / "manifest.json").unlink()
    expect(kdfast("score", "--data", tiny, "--dynamics", tmp_path / "d", "--method", "aum", "--out",
                  tmp_path / "s.npz"), 3, "is unfinished")  # fmt: skip


def test_rejects_other_settings_in_the_same_folder(kdfast, tiny, dynamics) -> None:
    before = arrays_of(dynamics)
    expect(kdfast(*dynamics_command(tiny, dynamics, "--lr", 0.01, *RECORDED)), 2,
           r"other data or settings: --lr was 0\.[0-9]+, is 0\.01\. Choose")  # fmt: skip
    expect(kdfast(*dynamics_command(tiny, dynamics, "--runs", 2, epochs=2)), 2,
           "number of recorded epochs was 3, is 2; epochs with features was .*; --epochs was 3, is 2")  # fmt: skip
    expect(kdfast(*dynamics_command("digits", dynamics, *RECORDED)), 2,
           "number of samples was 120, is .*; digest of the labels was .*; fingerprint of the data was ")  # fmt: skip
    assert arrays_of(dynamics) == before


@pytest.mark.parametrize(("flag", "value"), [("--keep", 0), ("--keep", 1.5), ("--keep", 0.05), ("--net", "resnet9")])
def test_rejected_recordings_write_nothing(kdfast, tiny, tmp_path, flag, value) -> None:
    ran = kdfast(*dynamics_command(tiny, tmp_path / "d", flag, value))
    assert ran.code == 2, ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_refused_recordings_delete_nothing_despite_force(kdfast, tiny, dynamics) -> None:
    before = arrays_of(dynamics)
    for flag, value in (("--keep", 0.05), ("--record-every", 2)):
        ran = kdfast(*dynamics_command(tiny, dynamics, flag, value, "--force"))
        assert (ran.code, ran.err.count("\n")) == (2, 1), ran.err
    assert arrays_of(dynamics) == before


def test_divergence_prints_one_line(kdfast, tiny, tmp_path) -> None:
    expect(kdfast(*dynamics_command(tiny, tmp_path / "d", "--lr", 1e12)), 5, "not finite")


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_recording_survives_kill_9(fork, tiny: Path, tmp_path: Path, kills: int) -> None:
    def command(out: Path) -> list[object]:
        return dynamics_command(tiny, out, "--runs", 2, "--keep", 0.7, "--features-every", 4, "--checkpoint-seconds",
                                0.05, epochs=8)  # fmt: skip

    seconds = finish(fork, command(tmp_path / "whole"))
    rng = random.Random(kills)
    while kills > 0:
        hits = 0
        while hits < kills:
            process = fork(*command(tmp_path / "cut"))
            try:
                _, err = process.communicate(timeout=rng.uniform(0.3, 0.95) * seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                hits += 1
                continue
            assert process.returncode == 0, err
            break
        else:
            finish(fork, command(tmp_path / "cut"))
        assert arrays_of(tmp_path / "cut") == arrays_of(tmp_path / "whole")
        shutil.rmtree(tmp_path / "cut")
        kills -= hits
        if not hits:
            seconds *= 0.7  # The machine is faster than in the first run.


def test_sigterm_exits_75_and_the_same_command_resumes(fork, tiny: Path, tmp_path: Path) -> None:
    command = dynamics_command(tiny, tmp_path / "d", epochs=40)
    process = fork(*command)
    status = tmp_path / "d" / "run-00" / "training" / "status.json"
    deadline = time.monotonic() + 60
    while not list((tmp_path / "d").glob("run-00/epoch-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "run the same command again" in err
    assert json.loads(status.read_text())["state"] == "interrupted"
    finish(fork, command)
    assert (tmp_path / "d" / "manifest.json").exists()


@pytest.mark.parametrize("command", ["score", "prune"])
def test_a_cache_of_another_teacher_than_the_network_is_refused(
    kdfast, tiny: Path, teacher: Path, cache: Path, tmp_path: Path, command: str
) -> None:
    model = load_model(teacher)
    own, other = model.digest[:12], tmp_path / "other.pt"
    with torch.no_grad():
        next(model.net.parameters()).mul_(2)
    model.metadata = {}
    save_model(other, model)
    flat = load_model(other)
    flat.metadata = {"flattened": {"teacher": "f" * 64, "sharpness": "none"}}
    save_model(tmp_path / "flat.pt", flat)
    out = tmp_path / ("out.npz" if command == "score" else "out.npy")
    line = (command, "--data", tiny, "--cache", cache, "--method", "influence", "--out", out)
    more = () if command == "score" else ("--fraction", 0.5)
    for network, what in ((other, "is the network"), (tmp_path / "flat.pt", "was flattened from the teacher f{12}")):
        ran = kdfast(*line, *more, "--teacher", network)
        expect(
            ran, 3, rf"{network} {what}.* but {cache} is the cache of the teacher {own}.*--teacher and --cache of one"
        )
    assert not list(tmp_path.glob("out*"))
    flat.metadata = {"flattened": {"teacher": load_model(teacher).digest, "sharpness": "none"}}
    save_model(tmp_path / "flat.pt", flat)
    for network in (teacher, tmp_path / "flat.pt"):
        ran = kdfast(*line, *more, "--teacher", network)
        assert ran.code == 0, ran.err
        out.unlink()
