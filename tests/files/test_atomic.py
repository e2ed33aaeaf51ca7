from __future__ import annotations

import errno
import os
import signal
import stat
import threading

import numpy as np
import pytest
import torch

from kdfast import files
from kdfast.errors import DataError, OutputError

WRITERS = {
    "bytes": lambda path: _through_file(path, lambda f: f.write(bytes(1_000_000))),
    "numpy": lambda path: _through_file(path, lambda f: np.save(f, np.zeros(200_000))),
    "torch": lambda path: _through_file(path, lambda f: torch.save({"a": torch.zeros(200_000)}, f)),
    "numpy-by-path": lambda path: _through_path(path, lambda p: np.save(p, np.zeros(200_000))),
    "torch-by-path": lambda path: _through_path(path, lambda p: torch.save({"a": torch.zeros(200_000)}, p)),
}


def _through_file(path, write):
    with files.atomic_write(path) as file:
        write(file)


def _through_path(path, write):
    with files.atomic_path(path) as temporary:
        write(temporary)


def test_target_is_replaced_only_when_the_write_is_complete(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with files.atomic_write(target) as file:
        file.write(b"new content")
        file.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new content"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_exception_keeps_the_old_file_and_removes_the_temporary_one(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        _through_file(target, lambda f: f.write(b"half") / 0)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interrupt_propagates_and_removes_the_temporary_file(tmp_path, stop):
    with pytest.raises(stop), files.atomic_write(tmp_path / "a.bin"):
        raise stop
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_writer_works(tmp_path, write):
    write(tmp_path / "a.npy")
    assert os.listdir(tmp_path) == ["a.npy"]
    assert (tmp_path / "a.npy").stat().st_size > 700_000


def test_temporary_path_keeps_folder_and_suffix(tmp_path):
    with files.atomic_path(tmp_path / "a.npy") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".npy"
        assert temporary.exists()


def test_file_mode_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_file_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def record_replace(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    files.write_json(tmp_path / "a.json", {})
    assert calls == ["file", "rename", "folder"]


@pytest.mark.parametrize("place", ["missing/a.bin", "file/a.bin", "folder", "n" * 300])
def test_rejects_unwritable_targets(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write") as caught, files.atomic_write(tmp_path / place):
        pytest.fail("the body must not run")
    assert "\n" not in str(caught.value)


def test_errors_of_the_body_propagate_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic_write(tmp_path / "a.bin"):
        (tmp_path / "input-that-is-missing").read_bytes()
    with pytest.raises(ConnectionResetError), files.atomic_write(tmp_path / "a.bin"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    with pytest.raises(DataError), files.atomic_write(tmp_path / "a.bin"):
        raise DataError("bad")


LIMITED = """
import os, resource, sys
sys.path.insert(0, sys.argv[2])
import test_atomic
from kdfast.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for write in test_atomic.WRITERS.values():
    try:
        write(sys.argv[1] + "/a.npy")
    except OutputError as exc:
        print(exc, os.listdir(sys.argv[1]))
"""


def test_file_size_limit_is_an_output_error_for_every_writer(tmp_path, start_python):
    out, err = start_python(LIMITED, tmp_path, os.path.dirname(__file__)).communicate(timeout=60)
    lines = out.splitlines()
    assert len(lines) == len(WRITERS), err
    assert all("File too large" in line and line.endswith("[]") for line in lines)


HALF = """
import sys, time
from kdfast import files
with files.atomic_write(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print(file.name, flush=True)
    time.sleep(60)
"""


def test_next_writer_removes_temporary_files_of_killed_writers_only(tmp_path, start_python):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    child = start_python(HALF, target)
    try:
        temporary = child.stdout.readline().strip()
        with files.atomic_write(tmp_path / "b-a.bin") as file:  # ends like the target's name, is not the target
            file.write(b"b")
        with files.atomic_write(target) as file:
            file.write(b"mine")
        assert os.path.exists(temporary)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert target.read_bytes() == b"mine"
    assert os.path.exists(temporary)
    files.write_json(tmp_path / "b-a.bin", 1)
    assert os.path.exists(temporary)
    files.write_json(target, 1)
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "b-a.bin"]


def test_remove_stale_removes_temporary_files_of_killed_writers_of_any_target(tmp_path, start_python):
    killed, running = (start_python(HALF, tmp_path / name) for name in ("step-1.pt", "step-2.pt"))
    try:
        stale, active = (child.stdout.readline().strip() for child in (killed, running))
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        for name in (".hidden", "a-step-1.pt"):
            (tmp_path / name).write_text("mine")
        (tmp_path / ".kdtmp-0123456789ab-folder").mkdir()
        before = set(os.listdir(tmp_path))
        with files.atomic_path(tmp_path / "b") as own:
            files.remove_stale(tmp_path)
            assert own.exists()
        assert set(os.listdir(tmp_path)) == before - {os.path.basename(stale)} | {"b"}
        assert os.path.exists(active)
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate()
    files.remove_stale(tmp_path)
    assert not os.path.exists(active)


def test_concurrent_writers_never_leave_a_mixed_or_missing_file(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(bytes(100_000))
    failures, done = [], threading.Event()

    def write(value):
        try:
            for _ in range(30):
                with files.atomic_write(target) as file:
                    file.write(bytes([value]) * 50_000)
                    file.write(bytes([value]) * 50_000)
        except OutputError as exc:
            failures.append(exc)

    def read():
        while not done.is_set():
            content = target.read_bytes()
            if len(content) != 100_000 or len(set(content)) != 1:
                failures.append(len(content))

    reader, writers = threading.Thread(target=read), [threading.Thread(target=write, args=(v,)) for v in (1, 2, 3)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert failures == []
    assert os.listdir(tmp_path) == ["a.bin"]
