"""Alpha and temperature of each sample: against PyTorch's losses in float64, and against one call per sample."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kdfast
from kdfast.errors import BackendUnavailable, ShapeError
from kdfast.ops.kd_loss import native, topk_teacher
from kdfast.ops.kd_loss.validation import make_call

ALPHAS = torch.tensor([0.0, 1.0, 0.5, 0.3, 0.25, 0.7, 1.0, 0.0, 0.9])
TEMPERATURES = torch.tensor([1.0, 2.0, 4.0, 3.0, 0.7, 1.0, 4.0, 2.0, 9.0])
N = len(ALPHAS)
ROUNDING = {torch.float32: 6e-8, torch.bfloat16: 2**-8, torch.float16: 2**-11}
KINDS = {
    "kl": {},
    "reverse": {"direction": "reverse"},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
    "dkd": {"divergence": "dkd", "dkd_weights": (0.7, 3.0)},
    "standardized": {"divergence": "standardized"},
    "top-k": {},
    "reverse top-k": {"direction": "reverse"},
}


def case(c=20, n=N, dtype=torch.float32, seed=0):
    """Return logits, labels, teacher and rows, with an ignored sample."""
    g = torch.Generator().manual_seed(seed)
    logits, teacher = 3 * torch.randn(n, c, generator=g), 3 * torch.randn(n + 3, c, generator=g)
    labels, rows = (torch.randint(0, high, (n,), generator=g) for high in (c, n + 3))
    labels[n // 2] = -100
    return logits.to(dtype), labels, teacher, rows


def teacher_of(kind, teacher):
    return topk_teacher(teacher, min(3, teacher.shape[1]), 4.0) if "top-k" in kind else teacher


def loss_and_grad(z, *args, **options):
    z = z.detach().requires_grad_()
    loss = kdfast.kd_loss(z, *args, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def truth(z, y, t, r, alpha, temperature, *, reverse=False, t_squared=True, reduction="mean", weights=None):
    """Loss and gradient by PyTorch's losses in float64, sample by sample."""
    z = z.double().requires_grad_()
    losses, divisor = [], 0.0
    for i in range(len(z)):
        a, temp, w = float(alpha[i]), float(temperature[i]), 1.0 if weights is None else float(weights[i])
        if y[i] == -100:
            losses.append(0 * z[i, 0])
            continue
        divisor += w
        log_p, log_q = (torch.log_softmax(x / temp, 0) for x in (z[i], t[r[i]].double()))
        pair = (log_q, log_p) if reverse else (log_p, log_q)
        kl = F.kl_div(*pair, log_target=True, reduction="sum")
        factor = a * temp**2 if t_squared else a
        losses.append(w * ((1 - a) * F.cross_entropy(z[i], y[i]) + factor * kl))
    losses = torch.stack(losses)
    loss = losses if reduction == "none" else losses.sum() / (divisor if reduction == "mean" else 1)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def assert_close(found, expected, dtype=torch.float32):
    for a, b, slack in zip(found, expected, (3e-6, 1e-5 + 1.01 * ROUNDING[dtype]), strict=True):
        assert (a.double() - b).abs().max() <= slack * b.abs().max()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", ["kl", "reverse"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_pytorch(kd_loss_options_backend, dtype, kind, reduction):
    for c, weights, t_squared in ((2, None, True), (17, torch.rand(N), False), (100, torch.rand(N), True)):
        args = case(c, dtype=dtype)
        options = {"reduction": reduction, "weights": weights, "t_squared": t_squared}
        numbers = {"alpha": ALPHAS, "temperature": TEMPERATURES, "backend": kd_loss_options_backend}
        found = loss_and_grad(*args, **numbers, **options, **KINDS[kind])
        assert found[1].dtype == dtype
        assert_close(found, truth(*args, ALPHAS, TEMPERATURES, reverse=kind == "reverse", **options), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [1, 3, 16, 100, 2048])
