"""Norms of whole networks, compared with each sample's gradient by autograd."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kdfast

N, CLASSES = 5, 4


class ConvNet(nn.Module):
    """Network with every image layer, in-place activations, and a convolution and a normalization called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=2)
        self.depthwise = nn.Conv2d(8, 16, 3, padding="same", groups=8, padding_mode="reflect")
        self.groups = nn.GroupNorm(4, 16)
        self.head = nn.Linear(16, CLASSES)
        for p in self.norm.buffers():
            if p.is_floating_point():
                p.data.uniform_(0.5, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = F.relu(self.norm(self.twice(x)), inplace=True)
        x = self.groups(self.depthwise(self.twice(x))).relu_()
        return self.head(x.mean((2, 3)))


class TextNet(nn.Module):
    """Parts of a decoder: embeddings, sequences, layer and RMS norm, output weights tied to the embedding."""

    def __init__(self, tied=True, padding=None):
        super().__init__()
        self.tokens = nn.Embedding(11, 6, padding_idx=padding)
        self.positions = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.last = nn.RMSNorm(6)
        self.out = nn.Linear(6, 11, bias=False)
        if tied:
            self.out.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]).expand_as(ids))
        x = x + self.mix(self.norm(x)).relu_()
        x = x + self.mix(x)  # second use of the layer
        return self.out(self.last(x))


class WaveNet(nn.Module):
    """Network with one-dimensional convolutions."""

    def __init__(self, mode="circular"):
        super().__init__()
        self.first = nn.Conv1d(2, 6, 5, padding=2, padding_mode=mode)
        self.second = nn.Conv1d(6, 6, 4, padding="same", dilation=2, groups=3)
        self.third = nn.Conv1d(6, 8, 3, stride=2, padding="valid")
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.third(self.second(self.first(x)))).mean(2))


def mean_token_loss(logits, labels):
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def images(dtype):
    return torch.randn(N, 3, 12, 12, dtype=dtype), torch.randint(0, CLASSES, (N,)), {}


def texts(dtype):
    return torch.randint(0, 11, (N, 7)), torch.randint(0, 11, (N, 7)), {"loss": mean_token_loss}


def waves(dtype):
    return torch.randn(N, 2, 30, dtype=dtype), torch.randint(0, CLASSES, (N,)), {}


CASES = {
    "images": (ConvNet, images),
    "tied embedding": (TextNet, texts),
    "padding index": (lambda: TextNet(tied=False, padding=3), texts),
    "tied with padding index": (lambda: TextNet(padding=3), texts),
    "waves": (WaveNet, waves),
    "waves, replicated border": (lambda: WaveNet("replicate"), waves),
}


@pytest.fixture(params=CASES)
def case(request):
    """Return functions that make the network and the data."""
    return CASES[request.param]


def per_sample(model, x, y, loss=None, pick=lambda out: out):
    """Return each sample's gradients by autograd, as a list of {name: gradient}."""
    loss = loss or (lambda z, t: F.cross_entropy(z, t, reduction="none"))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    out = []
    for i in range(len(y)):
        value = loss(pick(model(x[i : i + 1])), y[i : i + 1]).sum()
        grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        out.append({name: g for name, g in zip(named, grads, strict=True) if g is not None})
    return out


def norms(grads, layer=None):
    keep = [[g for name, g in sample.items() if layer in (None, name.rpartition(".")[0])] for sample in grads]
    return torch.stack([torch.stack([g.double().square().sum() for g in sample]).sum().sqrt() for sample in keep])


@pytest.mark.parametrize("method", ["auto", "direct", "gram", "pixel"])
def test_networks_in_float32(case, grad_norms_backend, method):
    model, (x, y, options) = case[0]().eval(), case[1](torch.float32)
    found = kdfast.grad_norms(model, x, y, backend=grad_norms_backend, method=method, **options)
    assert found.dtype == torch.float32
    exact = model.double()
    expected = norms(per_sample(exact, x.double() if x.is_floating_point() else x, y, options.get("loss")))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_networks_in_float64(case):
    model, (x, y, options) = case[0]().double().eval(), case[1](torch.float64)
    found = kdfast.grad_norms(model, x, y, **options)
    assert found.dtype == torch.float64
    grads = per_sample(model, x, y, options.get("loss"))
    torch.testing.assert_close(found, norms(grads), rtol=1e-12, atol=0)
    layers = kdfast.grad_norms(model, x, y, per_layer=True, **options)
    torch.testing.assert_close(torch.stack(list(layers.values())).square().sum(0).sqrt(), found, rtol=1e-12, atol=0)
    for name, value in layers.items():
        torch.testing.assert_close(value, norms(grads, name), rtol=1e-10, atol=1e-14)


def test_frozen_parameters_do_not_count():
    model = ConvNet().double().eval()
    x, y, _ = images(torch.float64)
    for p in (model.stem.weight, model.twice.weight, model.groups.bias, *model.norm.parameters()):
        p.requires_grad_(False)
    layers = kdfast.grad_norms(model, x, y, per_layer=True)
    assert set(layers) == {"twice", "depthwise", "groups", "head"}
    torch.testing.assert_close(kdfast.grad_norms(model, x, y), norms(per_sample(model, x, y)), rtol=1e-12, atol=0)


