"""Commands with random options on damaged files: each ends in time with a documented exit code and spoils no input.

A seed decides the case. The first ones run with the fast tests, the others with the slow ones. To repeat a case:
`python -m pytest 'tests/cli/files/test_fuzz.py::test_damaged_input[SEED]'`; its files stay in the folder that is
printed.
"""

import contextlib
import faulthandler
import hashlib
import json
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from kdfast.cli.messages import find_command
from kdfast.cli.program import app

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_files import TRAP, copy_tree, damage

FAST, ALL = 20, 520  # seeds
SECONDS = 60
MEMORY = 6 << 30  # bytes beyond those in use
CODES = {0, 2, 3, 4, 5, 6}

TRAINING = "--epochs 1 --batch-size 8 --device cpu"
TRAIN = f"distill --data data.npz --student resnet8 {TRAINING}"
PLAIN = f"{TRAIN} --alpha 0"
IMPORT = "--data data.npz --net resnet8 --mean .3,.3,.3 --std .2,.2,.2 --out new.pt"
DYNAMICS = f"dynamics --data data.npz --net resnet8 {TRAINING} --epochs 2 --top-k 2 --record batch"
CACHE = "cache --data data.npz --teacher teacher.pt --views 2"
FLATTEN = "teacher flatten --data data.npz --teacher teacher.pt --iterations 2 --device cpu"
PAGE = "report scores scores.npz --data data.npz --cache cache --subset idx.npy"
SWEEP = "sweep --data data.npz --student resnet8 --fractions .5 --kd off --steps 2 --batch-size 8"
QUICK = "--option steps=3 --option inner_steps=5 --option held=.25"
PUBLISHED = (
    "prune --data data.npz --cache cache --method if-beta --option preset=paper --option held=.25 --option mu_step=.5 "
    "--option steps=1 --fraction .5"
)
POLICY = f"prune --data data.npz --cache cache --method if-beta {QUICK} --fraction .5"

# Each command with the files that it reads, which are damaged in turn.
COMMANDS: list[tuple[str, list[str]]] = [
    ("data info data.npz", ["data.npz", "data.npz"]),
    ("data info images", ["images/*/*/*", "images/*/*/*"]),
    ("data info flipped", ["flipped/*"]),
    ("data convert images betons-of-images --dry-run", ["images/*/*/*"]),
    ("data flip data.npz new", ["data.npz"]),
    ("data info betons", ["betons/*.beton", "betons/*.json"]),
    ("eval --data data.npz --model teacher.pt", ["teacher.pt", "teacher.pt", "data.npz"]),
    (f"teacher train --data data.npz --net resnet8 {TRAINING} --out teacher.pt", ["teacher.pt", "teacher.pt.run/*"]),
    (f"teacher import weights.pt {IMPORT}", ["weights.pt", "weights.pt"]),
    (f"teacher import weights.safetensors {IMPORT}", ["weights.safetensors"]),
    (f"{FLATTEN} --out stopped-flat.pt", ["stopped-flat.pt.state", "teacher.pt"]),
    (f"{CACHE} --out new", ["teacher.pt", "data.npz"]),
    (f"{CACHE} --out cache", ["cache/*"]),
    ("cache verify --data data.npz --teacher teacher.pt --cache cache --samples 4", ["cache/*", "teacher.pt"]),
    ("cache verify --data data.npz --teacher teacher.pt --cache top-k --samples 4", ["top-k/*"]),
    (f"{DYNAMICS} --out dynamics", ["dynamics/*", "dynamics/run-00/*"]),
    (f"{DYNAMICS} --runs 2 --out stopped-dynamics", ["stopped-dynamics/*", "stopped-dynamics/run-00/*"]),
    ("score --data data.npz --method el2n --dynamics dynamics --out new.npz", ["dynamics/*", "dynamics/run-00/*"]),
    ("score --data data.npz --method influence --cache cache --out new.npz", ["cache/*"]),
    ("score --data flipped --method random --out scores.npz", ["scores.npz"]),
    ("prune --data data.npz --fraction .5 --scores scores.npz --out new.npy", ["scores.npz", "scores.npz"]),
    ("prune --data data.npz --fraction .5 --method random --out idx.npy", ["idx.npy", "idx.json"]),
    (f"{POLICY} --out stopped-policy.npy", ["stopped-policy.search.json"]),
    (f"{PUBLISHED} --scores scores.npz --out new.npy", ["scores.npz", "cache/*"]),
    (f"{PUBLISHED} --teacher teacher.pt --dry-run --out new.npy", ["teacher.pt"]),
    (f"{TRAIN} --subset idx.npy --cache cache --out new", ["idx.npy", "idx.json", "cache/*"]),
    (f"{TRAIN} --teacher teacher.pt --alpha .5 --out new", ["teacher.pt"]),
    (f"{PLAIN} --out run", ["run/*", "run/*", "run/checkpoints/*"]),
    (f"{PLAIN} --out stopped", ["stopped/*", "stopped/checkpoints/*", "stopped/checkpoints/*"]),
    ("distill --config config.yaml", ["config.yaml", "config.yaml", "config.yaml"]),
    (f"{SWEEP} --out sweep", ["sweep/results.jsonl", "sweep/*"]),
    ("sweep --out sweep --report-only", ["sweep/results.jsonl", "sweep/results.jsonl"]),
    (f"{SWEEP} --methods mine --scores mine=scores.npz --out new", ["scores.npz"]),
    (f"{PAGE} --out page.html", ["scores.npz", "idx.*"]),
    ("report if-beta policy.json --out page.html", ["policy.json", "policy.json", "policy.json"]),
    ("doctor", []),
]  # fmt: skip
TARGETS = [(words, pattern) for words, patterns in COMMANDS for pattern in patterns]
# Not part of the fast tests, whose preparation would take too long.
SLOW_FILES = ("betons",)

