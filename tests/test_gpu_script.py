"""The queue of bench/gpu.sh: order, limits, rows on disk at once, skipping, resuming; and the whole queue on a CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

from gpu import results as results_module  # noqa: E402
from gpu import run_queue  # noqa: E402
from gpu.__main__ import main  # noqa: E402
from gpu.part import AGAIN, SKIPPED, Part  # noqa: E402
from gpu.parts import parts  # noqa: E402
from gpu.results import append_row, hash_sources, read_rows  # noqa: E402
from gpu.run_queue import Queue  # noqa: E402

# Head of a part's program: `add` writes a row unless it is known.
HEAD = """
import os, signal, sys, time
from gpu.results import PartResults
results = PartResults.from_environment()
def add(key):
    if key not in results.measured():
        results.add(key, process=os.getpid())
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A repository with one source file."""
    file = tmp_path / "repository" / "source.py"
    file.parent.mkdir()
    file.write_text("1")
    monkeypatch.setattr(results_module, "ROOT", file.parent)
    return file


@pytest.fixture
def run(tmp_path, sources, monkeypatch):
    """A function that runs a queue of programs and returns its exit code and the states of the parts."""
    monkeypatch.setenv("QUEUE_GRACE", "5")

    def call(*programs, minutes=1.0, seconds=20.0, names="abcdef", **options):
        parts = [
            Part(name, seconds, ("-c", HEAD + program), ("source.py",), **options)
            for name, program in zip(names, programs, strict=False)
        ]
        queue = Queue(tmp_path / "out", tmp_path / "work", "cpu", minutes=minutes, committed=tmp_path / "committed")
        before = len(call.rows())
        code = queue.run(parts)
        return code, {row["part"]: row["state"] for row in call.rows()[before:] if not row["key"]}

    call.out = tmp_path / "out"
    call.rows = lambda: read_rows(tmp_path / "out" / "results.jsonl")
    call.measured = lambda: [row["key"] for row in call.rows() if row["key"]]
    call.log = lambda: (tmp_path / "out" / "log.txt").read_text()
    return call


def test_runs_the_parts_in_order_and_records_each_row(run):
    code, states = run("add('1'); add('2')", "add('3')")
    assert (code, states) == (0, {"a": "done", "b": "done"})
    assert [(row["part"], row["key"]) for row in run.rows()] == [
        ("a", "1"),
        ("a", "2"),
        ("a", ""),
        ("b", "3"),
        ("b", ""),
    ]


def test_a_failing_part_does_not_stop_the_others_but_fails_the_queue(run):
    code, states = run("add('1'); raise ValueError('broken')", "add('2')")
    assert (code, states) == (1, {"a": "failed", "b": "done"})
    assert "ValueError: broken" in next(row["log"] for row in run.rows() if row.get("state") == "failed")


def test_a_part_without_rows_failed(run):
    assert run("") == (1, {"a": "failed"})


def test_a_part_that_cannot_run_here_is_skipped_with_the_reason(run):
    code, states = run(f"print('no such tool'); sys.exit({SKIPPED})")
    assert (code, states) == (0, {"a": "skipped"})
    assert run.rows()[-1]["reason"] == "no such tool"


def test_without_a_device_nothing_else_runs(run):
    code, states = run("sys.exit('no device')", "add('1')", names=["machine", "b"])
    assert (code, states) == (1, {"machine": "failed"})


def test_known_parts_are_skipped_until_their_sources_change(run, sources):
    run("add('1')")
    assert run("add('1')") == (0, {})
    sources.write_text("2")
    assert run("add('1')") == (0, {"a": "done"})
    assert run.measured() == ["1", "1"]


def test_parts_that_prepare_the_machine_always_run(run):
    assert run("add('1')", always=True) == run("add('1')", always=True) == (0, {"a": "done"})


def test_a_part_at_its_limit_leaves_a_traceback_and_goes_on_next_time(run):
    program = "add('1')\nif not os.path.exists('{0}'): time.sleep(60)\nadd('2')"
    flag = run.out.parent / "flag"
    code, states = run(program.format(flag), "add('3')", seconds=5)
    assert (code, states) == (1, {"a": "cut", "b": "done"})
    assert "KeyboardInterrupt" in run.log()
    flag.touch()
    assert run(program.format(flag), "add('3')") == (0, {"a": "done"})
    assert run.measured() == ["1", "3", "2"]


def test_a_part_that_ignores_the_interrupt_is_killed(run, monkeypatch):
    monkeypatch.setenv("QUEUE_GRACE", "0.5")
    started = time.monotonic()
    code, states = run("signal.signal(signal.SIGINT, signal.SIG_IGN); add('1'); time.sleep(60)", seconds=5)
    assert (code, states) == (1, {"a": "cut"})
    assert time.monotonic() - started < 20
    assert run.rows()[-1]["exit"] == -signal.SIGKILL


def test_the_time_of_all_parts_is_limited(run, monkeypatch):
    monkeypatch.setattr(run_queue, "_LEAST", 1)
    code, states = run("add('1'); time.sleep(60)", "add('2')", minutes=3 / 60)
    assert (code, states) == (1, {"a": "cut"})


def test_a_part_that_asks_for_it_runs_again_in_a_new_process(run):
    code, states = run(f"first = '1' not in results.measured(); add('1'); sys.exit({AGAIN}) if first else add('2')")
    assert (code, states) == (0, {"a": "done"})
    assert len({row["process"] for row in run.rows() if row["key"]}) == 2


def test_committed_results_count(run, tmp_path):
    run("add('1')")
    (tmp_path / "out" / "results.jsonl").rename(tmp_path / "committed")
    assert run("add('1')") == (0, {})
    assert run.measured() == ["1"]


def test_a_line_that_a_kill_left_incomplete_is_skipped(tmp_path):
    file = tmp_path / "rows"
    append_row(file, {"a": 1})
    with open(file, "a") as stream:
        stream.write('{"a": 2')
    append_row(file, {"a": 3})
    assert read_rows(file) == [{"a": 1}, {"a": 3}]


def test_the_hash_depends_on_names_and_contents(sources):
    first = hash_sources(["source.py"])
    sources.write_text("2")
    second = hash_sources(["source.py"])
    sources.rename(sources.parent / "other.py")
    assert len({first, second, hash_sources(["other.py"])}) == 3
    with pytest.raises(FileNotFoundError):
        hash_sources(["source.py"])


# A queue of one part whose second row takes long unless the flag exists.
KILLED = """
import sys
from pathlib import Path
from gpu.part import Part
from gpu.run_queue import Queue
folder = Path(sys.argv[1])
program = {head!r} + "add('1')\\nif not os.path.exists(sys.argv[1]): time.sleep(60)\\nadd('2')"
part = Part("a", 30, ("-c", program, str(folder / "flag")), ("bench/gpu/part.py",))
sys.exit(Queue(folder / "out", folder / "work", "cpu", minutes=1, committed=folder / "none").run([part]))
"""


def test_kill_9_keeps_the_rows_ends_the_part_and_the_next_run_goes_on(tmp_path):
    command = [sys.executable, "-c", KILLED.format(head=HEAD), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
    rows = tmp_path / "out" / "results.jsonl"
    queue = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    wait_until(lambda: read_rows(rows))
    queue.kill()
    queue.wait()
    wait_until(lambda: not alive(read_rows(rows)[0]["process"]))
    (tmp_path / "flag").touch()
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert [row["key"] for row in read_rows(rows)] == ["1", "2", ""]


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(process):
    """Whether a process runs; a zombie does not."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


