"""Terms on logits against loops written from their papers' formulas, in float64."""

import math

import numpy as np
import pytest
import torch

from kdfast.distillation.losses.base import Outputs, TapShapes
from kdfast.distillation.losses.registry import LOSSES, get_term
from kdfast.errors import UsageError

LOGIT_TERMS = [name for name, entry in LOSSES.items() if not entry.taps]


def build(name, **options):
    return get_term(name).build(TapShapes(), {**get_term(name).options, **options})


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def rows(student, teacher, labels):
    return zip(student.logits.numpy(), teacher.logits.numpy(), labels.numpy(), strict=True)


def decoupled(s, t, y, alpha, beta, temperature):
    p, q = softmax(s / temperature), softmax(t / temperature)
    target = kl((q[y], 1 - q[y]), (p[y], 1 - p[y]))
    others = kl(np.delete(q, y) / (1 - q[y]), np.delete(p, y) / (1 - p[y]))
    return temperature**2 * (alpha * target + beta * others)


def standardized(z):
    return (z - z.mean()) / (z.std(ddof=1) + 1e-7)


def pearson(a, b):
    return np.corrcoef(a, b)[0, 1]


def expected_value(name, student, teacher, labels, options):
    pairs = list(rows(student, teacher, labels))
    if name in ("dkd", "ls-dkd"):
        change = standardized if name == "ls-dkd" else np.asarray
        return np.mean([decoupled(change(s), change(t), y, **options) for s, t, y in pairs])
    if name == "logit-mse":
        return np.mean([(s - t) ** 2 for s, t, _ in pairs])
    temperature = options["temperature"]
    if name == "ls":
        pairs = [(standardized(s), standardized(t), y) for s, t, y in pairs]
    p, q = (np.array([softmax(pair[i] / temperature) for pair in pairs]) for i in (0, 1))
    if name == "ls":
        return temperature**2 * np.mean([kl(b, a) for a, b in zip(p, q, strict=True)])
    if name == "reverse-kl":
        return temperature**2 * np.mean([kl(a, b) for a, b in zip(p, q, strict=True)])
    if name == "jsd":
        beta = options["beta"]
        mixed = beta * q + (1 - beta) * p
        parts = [beta * kl(b, m) + (1 - beta) * kl(a, m) for a, b, m in zip(p, q, mixed, strict=True)]
        return temperature**2 * np.mean(parts)
    assert name == "dist"
    between_classes = 1 - np.mean([pearson(a, b) for a, b in zip(p, q, strict=True)])
    between_samples = 1 - np.mean([pearson(a, b) for a, b in zip(p.T, q.T, strict=True)])
    return temperature**2 * (options["beta"] * between_classes + options["gamma"] * between_samples)


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_value_with_default_options(name, student, teacher, labels):
    options = dict(get_term(name).options)
    expected = expected_value(name, student, teacher, labels, options)
    assert build(name)(student, teacher, labels).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dkd", {"alpha": 2.0, "beta": 0.5, "temperature": 1.0}),
        ("ls-dkd", {"alpha": 0.0, "beta": 3.0, "temperature": 2.5}),
        ("ls", {"temperature": 3.0}),
        ("dist", {"beta": 2.0, "gamma": 0.5, "temperature": 1.0}),
        ("jsd", {"beta": 0.9, "temperature": 2.0}),
        ("reverse-kl", {"temperature": 1.0}),
    ],
)
def test_value_with_other_options(name, options, student, teacher, labels):
    expected = expected_value(name, student, teacher, labels, options)
    assert build(name, **options)(student, teacher, labels).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_gradient(name, student, teacher, labels):
    logits = student.logits.clone().requires_grad_()
    term = build(name)

    def value(z):
        return term(Outputs(z), teacher, labels)

    if name not in ("ls", "reverse-kl"):  # kd_loss checks its gradient itself, and can be differentiated once only
        assert torch.autograd.gradcheck(value, (logits,))
        return
    value(logits).backward()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    with torch.no_grad():
        slope = (value(logits + 1e-6 * direction) - value(logits - 1e-6 * direction)) / 2e-6
    assert slope.item() == pytest.approx((logits.grad * direction).sum().item(), rel=1e-6)


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_extreme_logits_stay_finite(name, labels):
    """A confident student that is wrong, and a confident teacher, in float32."""
    student = torch.zeros(len(labels), 7)
    student[:, 0] = 300
    teacher = torch.zeros(len(labels), 7)
    teacher[torch.arange(len(labels)), labels] = 300
    student.requires_grad_()
    value = build(name)(Outputs(student), Outputs(teacher), labels)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_equal_networks_have_no_loss(name, student, labels):
    assert build(name)(student, student, labels).item() == pytest.approx(0, abs=1e-9)


def test_divergence_of_two_classes_is_that_of_the_target(labels):
    """With two classes nothing is left among the others."""
    z, t = (torch.randn(5, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    two = build("dkd", temperature=1.0)(Outputs(z), Outputs(t), labels % 2).item()
    whole = np.mean([kl(softmax(b), softmax(a)) for a, b in zip(z.numpy(), t.numpy(), strict=True)])
    assert two == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
def test_jensen_shannon_needs_a_mixture(beta):
    with pytest.raises(UsageError, match="jsd has beta"):
        build("jsd", beta=beta)


@pytest.mark.parametrize("name", ["dkd", "ls-dkd", "dist"])
def test_weights_of_the_parts_are_not_negative(name):
    with pytest.raises(UsageError, match=r"the term d.* has .*beta -2.*at least 0"):
        build(name, beta=-2.0)


def test_unknown_term_suggests_the_nearest():
    with pytest.raises(UsageError, match="vid"):
        get_term("vit")
