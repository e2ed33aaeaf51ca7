from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from kdfast import files
from kdfast.errors import CacheMismatch, DataError, OutputError

WRITERS = {
    "bytes": lambda path: _through_file(path, lambda f: f.write(bytes(1_000_000))),
    "numpy": lambda path: _through_file(path, lambda f: np.save(f, np.zeros(200_000))),
    "torch": lambda path: _through_file(path, lambda f: torch.save({"a": torch.zeros(200_000)}, f)),
    "numpy-by-path": lambda path: _through_path(path, lambda p: np.save(p, np.zeros(200_000))),
    "torch-by-path": lambda path: _through_path(path, lambda p: torch.save({"a": torch.zeros(200_000)}, p)),
}

NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


def _through_file(path, write):
    with files.atomic_write(path) as file:
        write(file)


def _through_path(path, write):
    with files.atomic_path(path) as temporary:
        write(temporary)


def _python(code: str, *args: object, before: str = "", **kwargs) -> subprocess.Popen:
    """A child that runs `code`; `before` is shell code to run first in a mount namespace of its own."""
    command = [sys.executable, "-c", code, *map(str, args)]
    if before:
        command = [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            before + ' && exec "$@"',
            "sh",
            *command,
        ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


@pytest.fixture
def namespace(tmp_path):
    """Run code where a folder is a file system of its own, mounted with the given options."""
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")

    def run(options: str, code: str) -> str:
        place = tmp_path / "mounted"
        place.mkdir()
        child = _python(code, place, before=f"mount -t tmpfs -o {options} tmpfs {place}")
        out, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
        return out

    return run


def test_the_target_appears_whole_and_only_at_the_end(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with files.atomic_write(target) as file:
        file.write(b"new content")
        file.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new content"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_an_exception_leaves_the_old_file_and_no_remains(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        _through_file(target, lambda f: f.write(b"half") / 0)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_through_and_leaves_no_remains(tmp_path, stop):
    with pytest.raises(stop), files.atomic_write(tmp_path / "a.bin"):
        raise stop
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_each_way_of_writing_works(tmp_path, write):
    write(tmp_path / "a.npy")
    assert os.listdir(tmp_path) == ["a.npy"]
    assert (tmp_path / "a.npy").stat().st_size > 700_000


def test_the_temporary_path_keeps_folder_and_suffix(tmp_path):
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


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
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


@pytest.mark.parametrize("place", ["missing/a.bin", "file/a.bin", "folder", "n" * 250])
def test_places_that_take_no_file(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write") as caught, files.atomic_write(tmp_path / place):
        pytest.fail("the body must not run")
    assert "\n" not in str(caught.value)


def test_errors_of_the_body_are_not_blamed_on_the_target(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic_write(tmp_path / "a.bin"):
        (tmp_path / "input-that-is-missing").read_bytes()
    with pytest.raises(ConnectionResetError), files.atomic_write(tmp_path / "a.bin"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    with pytest.raises(DataError), files.atomic_write(tmp_path / "a.bin"):
        raise DataError("bad")


LIMITED = """
import os, resource, sys
sys.path.insert(0, sys.argv[2])
import test_files
from kdfast.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for write in test_files.WRITERS.values():
    try:
        write(sys.argv[1] + "/a.npy")
    except OutputError as exc:
        print(exc, os.listdir(sys.argv[1]))
"""


def test_a_file_size_limit_is_an_output_error_in_each_way_of_writing(tmp_path):
    out, err = _python(LIMITED, tmp_path, os.path.dirname(__file__)).communicate(timeout=60)
    lines = out.splitlines()
    assert len(lines) == len(WRITERS), err
    assert all("File too large" in line and line.endswith("[]") for line in lines)


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


def test_a_full_disk(namespace):
    saved, listing, refused = namespace("size=64k", FULL).splitlines()
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


def test_a_read_only_file_system(namespace):
    lines = namespace("ro", READ_ONLY).splitlines()
    assert len(lines) == 4
    assert all("Read-only file system" in line for line in lines)


HALF = """
import sys, time
from kdfast import files
with files.atomic_write(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print(file.name, flush=True)
    time.sleep(60)
"""


def test_remains_of_a_killed_writer_are_removed_by_the_next_one_and_living_ones_are_not(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    child = _python(HALF, target)
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


def test_remains_of_killed_writers_are_removed_whatever_their_target_and_living_ones_are_not(tmp_path):
    killed, living = _python(HALF, tmp_path / "step-1.pt"), _python(HALF, tmp_path / "step-2.pt")
    try:
        remains, work = (child.stdout.readline().strip() for child in (killed, living))
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        for name in (".hidden", "a-step-1.pt"):
            (tmp_path / name).write_text("mine")
        (tmp_path / ".kdtmp-0123456789ab-folder").mkdir()
        before = set(os.listdir(tmp_path))
        with files.atomic_path(tmp_path / "b") as own:
            files.remove_stale(tmp_path)
            assert own.exists()
        assert set(os.listdir(tmp_path)) == before - {os.path.basename(remains)} | {"b"}
        assert os.path.exists(work)
    finally:
        living.send_signal(signal.SIGKILL)
        living.communicate()
    files.remove_stale(tmp_path)
    assert not os.path.exists(work)


def test_concurrent_writers_never_show_a_mixed_or_missing_file(tmp_path):
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


def test_json_round_trip_and_its_errors(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"ä": [1, 2.5, None]})
    assert files.read_json(path) == {"ä": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, float("nan"))
    assert files.read_json(path) == {"ä": [1, 2.5, None]}
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="not valid JSON"):
        files.read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CacheMismatch, match="not valid JSON"):
        files.read_json(path, error=CacheMismatch)
    with pytest.raises(DataError, match="No such file"):
        files.read_json(tmp_path / "missing.json")


def test_sha256(tmp_path):
    content = os.urandom(2_500_000)
    (tmp_path / "a").write_bytes(content)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    with pytest.raises(DataError, match="No such file"):
        files.sha256_file(tmp_path / "b")


def test_check_writable_makes_the_folder_and_leaves_it_empty(tmp_path):
    assert files.check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        files.check_writable(tmp_path / "file")


LOCK = """
import sys, time
from kdfast.files import FolderLock
with FolderLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_and_freed_by_kill(tmp_path):
    child = _python(LOCK, tmp_path)
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"in use by process {child.pid} on"), files.FolderLock(tmp_path):
            pytest.fail("held twice")
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    with files.FolderLock(tmp_path), pytest.raises(OutputError, match="in use by process"):
        files.FolderLock(tmp_path).__enter__()
    with files.FolderLock(tmp_path):
        pass


def test_a_lock_needs_its_folder(tmp_path):
    with pytest.raises(OutputError, match="No such file"):
        files.FolderLock(tmp_path / "missing").__enter__()