def test_equals_one_call_per_sample(kind, c):
    """Bit by bit, since each row is computed by the same code. (float16 gradients are stored at another scale.)"""
    for dtype in (torch.float32, torch.bfloat16):
        z, y, t, r = case(c, dtype=dtype)
        options = {**KINDS[kind], "reduction": "none", "backend": "native", "label_smoothing": 0.1}
        teacher = teacher_of(kind, t)
        loss, grad = loss_and_grad(z, y, teacher, r, alpha=ALPHAS, temperature=TEMPERATURES, **options)
        for i in range(N):
            one, numbers = slice(i, i + 1), {"alpha": ALPHAS[i].item(), "temperature": TEMPERATURES[i].item()}
            of_one = loss_and_grad(z[one], y[one], teacher, r[one], **numbers, **options)
            assert torch.equal(of_one[0][0], loss[i])
            assert torch.equal(of_one[1][0], grad[i])


@pytest.mark.parametrize("kind", KINDS)
def test_reference_and_kernel_agree(kind):
    z, y, t, r = case(40)
    numbers, teacher = {"alpha": ALPHAS, "temperature": TEMPERATURES, **KINDS[kind]}, teacher_of(kind, t)
    for reduction in ("mean", "sum", "none"):
        found = loss_and_grad(z, y, teacher, r, **numbers, reduction=reduction)
        assert_close(found, loss_and_grad(z.double(), y, teacher, r, **numbers, reduction=reduction))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    z, y, t, r = case(4, dtype=torch.float64)
    teacher = teacher_of(kind, t)

    def loss(x):
        return kdfast.kd_loss(x, y, teacher, r, alpha=ALPHAS, temperature=TEMPERATURES, **KINDS[kind])

    assert torch.autograd.gradcheck(loss, z.requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_the_two_may_be_a_number(kd_loss_options_backend, kind):
    z, y, t, r = case(30)
    options, teacher = {**KINDS[kind], "backend": kd_loss_options_backend}, teacher_of(kind, t)
    for name, value, vector in (("alpha", 0.4, TEMPERATURES), ("temperature", 3.0, ALPHAS)):
        other = "temperature" if name == "alpha" else "alpha"
        mixed = loss_and_grad(z, y, teacher, r, **{name: value, other: vector}, **options)
        both = loss_and_grad(z, y, teacher, r, **{name: torch.full((N,), value), other: vector}, **options)
        torch.testing.assert_close(mixed, both, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_of_weight_zero_is_not_read(kd_loss_options_backend, kind):
    """A teacher's row of NaN where alpha is 0, and an infinite cross-entropy where alpha is 1."""
    z, y, t, r = case(12)
    r = torch.arange(N)
    t[0] = t[7] = math.nan
    z[1, y[1]] = t[1, y[1]] = z[6, y[6]] = t[6, y[6]] = -math.inf
    teacher = teacher_of(kind, t)
    numbers = {"alpha": ALPHAS, "temperature": TEMPERATURES, "backend": kd_loss_options_backend}
    loss, grad = loss_and_grad(z, y, teacher, r, **numbers, **KINDS[kind], reduction="none")
    if kind == "dkd":  # the teacher gives the label probability 0, so its part is 0 log 0
        loss, grad = loss[[0, 7]], grad[[0, 7]]
    assert loss.isfinite().all()
    assert grad.isfinite().all()


def test_the_factor_is_the_square_of_each_temperature(kd_loss_options_backend):
    args, options = case(), {"alpha": 1.0, "temperature": TEMPERATURES, "reduction": "none"}
    options["backend"] = kd_loss_options_backend
    plain = kdfast.kd_loss(*args, **options, t_squared=False)
    torch.testing.assert_close(kdfast.kd_loss(*args, **options), plain * TEMPERATURES**2, rtol=1e-5, atol=0)


def test_ignored_samples_may_have_any_alpha_and_temperature(kd_loss_options_backend):
    args = case()
    expected = loss_and_grad(*args, alpha=ALPHAS, temperature=TEMPERATURES, backend=kd_loss_options_backend)
    for bad in (math.nan, -1.0, math.inf, 0.0):
        a, temp = ALPHAS.clone(), TEMPERATURES.clone()
        a[N // 2] = temp[N // 2] = bad
        found = loss_and_grad(*args, alpha=a, temperature=temp, backend=kd_loss_options_backend)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_strides_of_the_tensors(kd_loss_options_backend, dtype):
    args = case()
    a, temp = ALPHAS.to(dtype), TEMPERATURES.to(dtype)
    expected = loss_and_grad(*args, alpha=a.float(), temperature=temp.float(), backend=kd_loss_options_backend)
    strided = torch.stack([a, temp], 1)
    found = loss_and_grad(*args, alpha=strided[:, 0], temperature=strided[:, 1], backend=kd_loss_options_backend)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    one = torch.tensor(2.0, dtype=dtype)
    spread = loss_and_grad(*args, temperature=one.expand(N), backend=kd_loss_options_backend)
    number = loss_and_grad(*args, temperature=2.0, backend=kd_loss_options_backend)
    torch.testing.assert_close(spread, number, rtol=1e-6, atol=1e-7)


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits():
    z, y, t, r = case(100)
    options = {
        "t_squared": True, "ignore_index": -100, "reduction": "mean", "direction": "forward", "jsd_beta": 0.5,
        "dkd_weights": (1.0, 8.0), "label_smoothing": 0.2,
    }  # fmt: skip
    for divergence in ("kl", "jsd", "dkd", "standardized"):
        call = make_call(z, y, t, r, None, alpha=ALPHAS, temperature=TEMPERATURES, divergence=divergence, **options)
        results = [native.kd_loss(call, True, isa_limit=limit) for limit in (2, 1, 0)]
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        results.append(native.kd_loss(call, True))
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for found in results for a, b in zip(found, results[0], strict=True))


@pytest.mark.parametrize("kind", ["kl", "reverse", "jsd", "top-k"])
def test_rows_of_a_hundred_thousand_classes(kind):
    z, y, t, r = (x[:4] for x in case(100_001, n=5))
    options = {**KINDS[kind], "alpha": ALPHAS[:4], "temperature": TEMPERATURES[:4]}
    teacher, r = teacher_of(kind, t), torch.arange(4)
    assert_close(loss_and_grad(z, y, teacher, r, **options), loss_and_grad(z.double(), y, teacher, r, **options))


def test_compiled_once_for_all_values(no_poison):
    args = case()
    torch._dynamo.reset()
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(
        lambda *a, alpha, temp: kdfast.kd_loss(*a, alpha=alpha, temperature=temp, label_smoothing=0.1),
        backend=count,
        fullgraph=True,
    )
    for shift in (0.0, 0.01):
        numbers = {"alpha": (ALPHAS - shift).clamp_min(0), "temperature": TEMPERATURES + shift}
        loss = compiled(*args, alpha=numbers["alpha"], temp=numbers["temperature"])
        torch.testing.assert_close(loss, kdfast.kd_loss(*args, **numbers, label_smoothing=0.1))
    assert len(graphs) == 1
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a, **k: kdfast.kd_loss(*a, **k), backend="aot_eager", fullgraph=True)
    z = args[0].clone().requires_grad_()
    loss = compiled(z, *args[1:], alpha=ALPHAS, temperature=TEMPERATURES)
    expected = loss_and_grad(*args, alpha=ALPHAS, temperature=TEMPERATURES)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], expected[1])