NUMBERS = [
    "-1", "0", "1", "7", ".5", "1.5", "-.5", "nan", "inf", "-inf", "1e-300", "1e308", "1e999", "65535", "1_0",
    "9223372036854775807", "9223372036854775808", "9" * 40, "9" * 5000, "0x10", "+1", "1e3", "\u0663",
]  # fmt: skip
WORDS = [
    "", " ", "x", "☃", "\udcff", "\x1b[31m", "a" * 300, "a/" * 3000, "=", "a=", "=a", "a=b=c", ",", "random,,", "-",
    "--", "-x", "--bogus", "true", "None", "{fraction}", "%s", "$(x)", "a:b=1", "auto", "both", "on", "el2n/beta",
    "if-beta", "random:seed=1", "torchvision:resnet18", "timm:x", "resnet14", "cuda", "cuda:9", "cpu:1", "meta",
    "fp16", "bf16", "equal", "ffcv", "kind=self", "a=1", "cosine", "never", "digits",
]  # fmt: skip
PATHS = [
    ".", "..", "nowhere", "new/deep/er", "/dev/null", "/dev/full", "/proc/self/mem", "/proc/nowhere/x", "data.npz/x",
    "~x", "new.npz", "new.npy", "new.pt", "☃.npy", "\udcff.npy",
]  # fmt: skip
FLAGS = [
    "--dry-run", "--tensorboard", "--keep-runs", "--report-only", "--json", "--help-options", "--balanced", "--equal",
    "--unbalanced", "--help", "--no-cuda-graph",
]  # fmt: skip
# Large values mean real work: the commands may start it only in a dry run.
WORKS = ("--epochs", "--iterations", "--steps", "--runs", "--option", "--score-option")
LEFT_OUT = ("jobs", "compile_network")  # a thousand processes; minutes of compilation


pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits the memory by what Linux tells"),
    pytest.mark.filterwarnings("default", "ignore:Duplicate name"),
]


