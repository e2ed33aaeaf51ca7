"""A signal at any moment ends a command with exit code 75, and the same command then ends like an uninterrupted one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SIGNALS = ("SIGINT", "SIGTERM")

# Sends a signal to its own process when a module is about to be imported.
AT_IMPORT = """
import os, signal, sys
module, kind = sys.argv[1:3]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), getattr(signal, kind))
sys.meta_path.insert(0, Finder())
sys.argv = ["kdfast", *sys.argv[3:]]
from kdfast.cli import main
main()
"""


def distill(data: Path, out: Path, *more: object) -> list[object]:
    return ["distill", "--data", data, "--student", "resnet8", "--epochs", 2, "--batch-size", 20, "--alpha", 0,
            "--out", out, *more]  # fmt: skip


def start(code: str, *arguments: object, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **pipes)


@pytest.mark.parametrize(
    ("module", "kind"),
    [("typer.core", "SIGINT"), ("yaml", "SIGTERM"), ("numpy.linalg", "SIGINT"), ("torch._C", "SIGTERM"),
     pytest.param("torch.nn.modules", "SIGINT", marks=pytest.mark.slow)],
)  # fmt: skip
def test_signal_during_an_import(tiny: Path, tmp_path: Path, module: str, kind: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("lr: 0.1\n")
    process = start(AT_IMPORT, module, kind, *distill(tiny, tmp_path / "run", "--config", config))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "kdfast: interrupted; run the same command again to resume\n")
    assert not (tmp_path / "run").exists()


def swallow(kind: str) -> None:
    """Do what compiled code does that ignores the exceptions of its callbacks."""
    try:
        os.kill(os.getpid(), getattr(signal, kind))
        time.sleep(0.01)
    except KeyboardInterrupt:
        pass


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("how", ["swallowed", "replaced"])
@pytest.mark.parametrize("command", ["distill", "cache", "dynamics"])
def test_signal_whose_exception_is_lost(kdfast, tiny, teacher, tmp_path, monkeypatch, command, how, kind) -> None:
    from kdfast.data import loaders
    from kdfast.teacher.predictor import Predictor

    def lose(result):
        swallow(kind)
        if how == "replaced":
            raise BufferError("cannot close exported pointers exist")
        return result

    make_loader, predict = loaders.make_loader, Predictor.predict_identity
    arguments = {
        "distill": distill(tiny, tmp_path / "out"),
        "dynamics": ["dynamics", "--data", tiny, "--net", "resnet8", "--epochs", 1, "--out", tmp_path / "out"],
        "cache": ["cache", "--data", tiny, "--teacher", teacher, "--views", 1, "--out", tmp_path / "out"],
    }[command]
    with monkeypatch.context() as patch:
        for place in ("kdfast.data.loaders", "kdfast.distillation.inputs"):
            patch.setattr(f"{place}.make_loader", lambda *a, **k: lose(make_loader(*a, **k)))
        if command == "cache":
            patch.setattr(Predictor, "predict_identity", lambda *a, **k: lose(predict(*a, **k)))
        ran = kdfast(*arguments)
    assert ran.code == 75, ran.err
    said = [line for line in ran.err.splitlines() if not line.startswith(("kdfast: images are ", f"{command}: "))]
    assert len(said) == 1, ran.err
    assert not (tmp_path / "out" / "result.json").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert kdfast(*arguments).code == 0


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize(("place", "data"), [
    ("program.find_command", "nowhere.npz"), ("program.complain_at_end", "nowhere.npz"), ("program.flush_output", None),
    ("program.prepare_streams", None), ("configure_threads", None),
])  # fmt: skip
def test_signal_before_the_command_or_while_it_prints_its_outcome(kdfast, tiny, monkeypatch, place, data, kind) -> None:
    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), getattr(signal, kind))
        time.sleep(0.01)

    monkeypatch.setattr(f"kdfast.cli.{place}", interrupt)
    ran = kdfast("data", "info", data or tiny)
    assert (ran.code, ran.err) == (75, "kdfast: interrupted; run the same command again to resume\n")


@pytest.mark.slow  # it loads FFCV
@pytest.mark.parametrize("kind", ["SIGINT", "KeyError"])
def test_conversion_that_ends_early_says_why(kdfast, tiny: Path, tmp_path: Path, monkeypatch, kind: str) -> None:
    pytest.importorskip("ffcv")
    import ffcv.writer

    handle, calls = ffcv.writer.handle_sample, []

    def handle_sample(*arguments: object) -> None:
        handle(*arguments)
        calls.append(1)
        if len(calls) == 20:
            if kind == "SIGINT":
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            raise KeyError("of the source")

    shared = set(os.listdir("/dev/shm"))
    with monkeypatch.context() as patch:
        patch.setattr(ffcv.writer, "handle_sample", handle_sample)
        ran = kdfast("data", "convert", tiny, tmp_path / "out")
    assert (ran.code, "BufferError" in ran.err) == ({"SIGINT": 75, "KeyError": 1}[kind], False), ran.err
    assert set(os.listdir("/dev/shm")) <= shared, "the shared memory is freed"
    assert [f.name for f in (tmp_path / "out").iterdir() if not f.name.startswith(".")] == ["data.json"]


STREAMS = """
import os, sys
from kdfast.cli.output import prepare_streams, say
prepare_streams()
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
say("to nobody", flush=True)
print("to nobody", file=sys.stderr, flush=True)
os.write(2, b"from a library")
os.write(file, str(file).encode())
"""


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_become_the_next_file(tmp_path: Path, closed: str) -> None:
    shell = ["bash", "-c", f'exec "$@" {closed}', "-", sys.executable, "-c", STREAMS, str(tmp_path / "file")]
    assert subprocess.run(shell, timeout=60, stdout=subprocess.DEVNULL).returncode == 0
    assert (tmp_path / "file").read_bytes() == b"3"


CLOSED = {
    "2>&-": ["distill"],
    ">&- 2>&-": ["distill"],
    "<&- >&- 2>&-": ["dynamics"],
}


@pytest.mark.slow
@pytest.mark.parametrize("closed", CLOSED)
def test_closed_streams_stop_no_command(tiny: Path, tmp_path: Path, closed: str) -> None:
    out = tmp_path / "out"
    (command,) = CLOSED[closed]
    arguments = distill(tiny, out) if command == "distill" else [
        "dynamics", "--data", tiny, "--net", "resnet8", "--epochs", 1, "--batch-size", 20, "--out", out]  # fmt: skip
    shell = ["bash", "-c", f'exec "$@" {closed}', "-", sys.executable, "-m", "kdfast", *map(str, arguments)]
    assert subprocess.run(shell, timeout=120).returncode == 0
    assert (out / ("result.json" if command == "distill" else "manifest.json")).exists()
    assert (out / ".kdfast.lock").read_bytes().startswith(b"process ")
    assert b"\n" not in (out / ".kdfast.lock").read_bytes(), "no message of a library went there"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["distill", "convert", "prune"])
def test_real_signals_at_random_moments(tiny: Path, tmp_path: Path, command: str) -> None:
    if command == "convert":
        pytest.importorskip("ffcv")
    arguments = {
        "distill": lambda out: distill(tiny, out, "--loader", "resident"),
        "convert": lambda out: ["data", "convert", tiny, out],
        "prune": lambda out: ["prune", "--data", tiny, "--fraction", 0.5, "--out", out / "idx.npy"],
    }[command]
    started = time.monotonic()
    process = start("from kdfast.cli import main; main()", *arguments(tmp_path / "whole"))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    seconds, rng, stopped = time.monotonic() - started, random.Random(1), 0
    for number in range(8):
        out = tmp_path / str(number)
        process = start("import kdfast.cli; print(flush=True); kdfast.cli.main()", *arguments(out))
        process.stdout.readline()  # the interpreter has started
        time.sleep(0.05 + rng.uniform(0, 1.1) * (seconds - 0.3))
        process.send_signal(getattr(signal, SIGNALS[number % 2]))
        _, err = process.communicate(timeout=120)
        assert process.returncode in (0, 75), f"{process.returncode}: {err}"
        stopped += process.returncode == 75
    assert stopped > 2
