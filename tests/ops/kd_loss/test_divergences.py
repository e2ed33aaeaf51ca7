"""The divergences other than KL, against the formulas of their papers in float64, on every CPU backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import kdfast
from kdfast.errors import ShapeError
from kdfast.ops.kd_loss import topk_teacher

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 6e-8, torch.bfloat16: 2**-8, torch.float16: 2**-11}
OPTIONS = {
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
    "dkd": {"divergence": "dkd", "dkd_weights": (0.7, 3.0)},
    "standardized": {"divergence": "standardized"},
}


def case(n, c, dtype=torch.float32, teacher_dtype=torch.float16, spread=3.0):
    """Return logits, labels, teacher and rows, with an ignored row and repeated teacher rows if N allows."""
    logits = (spread * torch.randn(n, c)).to(dtype)
    teacher = (spread * torch.randn(n + 3, c)).to(teacher_dtype)
    labels, rows = torch.randint(0, c, (n,)), torch.randint(0, n + 3, (n,))
    if n > 2:
        labels[1] = -100
        rows[2] = rows[0]
    return logits, labels, teacher, rows


def kl(p, q):
    """KL(p || q) of two vectors of probabilities, over the classes with p > 0."""
    keep = p > 0
    return (p[keep] * (p[keep] / q[keep]).log()).sum()


def standardized(z):
    kept = z[~z.isneginf()]
    deviation = (kept - kept.mean()).square().sum().div(max(len(kept) - 1, 1))
    return (z - kept.mean()) / ((deviation.sqrt() if deviation > 0 else 0) + 1e-7)


def divergence_of(name, z, t, y, temperature):
    """The formula of one row, in float64."""
    if name == "standardized":
        z, t = standardized(z), standardized(t)
    p, q = torch.softmax(z / temperature, 0), torch.softmax(t / temperature, 0)
    if name == "standardized":
        return kl(q, p)
    if name == "jsd":
        beta = OPTIONS["jsd"]["jsd_beta"]
        mixture = beta * q + (1 - beta) * p
        return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)
    alpha, beta = OPTIONS["dkd"]["dkd_weights"]
    others = torch.arange(len(z)) != y
    if not others.any() or bool(t[others].isneginf().all()):
        return alpha * kl(q[~others], p[~others])
    target = kl(torch.stack([q[y], q[others].sum()]), torch.stack([p[y], p[others].sum()]))
    return alpha * target + beta * kl(q[others] / q[others].sum(), p[others] / p[others].sum())


def truth(name, args, *, alpha=0.5, temperature=4.0, reduction="mean", weights=None):
    """Loss and gradient by a loop over the rows and float64 autograd."""
    z, y, t, r = args
    z = z.double().requires_grad_()
    losses, divisor = [], 0.0
    for i in range(len(z)):
        weight = 1.0 if weights is None else weights[i].item()
        if y[i] == -100:
            losses.append(0 * z[i, 0])
            continue
        divisor += weight
        ce = -torch.log_softmax(z[i], 0)[y[i]]
        part = divergence_of(name, z[i], t[r[i]].double(), y[i], temperature)
        losses.append(weight * ((1 - alpha) * ce + alpha * temperature**2 * part))
    losses = torch.stack(losses)
    loss = losses if reduction == "none" else losses.sum() / (divisor or 1 if reduction == "mean" else 1)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def loss_and_grad(args, **options):
    z = args[0].detach().requires_grad_()
    loss = kdfast.kd_loss(z, *args[1:], **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def errors(found, expected, least=1e-12):
    """Errors of loss and gradient, relative to their largest element."""
    assert all(value.isfinite().all() for value in expected)
    scales = [value.abs().max().clamp_min(least) for value in expected]
    return [((a.double() - b).abs().max() / s).item() for a, b, s in zip(found, expected, scales, strict=True)]


def close(found, expected, dtype=torch.float32, slack=1e-5):
    loss, grad = errors(found, expected)
    return loss < 3e-6 and grad < slack + 1.01 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_matches_the_formula(kd_loss_divergences_backend, name, dtype, teacher_dtype):
    for (n, c), t in itertools.product([(1, 3), (5, 15), (4, 16), (4, 17), (3, 100)], [1.0, 3.0, 4.0]):
        args = case(n, c, dtype, teacher_dtype)
        for reduction in ("mean", "none"):
            options = {"temperature": t, "reduction": reduction, "weights": torch.rand(n)}
            found = loss_and_grad(args, **options, **OPTIONS[name], backend=kd_loss_divergences_backend)
            assert close(found, truth(name, args, **options), dtype), (n, c, t, reduction)
            assert found[1].dtype == dtype


@pytest.mark.parametrize("name", OPTIONS)
def test_float64_is_exact(name):
    args = case(5, 19, torch.float64, torch.float64)
    assert max(errors(loss_and_grad(args, **OPTIONS[name]), truth(name, args))) < 1e-13


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("c", [1029, 32768])
def test_many_classes(kd_loss_divergences_backend, name, c):
    args = case(3, c)
    found = loss_and_grad(args, **OPTIONS[name], backend=kd_loss_divergences_backend)
    assert close(found, truth(name, args))


@pytest.mark.parametrize("name", OPTIONS)
def test_one_class_has_no_loss(kd_loss_divergences_backend, name):
    loss, grad = loss_and_grad(case(3, 1), **OPTIONS[name], backend=kd_loss_divergences_backend)
    assert loss.abs() < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 0.7])
def test_error_at_most_pytorchs(name, temperature):
    """As in test_accuracy: the reference in the same dtype may not be closer to float64 by more than 1e-6."""
    z, y, t, r = case(4, 40, teacher_dtype=torch.float32)
    one_large, all_large = z.clone(), (z + 1e4).round()
    one_large[:, 3] = 1e4
    hidden = z.clone(), t.clone()
    for x in hidden:
        x[:, 3::4] = -math.inf
    places = {
        "plain": (z, t),
        "far spread": (100 * z, 10 * t),
        "far spread teacher": (10 * z, 100 * t),
        "one logit 1e4": (one_large, t),
        "all near 1e4": (all_large, (t - 1e4).round()),
        "masked": hidden,
        "expanded": (z[:1].expand(4, -1), t[:1].expand(7, -1)),
        "transposed": (z.t().contiguous().t(), t.t().contiguous().t()),
    }
    y = torch.where(y % 4 == 3, y - 1, y)
    for place, alpha, dtype in itertools.product(places, (0.5, 1.0), DTYPES):
        student, teacher = places[place]
        args = student.to(dtype), y, teacher, r
        options = {"alpha": alpha, "temperature": temperature, "reduction": "none", **OPTIONS[name]}
        expected = loss_and_grad((args[0].double(), *args[1:]), **options)
        # Of networks that share no class, the gradient of "jsd" is a difference of equal numbers.
        ours = errors(loss_and_grad(args, **options), expected, least=0.1)
        theirs = errors(loss_and_grad(args, **options, backend="reference"), expected, least=0.1)
        assert all(a <= b + 1e-6 for a, b in zip(ours, theirs, strict=True)), (place, alpha, dtype, ours, theirs)


def test_decoupled_parts_where_the_label_is_almost_certain(kd_loss_divergences_backend):
    """1 - p_y and the other classes' distribution are sums over the others: 1 - softmax would be 0 in float32."""
    z, y, t, r = case(4, 12, teacher_dtype=torch.float32)
    y = torch.arange(4)
    for x in (z, t):
        x[torch.arange(len(x)), torch.arange(len(x))] = 40.0
    r = torch.arange(4)
    for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, 8.0)):
        options = {"alpha": 1.0, "temperature": 1.0, "divergence": "dkd", "dkd_weights": weights}
        found = loss_and_grad((z, y, t, r), **options, backend=kd_loss_divergences_backend)
        assert max(errors(found, loss_and_grad((z.double(), y, t, r), **options))) < 1e-5, weights


