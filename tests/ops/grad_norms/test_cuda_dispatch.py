"""Functions of per-sample gradients on a GPU, as far as a CPU shows: the backend, and what is passed to its kernels."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdfast.ops import backends
from kdfast.ops.grad_norms import dispatch, reference
from kdfast.ops.grad_norms.factors import Convolution, Geometry, OuterProduct

pytestmark = pytest.mark.skipif(
    not backends.is_available("grad_norms", "cpu", "native"), reason="needs the compiled extension"
)

SAME = Geometry((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), 1)
DEPTHWISE = SAME._replace(groups=4)


class OnGpu(torch.Tensor):
    """A tensor of the CPU that claims to be on a GPU."""

    is_cuda = True


@pytest.fixture
def native(monkeypatch):
    """Return kdfast.ops.grad_norms.native over an extension whose kernels for a GPU run on the CPU, in three parts."""
    from kdfast.ops.grad_norms import native

    cpu = native.extension
    monkeypatch.setattr(backends, "_build_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))

    def run(call, out, stream):
        assert stream == 7
        cpu.conv_squared_norms(call, out, 1, 2)

    fake = SimpleNamespace(
        Convolution=cpu.Convolution,
        conv_squared_norms_parts=lambda call: 1,
        conv_sums_of_squares_parts=lambda call: 3,
        conv_squared_norms_cuda=run,
    )
    monkeypatch.setattr(native, "extension", fake)
    backends._resolve.cache_clear()
    yield native
    backends._resolve.cache_clear()


@pytest.mark.parametrize("geometry", [SAME, DEPTHWISE, None], ids=["convolution", "depthwise", "sequence"])
def test_elements_use_the_kernels_of_the_gpu(native, geometry):
    if geometry is None:
        factors = OuterProduct(torch.randn(3, 5, 7), torch.randn(3, 5, 4))
        shape = (4, 7)
    else:
        factors = Convolution(torch.randn(3, 4, 6, 5), torch.randn(3, 8, 6, 5), geometry)
        shape = (8, 4 // geometry.groups, 3, 3)
    weights = torch.rand(shape)
    claimed = dataclasses.replace(factors, a=factors.a.as_subclass(OnGpu), b=factors.b.as_subclass(OnGpu))
    expected = reference.weighted_squared_norms(factors, weights).double()
    found = native.weighted_squared_norms(claimed, weights)
    torch.testing.assert_close(torch.Tensor(found), expected, rtol=1e-5, atol=0)
    found = native.sums_of_squares(claimed, shape)
    torch.testing.assert_close(torch.Tensor(found), reference.sums_of_squares(factors, shape), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("backend", "expected"), [("auto", "native"), ("cuda", "native"), ("reference", "reference")])
def test_float32_on_a_gpu_selects_the_kernels(native, monkeypatch, backend, expected):
    calls = []
    names = ("squared_norms", "weighted_squared_norms", "sums_of_squares")
    for module in (native, reference):
        for name in names:
            call = (module.__name__.rpartition(".")[2], name)
            monkeypatch.setattr(module, name, lambda *arguments, call=call: calls.append(call))
    with FakeTensorMode():
        factors = Convolution(torch.empty(2, 4, 6, 5, device="cuda"), torch.empty(2, 8, 6, 5, device="cuda"), SAME)
        dispatch.squared_norms(factors, backend=backend)
        dispatch.weighted_squared_norms(factors, torch.empty(8, 4, 3, 3, device="cuda"), backend)
        dispatch.sums_of_squares(factors, (8, 4, 3, 3), backend)
    assert calls == [(expected, name) for name in names]
