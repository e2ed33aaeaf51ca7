import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdfast.errors import DataError, OutputError
from kdfast.sweep.results_log import Ledger

KEY, OTHER = "ab" * 32, "cd" * 32


def python(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_rows_come_back_in_order_and_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.rows() == []
    for key, value in (("b", 1), ("a", 2), ("b", 3)):
        ledger.append({"key": key, "value": value})
    assert ledger.rows() == [{"key": "b", "value": 1}, {"key": "a", "value": 2}]
    assert ledger.done() == {"a", "b"}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_no_row_and_is_cut_off_by_the_next(tmp_path: Path, cut: int) -> None:
    ledger = Ledger(tmp_path)
    for key in "abc":
        ledger.append({"key": key, "value": 0.5})
    ledger.path.write_bytes(ledger.path.read_bytes()[:-cut])
    assert ledger.done() == {"a", "b"}
    ledger.append({"key": "c", "value": 0.25})
    lines = ledger.path.read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "b", "c"]
    assert json.loads(lines[-1])["value"] == 0.25


def test_a_damaged_line_in_the_middle_is_refused_and_left_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    content = b'{"key": "a"}\n{"ke\n{"key": "c"}\n'
    ledger.path.write_bytes(content)
    with pytest.raises(DataError, match="line 2"):
        ledger.rows()
    with pytest.raises(DataError, match="line 2"):
        ledger.append({"key": "d"})
    assert ledger.path.read_bytes() == content


def test_a_row_that_cannot_be_written_leaves_no_half(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot append"):
        Ledger(tmp_path / "missing").append({"key": "a"})
    ledger = Ledger(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        ledger.append({"key": "a", "value": float("nan")})
    assert ledger.rows() == []


def test_processes_that_append_at_once_lose_and_repeat_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kdfast.sweep.results_log import Ledger\n"
        "for k in range(25): Ledger(Path(sys.argv[1])).append({'key': f'k{k}', 'who': sys.argv[2], 'pad': 'x' * 500})"
    )
    processes = [python(code, tmp_path, who) for who in range(4)]
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0] * 4
    rows = Ledger(tmp_path).rows()
    assert sorted(row["key"] for row in rows) == sorted(f"k{k}" for k in range(25))


def test_a_claim_keeps_other_processes_off_and_dies_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from kdfast.sweep.results_log import Ledger\n"
        "with Ledger(Path(sys.argv[1])).claim(sys.argv[2]) as mine: print(mine, flush=True); time.sleep(100)"
    )
    holder = python(code, tmp_path, KEY)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        ledger = Ledger(tmp_path)
        with ledger.claim(KEY) as mine:
            assert not mine
        with ledger.claim(OTHER) as mine:
            assert mine
        holder.kill()
        holder.wait()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with ledger.claim(KEY) as mine:
                if mine:
                    break
        assert mine
    finally:
        holder.kill()
        holder.communicate()
