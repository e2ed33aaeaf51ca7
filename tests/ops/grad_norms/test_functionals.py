"""Metric norms, the Fisher diagonal and dot products, compared with each sample's gradient by autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdfast
from kdfast.ops.grad_norms import reference
from tests.ops.grad_norms.test_fallback import Times

N, CLASSES = 5, 4


class Images(nn.Module):
    """Convolutions with groups, strides and dilation, norms, a layer used twice, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=2)
        self.depthwise = nn.Conv2d(8, 16, 3, padding="same", groups=8, padding_mode="reflect")
        self.groups = nn.GroupNorm(4, 16)
        self.scale = nn.Parameter(torch.rand(16, 1, 1) + 0.5)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = self.twice(F.relu(self.twice(x)))
        x = self.scale * self.groups(self.depthwise(x)).relu()
        return self.head(x.mean((2, 3)))


class Texts(nn.Module):
    """Embeddings with repeated ids, linear layers on sequences, and output weights tied to the embedding."""

    def __init__(self, tied=True, padding=None):
        super().__init__()
        self.tokens = nn.Embedding(11, 6, padding_idx=padding)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.last = nn.RMSNorm(6)
        self.out = nn.Linear(6, 11, bias=False)
        if tied:
            self.out.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids)
        x = x + self.mix(self.norm(x)).relu()
        x = x + self.mix(x)
        return self.out(self.last(x)).mean(1)


class Volumes(nn.Module):
    """Convolutions of one and three dimensions, and a weight that is used transposed as well."""

    def __init__(self):
        super().__init__()
        self.volume = nn.Conv3d(2, 4, 3, stride=2, padding=1)
        self.line = nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2)
        self.square = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.line(self.volume(x).flatten(2)).mean(2)
        return self.head(torch.tanh(self.square(x)) @ (1 + self.square.weight.T))


def images():
    return torch.randn(N, 3, 12, 12), torch.randint(0, CLASSES, (N,))


def texts():
    return torch.randint(0, 11, (N, 7)), torch.randint(0, 11, (N,))


def volumes():
    return torch.randn(N, 2, 5, 6, 7), torch.randint(0, CLASSES, (N,))


CASES = {
    "images": (Images, images),
    "tied embedding": (Texts, texts),
    "padding index": (lambda: Texts(tied=False, padding=3), texts),
    "tied with padding index": (lambda: Texts(padding=3), texts),
    "volumes": (Volumes, volumes),
}


@pytest.fixture(params=CASES)
def case(request):
    make, data = CASES[request.param]
    model = make().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    return model, *data()


def per_sample(model, x, y, loss=None):
    """Return each sample's gradients in float64: {name: (N, *shape)}."""
    loss = loss or (lambda outputs, rows: F.cross_entropy(outputs, y[rows], reduction="none"))
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [slice(i, i + 1) for i in range(len(x))]
    grads = [
        torch.autograd.grad(loss(model(x[i]), i).sum(), list(named.values()), materialize_grads=True) for i in rows
    ]
    return {name: torch.stack(each) for name, each in zip(named, zip(*grads, strict=True), strict=True)}


def metric_for(model):
    """Return positive tensors whose entries differ by orders of magnitude, those of images with channels last."""
    found = {name: 10 ** torch.empty_like(p).uniform_(-3, 1).detach() for name, p in model.named_parameters()}
    return {name: f.contiguous(memory_format=torch.channels_last) if f.dim() == 4 else f for name, f in found.items()}


def vectors_for(model):
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


def metric_norms(grads, metric, layer=None):
    squares = [
        (g.square() / metric[name].double()).flatten(1).sum(1)
        for name, g in grads.items()
        if layer in (None, name.rpartition(".")[0])
    ]
    return torch.stack(squares).sum(0).sqrt()


def dots(grads, vectors):
    return torch.stack([(g * vectors[name].double()).flatten(1).sum(1) for name, g in grads.items()]).sum(0)