@pytest.mark.parametrize("kind", ["kl", "jsd", "dkd", "standardized"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transforms(kd_loss_options_backend, kind, reduction):
    z, y, t, r = case()
    options = {**KINDS[kind], "backend": kd_loss_options_backend, "reduction": reduction}
    batches = [(z, ALPHAS, TEMPERATURES), (z + 1, ALPHAS.flip(0), TEMPERATURES.flip(0))]

    def loss(x, a, temp):
        return kdfast.kd_loss(x, y, t, r, alpha=a, temperature=temp, **options)

    expected = [loss_and_grad(x, y, t, r, alpha=a, temperature=temp, **options) for x, a, temp in batches]
    found = torch.func.vmap(loss)(*map(torch.stack, zip(*batches, strict=True)))
    torch.testing.assert_close(found, torch.stack([value for value, _ in expected]))
    grads = torch.func.vmap(torch.func.grad(lambda *a: loss(*a).sum()))(*map(torch.stack, zip(*batches, strict=True)))
    torch.testing.assert_close(grads, torch.stack([grad for _, grad in expected]))
    torch.testing.assert_close(torch.func.grad(lambda x: loss(x, ALPHAS, TEMPERATURES).sum())(z), expected[0][1])


def test_autocast_has_no_effect(kd_loss_options_backend):
    args = case()
    numbers = {"alpha": ALPHAS, "temperature": TEMPERATURES, "backend": kd_loss_options_backend}
    expected = loss_and_grad(*args, **numbers)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_grad(*args, **numbers)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_weights_that_need_a_gradient(kd_loss_options_backend):
    z, *rest = case()
    w = torch.rand(N, requires_grad=True)
    numbers = {"alpha": ALPHAS, "temperature": TEMPERATURES, "backend": kd_loss_options_backend}
    kdfast.kd_loss(z.requires_grad_(), *rest, weights=w, **numbers).backward()
    _, expected = truth(z.detach(), *rest, ALPHAS, TEMPERATURES, weights=w.detach())
    torch.testing.assert_close(z.grad.double(), expected, rtol=1e-4, atol=1e-6)
    assert w.grad.isfinite().all()


def test_large_temperatures_do_not_overflow_in_float16(kd_loss_options_backend):
    z, y, t, r = case(dtype=torch.float16)
    temperature = torch.full((N,), 3000.0)
    _, grad = loss_and_grad(
        z, y, t, r, alpha=1.0, temperature=temperature, reduction="sum", backend=kd_loss_options_backend
    )
    assert grad.isfinite().all()


def test_terms_at_each_temperature(kd_loss_options_backend):
    z, y, t, r = case()
    options = {"backend": kd_loss_options_backend, "label_smoothing": 0.1}
    ce, kl = kdfast.kd_loss_terms(z, y, t, r, temperature=TEMPERATURES, **options)
    for i in range(N):
        one = slice(i, i + 1)
        terms = kdfast.kd_loss_terms(z[one], y[one], t, r[one], temperature=TEMPERATURES[i].item(), **options)
        torch.testing.assert_close((ce[one], kl[one]), terms, rtol=1e-6, atol=1e-7)


def test_module(kd_loss_options_backend):
    z, y, t, r = case()
    module = kdfast.KDLoss(temperature=TEMPERATURES, label_smoothing=0.1, backend=kd_loss_options_backend)
    module.alpha = ALPHAS
    expected = kdfast.kd_loss(
        z, y, t, r, alpha=ALPHAS, temperature=TEMPERATURES, label_smoothing=0.1, backend=kd_loss_options_backend
    )
    torch.testing.assert_close(module(z, y, t, r), expected, rtol=0, atol=0)


def test_one_row_and_none(kd_loss_options_backend):
    for n in (0, 1):
        z, y, t, r = (x[:n] for x in case())
        loss, grad = loss_and_grad(
            z, y, case()[2], r, alpha=ALPHAS[3:][:n], temperature=TEMPERATURES[3:][:n], backend=kd_loss_options_backend
        )
        assert loss.shape == ()
        assert grad.shape == z.shape
        expected = kdfast.kd_loss(z, y, case()[2], r, alpha=0.3, temperature=3.0)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    z, y, t, r = case()
    one = torch.tensor([2.0])  # a tensor with one number is a number
    torch.testing.assert_close(
        kdfast.kd_loss(z, y, t, r, temperature=one), kdfast.kd_loss(z, y, t, r, temperature=2.0), rtol=0, atol=0
    )


BAD = {
    "short": (torch.ones(3), ShapeError, r"has shape \(3,\): pass a number, or a tensor \(9,\)"),
    "column": (torch.ones(N, 1), ShapeError, r"has shape \(9, 1\)"),
    "integers": (torch.ones(N, dtype=torch.int64), TypeError, "is torch.int64: must have a floating dtype"),
    "elsewhere": (torch.ones(N, device="meta"), TypeError, "is on meta"),
    "a gradient": (torch.ones(N, requires_grad=True), TypeError, r"requires a gradient.*\.detach\(\)"),
    "sparse": (torch.ones(N).to_sparse(), TypeError, "is a .* must be dense"),
    "a list": ([1.0] * N, TypeError, r"is of type list: pass a number, or a tensor \(9,\)"),
    "an array": (np.ones(N), TypeError, r"is of type ndarray: pass a number, or a tensor \(9,\)"),
}


@pytest.mark.parametrize("name", ["alpha", "temperature"])
@pytest.mark.parametrize("kind", BAD)
def test_refused_tensors(kd_loss_options_backend, name, kind):
    value, error, message = BAD[kind]
    with pytest.raises(error, match=f"`{name}` {message}"):
        kdfast.kd_loss(*case(), **{name: value}, backend=kd_loss_options_backend)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, math.inf])
