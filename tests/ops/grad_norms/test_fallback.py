"""Fallbacks for parameters that no formula and no operation covers: vmap and a loop over the samples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdfast
from kdfast.errors import ShapeError, UsageError

N, CLASSES = 6, 4


class Times(torch.autograd.Function):
    """A product that PyTorch does not show."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale):
        return x * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).reshape(-1, len(scale)).sum(0)


class Scale(nn.Module):
    """A layer whose operation is not recorded."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size))

    def forward(self, x):
        return Times.apply(x, self.scale)


class Both(nn.Module):
    """Uses a layer's weight in an operation that is not recorded as well."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(Times.apply(self.layer(x), self.layer.bias))


class Derived(nn.Module):
    """Passes a tensor computed from a parameter to an operation that is not recorded."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return Times.apply(x, 1 + self.scale)


def expected(model, x, y):
    out = []
    for i in range(len(y)):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        out.append(sum(g.square().sum() for g in grads).sqrt())
    return torch.stack(out)


CASES = {
    "custom function": (lambda: nn.Sequential(nn.Linear(4, 8), Scale(8), nn.Linear(8, CLASSES)), "'1.scale'"),
    "besides its layer": (Both, "'layer.bias'"),
    "derived": (Derived, "'scale'"),
}


@pytest.mark.parametrize("name", CASES)
def test_names_unsupported_parameters_unless_a_fallback_is_given(name):
    make_model, parameter = CASES[name]
    model = make_model().double().eval()
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randint(0, CLASSES, (N,))
    message = f"parameter {parameter} is used by an operation that .*custom autograd"
    with pytest.raises(UsageError, match=message) as caught:
        kdfast.grad_norms(model, x, y)
    assert all(way in str(caught.value) for way in ("fallback='vmap'", "register_grad_norms", "requires_grad_(False)"))
    for fallback in ("vmap", "loop"):
        found = kdfast.grad_norms(model, x, y, fallback=fallback)
        torch.testing.assert_close(found, expected(model, x, y), rtol=1e-12, atol=0)


def test_vmap_receives_only_parameters_without_a_formula(monkeypatch):
    from kdfast.ops.grad_norms.fallback import FALLBACKS

    received = []
    original = FALLBACKS["vmap"]

    def spy(batch, parameters, *more):
        received.extend(parameters)
        return original(batch, parameters, *more)

    monkeypatch.setitem(FALLBACKS, "vmap", spy)
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


class Masked(nn.Module):
    """Chooses what to do by the values of a mask, which vmap does not allow."""

    def __init__(self):
        super().__init__()
        self.scale = Scale(4)

    def forward(self, x, mask):
        x = self.scale(x)
        if not bool(mask.all()):
            x = x * mask.unsqueeze(2)
        return x.sum(1)


@pytest.mark.parametrize("fallback", ["vmap", "loop"])
@pytest.mark.parametrize("kind", ["bool", "int64", "all ones"])
def test_attention_masks(kind, fallback):
    model, x, y = Masked().double(), torch.randn(N, 5, 4, dtype=torch.float64), torch.randint(0, 4, (N,))
    mask = torch.arange(5) < torch.tensor([5, 3, 5, 2, 3, 5]).unsqueeze(1)
    if kind != "bool":
        mask = torch.ones_like(mask) if kind == "all ones" else mask
        mask = mask.long()
    found = kdfast.grad_norms(model, {"x": x, "mask": mask}, y, fallback=fallback)
    exact = []
    for i in range(N):
        loss = F.cross_entropy(model(x[i : i + 1], mask[i : i + 1]), y[i : i + 1])
        exact.append(torch.autograd.grad(loss, model.scale.scale)[0].norm())
    torch.testing.assert_close(found, torch.stack(exact), rtol=1e-10, atol=0)


@pytest.mark.parametrize("fallback", ["vmap", "loop"])
@pytest.mark.parametrize("error", [ValueError, IndexError, TypeError])
def test_errors_of_a_model_that_cannot_run_on_one_sample_are_explained(error, fallback):
    class Picky(Scale):
        def forward(self, x):
            if len(x) == 1 or torch._C._functorch.is_batchedtensor(x):
                raise error("too few")
            return super().forward(x)

    with pytest.raises(UsageError, match=f"fallback='{fallback}'.*too few"):
        kdfast.grad_norms(Picky(4), torch.randn(N, 4), torch.randint(0, 4, (N,)), fallback=fallback)


@pytest.mark.parametrize("fallback", ["vmap", "loop"])
def test_rejects_model_that_mixes_the_samples(fallback):
    class Centered(Scale):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    with pytest.raises(ShapeError, match="a sample alone has another loss than in the batch"):
        kdfast.grad_norms(Centered(4), torch.randn(N, 4), torch.randint(0, 4, (N,)), fallback=fallback)