def length(grads):
    return torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()


def double(model, x):
    return model.double(), x.double() if x.is_floating_point() else x


def check_norms(model, x, y, tolerance, **options):
    metric = metric_for(model)
    found = kdfast.grad_norms(model, x, y, metric=metric, **options)
    layers = kdfast.grad_norms(model, x, y, metric=metric, per_layer=True, **options)
    grads = per_sample(model, x, y)
    torch.testing.assert_close(found.double(), metric_norms(grads, metric), rtol=tolerance, atol=0)
    assert set(layers) == {name.rpartition(".")[0] for name in grads}
    for layer, value in layers.items():
        torch.testing.assert_close(value.double(), metric_norms(grads, metric, layer), rtol=tolerance, atol=1e-14)
    return found


def test_norms_in_a_metric(case, grad_norms_backend):
    assert check_norms(*case, 1e-5, backend=grad_norms_backend).dtype == torch.float32


def test_norms_in_a_metric_of_networks_in_float64(case):
    model, x, y = case
    assert check_norms(*double(model, x), y, 1e-11).dtype == torch.float64


def check_fisher(model, x, y, rtol, atol, **options):
    batches = ((x[rows], y[rows]) for rows in (slice(0, 3), slice(3, 5)))
    found = kdfast.fisher_diagonal(model, batches, **options)
    for name, grads in per_sample(model, x, y).items():
        exact = grads.square().sum(0)
        assert found[name].dtype == torch.float64
        assert found[name].shape == exact.shape
        # Relative to the parameter's largest: an element may nearly cancel in each sample.
        error = ((found[name] - exact).abs() / (rtol * exact + atol * exact.max())).max()
        assert error < 1, name


def test_fisher_diagonal_adds_squares_over_samples(case, grad_norms_backend):
    check_fisher(*case, 1e-5, 1e-6, backend=grad_norms_backend)


def test_fisher_diagonal_of_networks_in_float64(case):
    model, x, y = case
    check_fisher(*double(model, x), y, 1e-9, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dot_products_with_a_vector(case, dtype):
    model, x, y = case
    vectors = vectors_for(model)
    if dtype == torch.float64:
        model, x = double(model, x)
    found = kdfast.grad_dots(model, x, y, vectors)
    grads = per_sample(model, x, y)
    assert found.dtype == dtype
    scale = length(grads) * torch.stack([v.double().square().sum() for v in vectors.values()]).sum().sqrt()
    error = ((found.double() - dots(grads, vectors)).abs() / scale).max()
    assert error < (1e-6 if dtype == torch.float32 else 1e-14)


def test_ones_as_metric_give_the_plain_norms(case):
    model, x, y = case
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    found = kdfast.grad_norms(model, x, y, metric=ones)
    torch.testing.assert_close(found, kdfast.grad_norms(model, x, y), rtol=1e-5, atol=0)


def test_shared_gradients_are_added_before_they_are_squared():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    model = nn.Sequential(layer, layer)  # w^2 x, so the gradient of the output is 2 w x = 2 x
    x = torch.tensor([[1.0], [3.0]])
    options = {"loss": lambda out, labels: out.squeeze(1)}
    fisher = kdfast.fisher_diagonal(model, [(x, None)], **options)
    assert fisher["0.weight"].item() == 4 + 36
    norms = kdfast.grad_norms(model, x, None, metric={"0.weight": torch.full((1, 1), 4.0)}, **options)
    assert norms.tolist() == [1, 3]
    assert kdfast.grad_dots(model, x, None, {"0.weight": torch.full((1, 1), -2.0)}, **options).tolist() == [-4, -12]


def test_distillation_loss_with_rows_of_a_teacher():
    model, (x, y), teacher = nn.Sequential(nn.Flatten(), nn.Linear(432, CLASSES)), images(), torch.randn(9, CLASSES)
    rows = torch.tensor([8, 0, 3, 3, 5])
    options = {"loss": "kd", "teacher": teacher, "alpha": 0.7, "temperature": 2.0}

    def loss(outputs, i):
        return kdfast.kd_loss(
            outputs, y[i], teacher.double(), rows[i], alpha=0.7, temperature=2.0, reduction="none", backend="reference"
        )

    metric, vectors = metric_for(model), vectors_for(model)
    norms = kdfast.grad_norms(model, x, y, metric=metric, rows=rows, **options)
    products = kdfast.grad_dots(model, x, y, vectors, rows=rows, **options)
    fisher = kdfast.fisher_diagonal(model, [(x[:2], y[:2], rows[:2]), (x[2:], y[2:], rows[2:])], **options)
    grads = per_sample(model, x, y, loss)
    torch.testing.assert_close(norms.double(), metric_norms(grads, metric), rtol=1e-5, atol=0)
    torch.testing.assert_close(products.double(), dots(grads, vectors), rtol=1e-4, atol=1e-6)
    for name, g in grads.items():
        torch.testing.assert_close(fisher[name], g.square().sum(0), rtol=1e-5, atol=0)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x):
        return Times.apply(x, self.scale)