def test_alpha_out_of_range(kd_loss_options_backend, value):
    alpha = ALPHAS.clone()
    alpha[3] = value
    with pytest.raises(ShapeError, match=rf"`alpha\[3\]` is {value:g}: must be in \[0, 1\]"):
        kdfast.kd_loss(*case(), alpha=alpha, backend=kd_loss_options_backend)


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan, math.inf, 1e16])
def test_temperature_out_of_range(kd_loss_options_backend, value):
    temperature = TEMPERATURES.clone()
    temperature[5] = value
    with pytest.raises(ShapeError, match=r"`temperature\[5\]` is .*: must be a positive number, from 1e-15 to 1e\+15"):
        kdfast.kd_loss(*case(), temperature=temperature, backend=kd_loss_options_backend)


def test_where_values_cannot_be_read_their_rows_are_nan():
    z, y, t, r = case()
    y[N // 2] = 0
    for name, values in (("alpha", ALPHAS), ("temperature", TEMPERATURES)):
        for bad in (-1.0, math.nan, math.inf):
            changed = values.clone()
            changed[4] = bad
            options = {"alpha": 0.5, name: changed, "reduction": "none", "backend": "reference"}
            grads, losses = torch.func.vmap(
                torch.func.grad_and_value(lambda x, o=options: kdfast.kd_loss(x, y, t, r, **o).sum()), (0,)
            )(z[None])
            assert losses.isnan().all()
            assert grads[0].isnan().any(1).tolist() == [i == 4 for i in range(N)]


def test_labels_are_needed():
    z, _, t, r = case()
    with pytest.raises(ShapeError, match="`labels` are None, but `alpha` is a tensor"):
        kdfast.kd_loss(z, None, t, r, alpha=torch.ones(N))
    kdfast.kd_loss(z, None, t, r, alpha=1.0, temperature=TEMPERATURES)


def test_topk_teachers_have_no_triton_kernel():
    z, y, t, r = case()
    with pytest.raises(BackendUnavailable, match="kd_loss_topk_options on cpu cannot use it"):
        kdfast.kd_loss(z, y, topk_teacher(t, 3, 4.0), r, alpha=ALPHAS, backend="triton")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind):
    z, y, t, r = case()
    numbers, teacher = {"alpha": ALPHAS, "temperature": TEMPERATURES}, teacher_of(kind, t)
    expected = loss_and_grad(z.double(), y, teacher, r, **numbers, **KINDS[kind])
    on_gpu = {name: value.cuda() for name, value in numbers.items()}
    moved = teacher.cuda() if isinstance(teacher, torch.Tensor) else type(teacher)(*(x.cuda() for x in teacher))
    loss, grad = loss_and_grad(z.cuda(), y.cuda(), moved, r.cuda(), **on_gpu, **KINDS[kind])
    assert_close((loss.cpu(), grad.cpu()), expected)