TESTS = """
import os, time
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_hangs():
    if os.environ.get("HANG") == "crash": os.abort()
    if os.environ.get("HANG"): time.sleep(60)
def test_last(): pass
"""


@pytest.fixture(params=[pytest.param(0, marks=pytest.mark.slow, id="one process"), pytest.param(2, id="two processes")])
def tests(run, tmp_path, monkeypatch, request):
    """A function that runs the tests above as a part, with limits in seconds of the part and of each test."""
    file = tmp_path / "test_it.py"
    file.write_text(TESTS)
    command = (
        "-m",
        "pytest",
        "-p",
        "gpu.pytest_rows",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "-c",
        os.devnull,
        *(("-n", str(request.param)) if request.param else ()),
        str(tmp_path),
    )

    def call(seconds=30.0, limit=100.0, hang="", outcomes=True):
        monkeypatch.setenv("QUEUE_TEST_SECONDS", str(limit))
        monkeypatch.setenv("HANG", hang)
        part = Part("tests", seconds, command, ("source.py",), finished=(0, 1, 5))
        code = Queue(tmp_path / "out", tmp_path / "work", "cpu", minutes=1, committed=tmp_path / "none").run([part])
        state = run.rows()[-1]["state"]
        if not outcomes:
            return code, state
        return code, state, {row["key"].split("::")[1]: row["outcome"] for row in run.rows() if row["key"]}

    return call


