"""Parameters scored by the operations that they enter: small copies of layers of public models, against autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdfast
from kdfast.ops.grad_norms import evaluation
from kdfast.ops.grad_norms.operations import recompute, rules

WIDTH, LENGTH, CLASSES = 6, 5, 4
SEQUENCE = (LENGTH, WIDTH)


class Llama(nn.Module):
    """RMSNorm of Llama, Qwen, Mistral, T5, Mamba."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        kind = x.dtype
        x = x.to(torch.promote_types(kind, torch.float32))
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(kind)


class Gemma(nn.Module):
    """RMSNorm with a weight around zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight.to(x.dtype))


class Olmo(nn.Module):
    """LayerNorm without weight, and a Linear."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return F.layer_norm(self.mix(x), (WIDTH,), None, None, eps=1e-5)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm of timm over the channels of images."""

    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class BatchNormAct2d(nn.BatchNorm2d):
    """BatchNorm of timm, with an activation in place."""

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return F.relu(x, inplace=True)


class Linear(nn.Linear):
    """Linear layer of timm."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Offset(nn.Embedding):
    """Positions of OPT."""

    def forward(self, mask):
        positions = (torch.cumsum(mask, dim=1) * mask).long() - 1
        return super().forward(positions + 2)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.tokens = Offset(LENGTH + 2, WIDTH), nn.Embedding(9, WIDTH)

    def forward(self, ids):
        return self.tokens(ids) + self.positions((ids > 0).long())


class ViT(nn.Module):
    """Class token, registers, position embeddings and layer scale."""

    def __init__(self, tokens="expand", in_place=False):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls, self.registers = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(2, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.gamma, self.mlp, self.norm = nn.Parameter(torch.rand(WIDTH)), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.tokens, self.in_place = tokens, in_place

    def forward(self, x):
        n = len(x)
        x = self.patches(x).flatten(2).transpose(1, 2)
        cls = self.cls.expand(n, -1, -1) if self.tokens == "expand" else self.cls.repeat(n, 1, 1)
        x = torch.cat([cls, x], 1)
        if self.in_place:
            x += self.positions
        else:
            x = x + self.positions
        x = torch.cat([x, self.registers[None].expand(n, 2, WIDTH)], 1)
        y = self.mlp(self.norm(x))
        x = x + (y.mul_(self.gamma) if self.in_place else self.gamma * y)
        return F.scaled_dot_product_attention(x, x, x)


class SlicedPositions(nn.Module):
    """Position embeddings that are resized and sliced before they are added."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Parameter(torch.randn(1, WIDTH, 3)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        table = F.interpolate(self.table, size=LENGTH + 1, mode="linear").transpose(1, 2)
        return self.mix(x + table[:, 1:]) + table[:, :1]


