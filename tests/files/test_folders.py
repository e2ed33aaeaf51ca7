from __future__ import annotations

import os
import signal

import pytest

from kdfast import files
from kdfast.errors import OutputError


def test_check_writable_creates_the_folder_and_leaves_it_empty(tmp_path):
    assert files.check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        files.check_writable(tmp_path / "file")


FULL = """
import sys, os, numpy as np
from kdfast import files
from kdfast.errors import OutputError
def attempt(work):
    try:
        work()
    except OutputError as exc:
        print(type(exc.__cause__).__name__, exc)
def save():
    with files.atomic_write(sys.argv[1] + "/a.npy") as file:
        np.save(file, np.zeros(100_000))
attempt(save)
print(os.listdir(sys.argv[1]))
attempt(lambda: files.check_writable(sys.argv[1] + "/b"))
with open(sys.argv[1] + "/filler", "wb", buffering=0) as file:
    file.write(bytes(10**6))
attempt(lambda: files.check_writable(sys.argv[1] + "/b"))
"""


def test_full_disk_is_reported(run_mounted):
    saved, listing, refused = run_mounted("size=64k", FULL).splitlines()
    assert "No space left on device" in saved
    assert listing == "[]"
    assert "No space left on device" in refused


READ_ONLY = """
import sys
from kdfast import files
from kdfast.errors import OutputError
for work in (files.FolderLock(sys.argv[1]).__enter__, lambda: files.write_json(sys.argv[1] + "/a.json", 1),
             lambda: files.check_writable(sys.argv[1]), lambda: files.check_writable(sys.argv[1] + "/b/c")):
    try:
        work()
    except OutputError as exc:
        print(exc)
"""


def test_read_only_file_system_is_reported(run_mounted):
    lines = run_mounted("ro", READ_ONLY).splitlines()
    assert len(lines) == 4
    assert all("Read-only file system" in line for line in lines)


LOCK = """
import sys, time
from kdfast.files import FolderLock
with FolderLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_lock_is_exclusive_and_released_by_kill(tmp_path, start_python):
    child = start_python(LOCK, tmp_path)
    try:
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match=f"in use by process {child.pid} on"), files.FolderLock(tmp_path):
            pytest.fail("locked twice")
        with pytest.raises(OutputError, match=f"in use by process {child.pid} on"):
            files.check_unlocked(tmp_path)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    with files.FolderLock(tmp_path), pytest.raises(OutputError, match="in use by process"):
        files.FolderLock(tmp_path).__enter__()
    files.check_unlocked(tmp_path)
    with files.FolderLock(tmp_path):
        pass


def test_looking_for_a_lock_leaves_none(tmp_path):
    files.check_unlocked(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_lock_requires_an_existing_folder(tmp_path):
    with pytest.raises(OutputError, match="No such file"):
        files.FolderLock(tmp_path / "missing").__enter__()