@pytest.mark.parametrize("name", OPTIONS)
def test_masked_classes(kd_loss_divergences_backend, name):
    z, y, t, r = case(6, 40)
    masked = torch.arange(40) % 3 == 0
    z[:, masked], t[:, masked] = -math.inf, -math.inf
    y = torch.where(y < 0, y, 1)
    found = loss_and_grad((z, y, t, r), **OPTIONS[name], backend=kd_loss_divergences_backend)
    kept = z[:, ~masked], torch.where(y < 0, y, 0), t[:, ~masked], r  # class 1 is the first that is left
    loss, grad = truth(name, kept)
    assert close((found[0], found[1][:, ~masked]), (loss, grad))
    assert (found[1][:, masked] == 0).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_masks_on_one_side(kd_loss_divergences_backend, name):
    z, y, t, r = case(6, 40)
    y = torch.where(y < 0, y, 1)
    masked = t.clone()
    masked[:, 5] = -math.inf
    options = {**OPTIONS[name], "backend": kd_loss_divergences_backend}
    assert close(loss_and_grad((z, y, masked, r), **options), truth(name, (z, y, masked, r)))
    z[:, 5] = -math.inf
    loss = kdfast.kd_loss(z, y, t, r, **options)
    assert loss.isfinite() if name == "jsd" else loss == math.inf


