"""The fast path gives the bits of the general path, and declines every call that is not plain."""

import subprocess
import sys

import pytest
import torch

import kdfast
from kdfast.ops.kd_loss import fast_path

N, C, M = 9, 37, 20
# Without DLPack's C interface, which PyTorch has since 2.10, no call is plain.
needs_dlpack = pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="needs torch >= 2.10")


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(N, C, generator=generator).mul_(3)
    teacher = torch.randn(M, C, generator=generator).mul_(3)
    labels = torch.randint(C, (N,), generator=generator)
    labels[2] = -100
    return z, labels, teacher, torch.randint(M, (N,), generator=generator)


def fast(z, labels, teacher, rows, **changed):
    options = {
        "alpha": 0.5,
        "temperature": 4.0,
        "t_squared": True,
        "ignore_index": -100,
        "reduction": "mean",
        "direction": "forward",
        "backend": "auto",
        "divergence": "kl",
        "jsd_beta": 0.5,
        "dkd_weights": (1.0, 8.0),
        "label_smoothing": 0.0,
    }
    return fast_path._kernel()(z, labels, teacher, rows, *{**options, **changed}.values(), 2)


@needs_dlpack
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("dtype", "teacher_dtype"), [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
def test_fast_and_general_path_agree_to_the_bit(operands, dtype, teacher_dtype, alpha, reduction, direction):
    z, labels, teacher, rows = operands
    z, teacher = z.to(dtype), teacher.to(teacher_dtype)
    options = {"alpha": alpha, "temperature": 3.0, "reduction": reduction, "direction": direction}
    assert fast(z, labels, teacher, rows, **options) is not None
    results = []
    for backend in ("auto", "native"):  # naming a backend takes the general path
        x = z.clone().requires_grad_()
        loss = kdfast.kd_loss(x, labels, teacher, rows, backend=backend, **options)
        (3 * loss).backward()
        results.append((loss.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0].dtype == torch.float32
    assert results[0][1].dtype == dtype


@needs_dlpack
@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "jsd", "jsd_beta": 0.3},
        {"divergence": "dkd", "dkd_weights": (0.5, 3.0), "alpha": 1.0},
        {"divergence": "dkd"},
        {"divergence": "standardized"},
    ],
    ids=str,
)
def test_paths_agree_to_the_bit_for_every_divergence(operands, options):
    z, *others = operands
    loss, _ = fast(z, *others, **options)
    assert torch.equal(loss, kdfast.kd_loss(z, *others, **options, backend="native"))
    results = []
    for backend in ("auto", "native"):
        x = z.clone().requires_grad_()
        kdfast.kd_loss(x, *others, **options, backend=backend).backward()
        results.append(x.grad)
    assert torch.equal(*results)


@needs_dlpack
def test_strided_operands_and_missing_rows_and_labels(operands):
    z, _, teacher, _ = operands
    wide = torch.randn(C, 2 * N).t()[::2]
    expected = kdfast.kd_loss(wide, None, teacher[:N], alpha=1.0, backend="native")
    loss, grad = fast(wide, None, teacher[:N], None, alpha=1.0)
    assert grad is None
    assert torch.equal(loss, expected)
    assert fast(z, None, teacher, None, alpha=1.0) is None, "a teacher with another number of rows needs rows"


@pytest.mark.parametrize(
    "changed",
    [
        {"alpha": 1},
        {"alpha": 1.5},
        {"alpha": torch.tensor(0.5)},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"reduction": "none"},
        {"reduction": "typo"},
        {"direction": "typo"},
        {"backend": "reference"},
        {"divergence": "typo"},
        {"divergence": "jsd", "direction": "reverse"},
        {"divergence": "jsd", "jsd_beta": 1.0},
        {"divergence": "jsd", "jsd_beta": float("nan")},
        {"divergence": "dkd", "dkd_weights": [1.0, 8.0]},
        {"divergence": "dkd", "dkd_weights": (1.0,)},
        {"divergence": "dkd", "dkd_weights": (1.0, -1.0)},
        {"ignore_index": None},
    ],
    ids=str,
)
def test_declines_unusual_options(operands, changed):
    assert fast(*operands, **changed) is None


def test_declines_unusual_operands(operands):
    z, labels, teacher, rows = operands
    assert fast(z.double(), labels, teacher, rows) is None
    assert fast(z.half(), labels, teacher, rows) is None
    assert fast(z[0], labels, teacher, rows) is None
    assert fast(z.to("meta"), labels, teacher, rows) is None
    assert fast(z.tolist(), labels, teacher, rows) is None
    assert fast(z, labels.int(), teacher, rows) is None
    assert fast(z, labels[1:], teacher, rows) is None
    assert fast(z, None, teacher, rows) is None
    assert fast(z, None, teacher, rows, alpha=1.0, divergence="dkd") is None
    assert fast(z, labels, teacher[:, 1:], rows) is None
    assert fast(z, labels, teacher.clone().requires_grad_(), rows) is None
    assert fast(z, labels, kdfast.topk_teacher(teacher, 3, 4.0), rows) is None
    assert fast(z, labels, teacher, rows.float()) is None


def test_declines_under_modes_transforms_and_another_backend(operands, monkeypatch):
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert fast(*operands) is None
    assert torch.func.vmap(lambda x: torch.zeros(()) if fast(x, *operands[1:]) is None else x.sum())(
        operands[0].expand(2, N, C)
    ).equal(torch.zeros(2))
    monkeypatch.setenv("KDFAST_BACKEND", "reference")
    assert fast(*operands) is None


@needs_dlpack
def test_indices_are_checked(operands):
    z, labels, teacher, rows = operands
    with pytest.raises(IndexError, match="rows"):
        fast(z, labels, teacher, rows + M)
    with pytest.raises(IndexError, match="labels"):
        fast(z, labels.masked_fill(labels == labels[0], C), teacher, rows)


@needs_dlpack
def test_default_device_does_not_matter(operands):
    z = operands[0].requires_grad_()
    with torch.device("meta"):
        loss, grad = fast(z, *operands[1:])
    assert loss.device.type == grad.device.type == "cpu"


def test_lazily_negated_tensors(operands):
    z, labels, teacher, rows = operands
    found = kdfast.kd_loss(torch._neg_view(z), labels, torch._neg_view(teacher), rows)
    assert torch.equal(found, kdfast.kd_loss(-z, labels, -teacher, rows))


FIRST_USE = """
import torch, kdfast
from torch._subclasses.fake_tensor import FakeTensorMode

with {mode}:
    import kdfast.ops.kd_loss.native
z = torch.ones(4, 5, requires_grad=True)
loss = kdfast.kd_loss(z, torch.zeros(4, dtype=torch.int64), torch.eye(5)[:4])
grad = torch.autograd.grad(loss, z)[0]
print(type(loss).__name__, loss.device, bool(loss > 0), type(grad).__name__, bool(grad.abs().sum() > 0))
"""


@pytest.mark.parametrize("mode", ["FakeTensorMode()", "torch.device('meta')", "torch.inference_mode()"])
def test_first_use_inside_a_mode(mode):
    code = FIRST_USE.format(mode=mode)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split() == ["Tensor", "cpu", "True", "Tensor", "True"], done.stderr