def test_each_test_has_a_row_and_a_failure_fails_the_queue(tests, run):
    passed = {"test_passes": "passed", "test_fails": "failed", "test_hangs": "passed", "test_last": "passed"}
    assert tests() == (1, "done", passed)
    assert "assert 1 == 2" in next(row["error"] for row in run.rows() if row.get("outcome") == "failed")
    rows = len(run.rows())
    assert tests() == (1, "done", passed)  # the failure counts although no test ran again
    assert len(run.rows()) == rows


def test_a_file_of_tests_that_cannot_be_imported_fails_the_queue(tests, run, tmp_path):
    (tmp_path / "test_other.py").write_text("import no_such_module")
    assert tests(outcomes=False) == (1, "failed")
    assert "no_such_module" in next(row["error"] for row in run.rows() if row.get("outcome") == "failed")


def test_a_test_has_less_time_than_its_part(run):
    assert run("add(os.environ['QUEUE_TEST_SECONDS'])", seconds=20) == (0, {"a": "done"})
    assert 0 < float(run.measured()[0]) < 20


def test_a_test_that_hangs_is_recorded_with_its_stack_and_the_others_run(tests, run):
    code, state, outcomes = tests(limit=2, hang="1")
    assert (code, state) == (1, "done")
    assert outcomes == {"test_passes": "passed", "test_fails": "failed", "test_hangs": "hung", "test_last": "passed"}
    assert "in test_hangs" in next(row["error"] for row in run.rows() if row.get("outcome") == "hung")


def test_a_test_that_ends_its_process_fails_the_queue(tests, run, request):
    code, state, outcomes = tests(hang="crash")
    if "two processes" in request.node.name:  # the other worker goes on
        failed = {"test_passes": "passed", "test_fails": "failed", "test_hangs": "failed", "test_last": "passed"}
        assert (code, state, outcomes) == (1, "done", failed)
    else:
        assert (code, state) == (1, "failed")


def test_tests_cut_by_the_limit_keep_their_traceback_and_go_on(tests, run):
    code, state, outcomes = tests(seconds=6, hang="1")
    assert (code, state, outcomes["test_hangs"]) == (1, "cut", "interrupted")
    assert "time.sleep(60)" in next(row["error"] for row in run.rows() if row.get("outcome") == "interrupted")
    assert "test_last" not in outcomes
    code, state, outcomes = tests()
    assert (code, state) == (1, "done")
    assert outcomes["test_hangs"] == outcomes["test_last"] == "passed"
    assert "".join(run.measured()).count("test_passes") == 1