@pytest.mark.parametrize("seed", range(6))
def test_random_calls(seed):
    """Random shapes, layouts, dtypes and options, on the kernel and in float64."""
    rng = random.Random(seed)
    for i in range(25):
        n, c = rng.choice([1, 2, 7, 9, 33]), rng.choice([1, 2, 15, 16, 31, 33, 100, 257])
        z, y, t, r = case(c, n, seed=100 * seed + i)
        kind = rng.choice(list(KINDS))
        g = torch.Generator().manual_seed(i)
        alpha = torch.rand(n, generator=g).mul(1.6).sub(0.3).clamp(0, 1)
        temperature = torch.rand(n, generator=g).mul(6).round().clamp_min(0.5)
        options = {
            **KINDS[kind],
            "alpha": rng.choice([alpha, 0.5]),
            "temperature": rng.choice([temperature, 3.0]),
            "reduction": rng.choice(["mean", "sum", "none"]),
            "weights": rng.choice([None, torch.rand(n, generator=g)]),
            "t_squared": rng.choice([True, False]),
            "label_smoothing": rng.choice([0.0, 0.1, 0.7]),
        }
        if rng.random() < 0.3:
            z = z.t().contiguous().t()
        teacher = teacher_of(kind, t.half() if rng.random() < 0.5 else t)
        found = loss_and_grad(z, y, teacher, r, **options)
        expected = loss_and_grad(z.double(), y, teacher, r, **options)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 2e-6, (seed, i, kind, n, c, options)
