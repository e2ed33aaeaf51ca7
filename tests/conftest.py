"""Fixtures of all tests: seeds, NaN in uninitialized memory, and the backends to test."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from kdfast.ops import backends

THREADS = torch.get_num_threads()


def pytest_collection_finish():
    """Restore torch's thread count, which affects training: test modules import FFCV, which sets it to one."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory):
    """Keep what commands remember of files out of the user's cache folder."""
    os.environ["KDFAST_CACHE_DIR"] = str(tmp_path_factory.mktemp("remembered"))


@pytest.fixture
def terminate_when():
    """A function that sends SIGTERM to this process, from a thread, once a condition holds."""
    ended, senders = threading.Event(), []

    def start(condition):
        def send():
            while not condition():
                if ended.wait(0.05):
                    return
            os.kill(os.getpid(), signal.SIGTERM)

        senders.append(threading.Thread(target=send))
        senders[-1].start()

    yield start
    ended.set()
    for sender in senders:
        sender.join()


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (for libraries that draw from the global state)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_path(monkeypatch):
    """Restore the path that modules are imported from, to which a network of a user's file adds its folder."""
    monkeypatch.setattr("sys.path", list(sys.path))


@pytest.fixture(autouse=True)
def _poisoned_empty(request, monkeypatch):
    """Fill `torch.empty` with NaN, so that a kernel with unwritten output fails; `no_poison` disables it."""
    if "no_poison" in request.fixturenames:
        return
    empty, empty_like = torch.empty, torch.empty_like

    @torch.no_grad()
    def poison(x):
        return x.fill_(float("nan")) if x.is_floating_point() and not x.is_meta and type(x) is torch.Tensor else x

    if not os.environ.get("KDFAST_NO_POISON"):
        monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
        monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.fixture
def no_poison():
    """Keep `torch.empty` unchanged, for tests that trace or count memory."""


# Forks a process for each program, which then need not import torch. Its own threads would not survive a fork.
FORKS = """
import json, os, sys
import torch, kdfast
torch.set_num_threads(1)
kdfast.kd_loss, kdfast.grad_norms, kdfast.head_solve
for line in sys.stdin:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        program, environment = json.loads(line)
        os.environ.update(environment)
        exec(program, {"__name__": "__main__"})
        sys.exit()
    os.close(writing)
    with open(reading) as stream:
        printed = stream.read()
    print(json.dumps([os.waitpid(child, 0)[1], printed]), flush=True)
"""


@pytest.fixture(scope="session")
def run_program():
    """Return a function that runs a program in a process of its own: source and environment -> what it prints."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKS], **pipes) as process:

        def run(program, environment=None):
            process.stdin.write(json.dumps([program, environment or {}]) + "\n")
            process.stdin.flush()
            status, printed = json.loads(process.stdout.readline())
            assert status == 0, f"exit status {status} of the program; see the standard error"
            return printed

        yield run
        process.stdin.close()


def pytest_generate_tests(metafunc):
    """Run a test with a `<op>_backend` argument on each CPU backend of the operator in `KDFAST_TEST_BACKENDS`."""
    for op, device in backends.TABLE:
        argument = f"{op}_backend"
        if device == "cpu" and argument in metafunc.fixturenames:
            allowed = os.environ.get("KDFAST_TEST_BACKENDS", ",".join(backends.TABLE[op, device])).split(",")
            names = [name for name in backends.TABLE[op, device] if name in allowed]
            metafunc.parametrize(argument, names)
