"""kd_loss on a CUDA device: against float64, without host synchronization, inside a CUDA graph."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdfast

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def case(n: int, c: int, dtype: torch.dtype):
    generator = torch.Generator("cuda").manual_seed(n + c)
    logits = (4 * torch.randn(n, c, device="cuda", generator=generator)).to(dtype).requires_grad_()
    teacher = (4 * torch.randn(2 * n, c, device="cuda", generator=generator)).half()
    labels = torch.randint(c, (n,), device="cuda", generator=generator)
    rows = torch.randint(2 * n, (n,), device="cuda", generator=generator)
    return logits, labels, teacher, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(7, 1), (128, 10), (130, 100), (64, 1000), (16, 8192), (16, 16384), (8, 32000), (3, 131072)],
)
def test_loss_and_gradient_against_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, labels, teacher, rows = case(*shape, dtype)
    loss = kdfast.kd_loss(logits, labels, teacher, rows, backend="triton")
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    expected = kdfast.kd_loss(exact, labels, teacher.double(), rows, backend="reference")
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=1e-6)
    check_gradient(logits.grad, exact.grad, 2e-6)


def check_gradient(found: torch.Tensor, exact: torch.Tensor, share: float) -> None:
    """Compare with float64: the rounding of the dtype, and a share of the largest element."""
    unit = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[found.dtype]
    # Half of the distance between subnormal numbers, which small gradients in float16 are.
    smallest = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps / 2
    bound = unit * exact.abs() + share * exact.abs().max() + smallest
    assert ((found.double() - exact).abs() <= bound).all()


DIVERGENCES = {
    "jsd": {"jsd_beta": 0.3},
    "dkd": {"dkd_weights": (0.7, 3.0)},
    "standardized": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 3), (130, 100), (64, 1000), (16, 8192), (8, 32000), (3, 131072)])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_other_divergences_against_float64(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, labels, teacher, rows = case(*shape, dtype)
    options = {"divergence": name, **DIVERGENCES[name]}
    loss = kdfast.kd_loss(logits, labels, teacher, rows, **options, backend="triton")
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    expected = kdfast.kd_loss(exact, labels, teacher.double(), rows, **options, backend="reference")
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=5e-6, atol=2e-6)
    check_gradient(logits.grad, exact.grad, 5e-6)


def run_grid(name: str, groups: list[str]) -> dict[str, list[str]]:
    """Run groups of a program of tests on the device and return the failures by group."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(name)), "cuda", *groups]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {group: failures for group, (_, failures) in json.loads(done.stdout.splitlines()[-1]).items()}


# The others compile for minutes.
GROUPS = (
    "options", "strides", "masked", "large", "ties", "topk_edges", "far", "ignored", "out_of_range", "scaling",
    "weights",
)  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
def test_options_masks_and_far_spread_logits(group: str) -> None:
    assert run_grid("triton_grid.py", [group]) == {group.replace("_", " "): []}


@pytest.mark.parametrize("group", ["masks", "far", "indices", "special", "own"])
def test_masks_and_far_spread_logits_of_other_divergences(group: str) -> None:
    results = run_grid("triton_divergences_grid.py", [group])
    assert list(results) == {"special": ["special"], "own": ["own numbers"]}.get(group, list(DIVERGENCES))
    assert not {name: failures for name, failures in results.items() if failures}


def test_forward_and_backward_never_wait_for_the_device() -> None:
    logits, labels, teacher, rows = case(256, 1000, torch.bfloat16)
    for name in ("kl", *DIVERGENCES):
        kdfast.kd_loss(logits, labels, teacher, rows, divergence=name).backward()  # compiles
    logits.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        kdfast.kd_loss(logits, labels, teacher, rows).backward()
        (2 * kdfast.kd_loss(logits, labels, teacher, rows)).backward()
        for name in DIVERGENCES:
            kdfast.kd_loss(logits, labels, teacher, rows, divergence=name, backend="triton").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_the_loss() -> None:
    logits, labels, teacher, rows = case(128, 100, torch.float32)
    expected = kdfast.kd_loss(logits, labels, teacher, rows)
    (gradient,) = torch.autograd.grad(expected, logits)
    # The node that accumulates a gradient keeps the stream on which it was created, and a graph cannot wait for the
    # default stream. So the captured stream has a leaf of its own.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        leaf = logits.detach().clone().requires_grad_()
        for _ in range(3):
            kdfast.kd_loss(leaf, labels, teacher, rows).backward()
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = kdfast.kd_loss(leaf, labels, teacher, rows)
        loss.backward()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad():
        loss.zero_()
        leaf.grad.zero_()
    graph.replay()
    torch.testing.assert_close(loss.detach(), expected.detach())
    torch.testing.assert_close(leaf.grad, gradient)


def test_index_out_of_range_raises_with_validate_and_gives_nan_without() -> None:
    logits, labels, teacher, rows = case(32, 100, torch.float32)
    rows[3] = 10_000
    with pytest.raises(IndexError, match="rows"):
        kdfast.kd_loss(logits, labels, teacher, rows, validate=True)
    losses = kdfast.kd_loss(logits, labels, teacher, rows, reduction="none")
    assert losses.isnan().nonzero().flatten().tolist() == [3]
