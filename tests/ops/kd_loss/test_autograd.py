"""kd_loss inside PyTorch's machinery: autograd, autocast, GradScaler, torch.compile, torch.func, opcheck."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch

import kdfast
from kdfast.ops.kd_loss import fast_path, gradient_buffer, topk_teacher
from kdfast.ops.kd_loss.autograd import kd_loss_op, scale_op

TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
needs_dlpack = pytest.mark.skipif(TORCH < (2, 10), reason="the fast path needs torch >= 2.10")

pytestmark = pytest.mark.usefixtures("no_poison")


@pytest.fixture
def args():
    logits, teacher = 3 * torch.randn(6, 20), (3 * torch.randn(9, 20)).half()
    labels, rows = torch.randint(0, 20, (6,)), torch.randint(0, 9, (6,))
    labels[2] = -100
    return logits, labels, teacher, rows


def reference_grad(args, factor=1.0, **options):
    z = args[0].detach().double().requires_grad_()
    (grad,) = torch.autograd.grad((kdfast.kd_loss(z, *args[1:], backend="reference", **options) * factor).sum(), z)
    return grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_retained_graph_gives_independent_gradients(args, dtype):
    z = args[0].to(dtype).requires_grad_()
    loss = kdfast.kd_loss(z, *args[1:])
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss * 3, z, retain_graph=True)
    first.mul_(100)
    (third,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(third, kept)
    torch.testing.assert_close(second, kept * 3, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.0, -0.3, 0.0])
def test_scaled_loss_and_loss_in_a_sum(args, factor):
    z = args[0].requires_grad_()
    (kdfast.kd_loss(z, *args[1:]) * factor + z.sum()).backward()
    expected = reference_grad(args, factor) + 1
    torch.testing.assert_close(z.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_one_factor_per_row(args):
    z = args[0].requires_grad_()
    factors = torch.randn(6)
    (kdfast.kd_loss(z, *args[1:], reduction="none") * factors).sum().backward()
    expected = reference_grad(args, factors.double(), reduction="none")
    torch.testing.assert_close(z.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_backward_returns_the_stored_gradient_if_the_factor_is_one(args, monkeypatch):
    from kdfast.ops.kd_loss import native

    calls = []
    extension = native.extension
    spy = type("Spy", (), {"kd_loss": staticmethod(extension.kd_loss), "scale_rows": lambda *a: calls.append(a)})
    monkeypatch.setattr(native, "extension", spy)
    z = args[0].requires_grad_()
    kdfast.kd_loss(z, *args[1:]).backward()
    assert not calls
    (kdfast.kd_loss(z, *args[1:]) * 2).backward()
    assert len(calls) == 1


def test_gradient_accumulates_and_logits_need_not_be_a_leaf(args):
    w = torch.randn(20, 20, requires_grad=True)
    for _ in range(2):
        kdfast.kd_loss(args[0] @ w, *args[1:]).backward()
    w64 = w.detach().double().requires_grad_()
    kdfast.kd_loss(args[0].double() @ w64, *args[1:], backend="reference").backward()
    torch.testing.assert_close(w.grad.double(), 2 * w64.grad, rtol=1e-5, atol=1e-5)


def test_second_derivative_raises(args):
    z = args[0].requires_grad_()
    (grad,) = torch.autograd.grad(kdfast.kd_loss(z, *args[1:]), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        (grad.square().sum() + z.sum()).backward()
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.func.grad(lambda x: torch.func.grad(lambda v: kdfast.kd_loss(v, *args[1:]))(x).sum())(z.detach())
    op_loss, _ = kd_loss_op(
        z,
        *args[1:],
        None,
        None,
        None,
        None,
        None,
        0.5,
        4.0,
        True,
        -100,
        "mean",
        False,
        "kl",
        0.0,
        0.0,
        0.0,
        "native",
        True,
    )
    (grad,) = torch.autograd.grad(op_loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        (grad.square().sum() + z.sum()).backward()


@needs_dlpack
def test_computes_no_gradient_unless_needed(args, monkeypatch):
    results = []
    run = fast_path._kernel()
    monkeypatch.setattr(fast_path, "_kernel", lambda: lambda *a: results.append(run(*a)) or results[-1])
    z = args[0].requires_grad_()
    with torch.no_grad():
        kdfast.kd_loss(z, *args[1:])
    with torch.inference_mode():
        kdfast.kd_loss(z, *args[1:])
    kdfast.kd_loss(z.detach(), *args[1:])
    assert [found[1] for found in results] == [None] * 3


@needs_dlpack
@pytest.mark.parametrize("differentiated", [False, True])
def test_loss_frees_its_gradient_without_the_garbage_collector(args, monkeypatch, differentiated):
    seen = []
    run = fast_path._kernel()

    def spy(*a):
        loss, grad = run(*a)
        seen.append(weakref.ref(grad))
        return loss, grad

    monkeypatch.setattr(fast_path, "_kernel", lambda: spy)
    z = args[0].requires_grad_()
    gc.disable()
    try:
        loss = kdfast.kd_loss(z, *args[1:])
        if differentiated:
            torch.autograd.grad(loss, z)
            assert seen[0]() is None, "the loss still refers to a gradient that was returned"
        del loss
        assert seen[0]() is None
    finally:
        gc.enable()


def test_gradcheck_of_the_reference(args):
    z = args[0][:, :5].double().requires_grad_()
    labels = args[1].clamp_max(4)
    for direction in ("forward", "reverse"):

        def loss(x, direction=direction):
            return kdfast.kd_loss(x, labels, args[2][:, :5], args[3], direction=direction, backend="reference")

        torch.autograd.gradcheck(loss, z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(args, dtype):
    layer = torch.nn.Linear(20, 20)
    with torch.autocast("cpu", dtype=dtype):
        logits = layer(args[0])
        loss = kdfast.kd_loss(logits, *args[1:])
    assert logits.dtype == dtype
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert grad.dtype == dtype
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32


def test_float16_gradients_survive_until_the_scaler_reaches_them():
    n, c, scale = 4096, 16, 2.0**16
    z, teacher = torch.randn(n, c).half(), torch.randn(n, c).half()
    labels = torch.randint(0, c, (n,))
    z.requires_grad_()
    (kdfast.kd_loss(z, labels, teacher, alpha=0.5) * scale).backward()
    expected = reference_grad((z, labels, teacher), scale, alpha=0.5)
    # A rounding to float16, and half a unit of its subnormal numbers over 1024; without the scale it would be 2e-3.
    torch.testing.assert_close(z.grad.double(), expected, rtol=2**-10, atol=4e-6)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_float16_gradients_of_a_vocabulary_survive_until_the_scaler_reaches_them(reduction):
    n, c, scale = 4, 32000, 2.0**10
    z, teacher = torch.randn(n, c).half(), torch.randn(n, c).half()
    labels = torch.randint(0, c, (n,))
    sparse = topk_teacher(teacher, 50, 4.0)
    for target in (teacher, sparse):
        x = z.clone().requires_grad_()
        kdfast.kd_loss(x, labels, target, reduction=reduction).sum().mul(scale).backward()
        expected = reference_grad((z, labels, target), scale, reduction=reduction)
        # Half a unit of float16's subnormal numbers, 6e-8, over 1024; without the scale some 0.1% would be zero.
        torch.testing.assert_close(x.grad.double(), expected, rtol=2**-10, atol=4e-8 * scale / 1024 + 4e-8)
        assert (x.grad == 0).sum() == (expected.half() == 0).sum() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_stored_float16_gradients_do_not_overflow(reduction):
    labels, rows = torch.tensor([0, 1]), torch.arange(2)
    z, t = torch.zeros(2, 3).half(), torch.zeros(2, 3)
    z[:, 0], t[:, 1] = 2e4, 2e4  # as far apart as float16 allows
    for direction, temperature in (("forward", 31.0), ("reverse", 4.0), ("reverse", 1.0)):
        for student in (
            z,
            z / 4e4,
        ):  # the reverse divergence is steepest with half of the mass on each
            x = student.clone().requires_grad_()
            options = {"alpha": 1.0, "direction": direction, "temperature": temperature, "reduction": reduction}
            (grad,) = torch.autograd.grad(kdfast.kd_loss(x, labels, t, rows, **options).sum(), x)
            expected = reference_grad((student, labels, t, rows), **options)
            torch.testing.assert_close(grad.double(), expected, rtol=2e-3, atol=2e-3)
    x, w = z.clone().requires_grad_(), torch.tensor([1e3, 1.0])
    options = {"reduction": reduction, "weights": w}
    (grad,) = torch.autograd.grad(kdfast.kd_loss(x, labels, t, rows, **options).sum(), x)
    torch.testing.assert_close(grad.double(), reference_grad((z, labels, t, rows), **options), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_float16_gradients_under_vmap(args, weighted):
    z = torch.stack([args[0], -args[0]]).half()
    w = torch.rand(2, 6) if weighted else None
    for reduction in ("mean", "sum", "none"):

        def one(x, weights, reduction=reduction):
            return kdfast.kd_loss(x, *args[1:], weights=weights, reduction=reduction).sum()

        grads = torch.func.vmap(torch.func.grad(one), (0, 0 if weighted else None))(z, w)
        for i in range(2):
            expected = reference_grad((z[i], *args[1:]), weights=w[i] if weighted else None, reduction=reduction)
            torch.testing.assert_close(grads[i].double(), expected, rtol=2e-3, atol=1e-6)


def test_grad_scaler(args):
    layer = torch.nn.Linear(20, 20)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = kdfast.kd_loss(layer(args[0]), *args[1:])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(args, dynamic, backend):
    torch._dynamo.reset()

    def step(x, y, t, r, w):
        return kdfast.kd_loss(x * 1.5, y, t, r, weights=w, alpha=0.3)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (6, 5):
        x, w = args[0][:n].detach().requires_grad_(), torch.rand(n)
        loss = compiled(x, args[1][:n], args[2], args[3][:n], w)
        (grad,) = torch.autograd.grad(loss * 2, x)
        expected = step(x, args[1][:n], args[2], args[3][:n], w)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(grad, torch.autograd.grad(expected * 2, x)[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(*[a[:5] for a in args[:2]], args[2], args[3][:5], w), expected.detach())


@pytest.mark.skipif(TORCH < (2, 13), reason="the compiler of torch 2.8 takes new memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.filterwarnings("ignore:dynamo_pgo")
def test_compiled_code_scales_the_stored_gradient_in_place(dtype, reduction):
    torch._dynamo.reset()
    z, teacher, labels = torch.randn(512, 999).to(dtype), torch.randn(512, 999), torch.randint(0, 999, (512,))

    def step(x):
        return kdfast.kd_loss(x, labels, teacher, reduction=reduction)

    def gradient(call, x):
        (loss := call(x)).backward(torch.full_like(loss, 0.3))
        return x.grad

    # Caches of earlier compilations do not see that the operator's backward pass was changed.
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(step, fullgraph=True)
        found = gradient(compiled, z.clone().requires_grad_())
    torch.testing.assert_close(found, gradient(step, z.clone().requires_grad_()), rtol=0, atol=0)
    x = z.clone().requires_grad_()
    gradient_buffer.release()
    with torch.profiler.profile(profile_memory=True) as run:
        gradient(compiled, x)
    sizes = [e.nbytes() for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 1 <= max(itertools.accumulate(sizes)) / z.nbytes < 1.02, "more than one gradient at a time"


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_autograd_takes_an_eager_loss_without_a_break(args, factor):
    torch._dynamo.reset()
    expected = reference_grad(args, factor)
    z = args[0].requires_grad_()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        (kdfast.kd_loss(z, *args[1:]) * factor).backward()
    torch.testing.assert_close(z.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_compile_of_the_other_paths(args):
    torch._dynamo.reset()
    sparse = topk_teacher(args[2], 3, 4.0)
    for options in ({"reduction": "none"}, {"direction": "reverse"}, {"backend": "reference"}):
        compiled = torch.compile(kdfast.kd_loss, fullgraph=True, backend="aot_eager")
        for teacher in (args[2], sparse):
            expected = kdfast.kd_loss(args[0], args[1], teacher, args[3], **options)
            torch.testing.assert_close(compiled(args[0], args[1], teacher, args[3], **options), expected)


def test_compile_of_vmap_and_of_the_terms(args):
    torch._dynamo.reset()
    several = torch.stack([args[0], -args[0]]).requires_grad_()

    def total(x):
        return torch.func.vmap(lambda v: kdfast.kd_loss(v, *args[1:]))(x).sum()

    (grad,) = torch.autograd.grad(torch.compile(total, fullgraph=True, backend="aot_eager")(several), several)
    torch.testing.assert_close(grad, torch.autograd.grad(total(several), several)[0])
    terms = torch.compile(kdfast.kd_loss_terms, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(terms, kdfast.kd_loss_terms(*args))


@pytest.mark.parametrize("what", ["labels", "rows", "classes"])
def test_index_out_of_range_makes_its_row_nan_where_values_cannot_be_read(args, what):
    logits, labels, teacher, rows = args[0].double(), args[1].clone(), topk_teacher(args[2], 3, 4.0), args[3].clone()
    labels[4], rows[4], rows[5] = 1, 7, 6
    {"labels": labels, "rows": rows, "classes": teacher.classes}[what][{"classes": (7, 1)}.get(what, 4)] = -1
    bad = torch.zeros(6, dtype=torch.bool)
    bad[4] = True
    if what == "classes":
        bad = (rows == 7) & (labels != -100)
    grad = torch.func.grad(lambda v: kdfast.kd_loss(v, labels, teacher, rows, reduction="sum"))(logits)
    assert torch.equal(grad.isnan().any(1), bad)
    with pytest.raises(IndexError, match=what):
        kdfast.kd_loss(logits, labels, teacher, rows)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_vmap_and_per_sample_gradients(args, reduction):
    z = torch.stack([args[0], -args[0], args[0].flip(0)])
    w = torch.rand(3, 6)

    def one(x, y, t, r, weights):
        return kdfast.kd_loss(x, y, t, r, weights=weights, reduction=reduction).sum()

    for teachers, dim in ((args[2], None), (torch.stack([args[2], args[2] * 2, -args[2]]), 0)):
        dims = (0, None, dim, None, 0)
        values = torch.func.vmap(one, dims)(z, args[1], teachers, args[3], w)
        grads = torch.func.vmap(torch.func.grad(one), dims)(z, args[1], teachers, args[3], w)
        for i in range(3):
            t = teachers if dim is None else teachers[i]
            torch.testing.assert_close(values[i], one(z[i], args[1], t, args[3], w[i]))
            x = z[i].clone().requires_grad_()
            torch.testing.assert_close(grads[i], torch.autograd.grad(one(x, args[1], t, args[3], w[i]), x)[0])


def test_vmap_inside_grad(args):
    z = torch.stack([args[0], -args[0]])

    def total(x):
        return torch.func.vmap(lambda v: kdfast.kd_loss(v, *args[1:]))(x).sum()

    x = z.clone().requires_grad_()
    expected = torch.autograd.grad(sum(kdfast.kd_loss(v, *args[1:]) for v in x), x)[0]
    torch.testing.assert_close(torch.func.grad(total)(z), expected)


def cases():
    z, t = torch.randn(5, 12), torch.randn(5, 12).half()
    y, r = torch.randint(0, 12, (5,)), torch.randint(0, 5, (5,))
    empty = torch.randn(0, 12)
    sparse = topk_teacher(t, 3, 4.0)
    return {
        "contiguous": (z, y, t, r, None, None, None),
        "half": (z.half(), y, t, None, None, None, torch.rand(5)),
        "transposed": (z.t().contiguous().t(), y, t, r, None, None, None),
        "expanded": (z[:1].expand(5, 12), y, t[:1].expand(5, 12), None, None, None, None),
        "empty": (empty, y[:0], t, r[:0], None, None, None),
        "top-k": (z, y, sparse.values, r, sparse.classes, sparse.tail, None),
    }


@pytest.mark.parametrize("name", list(cases()))
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.filterwarnings("ignore")
def test_opcheck(name, grad, reduction):
    logits, *others = cases()[name]
    logits = logits.detach().requires_grad_(grad)
    torch.library.opcheck(
        kd_loss_op,
        (logits, *others, None, None, 0.5, 4.0, True, -100, reduction, False, "kl", 0.0, 0.0, 0.0, "native", grad),
    )


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_the_scaling():
    for factor in (torch.tensor(3.0), torch.rand(4), torch.tensor(2.0).expand(4)):
        torch.library.opcheck(scale_op, (torch.randn(4, 7).half(), factor, torch.tensor(1.0), 0.5, "native"))


def test_op_without_a_stored_gradient_says_so(args):
    z = args[0].requires_grad_()
    loss, _ = kd_loss_op(
        z,
        *args[1:],
        None,
        None,
        None,
        None,
        None,
        0.5,
        4.0,
        True,
        -100,
        "mean",
        False,
        "kl",
        0.0,
        0.0,
        0.0,
        "native",
        False,
    )
    with pytest.raises(ValueError, match="need_grad=False"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_gradients_at_once(args, dtype, reduction):
    z, *rest = args
    z = z.detach().to(dtype).requires_grad_()
    n = len(z)
    factors = torch.eye(n) if reduction == "none" else torch.arange(1.0, 4)
    for retain in (True, False):
        loss = kdfast.kd_loss(z, *rest, reduction=reduction)
        (found,) = torch.autograd.grad(loss, z, factors, is_grads_batched=True, retain_graph=retain)
        expected = []
        for factor in factors:
            loss = kdfast.kd_loss(z, *rest, reduction=reduction)
            expected.append(torch.autograd.grad(loss, z, factor)[0])
        torch.testing.assert_close(found, torch.stack(expected))
    jacobian = torch.autograd.functional.jacobian(
        lambda x: kdfast.kd_loss(x, *rest, reduction="none"), z.detach(), vectorize=True
    )
    assert jacobian.shape == (n, *z.shape)
    assert (jacobian.flatten(2).norm(dim=2).fill_diagonal_(0) == 0).all(), "a row's loss has no slope in another row"


def test_forward_mode_raises_instead_of_losing_the_tangent(args):
    from torch.autograd import forward_ad

    z, *rest = args
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(z.detach(), torch.ones_like(z))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            kdfast.kd_loss(dual, *rest)
        tangent = forward_ad.unpack_dual(kdfast.kd_loss(dual, *rest, backend="reference")).tangent
        assert tangent.abs() < 1e-5, "logits may all be moved by the same"
        assert kdfast.kd_loss(z.detach(), *rest).isfinite(), "nothing moves"
    for transform in (torch.func.hessian, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match="no forward-mode derivative: pass backend='reference'"):
            transform(lambda x: kdfast.kd_loss(x, *rest))(z.detach())


@pytest.mark.parametrize(
    ("temperature", "t_squared", "spread"), [(1.0, True, 2e4), (1.0, False, 2e4), (0.1, False, 400)]
)
def test_reverse_float16_gradients_are_finite_where_pytorchs_are(temperature, t_squared, spread):
    z, t = torch.tensor([[-spread / 2, spread / 2]]), torch.tensor([[spread / 2, -spread / 2]])
    options = {"alpha": 1.0, "temperature": temperature, "t_squared": t_squared, "direction": "reverse"}
    for student in (z, z * 0):
        grads = []
        for backend in ("auto", "reference"):
            x = student.half().requires_grad_()
            kdfast.kd_loss(x, None, t.half(), backend=backend, **options).backward()
            grads.append(x.grad)
        assert grads[0].isfinite().all()
        torch.testing.assert_close(grads[0], grads[1], rtol=2**-9, atol=1e-6)
