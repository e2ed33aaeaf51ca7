"""Streaming of image files by processes: the same batches, errors, and processes that end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.data.readers.folders.file_loader import FileLoader
from kdfast.data.readers.registry import open_source
from kdfast.errors import DataError, SubsetError, UsageError


@pytest.fixture
def train(tmp_path, image_folder):
    return open_source(image_folder(tmp_path, per_class=20)).train


@pytest.fixture
def loader(train):
    loader = FileLoader(train, workers=2)
    yield loader
    loader.close()


def collected(loader, ids, size):
    return [batch.clone() for batch in loader.batches(ids, size)]


def test_batches_are_those_of_the_split_in_every_epoch(train, loader):
    for seed, size in ((0, 7), (1, 7), (2, 3), (3, 40)):
        ids = np.random.default_rng(seed).permutation(len(train))[:37]
        batches = collected(loader, ids, size)
        assert [len(batch) for batch in batches] == [min(size, 37 - start) for start in range(0, 37, size)]
        assert np.array_equal(torch.cat(batches).numpy(), train.read(ids))


def test_an_epoch_that_is_left_early_and_two_at_a_time_do_not_disturb_others(train, loader):
    ids = np.arange(len(train))
    first = loader.batches(ids, 4)
    next(first)
    other = loader.batches(ids[::-1], 4)
    assert np.array_equal(next(other).numpy(), train.read(ids[::-1][:4]))
    assert np.array_equal(next(first).numpy(), train.read(ids[4:8]))
    first.close()
    other.close()
    assert np.array_equal(torch.cat(collected(loader, ids, 4)).numpy(), train.read(ids))


def test_a_file_that_cannot_be_read_is_named_and_the_loader_goes_on(train, loader):
    ids = np.arange(len(train))
    file = Path(train.files[9])
    content = file.read_bytes()
    file.write_bytes(content[:40])
    with pytest.raises(DataError, match=str(file)):
        collected(loader, ids, 4)
    file.write_bytes(content)
    assert len(collected(loader, ids, 4)) == 10


def test_a_killed_process_is_an_error_at_once_and_the_next_epoch_has_new_ones(train, loader):
    ids = np.arange(len(train))
    before = set(psutil_children())
    batches = loader.batches(ids, 2)
    next(batches)
    workers = sorted(set(psutil_children()) - before)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    time.sleep(0.5)  # until the other end of its pipe is known to be closed
    start = time.monotonic()
    with pytest.raises(DataError, match="a process that decodes images has ended"):
        for _ in batches:
            pass
    assert time.monotonic() - start < 30
    assert len(collected(loader, ids, 8)) == 5


def psutil_children():
    return [process.pid for process in pytest.importorskip("psutil").Process().children()]


def test_close_ends_the_processes_and_rejects_later_epochs(train):
    loader = FileLoader(train, workers=2)
    before = set(psutil_children())
    collected(loader, [0, 1, 2], 2)
    assert set(psutil_children()) - before
    loader.close()
    assert not set(psutil_children()) - before
    with pytest.raises(UsageError, match="closed"):
        loader.batches([0], 1)


def test_rejects_bad_ids(train, loader):
    with pytest.raises(SubsetError, match="occurs 2 times"):
        loader.batches([1, 1], 2)
    with pytest.raises(SubsetError, match="`batch_size` is 0"):
        loader.batches([1], 0)


def test_workers_are_limited_to_the_share_of_the_cores(train, monkeypatch):
    cores = len(os.sched_getaffinity(0))
    assert FileLoader(train, workers=10_000)._workers == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    assert FileLoader(train)._workers == 1


PROGRAM = """
import sys
from kdfast.data.readers.folders.file_loader import FileLoader
from kdfast.data.readers.registry import open_source
train = open_source(sys.argv[1]).train
batches = FileLoader(train, workers=2).batches(list(range(len(train))), 4)
next(batches)
print("ready", flush=True)
sys.stdin.read()
"""


def test_processes_end_with_a_killed_parent(tmp_path, image_folder):
    psutil = pytest.importorskip("psutil")
    root = image_folder(tmp_path, per_class=20)
    command = [sys.executable, "-c", PROGRAM, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        workers = psutil.Process(parent.pid).children()
        assert len(workers) == 2
        parent.kill()
        _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