class Windows(nn.Module):
    """Attention of Swin: windows of all samples in one dimension, a relative position bias, a functional projection."""

    def __init__(self):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(3 * WIDTH, WIDTH)), nn.Parameter(torch.randn(3 * WIDTH))
        self.table, self.project = nn.Parameter(torch.randn(3, 2)), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("index", torch.tensor([[1, 2], [0, 1]]))

    def forward(self, x):
        n = len(x)
        x = x.view(n, 4, 2, WIDTH).reshape(n * 4, 2, WIDTH)
        q, k, v = F.linear(x, self.weight, self.shift).view(n * 4, 2, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        attention = q @ k.transpose(-2, -1) + self.table[self.index.view(-1)].view(2, 2, 2).permute(2, 0, 1)
        x = (attention.softmax(-1) @ v).transpose(1, 2).reshape(n * 4, 2, WIDTH)
        return self.project(x).view(n, 8, WIDTH)


class Rows(nn.Module):
    """A functional projection of the rows of all samples in one dimension."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return F.linear(x.reshape(-1, WIDTH), self.weight).view(x.shape)


class Scan(nn.Module):
    """Parts of Mamba: parameters in exponentials, and a layer's weight used without the layer."""

    def __init__(self):
        super().__init__()
        self.log, self.skip = nn.Parameter(torch.rand(WIDTH, 3)), nn.Parameter(torch.rand(WIDTH))
        self.step = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        steps = F.softplus(self.step.weight @ x.transpose(1, 2) + self.step.bias[:, None])
        decay = torch.exp(-torch.exp(self.log)[None, :, None] * steps[..., None])
        return (decay.sum(-1) * x.transpose(1, 2)).transpose(1, 2) + x * self.skip


class Dora(nn.Module):
    """Low-rank update with a magnitude, as in peft."""

    def __init__(self):
        super().__init__()
        self.base, self.a = nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Linear(WIDTH, 2, bias=False)
        self.b, self.magnitude = nn.Linear(2, WIDTH, bias=False), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        update = self.b(self.a(torch.eye(WIDTH, dtype=x.dtype))).T
        scale = self.magnitude / (self.base.weight + update).norm(dim=1).detach()
        return self.base(x) * scale + scale * self.b(self.a(x))


class Merged(nn.Module):
    """Low-rank update that is added to the weight before the product."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.a, self.b = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(WIDTH, 2))

    def forward(self, x):
        return F.linear(x, self.base.weight + self.b @ self.a, self.base.bias)


class Ia3(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(WIDTH, 1))

    def forward(self, x):
        return self.base(x) * self.scale.flatten()


class Attention(nn.Module):
    def __init__(self, weights=False, **options):
        super().__init__()
        self.layer, self.weights = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options), weights

    def forward(self, x):
        other = x[..., : self.layer.kdim]
        padding = torch.arange(LENGTH).expand(len(x), -1) > LENGTH - 2
        return self.layer(x, other, other, need_weights=self.weights, key_padding_mask=padding)[0]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(WIDTH, WIDTH, 3)

    def forward(self, x):
        return self.layer(x, x.flip(1))


class First(nn.Module):
    """Returns the outputs of a recurrent layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Operators(nn.Module):
    """Arithmetic of a parameter and samples in all forms."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(1 + torch.rand(size)) for size in (WIDTH, (LENGTH, 1)))
        self.c = nn.Parameter(torch.rand(()))

    def forward(self, x):
        x = (self.a - x) / self.b + self.c * x
        x = torch.sub(x, self.a, alpha=0.5) + torch.mul(self.b, x)
        x = self.a / (2 + x.square()) - x / self.a
        return x.addcmul(x, self.b).pow(2) @ self.a.diag() + torch.einsum("ntd,d->nt", x, self.a)[..., None]


LAYERS = {
    "Llama": (Llama, SEQUENCE),
    "Gemma": (Gemma, SEQUENCE),
    "Olmo": (Olmo, SEQUENCE),
    "LayerNorm2d": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), LayerNorm2d(4)), (3, 5, 5)),
    "BatchNormAct2d": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4)).eval(), (3, 5, 5)),
    "timm Linear": (lambda: Linear(WIDTH, 3), SEQUENCE),
    "OPT": (Positions, None),
    "ViT": (ViT, (3, 8, 8)),
    "ViT, repeated tokens": (lambda: ViT("repeat"), (3, 8, 8)),
    "ViT, in place": (lambda: ViT(in_place=True), (3, 8, 8)),
    "sliced positions": (SlicedPositions, SEQUENCE),
    "Swin": (Windows, (8, WIDTH)),
    "flattened rows": (Rows, SEQUENCE),
    "Mamba": (Scan, SEQUENCE),
    "DoRA": (Dora, SEQUENCE),
    "merged LoRA": (Merged, SEQUENCE),
    "IA3": (Ia3, SEQUENCE),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 3)), SEQUENCE),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv1d(LENGTH, 3, 3)).eval(), SEQUENCE),
    "attention": (Attention, SEQUENCE),
    "attention, weights": (lambda: Attention(weights=True), SEQUENCE),
    "attention, other width": (lambda: Attention(kdim=4, vdim=4), SEQUENCE),
    "attention, bias": (lambda: Attention(add_bias_kv=True, add_zero_attn=True), SEQUENCE),
    "Conv3d": (lambda: nn.Conv3d(2, 3, (2, 1, 2), stride=(1, 2, 1), padding=1), (2, 3, 4, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(LENGTH, 4, 3, stride=2, padding=1, output_padding=1), SEQUENCE),
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), (4, 5, 4),
    ),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 3, 2, 3)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(LENGTH, affine=True), SEQUENCE),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 4, 4)),
    "InstanceNorm2d, eval": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval(), (3, 4, 4)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(9, WIDTH, padding_idx=3), None),
    "EmbeddingBag, sum": (lambda: nn.EmbeddingBag(9, WIDTH, mode="sum"), None),
    "EmbeddingBag, max": (lambda: nn.EmbeddingBag(9, WIDTH, mode="max"), None),
    "Bilinear": (Pair, SEQUENCE),
    "PReLU": (lambda: nn.PReLU(LENGTH), SEQUENCE),
    "LSTM": (lambda: First(nn.LSTM(WIDTH, 4, 2, batch_first=True, bidirectional=True)), SEQUENCE),
    "GRU": (lambda: First(nn.GRU(WIDTH, 4, batch_first=True)), SEQUENCE),
    "operators": (Operators, SEQUENCE),
}  # fmt: skip


class Network(nn.Module):
    """A layer and a head."""

    def __init__(self, layer, example):
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            self.head = nn.Linear(layer(example).flatten(1).shape[1], CLASSES)

    def forward(self, x):
        return self.head(self.layer(x).tanh().flatten(1))


def case(name, n=3):
    make, shape = LAYERS[name]
    x = torch.randint(0, 9, (n, LENGTH)) if shape is None else torch.randn(n, *shape)
    return Network(make(), x), x, torch.randint(0, CLASSES, (n,))


def expected(model, x, y):
    """Return norms by autograd in float64, one sample at a time."""
    model, x = model.double(), x.double() if x.is_floating_point() else x
    parameters = [p for p in model.parameters() if p.requires_grad]
    out = []
    for i in range(len(y)):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters, allow_unused=True)
        out.append(sum(g.square().sum() for g in grads if g is not None).sqrt())
    return torch.stack(out)


@pytest.fixture(autouse=True)
def no_fallback(monkeypatch):
    monkeypatch.setattr(evaluation, "FALLBACKS", {})


@pytest.mark.parametrize("n", [1, 3, LENGTH, WIDTH])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_match_autograd(name, n):
    model, x, y = case(name, n)
    found = kdfast.grad_norms(model, x, y)
    torch.testing.assert_close(found.double(), expected(model, x, y), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_results_do_not_depend_on_the_chunk_size(name, monkeypatch):
    from kdfast.ops.grad_norms import reference

    model, x, y = case(name)
    model, x = model.double(), x.double() if x.is_floating_point() else x
    whole = kdfast.grad_norms(model, x, y)
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1)
    torch.testing.assert_close(kdfast.grad_norms(model, x, y), whole, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["Llama", "ViT", "Swin", "attention", "LSTM", "EmbeddingBag"])
def test_rules_and_recomputation_agree(name, monkeypatch):
    model, x, y = case(name)
    model, x = model.double(), x.double() if x.is_floating_point() else x
    ruled = kdfast.grad_norms(model, x, y)
    monkeypatch.setattr(rules, "RULES", {key: rules.RULES[key] for key in ("expand", "repeat")})
    torch.testing.assert_close(kdfast.grad_norms(model, x, y), ruled, rtol=1e-10, atol=0)
    monkeypatch.setattr(recompute, "vmap", _fails)
    torch.testing.assert_close(kdfast.grad_norms(model, x, y), ruled, rtol=1e-10, atol=0)


def _fails(*args, **options):
    raise RuntimeError("no batching rule")


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_given_by_offsets(mode):
    model = nn.EmbeddingBag(9, CLASSES, mode=mode, padding_idx=1).double()
    ids, bounds, y = torch.randint(0, 9, (12,)), [0, 3, 3, 4, 9, 12], torch.randint(0, CLASSES, (5,))
    found = kdfast.grad_norms(model, (ids, torch.tensor(bounds[:-1])), y)
    exact = []
    for i in range(5):
        out = model(ids[bounds[i] : bounds[i + 1]], torch.tensor([0]))
        exact.append(torch.autograd.grad(F.cross_entropy(out, y[i : i + 1]), model.weight)[0].norm())
    torch.testing.assert_close(found, torch.stack(exact), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["Llama", "Gemma", "ViT", "IA3", "attention"])
def test_autocast_and_half_precision(name):
    model, x, y = case(name)
    exact = kdfast.grad_norms(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = kdfast.grad_norms(model, x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0)
    half = kdfast.grad_norms(model.bfloat16(), x.bfloat16(), y)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.15, atol=0)
