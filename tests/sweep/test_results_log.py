import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdfast.errors import DataError, OutputError
from kdfast.sweep.results_log import ResultsLog

KEY, OTHER = "ab" * 32, "cd" * 32


def python(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_reads_each_row_once_in_order(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path)
    assert log.rows() == []
    for key, value in (("b", 1), ("a", 2), ("b", 3)):
        log.append({"key": key, "value": value})
    assert log.rows() == [{"key": "b", "value": 1}, {"key": "a", "value": 2}]
    assert log.done() == {"a", "b"}


def test_refuses_an_edited_row_in_tables(tmp_path: Path) -> None:
    row = {"key": KEY, "method": "random", "fraction": 0.5, "kd": False, "seed": 0, "steps": 1, "kept": 10,
           "test_top1": 43.25, "seconds": 1.0, "settings": {"data": "f", "student": "resnet8", "steps": 1}}  # fmt: skip
    log = ResultsLog(tmp_path)
    log.append(row)
    assert log.results() == [row]
    raw = log.path.read_bytes()
    for old, new in ((b"43.25", b"63.25"), (b"random", b"rbndom"), (b'"seed": 0', b'"seed": 1'), (b"0.5", b"0.4")):
        log.path.write_bytes(raw.replace(old, new))
        with pytest.raises(DataError, match=r"line 1 of .* does not match its own digest: delete that line"):
            log.results()
    log.path.write_text(json.dumps(row) + "\n")  # as earlier versions wrote it
    assert log.results() == [row]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_next_row_replaces_an_incomplete_last_line(tmp_path: Path, cut: int) -> None:
    log = ResultsLog(tmp_path)
    for key in "abc":
        log.append({"key": key, "value": 0.5})
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    assert log.done() == {"a", "b"}
    log.append({"key": "c", "value": 0.25})
    lines = log.path.read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "b", "c"]
    assert json.loads(lines[-1])["value"] == 0.25


def test_rejects_a_damaged_line_and_leaves_the_file_unchanged(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path)
    content = b'{"key": "a"}\n{"ke\n{"key": "c"}\n'
    log.path.write_bytes(content)
    with pytest.raises(DataError, match="line 2"):
        log.rows()
    with pytest.raises(DataError, match="line 2"):
        log.append({"key": "d"})
    assert log.path.read_bytes() == content


def test_failed_append_leaves_no_partial_row(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        ResultsLog(tmp_path / "missing").append({"key": "a"})
    log = ResultsLog(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        log.append({"key": "a", "value": float("nan")})
    assert log.rows() == []


def test_concurrent_appends_lose_and_repeat_no_row(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kdfast.sweep.results_log import ResultsLog\n"
        "log = ResultsLog(Path(sys.argv[1]))\n"
        "for k in range(25): log.append({'key': f'k{k}', 'who': sys.argv[2], 'pad': 'x' * 500})"
    )
    processes = [python(code, tmp_path, who) for who in range(4)]
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0] * 4
    rows = ResultsLog(tmp_path).rows()
    assert sorted(row["key"] for row in rows) == sorted(f"k{k}" for k in range(25))


def test_claim_excludes_other_processes_and_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from kdfast.sweep.results_log import ResultsLog\n"
        "with ResultsLog(Path(sys.argv[1])).claim(sys.argv[2]) as mine: print(mine, flush=True); time.sleep(100)"
    )
    holder = python(code, tmp_path, KEY)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        log = ResultsLog(tmp_path)
        with log.claim(KEY) as mine:
            assert not mine
        with log.claim(OTHER) as mine:
            assert mine
        holder.kill()
        holder.wait()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with log.claim(KEY) as mine:
                if mine:
                    break
        assert mine
    finally:
        holder.kill()
        holder.communicate()


ROW = {"key": "a", "method": "random", "fraction": 0.5, "kd": False, "seed": 0, "steps": 1, "kept": 9,
       "test_top1": 50.0, "seconds": 1.0, "settings": {"data": "f", "student": "resnet8", "steps": 1}}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [("test_top1", "50"), ("test_top1", -1.0), ("fraction", 0), ("kd", 1), ("seed", 0.5), ("kept", None), ("key", [])],
)
def test_names_the_line_and_field_of_a_changed_row(tmp_path, field, value):
    log = ResultsLog(tmp_path)
    log.path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, {**ROW, "key": "b", field: value})))
    with pytest.raises(DataError, match=rf"line 2 of .*results\.jsonl.*: field {field}.*delete that line"):
        log.results()


@pytest.mark.parametrize("name", ["method", "settings", "test_top1", "steps"])
def test_names_the_line_and_a_missing_field(tmp_path, name):
    log = ResultsLog(tmp_path)
    log.path.write_text(json.dumps({key: value for key, value in ROW.items() if key != name}) + "\n")
    with pytest.raises(DataError, match=rf"line 1 of .*missing required field {name}"):
        log.results()


@pytest.mark.parametrize(
    "line", ['{"key": "b", "x": NaN}', '{"key": "b", "x": 1e999}', '{"key": "b", "x": ' + "[" * 200 + "]" * 200 + "}"]
)
def test_refuses_rows_that_are_no_strict_json(tmp_path, line):
    log = ResultsLog(tmp_path)
    log.path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(DataError, match=r"line 2 of \S*results\.jsonl is (not valid JSON|nested).*: delete that line"):
        log.rows()
