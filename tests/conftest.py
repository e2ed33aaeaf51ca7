"""What every test shares: a seed, memory that is not accidentally zero, and the names of the backends."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from kdfast.ops import backends

THREADS = torch.get_num_threads()


def pytest_collection_finish():
    """Importing FFCV sets torch to one thread, and test modules import it; what a test trains depends on the count."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (for libraries that draw from the global state)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty(request, monkeypatch):
    """`torch.empty` gives NaN, so that a kernel that leaves an output unwritten fails. `no_poison` turns it off."""
    if "no_poison" in request.fixturenames:
        return
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x):
        return x.fill_(float("nan")) if x.is_floating_point() and not x.is_meta and type(x) is torch.Tensor else x

    if not os.environ.get("KDFAST_NO_POISON"):
        monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
        monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.fixture
def no_poison():
    """Leave `torch.empty` as it is, for tests that trace or count memory."""


def pytest_generate_tests(metafunc):
    """A `<op>_backend` argument runs a test on each CPU backend of that operator, `KDFAST_TEST_BACKENDS` permitting."""
    for op, device in backends.TABLE:
        argument = f"{op}_backend"
        if device == "cpu" and argument in metafunc.fixturenames:
            allowed = os.environ.get("KDFAST_TEST_BACKENDS", ",".join(backends.TABLE[op, device])).split(",")
            names = [name for name in backends.TABLE[op, device] if name in allowed]
            metafunc.parametrize(argument, names)