class Hang(BaseException):
    """A case ran out of time; no handler of Exception may catch it."""


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # CUDA needs more memory than the limit


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind, made from 24 training images of 8 x 8 by one step or epoch each."""
    root = tmp_path_factory.mktemp("fuzz") / "prepared"
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        make_data(root)
        make_results(root, patch)
    return root


def make_data(root: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 24), ("test", 12)):
        labels = np.arange(n) % 3
        images = rng.integers(0, 60, (n, 8, 8, 3), dtype=np.uint8)
        images[np.arange(n), :, :, labels] += 150
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
        for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / "images" / part / f"class {label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.{'png' if i % 4 else 'jpg'}")
    np.savez(root / "data.npz", **arrays)
    lines = ["data: data.npz", "student: resnet8", "alpha: 0", "epochs: 1", "batch-size: 8", "lr: 0.1", "out: new"]
    (root / "config.yaml").write_text("\n".join(lines) + "\n")


def make_results(root: Path, patch: pytest.MonkeyPatch) -> None:
    from kdfast.pruning.if_beta.search import Schedule
    from kdfast.pruning.if_beta.selector import costs

    patch.setattr(costs, "distillation_seconds", lambda *_: 1.0)
    call(f"teacher train --data data.npz --net resnet8 {TRAINING} --out teacher.pt")
    state = torch.load(root / "teacher.pt", weights_only=True)["state_dict"]
    torch.save({"state_dict": state, "epoch": 3}, root / "weights.pt")
    save_file(state, root / "weights.safetensors")
    call("data flip data.npz flipped")
    call(f"{CACHE} --out cache")
    call(f"{CACHE} --top-k 2 --out top-k")
    call(f"{DYNAMICS} --out dynamics")
    call(f"{DYNAMICS} --runs 2 --only 0 --out stopped-dynamics")
    call("score --data data.npz --method el2n --dynamics dynamics --out scores.npz")
    call("prune --data data.npz --fraction .5 --scores scores.npz --out idx.npy")
    call(f"{POLICY} --out policy.npy")
    call(f"{PLAIN} --checkpoint-seconds 0 --keep-checkpoints --out run")
    shutil.copytree("run", "stopped")
    (root / "stopped" / "result.json").unlink()
    call(f"{SWEEP} --out sweep")
    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr("kdfast.nets.checkpoint.save_model", interrupt)
        call(f"{FLATTEN} --out stopped-flat.pt", code=75)
    assert (root / "stopped-flat.pt.state").is_file()
    steps = iter(range(2))
    take_step = Schedule.take_step

    def interrupted(*arguments: Any) -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return take_step(*arguments)

    patch.setattr(Schedule, "take_step", interrupted)
    call(f"{POLICY} --out stopped-policy.npy", code=75)
    assert (root / "stopped-policy.search.json").is_file()


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def call(words: str, code: int = 0) -> None:
    from kdfast import cli

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kdfast", *words.split()])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    for number, handler in before.items():
        signal.signal(number, handler)
    assert stop.value.code == code, words


@pytest.fixture(scope="session")
def betons(prepared: Path) -> Path:
    """The data as FFCV files, without the verification of a conversion, whose compilation takes a minute."""
    pytest.importorskip("ffcv")
    from kdfast.data.ffcv.record import write_record
    from kdfast.data.ffcv.write import write_beton
    from kdfast.data.readers.registry import open_source
    from kdfast.files import sha256_file

    source, folder = open_source(prepared / "data.npz"), prepared / "betons"
    folder.mkdir()
    for part, split in (("train", source.train), ("test", source.test)):
        write_beton(split, folder / f"{part}.beton")
    digests = {f"{part}.beton": sha256_file(folder / f"{part}.beton") for part in ("train", "test")}
    facts = {"classes": list(source.classes), "views": source.view_spec.to_dict(), "jpeg_quality": None}
    write_record(folder, {**facts, "origin": source.fingerprint, "fingerprint": source.fingerprint}, digests)
    return folder


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Bound the time and the memory of this process; beyond twice the time, compiled code hangs: end the process."""

    def stop(*_: object) -> None:
        raise Hang(f"no end after {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True, file=sys.__stderr__)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def change_words(words: list[str], names: list[str], rng: random.Random) -> tuple[str, list[str]]:
    """Change one word of a command line, or the options in it; `names` are files that there are."""
    command = find_command(typer.main.get_command(app), words)
    options = [p for p in command.params if p.param_type_name == "option" and p.name not in LEFT_OUT]
    spelled = {spelling: option for option in options for spelling in option.opts}
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    start = min(first, 2)
    kind = rng.choice(["value"] * 6 + ["path"] * 3 + ["drop", "twice", "swap", "flag", "insert"])
    words = list(words)
    given = [i for i in range(first, len(words) - 1) if words[i] in spelled and not spelled[words[i]].is_flag]
    values = [option for option in options if not option.is_flag and option.name != "help"]
    if kind == "value" and values:
        flag = max(rng.choice(values).opts, key=len)
        value = rng.choice(rng.choice([NUMBERS, NUMBERS, WORDS, PATHS, names]))
        at = words.index(flag) if flag in words else None
        words[len(words) if at is None else at : len(words) if at is None else at + 2] = [flag, value]
        words += ["--dry-run"] * (flag in WORKS and "--dry-run" in spelled)
    elif kind == "path" and given:
        words[rng.choice(given) + 1] = rng.choice(rng.choice([PATHS, names, names]))
    elif kind == "twice" and given:
        at = rng.choice(given)
        words += [words[at], rng.choice([words[at + 1], *WORDS, *PATHS])]
    elif kind == "swap" and len(words) > start + 1:
        one, other = rng.sample(range(start, len(words)), 2)
        words[one], words[other] = words[other], words[one]
    elif kind == "drop" and len(words) > start:
        del words[rng.randrange(start, len(words))]
    elif kind == "insert":
        words.insert(rng.randint(start, len(words)), rng.choice([*WORDS, *NUMBERS, *PATHS]))
    else:
        kind = "flag"
        words.append(rng.choice(FLAGS))
    return f"options: {kind}", words


def pick(seed: int) -> tuple[str, str | None]:
    """Return a command and the files to damage, in two cases of three, or None: its options are changed."""
    round_, turn = divmod(seed, 3)
    # Both steps have no common divisor with the lengths, so that a few seeds are spread over the whole list.
    line, pattern = TARGETS[(2 * round_ + turn - 1) * 7 % len(TARGETS)]
    if turn == 0:
        line, pattern = COMMANDS[round_ * 5 % len(COMMANDS)][0], None
    if seed < FAST and any(name in line.split() for name in SLOW_FILES):
        return COMMANDS[0][0], pattern and COMMANDS[0][1][0]
    return line, pattern


def make_case(seed: int, prepared: Path, root: Path) -> tuple[list[str], str]:
    """Prepare the folder of a seed; return the command and what was changed."""
    rng = random.Random(seed)
    line, pattern = pick(seed)
    names = sorted(path.name for path in prepared.iterdir() if path.name not in SLOW_FILES or path.name in line.split())
    copy_tree(prepared, root, names)
    if pattern is None:
        done, words = change_words(line.split(), names, rng)
        return words, done
    files = sorted(path for path in root.glob(pattern) if path.is_file())
    return line.split(), damage(root, rng.choice(files), rng)


def inputs_of(root: Path) -> dict[str, str]:
    """Return digests of the files that no command may change."""
    files = [*root.glob("*.yaml"), *root.glob("weights.*"), *root.glob("data.npz"), *root.glob("*/*.beton")]
    files += root.glob("images/*/*/*")
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed < FAST else [pytest.mark.slow]) for seed in range(ALL)]
)
def test_damaged_input(
    kdfast, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, seed: int
) -> None:
    if seed >= FAST:
        request.getfixturevalue("betons")
    root = tmp_path / "case"
    words, done = make_case(seed, prepared, root)
    about = f"seed {seed}, {done}\n  cd {root}\n  kdfast {json.dumps(words)[1:-1]}\n"
    before = inputs_of(root)
    monkeypatch.chdir(root)
    try:
        with limits():
            outcome = kdfast(*words)
    except BaseException as error:
        pytest.fail(f"{about}{type(error).__name__}: {error}")
    assert outcome.code in CODES, about + outcome.err
    assert "Traceback" not in outcome.err, about + outcome.err
    assert not outcome.code or outcome.err.splitlines()[-1].startswith("kdfast: "), about + outcome.err
    assert not any(root.rglob(TRAP)), f"{about}code in a file was executed"
    assert inputs_of(root) == before, f"{about}an input was changed"
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("line", dict(COMMANDS))
def test_undamaged_input(
    kdfast, prepared: Path, betons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    copy_tree(prepared, tmp_path / "case", [path.name for path in prepared.iterdir()])
    monkeypatch.chdir(tmp_path / "case")
    outcome = kdfast(*line.split())
    assert outcome.code == 0, outcome.err
    shutil.rmtree(tmp_path)


def test_the_seeds_reach_every_command_and_kind_of_file() -> None:
    picked = {pick(seed) for seed in range(ALL)}
    assert picked == {*TARGETS, *((line, None) for line, _ in COMMANDS)}


def test_a_hang_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SECONDS", 1)
    with pytest.raises(Hang), limits():
        time.sleep(30)