def test_jensen_shannon_is_bounded_and_has_a_gradient_for_disjoint_classes(kd_loss_divergences_backend):
    z, t = torch.zeros(2, 20), torch.zeros(2, 20)
    z[:, :10], t[:, 10:] = -math.inf, -math.inf
    options = {"alpha": 1.0, "divergence": "jsd", "temperature": 1.0, "backend": kd_loss_divergences_backend}
    loss, grad = loss_and_grad((z, None, t), **options)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert grad.abs().max() < 1e-7


def test_decoupled_with_all_other_classes_masked(kd_loss_divergences_backend):
    z, t = torch.randn(1, 8), torch.full((1, 8), -math.inf)
    y, options = torch.tensor([2]), {**OPTIONS["dkd"], "backend": kd_loss_divergences_backend}
    t[0, 2] = 1.0
    found = loss_and_grad((z, y, t, torch.tensor([0])), **options)
    assert close(found, truth("dkd", (z, y, t, torch.tensor([0]))))
    student = torch.where(t.isneginf(), t, z)
    loss, grad = loss_and_grad((student, y, t), **options)
    assert loss == 0
    assert (grad == 0).all()
    assert kdfast.kd_loss(student, y, z, **options) == math.inf


@pytest.mark.parametrize("spread", [0.0, 1e-3])
def test_standardized_logits_that_are_almost_equal(kd_loss_divergences_backend, spread):
    z, y, t, r = case(3, 20, teacher_dtype=torch.float32)
    args = 5 + spread * z, y, t, r
    options = {**OPTIONS["standardized"], "alpha": 1.0, "backend": kd_loss_divergences_backend}
    assert max(errors(loss_and_grad(args, **options), truth("standardized", args, alpha=1.0))) < 2e-5


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("operand", ["logits", "teacher"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_not_hidden(kd_loss_divergences_backend, name, operand, value):
    z, y, t, r = case(5, 50, teacher_dtype=torch.float32)
    for column in (0, 20, 49):
        y[0] = 20
        z2, t2 = z.clone(), t.clone()
        (z2 if operand == "logits" else t2)[:, column] = value
        loss, grad = loss_and_grad((z2, y, t2, r), **OPTIONS[name], backend=kd_loss_divergences_backend)
        assert loss.isnan()
        assert grad[0].isnan().all()


@pytest.mark.parametrize("name", OPTIONS)
def test_ignored_rows_may_hold_anything(kd_loss_divergences_backend, name):
    z, y, t, _ = case(4, 9)
    t = t[:4]
    options = {**OPTIONS[name], "backend": kd_loss_divergences_backend}
    expected = kdfast.kd_loss(z, y, t, **options)
    z[1], t[1] = math.nan, math.nan
    loss, grad = loss_and_grad((z, y, t), **options)
    torch.testing.assert_close(loss, expected)
    assert (grad[1] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", OPTIONS)
def test_weight_of_the_divergence(kd_loss_divergences_backend, name):
    z, y, t, r = case(5, 12)
    options = {**OPTIONS[name], "backend": kd_loss_divergences_backend}
    nothing = torch.full_like(t, math.nan)
    torch.testing.assert_close(kdfast.kd_loss(z, y, nothing, r, alpha=0, **options), F.cross_entropy(z, y))
    whole = loss_and_grad((z, y, t, r), alpha=1.0, **options)
    assert close(whole, truth(name, (z, y, t, r), alpha=1.0))
    plain = loss_and_grad((z, y, t, r), alpha=1.0, t_squared=False, **options)
    torch.testing.assert_close(plain[0] * 16, whole[0])
    torch.testing.assert_close(plain[1] * 16, whole[1])


@pytest.mark.parametrize("name", OPTIONS)
def test_terms_are_those_of_the_loss(kd_loss_divergences_backend, name):
    z, y, t, r = case(6, 30)
    options = {**OPTIONS[name], "backend": kd_loss_divergences_backend}
    ce, divergence = kdfast.kd_loss_terms(z.requires_grad_(), y, t, r, **options)
    assert not ce.requires_grad
    assert ce[1] == divergence[1] == 0
    rows = kdfast.kd_loss(z, y, t, r, alpha=0.3, reduction="none", **options)
    torch.testing.assert_close(0.7 * ce + 0.3 * 16 * divergence, rows.detach())


@pytest.mark.parametrize("name", OPTIONS)
def test_retained_graph_and_factors(kd_loss_divergences_backend, name):
    args = case(6, 30)
    _, expected = truth(name, args)
    z = args[0].clone().requires_grad_()
    loss = kdfast.kd_loss(z, *args[1:], **OPTIONS[name], backend=kd_loss_divergences_backend)
    (first,) = torch.autograd.grad(3 * loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(loss, z)
    assert errors((first, second), (3 * expected, expected)) < [1e-5, 1e-5]


@pytest.mark.parametrize("name", OPTIONS)
def test_transforms(kd_loss_divergences_backend, name):
    z, y, t, r = case(6, 30)
    options = {**OPTIONS[name], "backend": kd_loss_divergences_backend}
    loss, grad = loss_and_grad((z, y, t, r), **options)
    torch.testing.assert_close(torch.func.grad(lambda x: kdfast.kd_loss(x, y, t, r, **options))(z), grad)
    batched = torch.func.vmap(torch.func.grad_and_value(lambda x: kdfast.kd_loss(x, y, t, r, **options)))
    grads, losses = batched(torch.stack([z, z]))
    torch.testing.assert_close(losses, loss.expand(2))
    torch.testing.assert_close(grads, grad.expand(2, -1, -1))


@pytest.mark.parametrize("name", OPTIONS)
def test_compiled(name, no_poison):
    args = case(6, 30)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: kdfast.kd_loss(*a, **OPTIONS[name]), backend="aot_eager", fullgraph=True)
    z = args[0].clone().requires_grad_()
    loss = compiled(z, *args[1:])
    expected = loss_and_grad(args, **OPTIONS[name])
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], expected[1])


@pytest.mark.parametrize("name", OPTIONS)
def test_module(name):
    args = case(6, 30)
    module = kdfast.KDLoss(alpha=0.2, **OPTIONS[name])
    torch.testing.assert_close(module(*args), kdfast.kd_loss(*args, alpha=0.2, **OPTIONS[name]))
    assert f"divergence='{name}'" in repr(module)


def test_small_gradients_in_half_precision_survive_a_loss_scaler(kd_loss_divergences_backend):
    args = case(64, 100, torch.float16)
    for name, options in OPTIONS.items():
        z = args[0].clone().requires_grad_()
        loss = kdfast.kd_loss(z, *args[1:], **options, backend=kd_loss_divergences_backend)
        (grad,) = torch.autograd.grad(loss * 256, z)
        _, expected = truth(name, args)
        assert ((grad.double() / 256 - expected).abs() <= 2**-11 * expected.abs() + 1e-5 * expected.abs().max()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "js"}, "`divergence` is 'js': pass one of 'kl', 'jsd', 'dkd', 'standardized'"),
        ({"divergence": "jsd", "direction": "reverse"}, "the divergence 'jsd' has none"),
        ({"divergence": "jsd", "jsd_beta": 1.0}, "`jsd_beta` is 1.0: must be above 0 and below 1"),
        ({"divergence": "dkd", "dkd_weights": (1, -1)}, "must be finite and not negative"),
        ({"divergence": "dkd", "dkd_weights": (math.inf, 1)}, "must be finite and not negative"),
        ({"divergence": "dkd", "labels": None, "alpha": 1}, "the divergence 'dkd' depends on them"),
    ],
)
def test_rejects_options(options, message):
    z, y, t, r = case(3, 5)
    with pytest.raises(ShapeError, match=message):
        kdfast.kd_loss(z, teacher=t, rows=r, **{"labels": y, **options})


@pytest.mark.parametrize("weights", [3.0, (1.0,), (1.0, "8")])
def test_rejects_weights_that_are_not_two_numbers(weights):
    with pytest.raises(TypeError, match="dkd_weights"):
        kdfast.kd_loss(*case(3, 5), divergence="dkd", dkd_weights=weights)


@pytest.mark.parametrize("name", OPTIONS)
def test_rejects_topk_teacher(name):
    z, y, t, r = case(3, 5)
    with pytest.raises(ShapeError, match=f"the divergence '{name}' needs the logits of all classes"):
        kdfast.kd_loss(z, y, topk_teacher(t, 2, 4.0), r, **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_rejects_index_out_of_range(kd_loss_divergences_backend, name):
    z, y, t, r = case(3, 5)
    y[0] = 5
    with pytest.raises(IndexError, match=r"labels\[0\]"):
        kdfast.kd_loss(z, y, t, r, alpha=1.0, **OPTIONS[name], backend=kd_loss_divergences_backend)
