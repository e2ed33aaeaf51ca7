"""Products with a network's Hessian and Gauss-Newton matrix, compared with the explicit matrices."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, jacrev

import kdfast
from kdfast.errors import DataError, ShapeError, SolveError, UsageError
from kdfast.ops.network_curvature import KINDS, NetworkCurvature

N, CLASSES = 7, 3


class Net(nn.Module):
    """Network with convolution, normalization, functional attention and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, bias=False)
        self.norm = nn.GroupNorm(1, 2)
        self.fixed = nn.Parameter(torch.rand(2), requires_grad=False)
        self.mix = nn.Linear(2, 2)
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x):
        x = self.norm(self.conv(x)).tanh().flatten(2).transpose(1, 2) * self.fixed
        x = F.scaled_dot_product_attention(x, self.mix(x), x)
        return self.head(x.mean(1))


@pytest.fixture
def model():
    return Net().double()


@pytest.fixture
def batch():
    return torch.randn(N, 1, 5, 5, dtype=torch.float64), torch.randint(0, CLASSES, (N,))


def matrices(model, x, y, l2, criterion=None):
    """Return the explicit Hessian and Gauss-Newton matrix."""
    criterion = criterion or (lambda z: F.cross_entropy(z, y))
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    theta = torch.cat([p.flatten() for p in named.values()])

    def outputs(flat):
        pieces = torch.split(flat, [p.numel() for p in named.values()])
        params = {name: piece.view(p.shape) for (name, p), piece in zip(named.items(), pieces, strict=True)}
        return functional_call(model, params, (x,))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        h = hessian(lambda flat: criterion(outputs(flat)))(theta)
        j = jacrev(outputs)(theta).reshape(-1, len(theta))
        z = outputs(theta)
        inner = hessian(lambda flat: criterion(flat.view_as(z)))(z.flatten())
    identity = l2 * torch.eye(len(theta), dtype=theta.dtype)
    return {"hessian": h + identity, "gauss_newton": j.T @ inner @ j + identity}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_products_match_the_explicit_matrix(model, batch, kind, batch_size):
    x, y = batch
    matrix = matrices(model, x, y, 0.01)[kind]
    v = torch.randn(4, len(matrix), dtype=torch.float64)
    found = kdfast.network_hvp(model, x, y, v, kind=kind, l2=0.01, batch_size=batch_size)
    torch.testing.assert_close(found, v @ matrix, rtol=1e-10, atol=1e-12)
    one = kdfast.network_hvp(model, x, y, v[1], kind=kind, l2=0.01)
    assert one.shape == v[1].shape
    torch.testing.assert_close(one, found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_loss_products_match_the_explicit_matrix(model, batch, kind):
    x, y = batch
    teacher = torch.randn(N, CLASSES, dtype=torch.float64)

    def criterion(z):
        return kdfast.kd_loss(z, y, teacher, alpha=0.7, temperature=2.0, backend="reference")

    matrix = matrices(model, x, y, 0.0, criterion)[kind]
    v = torch.randn(2, len(matrix), dtype=torch.float64)
    options = {"loss": "kd", "teacher": teacher, "alpha": 0.7, "temperature": 2.0, "batch_size": 4}
    torch.testing.assert_close(
        kdfast.network_hvp(model, x, y, v, kind=kind, **options), v @ matrix, rtol=1e-9, atol=1e-11
    )


def test_gradient_matches_autograd(model, batch):
    x, y = batch
    curvature = NetworkCurvature(model, x, y, l2=0.3, batch_size=2)
    F.cross_entropy(model(x), y).backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    expected = torch.cat([(p.grad + 0.3 * p.detach()).flatten() for p in trainable])
    assert curvature.size == len(expected)
    torch.testing.assert_close(curvature.gradient(), expected, rtol=1e-12, atol=1e-14)


def test_solves_several_systems_at_once(model, batch):
    x, y = batch
    matrix = matrices(model, x, y, 0.05)["gauss_newton"]
    curvature = NetworkCurvature(model, x, y, l2=0.05, batch_size=5)
    b = torch.stack([curvature.gradient(), torch.randn(curvature.size, dtype=torch.float64)])
    solution = curvature.solve(b, tol=1e-9)
    assert solution.residuals.max() <= 1e-9
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix, b.T).T, rtol=1e-6, atol=1e-8)