def check_all(model, x, y, **options):
    metric, vectors = metric_for(model), vectors_for(model)
    norms = kdfast.grad_norms(model, x, y, metric=metric, **options)
    products = kdfast.grad_dots(model, x, y, vectors, **options)
    fisher = kdfast.fisher_diagonal(model, [(x, y)], **options)
    grads = per_sample(model, x, y)
    torch.testing.assert_close(norms.double(), metric_norms(grads, metric), rtol=1e-5, atol=0)
    torch.testing.assert_close(products.double(), dots(grads, vectors), rtol=1e-4, atol=1e-5)
    for name, g in grads.items():
        torch.testing.assert_close(fisher[name], g.square().sum(0), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("n", [1, N])
@pytest.mark.parametrize("fallback", ["vmap", "loop"])
def test_fallbacks(fallback, n):
    model = nn.Sequential(nn.Linear(3, 6), Scale(), nn.Linear(6, CLASSES))
    check_all(model, torch.randn(n, 3), torch.randint(0, CLASSES, (n,)), fallback=fallback)


def test_registered_layers(monkeypatch):
    monkeypatch.setattr("kdfast.ops.grad_norms.layers.REGISTERED", {})
    kdfast.register_grad_norms(Scale, lambda layer, x, grad: {"scale": grad * x})
    model = nn.Sequential(nn.Linear(3, 6), Scale(), nn.Linear(6, CLASSES))
    check_all(model, torch.randn(N, 3), torch.randint(0, CLASSES, (N,)))


def test_samples_in_another_dimension():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.LSTM(3, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head(self.layer(x)[0][-1])

    model, x, y = Recurrent(), torch.randn(7, N, 3), torch.randint(0, CLASSES, (N,))
    metric, vectors = metric_for(model), vectors_for(model)
    found = [
        kdfast.grad_norms(model, x, y, metric=metric, batch_dim=1),
        kdfast.grad_dots(model, x, y, vectors, batch_dim=1),
    ]
    fisher = kdfast.fisher_diagonal(model, [(x, y)], batch_dim=1)
    each = [
        torch.autograd.grad(F.cross_entropy(model(x[:, i : i + 1]), y[i : i + 1]), model.parameters()) for i in range(N)
    ]
    grads = {
        name: torch.stack(g).double()
        for (name, _), g in zip(model.named_parameters(), zip(*each, strict=True), strict=True)
    }
    torch.testing.assert_close(found[0].double(), metric_norms(grads, metric), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1].double(), dots(grads, vectors), rtol=1e-4, atol=1e-6)
    for name, g in grads.items():
        torch.testing.assert_close(fisher[name], g.square().sum(0), rtol=1e-4, atol=1e-9)


def test_frozen_parameters_do_not_count():
    model, (x, y) = Images().eval(), images()
    model.twice.requires_grad_(False)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    metric = {name: torch.rand_like(p) + 0.1 for name, p in named.items()}
    vectors = {name: torch.randn_like(p) for name, p in named.items()}
    norms, products = kdfast.grad_norms(model, x, y, metric=metric), kdfast.grad_dots(model, x, y, vectors)
    assert set(kdfast.fisher_diagonal(model, [(x, y)])) == set(named)
    grads = per_sample(model, x, y)
    torch.testing.assert_close(norms.double(), metric_norms(grads, metric), rtol=1e-5, atol=0)
    torch.testing.assert_close(products.double(), dots(grads, vectors), rtol=1e-4, atol=1e-6)


def test_unused_and_ignored_samples_have_zeros():
    model = nn.ModuleDict({"used": nn.Linear(3, CLASSES), "idle": nn.Linear(3, CLASSES)})
    model.forward = lambda x: model["used"](x)
    x, y = torch.randn(N, 3), torch.tensor([0, -100, 2, 3, 0])
    norms = kdfast.grad_norms(model, x, y, metric=metric_for(model), per_layer=True)
    assert norms["idle"].max() == 0
    assert norms["used"][1] == 0
    assert norms["used"].max() > 0
    fisher = kdfast.fisher_diagonal(model, [(x, y), (x[:0], y[:0]), (x[1:2], y[1:2])])
    assert fisher["idle.weight"].max() == 0
    keep = y >= 0
    torch.testing.assert_close(fisher, kdfast.fisher_diagonal(model, [(x[keep], y[keep])]), rtol=1e-6, atol=0)
    assert kdfast.grad_dots(model, x, y, vectors_for(model))[1] == 0
    assert kdfast.grad_dots(model, x[:0], y[:0], vectors_for(model)).shape == (0,)
    assert kdfast.grad_norms(model, x[:0], y[:0], metric=metric_for(model)).shape == (0,)


def test_well_learned_samples_keep_their_precision():
    model, x, y = nn.Linear(6, CLASSES), torch.randn(N, 6), torch.zeros(N, dtype=torch.long)
    with torch.no_grad():
        model.bias[0] += 60  # the squares of the gradients are below the range of float32
    fisher = kdfast.fisher_diagonal(model, [(x, y)])
    vectors = vectors_for(model)
    metric = {name: f + 1e-3 * f.mean() for name, f in fisher.items()}
    norms, products = kdfast.grad_norms(model, x, y, metric=metric), kdfast.grad_dots(model, x, y, vectors)
    p = model.double()(x.double()).softmax(1)
    residuals = p.clone()
    residuals[:, 0] = -p[:, 1:].sum(1)
    grads = {"weight": residuals[:, :, None] * x.double()[:, None], "bias": residuals}
    for name, g in grads.items():
        assert 0 < fisher[name].max() < 1e-40
        torch.testing.assert_close(fisher[name], g.square().sum(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(norms.double(), metric_norms(grads, metric), rtol=1e-4, atol=0)
    assert ((products.double() - dots(grads, vectors)).abs() / length(grads)).max() < 1e-5


def test_result_does_not_depend_on_the_chunk_size(monkeypatch):
    model, (x, y) = Images().eval(), images()
    metric, vectors = metric_for(model), vectors_for(model)

    def found():
        return [
            kdfast.grad_norms(model, x, y, metric=metric, backend="reference"),
            *kdfast.fisher_diagonal(model, [(x, y)], backend="reference").values(),
            kdfast.grad_dots(model, x, y, vectors),
        ]

    whole = found()
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1)
    torch.testing.assert_close(found(), whole, rtol=1e-5, atol=1e-9)


def test_leaves_the_model_unchanged():
    model, (x, y) = Images().eval(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kdfast.fisher_diagonal(model, [(x, y)])
    kdfast.grad_dots(model, x, y, vectors_for(model))
    kdfast.grad_norms(model, x, y, metric=metric_for(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