def test_an_error_costs_no_other_row_and_is_measured_again(run):
    program = """
from gpu.results import measure_missing
def fail():
    raise ValueError("broken")
measure_missing(results, {"1": lambda: {"x": 1 / 3}, "2": FAIL, "3": lambda: {"y": 2}})
"""
    code, states = run(program.replace("FAIL", "fail"))
    assert (code, states) == (1, {"a": "failed"})
    values = {row["key"]: row for row in run.rows()}
    assert (values["1"]["x"], values["2"]["error"], values["3"]["y"]) == (0.333333, "ValueError: broken", 2)
    assert run(program.replace("FAIL", "lambda: {'z': 3}")) == (0, {"a": "done"})
    assert run.measured() == ["1", "2", "3", "2"]


def test_a_signal_to_kdfast_ends_the_part(run):
    program = """
from gpu.results import measure_missing
from kdfast.errors import Interrupted
def stop():
    raise Interrupted("stopped by SIGINT")
measure_missing(results, {"1": stop, "2": lambda: {"y": 2}})
"""
    assert run(program) == (1, {"a": "failed"})
    assert not run.measured()


def test_wheels_are_installed_for_the_parts_that_compare_alone(run, tmp_path, monkeypatch):
    wheel = tmp_path / "data" / "wheels" / "peer-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("peer.py", "")
        file.writestr(
            "peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: peer\nVersion: 1.0\nRequires-Dist: no-such"
        )
        file.writestr("peer-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("peer-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    monkeypatch.delenv("WHEELS", raising=False)
    install = Part("wheels", 60, ("-m", "gpu.measure.wheels"), ("source.py",))
    found = ("-c", HEAD + "import importlib.util; add(str(importlib.util.find_spec('peer') is not None))")
    queue = Queue(tmp_path / "out", tmp_path / "work", "cpu", minutes=1, committed=tmp_path / "none")
    compare, other = Part("with", 20, found, ("source.py",), wheels=True), Part("without", 20, found, ("source.py",))
    assert queue.run([install, compare, other]) == 0
    assert {row["part"]: row["key"] for row in run.rows() if row["key"]}.items() >= {
        "with": "True",
        "without": "False",
    }.items()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_part_has_sources_and_a_name_of_its_own(device):
    queue = parts(device)
    assert len({part.name for part in queue}) == len(queue)
    assert all(hash_sources(part.sources) for part in queue)


def call_script(tmp_path, *arguments, **environment):
    variables = {**os.environ, "OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work"), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, env={**variables, **environment}, capture_output=True, text=True, check=False)


def test_named_parts_run_after_those_that_prepare_the_machine(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(Queue, "run", lambda _, chosen: names.extend(part.name for part in chosen))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("WORK", str(tmp_path / "work"))
    monkeypatch.setenv("DEVICE", "cpu")
    main(["1.5", "studies", "kd_loss"])
    assert names == ["machine", "build", "kd_loss", "wheels", "studies"]
    for arguments, message in ((["1", "all"], "no such part: all"), (["studies"], "usage")):
        with pytest.raises(SystemExit, match=message):
            main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_script_fails_loudly_without_a_gpu(tmp_path):
    done = call_script(tmp_path)
    assert done.returncode == 1
    assert "torch sees no CUDA device" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the states of some parts differ where there is a CUDA device")
def test_the_whole_queue_runs_on_a_cpu(tmp_path):
    done = call_script(tmp_path, "30", DEVICE="cpu", DATA=str(tmp_path))
    assert done.returncode == 0, done.stdout
    # Those of a GPU are copied from the committed results.
    rows = [row for row in read_rows(tmp_path / "out" / "results.jsonl") if row["kind"] == "cpu"]
    states = {row["part"]: row["state"] for row in rows if not row["key"]}
    assert list(states) == [part.name for part in parts("cpu")]
    assert {name for name, state in states.items() if state != "done"} == {"sanitizer", "counters", "wheels"}
    assert set(states.values()) == {"done", "skipped"}
    assert rows[0]["torch"] == torch.__version__
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "results.jsonl"]
    again = call_script(tmp_path, DEVICE="cpu", DATA=str(tmp_path))
    assert again.returncode == 0
    assert again.stdout.count("known") == 2 * (len(states) - 5)  # all but machine, build and the skipped ones