class Padded(nn.Module):
    """Embeddings with a padding index, by a layer or a function, and output weights of their own or tied."""

    def __init__(self, padding, tied=False, functional=False):
        super().__init__()
        self.tokens, self.mix = nn.Embedding(6, 4, padding_idx=padding), nn.Linear(4, 4)
        self.head = nn.Linear(4, 6)
        self.functional = functional
        if tied:
            self.head.weight = self.tokens.weight
        with torch.no_grad():
            self.tokens.weight.normal_()

    def forward(self, ids):
        if self.functional:
            rows = F.embedding(ids, self.tokens.weight, padding_idx=self.tokens.padding_idx)
        else:
            rows = self.tokens(ids)
        return self.head(self.mix(rows).tanh().mean(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [2, -4, None])
@pytest.mark.parametrize(("tied", "functional"), [(False, False), (True, False), (False, True), (True, True)])
def test_operator_with_a_padding_index_is_symmetric(padding, tied, functional, kind):
    """The row of padding is a constant where it is looked up: neither gradients nor tangents pass."""
    model = Padded(padding, tied, functional).double()
    ids, y = torch.tensor([[2, 1, 3], [0, 2, 2], [5, 4, 2], [1, 1, 0]]), torch.tensor([0, 3, 1, 5])
    curvature = NetworkCurvature(model, ids, y, kind=kind, l2=0.1, batch_size=3)
    matrix = curvature(torch.eye(curvature.size, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-12)
    F.cross_entropy(model(ids), y).backward()
    expected = torch.cat([(p.grad + 0.1 * p.detach()).flatten() for p in model.parameters()])
    torch.testing.assert_close(curvature.gradient(), expected, rtol=1e-12, atol=1e-14)
    if kind == "gauss_newton":
        b = torch.randn(2, curvature.size, dtype=torch.float64)
        assert curvature.solve(b, tol=1e-8).residuals.max() <= 1e-8
    if padding is not None and not tied:
        row = matrix[8:12, :].clone()
        row[:, 8:12] -= 0.1 * torch.eye(4, dtype=torch.float64)
        assert row.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_padding_index_that_is_not_in_the_batch_changes_nothing(kind):
    model = Padded(2).double()
    ids, y = torch.tensor([[0, 1, 3], [5, 4, 4]]), torch.tensor([0, 3])
    v = torch.randn(NetworkCurvature(model, ids, y).size, dtype=torch.float64)
    found = kdfast.network_hvp(model, ids, y, v, kind=kind)
    model.tokens.padding_idx = None
    torch.testing.assert_close(found, kdfast.network_hvp(model, ids, y, v, kind=kind), rtol=1e-12, atol=1e-14)


class LookedUp(nn.Module):
    """A classifier of looked-up rows."""

    def __init__(self, look_up):
        super().__init__()
        self.rows, self.head = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 3)
        self.look_up = look_up

    def forward(self, ids):
        return self.head(self.look_up(ids, self.rows).tanh().mean(1))


LOOK_UPS = {
    "torch.embedding": (lambda ids, w: torch.embedding(w, ids, 2), 2),
    "torch.embedding without padding": (lambda ids, w: torch.embedding(w, ids), None),
    "scaled by frequency": (lambda ids, w: F.embedding(ids, w, scale_grad_by_freq=True), None),
    "sparse": (lambda ids, w: F.embedding(ids, w, sparse=True), None),
    "all by position": (lambda ids, w: F.embedding(ids, w, -4, None, 2.0, True, True), 2),
}


@pytest.mark.parametrize("name", LOOK_UPS)
def test_options_of_embeddings_that_change_gradients_alone_have_no_effect(name):
    look_up, padding = LOOK_UPS[name]
    model = LookedUp(look_up).double()
    ids, y = torch.tensor([[2, 1, 3], [0, 2, 2], [5, 4, 2], [1, 1, 0]]), torch.tensor([0, 2, 1, 1])
    constant = model.rows.detach().clone()

    def loss(flat):
        rows, weight, bias = flat[:24].view(6, 4), flat[24:36].view(3, 4), flat[36:]
        looked = (
            rows[ids] if padding is None else torch.where((ids == padding)[..., None], constant[padding], rows[ids])
        )
        return F.cross_entropy(looked.tanh().mean(1) @ weight.T + bias, y)

    at = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = torch.autograd.functional.hessian(loss, at)
    found = kdfast.network_hvp(model, ids, y, torch.eye(len(at), dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    gauss_newton = kdfast.network_hvp(model, ids, y, torch.eye(len(at), dtype=torch.float64), kind="gauss_newton")
    torch.testing.assert_close(gauss_newton, gauss_newton.T, rtol=0, atol=1e-14)


def test_rejects_an_empty_batch(model):
    x, y = torch.zeros(0, 1, 5, 5, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(DataError, match="the batch is empty"):
        NetworkCurvature(model, x, y)


def test_negative_curvature_raises(model, batch):
    x, y = batch
    values, vectors = torch.linalg.eigh(matrices(model, x, y, 0.0)["hessian"])
    assert values[0] < -1e-3
    with pytest.raises(SolveError, match=r"curvature .*add damping .*Gauss-Newton"):
        NetworkCurvature(model, x, y, kind="hessian").solve(vectors[:, :1].T.contiguous())


def test_leaves_the_model_unchanged(model, batch):
    before = [(p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()]
    v = torch.randn(sum(p.numel() for p in model.parameters() if p.requires_grad), dtype=torch.float64)
    with torch.no_grad():
        kdfast.network_hvp(model, *batch, v)
    for p, (flag, grad, value) in zip(model.parameters(), before, strict=True):
        assert p.requires_grad == flag
        assert p.grad is grad is None
        assert torch.equal(p, value)


def test_accepts_keyword_inputs_and_custom_losses(model, batch):
    x, y = batch
    v = torch.randn(2, NetworkCurvature(model, x, y).size, dtype=torch.float64)
    for kind in KINDS:
        expected = kdfast.network_hvp(model, x, y, v, kind=kind)
        found = kdfast.network_hvp(
            model, {"x": x}, y, v, kind=kind, loss=lambda z, t: F.cross_entropy(z, t, reduction="none"), batch_size=2
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "fisher"}, UsageError, "`kind` is 'fisher'"),
        ({"l2": -1.0}, UsageError, "`l2` is -1.0"),
        ({"batch_size": 0}, UsageError, "`batch_size` is 0"),
        ({"v": torch.zeros(3)}, ShapeError, r"`v` has shape \(1, 3\): pass \(K, 37\)"),
        ({"v": torch.full((37,), float("nan"))}, DataError, "not finite"),
        ({"v": torch.zeros(37, device="meta")}, UsageError, "`v` is on meta"),
        ({"labels": torch.full((N,), 3)}, DataError, r"`labels\[0\]` is 3"),
        ({"inputs": torch.full((N, 1, 5, 5), float("inf")).double()}, DataError, "`inputs` contains"),
    ],
)
def test_rejects_bad_arguments(model, batch, change, error, message):
    options = {"inputs": batch[0], "labels": batch[1], "v": torch.zeros(37), **change}
    with pytest.raises(error, match=message):
        kdfast.network_hvp(model, **options)


def test_rejects_batch_statistics_and_dropout(batch):
    x = torch.randn(N, 5, dtype=torch.float64)
    batch_norm = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)).double()
    with pytest.raises(UsageError, match="layer '1'"):
        kdfast.network_hvp(batch_norm, x, batch[1], torch.zeros(1))
    dropout = nn.Sequential(nn.Linear(5, CLASSES), nn.Dropout()).double()
    with pytest.raises(UsageError, match=r"dropout needs model.eval\(\)"):
        kdfast.network_hvp(dropout, x, batch[1], torch.zeros(18))
