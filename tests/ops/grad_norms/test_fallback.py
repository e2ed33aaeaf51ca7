"""Fallbacks for layers without a formula: vmap and a loop over the samples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdfast
from kdfast.errors import UsageError

N, CLASSES = 6, 4


class Scale(nn.Module):
    """A layer without a formula."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size))

    def forward(self, x):
        return x * self.scale


class Attention(nn.Module):
    """The projection weight is used by the attention, never by the layer that owns it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.first(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Functional(nn.Module):
    """Uses a layer's weight outside the layer as well."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x) + x @ self.layer.weight)


def expected(model, x, y):
    out = []
    for i in range(len(y)):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        out.append(sum(g.square().sum() for g in grads).sqrt())
    return torch.stack(out)


CASES = {
    "unknown layer": (lambda: nn.Sequential(nn.Linear(4, 8), Scale(8), nn.Linear(8, CLASSES)), (4,), "'1' \\(Scale\\)"),
    "attention": (Attention, (5, 4), "'attention' \\(MultiheadAttention\\)"),
    "used outside its layer": (Functional, (4,), "'layer.weight' is used outside"),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 36, CLASSES)), (2, 4, 4),
        "'0' \\(ConvTranspose2d\\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_names_unsupported_parameters_unless_a_fallback_is_given(name):
    make_model, shape, message = CASES[name]
    model = make_model().double().eval()
    x, y = torch.randn(N, *shape, dtype=torch.float64), torch.randint(0, CLASSES, (N,))
    with pytest.raises(UsageError, match=message) as caught:
        kdfast.grad_norms(model, x, y)
    assert "fallback='vmap'" in str(caught.value)
    for fallback in ("vmap", "loop"):
        found = kdfast.grad_norms(model, x, y, fallback=fallback)
        torch.testing.assert_close(found, expected(model, x, y), rtol=1e-12, atol=0)


def test_vmap_receives_only_parameters_without_a_formula(monkeypatch):
    from kdfast.ops.grad_norms import api

    received = []
    original = api.FALLBACKS["vmap"]

    def spy(model, inputs, objective, parameters, n):
        received.extend(parameters)
        return original(model, inputs, objective, parameters, n)

    monkeypatch.setitem(api.FALLBACKS, "vmap", spy)
    model = nn.Sequential(nn.Linear(4, 8), Scale(8), nn.Linear(8, CLASSES))
    kdfast.grad_norms(model, torch.randn(N, 4), torch.randint(0, CLASSES, (N,)), fallback="vmap")
    assert received == ["1.scale"]


@pytest.mark.parametrize(("chunk", "fallback"), [(1, "vmap"), (2**25, "vmap"), (1, "loop")])
def test_every_input_container_with_the_distillation_loss(monkeypatch, chunk, fallback):
    from kdfast.ops.grad_norms import reference

    monkeypatch.setattr(reference, "CHUNK_BYTES", chunk)

    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = Scale(4)

        def forward(self, a, b, shift=0.0):
            return {"logits": self.scale(a) * b + shift}

    model, a, b = TwoInputs().double(), *torch.randn(2, N, 4, dtype=torch.float64)
    y, teacher = torch.randint(0, 4, (N,)), torch.randn(N, 4, dtype=torch.float64)
    options = {"loss": "kd", "teacher": teacher, "fallback": fallback, "backend": "reference"}
    positional = kdfast.grad_norms(model, (a, b), y, **options)
    keyword = kdfast.grad_norms(model, {"a": a, "b": b, "shift": 0.0}, y, **options)
    exact = []
    for i in range(N):
        loss = kdfast.kd_loss(
            model(a[i : i + 1], b[i : i + 1])["logits"], y[i : i + 1], teacher[i : i + 1], backend="reference"
        )
        exact.append(torch.autograd.grad(loss, model.scale.scale)[0].norm())
    torch.testing.assert_close(positional, torch.stack(exact), rtol=1e-6, atol=0)
    torch.testing.assert_close(keyword, positional)


@pytest.mark.parametrize("fallback", ["vmap", "loop"])
def test_rejects_active_dropout(fallback):
    model = nn.Sequential(Scale(4), nn.Dropout(0.5)).train()
    with pytest.raises(UsageError, match=fallback):
        kdfast.grad_norms(model, torch.randn(N, 4), torch.randint(0, CLASSES, (N,)), fallback=fallback)


def test_loop_runs_models_that_vmap_cannot():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = Scale(4)

        def forward(self, x):
            x = self.scale(x)
            return x if bool((x > -100).all()) else -x  # data-dependent control flow

    model, x, y = Branching().double(), torch.randn(N, 4, dtype=torch.float64), torch.randint(0, CLASSES, (N,))
    with pytest.raises(UsageError, match="fallback='loop' runs one sample at a time instead"):
        kdfast.grad_norms(model, x, y, fallback="vmap")
    torch.testing.assert_close(
        kdfast.grad_norms(model, x, y, fallback="loop"), expected(model, x, y), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("fallback", ["vmap", "loop"])
def test_rejects_labels_that_cannot_be_split(fallback):
    def loss(outputs, labels):
        return F.cross_entropy(outputs, labels["y"], reduction="none")

    model, x, labels = Scale(4), torch.randn(N, 4), {"y": torch.randint(0, CLASSES, (N,))}
    with pytest.raises(UsageError, match=f"fallback='{fallback}' splits the labels into samples: .* not dict"):
        kdfast.grad_norms(model, x, labels, loss=loss, fallback=fallback)
    kdfast.grad_norms(nn.Linear(4, 4), x, labels, loss=loss)
