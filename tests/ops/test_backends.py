"""The dispatch table: selection, errors, and a single warning on fallback."""

from __future__ import annotations

import shutil
import subprocess
import warnings

import pytest
import torch

import kdfast
from kdfast.errors import BackendUnavailable, UsageError
from kdfast.ops import backends


@pytest.fixture(autouse=True)
def _clear_caches(monkeypatch):
    monkeypatch.delenv("KDFAST_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cached = backends._resolve, backends._import_problem
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_every_row_ends_in_the_reference():
    for row in backends.TABLE.values():
        assert row[-1] == "reference"


def test_auto_selects_the_preferred_backend_without_warning():
    assert backends.resolve("kd_loss", "cpu", "float32") == "native"
    assert backends.resolve("kd_loss", "privateuseone", "float32") == "reference"


def test_fallback_warns_once_with_the_reason(monkeypatch):
    monkeypatch.setattr(backends, "_import_problem", lambda module: f"{module} cannot be imported (gone)")
    with pytest.warns(RuntimeWarning, match="kd_loss on cpu falls back to reference: native: kdfast._native cannot"):
        assert backends.resolve("kd_loss", "cpu", "float32") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("kd_loss", "cpu", "float32") == "reference"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_unsupported_dtype_selects_the_reference_without_warning(device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("kd_loss", device, "float64") == "reference"
    named = backends.TABLE["kd_loss", device][0]
    with pytest.raises(BackendUnavailable, match="it supports float32, bfloat16, float16, not float64"):
        backends.resolve("kd_loss", device, "float64", named)


def test_float64_logits_run_with_auto_but_not_with_native():
    z, t = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = kdfast.kd_loss(z, torch.tensor([0, 1, 2]), t)
    assert loss.dtype == torch.float64
    with pytest.raises(BackendUnavailable, match=r"backend='native'.*not float64"):
        kdfast.kd_loss(z, torch.tensor([0, 1, 2]), t, backend="native")


def test_broken_extension_falls_back_to_the_reference(monkeypatch):
    monkeypatch.setattr(backends, "_import_problem", lambda module: f"{module} cannot be imported (gone)")
    with pytest.warns(RuntimeWarning, match="kdfast._native cannot be imported"):
        assert backends.resolve("kd_loss", "cpu") == "reference"
    with pytest.raises(BackendUnavailable, match="gone"):
        backends.resolve("kd_loss", "cpu", backend="native")
    assert "gone" in {choice.op: choice for choice in backends.choices() if choice.device == "cpu"}["kd_loss"].reason


@pytest.mark.parametrize("name", ["triton", "cuda", "nonsense"])
def test_rejects_named_backend_that_cannot_run(name):
    z = torch.randn(2, 3)
    with pytest.raises(BackendUnavailable, match=f"backend='{name}'.*choose one of native, reference"):
        kdfast.kd_loss(z, torch.tensor([0, 1]), z, backend=name)


@pytest.mark.parametrize(
    "setting", ["reference", "kd_loss=reference", "kd_loss=reference,views=native", "native,kd_loss=reference"]
)
def test_environment_variable_replaces_auto(monkeypatch, setting):
    monkeypatch.setenv("KDFAST_BACKEND", setting)
    assert backends.resolve("kd_loss", "cpu") == "reference"
    assert backends.resolve("kd_loss", "cpu", backend="native") == "native"
    assert ("kd_loss", "cpu", "reference") in {choice[:3] for choice in backends.choices()}


@pytest.mark.parametrize(("name", "op"), [("ghost", "grad_norms"), ("head", "softmax_head")])
def test_environment_variable_accepts_earlier_operator_names(monkeypatch, name, op):
    monkeypatch.setenv("KDFAST_BACKEND", f"{name}=reference")
    assert backends.resolve(op, "cpu") == "reference"
    assert backends.resolve("kd_loss", "cpu") == "native"
    assert {choice.backend for choice in backends.choices() if choice.op == op} == {"reference"}


def test_rejects_bad_environment_setting(monkeypatch):
    monkeypatch.setenv("KDFAST_BACKEND", "kd_los=native")
    with pytest.raises(UsageError, match="no operator is named 'kd_los': did you mean 'kd_loss'"):
        backends.resolve("kd_loss", "cpu")
    monkeypatch.setenv("KDFAST_BACKEND", "fastest")
    with pytest.raises(BackendUnavailable, match="KDFAST_BACKEND=fastest"):
        backends.resolve("kd_loss", "cpu")
    assert {choice.backend for choice in backends.choices()} == {"none"}


def test_choices_cover_the_table():
    assert [(choice.op, choice.device) for choice in backends.choices()] == list(backends.TABLE)
    assert all(choice.reason for choice in backends.choices())


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_extension_links_no_openmp_torch_or_cuda_runtime():
    from kdfast import _native

    done = subprocess.run(["readelf", "-d", _native.__file__], capture_output=True, text=True, check=True)
    needed = [line for line in done.stdout.splitlines() if "NEEDED" in line]
    assert any("libc.so" in line for line in needed)
    for library in ("gomp", "iomp", "libomp", "torch", "c10", "cudart"):
        assert not any(library in line for line in needed), needed