def test_unused_layer_adds_zero():
    model = nn.ModuleDict({"used": nn.Linear(3, 4), "called": nn.Linear(3, 4), "idle": nn.Linear(3, 4)})
    model.forward = lambda x: (model["used"](x), model["called"](x))[0]
    x, y = torch.randn(N, 3), torch.randint(0, 4, (N,))
    layers = kdfast.grad_norms(model, x, y, per_layer=True)
    assert layers["used"].min() > 0
    assert layers["called"].max() == layers["idle"].max() == 0


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_distillation_loss_matches_autograd(alpha):
    model, teacher = ConvNet().double().eval(), torch.randn(N, CLASSES, dtype=torch.float64)
    x, y, _ = images(torch.float64)
    labels = None if alpha == 1 else y
    found = kdfast.grad_norms(model, x, labels, loss="kd", teacher=teacher, alpha=alpha, temperature=2.0)
    expected = []
    for i in range(N):
        value = kdfast.kd_loss(
            model(x[i : i + 1]), y[i : i + 1], teacher[i : i + 1], alpha=alpha, temperature=2.0, backend="reference"
        )
        expected.append(sum(g.square().sum() for g in torch.autograd.grad(value, list(model.parameters()))).sqrt())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=0)


def test_accepts_keyword_inputs_and_outputs_with_logits():
    inner = nn.Linear(6, CLASSES)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, pixels, scale=None):
            return SimpleNamespace(logits=self.inner(input=pixels * scale), other=None)

    model, x, y = Wrapped(), torch.randn(N, 6), torch.randint(0, CLASSES, (N,))
    scale = torch.rand(N, 1)
    expected = kdfast.grad_norms(inner, x * scale, y)
    torch.testing.assert_close(kdfast.grad_norms(model, {"pixels": x, "scale": scale}, y), expected)
    torch.testing.assert_close(kdfast.grad_norms(model, (x, scale), y), expected)
    own = kdfast.grad_norms(model, (x, scale), y, loss=lambda out, t: F.cross_entropy(out.logits, t, reduction="none"))
    torch.testing.assert_close(own, expected)


def test_leaves_the_model_unchanged_even_after_errors():
    model = ConvNet().train()
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    x, y, _ = images(torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]

    def check():
        assert [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == state
        assert [p.requires_grad for p in model.parameters()] == flags
        assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
        assert all(p.grad is None for name, p in model.named_parameters() if name != "head.weight")
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    kdfast.grad_norms(model, x, y)
    check()
    with pytest.raises(RuntimeError):
        kdfast.grad_norms(model, torch.randn(N, 5, 12, 12), y)
    check()

    def broken(outputs, labels):
        outputs.register_hook(lambda grad: 1 / 0)
        return F.cross_entropy(outputs, labels, reduction="none")

    with pytest.raises(ZeroDivisionError):
        kdfast.grad_norms(model, x, y, loss=broken)
    check()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_runs_with_gradients_disabled(context):
    model, (x, y, _) = ConvNet().eval(), images(torch.float32)
    expected = kdfast.grad_norms(model, x, y)
    with context():
        found = kdfast.grad_norms(model, x, y)
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_respects_autocast_and_accumulates_in_float32():
    model, (x, y, _) = ConvNet().eval(), images(torch.float32)
    expected = kdfast.grad_norms(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = kdfast.grad_norms(model, x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)
    assert not torch.equal(found, expected)


def test_bfloat16_model():
    model, (x, y, _) = ConvNet().eval(), images(torch.float32)
    expected = kdfast.grad_norms(model, x, y)
    found = kdfast.grad_norms(model.bfloat16(), x.bfloat16(), y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0)


def test_output_changed_by_a_user_hook_counts():
    model, (x, y, _) = ConvNet().double().eval(), images(torch.float64)
    handle = model.stem.register_forward_hook(lambda layer, args, out: 3 * out)
    expected = norms(per_sample(model, x, y))
    torch.testing.assert_close(kdfast.grad_norms(model, x, y), expected, rtol=1e-12, atol=0)
    handle.remove()


def test_checkpointed_layers_match_autograd():
    class Checkpointed(ConvNet):
        def forward(self, x):
            x = checkpoint(lambda v: self.norm(self.stem(v)).relu(), x, use_reentrant=False)
            return self.head(checkpoint(self.twice, x, use_reentrant=False).repeat(1, 2, 1, 1).mean((2, 3)))

    model, (x, y, _) = Checkpointed().double().eval(), images(torch.float64)
    expected = norms(per_sample(model, x, y))
    torch.testing.assert_close(kdfast.grad_norms(model, x, y), expected, rtol=1e-12, atol=0)


def test_batch_of_one_and_repeated_call_give_the_same_norms():
    model, (x, y, _) = ConvNet().eval(), images(torch.float32)
    whole = kdfast.grad_norms(model, x, y)
    for i in range(N):
        torch.testing.assert_close(kdfast.grad_norms(model, x[i : i + 1], y[i : i + 1])[0], whole[i])
    assert torch.equal(kdfast.grad_norms(model, x, y), whole)


def test_vanishing_gradient_gives_zero():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, CLASSES))
    nn.init.zeros_(model[2].weight)
    x = torch.randn(N, 3, 8, 8)
    layers = kdfast.grad_norms(model, x, torch.zeros(N, dtype=torch.long), per_layer=True, method="gram")
    assert layers["0"].max() == 0
    assert layers["2"].min() > 0


def test_well_learned_samples_keep_their_precision():
    model = nn.Linear(6, CLASSES)
    x, y = torch.randn(N, 6), torch.zeros(N, dtype=torch.long)
    with torch.no_grad():
        model.bias[0] += 25  # 1 - p_y is about 1e-11, below the resolution of float32
    found = kdfast.grad_norms(model, x, y)
    expected = norms(per_sample(model.double(), x.double(), y))
    assert 0 < expected.max() < 1e-8
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_compiled_model_gives_the_same_norms():
    model, (x, y, _) = ConvNet().eval(), images(torch.float32)
    found = kdfast.grad_norms(torch.compile(model, backend="eager"), x, y, per_layer=True)
    for name, value in kdfast.grad_norms(model, x, y, per_layer=True).items():
        assert torch.equal(found[name], value)
