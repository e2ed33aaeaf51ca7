"""Layers whose gradients users define by register_grad_norms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdfast
from kdfast.errors import UsageError
from kdfast.ops.grad_norms.factors import OuterProduct

N, CLASSES = 5, 4


class Product(torch.autograd.Function):
    """A matrix product that PyTorch does not show."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x, grad.sum(0)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return Product.apply(x, self.kernel, self.shift)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr("kdfast.ops.grad_norms.layers.REGISTERED", {})


def gradients(layer, x, grad):
    return {"kernel": grad.unsqueeze(2) * x.unsqueeze(1), "shift": grad}


def factors(layer, x, grad):
    return {"kernel": OuterProduct(x.unsqueeze(1), grad.unsqueeze(1)), "shift": grad}


def case(make=Own):
    model = nn.Sequential(nn.Linear(3, 3), make(), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randint(0, CLASSES, (N,))
    losses = F.cross_entropy(model(x), y, reduction="none")
    grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    return model, x, y, torch.stack([sum(g.square().sum() for g in each).sqrt() for each in grads])


@pytest.mark.parametrize("fn", [gradients, factors])
def test_registered_layers_match_autograd(fn):
    model, x, y, exact = case()
    with pytest.raises(UsageError, match=r"parameter '1\.kernel' .* kdfast\.register_grad_norms"):
        kdfast.grad_norms(model, x, y)
    kdfast.register_grad_norms(Own, fn)
    torch.testing.assert_close(kdfast.grad_norms(model, x, y), exact, rtol=1e-12, atol=0)
    model[1].shift.requires_grad_(False)
    frozen = kdfast.grad_norms(model, x, y, per_layer=True)["1"]
    full = kdfast.grad_norms(model.requires_grad_(), x, y, per_layer=True)["1"]
    assert bool((frozen < full).all())


def test_subclasses_are_included_unless_they_override_forward():
    class Plain(Own):
        pass

    class Doubled(Own):
        def forward(self, x):
            return 2 * super().forward(x)

    kdfast.register_grad_norms(Own, gradients)
    model, x, y, exact = case(Plain)
    torch.testing.assert_close(kdfast.grad_norms(model, x, y), exact, rtol=1e-12, atol=0)
    model, x, y, _ = case(Doubled)
    with pytest.raises(UsageError, match=r"parameter '1\.kernel'"):
        kdfast.grad_norms(model, x, y)


def test_registration_replaces_a_formula():
    layer = nn.Linear(3, CLASSES)
    x, y = torch.randn(N, 3), torch.randint(0, CLASSES, (N,))
    exact = kdfast.grad_norms(layer, x, y)
    for scale in (2, 3):
        kdfast.register_grad_norms(
            nn.Linear,
            lambda layer, x, grad, scale=scale: {
                "weight": OuterProduct(scale * x.unsqueeze(1), grad.unsqueeze(1)),
                "bias": scale * grad,
            },
        )
        torch.testing.assert_close(kdfast.grad_norms(layer, x, y), scale * exact)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"kernel": torch.zeros(N, 6, 3, dtype=torch.float64)}, r"returned NoneType for 'shift'"),
        ({"kernel": torch.zeros(N, 3, 6), "shift": torch.zeros(N, 6)}, r"returned shape \(5, 3, 6\) for 'kernel'"),
        ({"kernel": 1.0, "shift": torch.zeros(N, 6)}, r"returned float for 'kernel'.* shape \(5, 6, 3\)"),
    ],
)
def test_rejects_what_a_function_returns(returned, message):
    kdfast.register_grad_norms(Own, lambda layer, x, grad: returned)
    model, x, y, _ = case()
    with pytest.raises(UsageError, match=message):
        kdfast.grad_norms(model, x, y)


def test_rejects_bad_registrations():
    with pytest.raises(UsageError, match="`layer_class` is 'Own': pass a subclass"):
        kdfast.register_grad_norms("Own", gradients)
    with pytest.raises(UsageError, match="`layer_class` is Own"):
        kdfast.register_grad_norms(Own(), gradients)
    with pytest.raises(UsageError, match="`fn` is None: pass a function"):
        kdfast.register_grad_norms(Own, None)
