"""Samples that are not in the first dimension of the inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdfast
from kdfast.errors import ShapeError, UsageError

WIDTH, CLASSES = 6, 4


class Recurrent(nn.Module):
    """A recurrent layer in its default layout, time first, and a head on the last step."""

    def __init__(self, layer=nn.LSTM):
        super().__init__()
        self.layer, self.head = layer(WIDTH, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x)[0][-1])


class Encoder(nn.Module):
    """A transformer layer in its default layout."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x).mean(0))


class Mixer(nn.Module):
    """Layers with formulas on time-first tensors."""

    def __init__(self):
        super().__init__()
        self.mix, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.mix(x)).tanh().mean(0))


class Tokens(nn.Module):
    """Embeddings of time-first ids."""

    def __init__(self):
        super().__init__()
        self.tokens, self.layer = nn.Embedding(9, WIDTH, padding_idx=2), nn.GRU(WIDTH, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, ids):
        return self.head(self.layer(self.tokens(ids))[1][0])


MODELS = {
    "lstm": Recurrent,
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "transformer": Encoder,
    "linear": Mixer,
    "ids": Tokens,
}


def time_first(kind, steps, n):
    model = MODELS[kind]().double()
    x = torch.randint(0, 9, (steps, n)) if kind == "ids" else torch.randn(steps, n, WIDTH, dtype=torch.float64)
    return model, x, torch.randint(0, CLASSES, (n,))


def expected(model, x, y):
    out = []
    for i in range(len(y)):
        loss = F.cross_entropy(model(x[:, i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        out.append(sum(g.square().sum() for g in grads if g is not None).sqrt())
    return torch.stack(out)


@pytest.mark.parametrize("fallback", ["error", "vmap", "loop"])
@pytest.mark.parametrize(("steps", "n"), [(7, 3), (3, 3), (6, 6), (1, 4), (5, 1)])
@pytest.mark.parametrize("kind", MODELS)
def test_time_first_layouts_match_autograd(kind, steps, n, fallback):
    model, x, y = time_first(kind, steps, n)
    found = kdfast.grad_norms(model, x, y, batch_dim=1, fallback=fallback)
    torch.testing.assert_close(found, expected(model, x, y), rtol=1e-10, atol=0)


@pytest.mark.parametrize("fallback", ["error", "vmap", "loop"])
@pytest.mark.parametrize("kind", MODELS)
def test_rejects_other_lengths_of_inputs_and_labels(kind, fallback):
    model, x, y = time_first(kind, 7, 3)
    with pytest.raises(ShapeError, match=r"`labels` has 3 entries, and `inputs` .* has 7 samples .*pass `batch_dim`=1"):
        kdfast.grad_norms(model, x, y, fallback=fallback)
    with pytest.raises(ShapeError, match=r"`labels` has 7 entries, and `inputs` .* has 3 samples .*pass `batch_dim`=0"):
        kdfast.grad_norms(model, x, torch.zeros(7, dtype=torch.int64), batch_dim=1, fallback=fallback)


@pytest.mark.parametrize("fallback", ["error", "vmap", "loop"])
@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("kind", MODELS)
def test_rejects_the_wrong_dimension_where_lengths_do_not_tell(kind, n, fallback):
    model, x, y = time_first(kind, n, n)
    with pytest.raises(ShapeError, match="pass the samples' dimension as `batch_dim`"):
        kdfast.grad_norms(model, x, y, fallback=fallback)


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("kind", MODELS)
def test_rejects_the_wrong_dimension_with_a_loss_of_ones_own(kind, n):
    model, x, y = time_first(kind, n, n)
    with pytest.raises(ShapeError, match="pass the samples' dimension as `batch_dim`"):
        kdfast.grad_norms(model, x, y, loss=lambda out, y: F.cross_entropy(out, y, reduction="none"))


@pytest.mark.parametrize("steps", [3, 5])
def test_outputs_may_have_the_samples_elsewhere(steps):
    """A loss of one's own on outputs (time, samples, classes)."""

    def loss(outputs, labels):
        return F.cross_entropy(outputs.mean(0), labels, reduction="none")

    model = nn.Linear(WIDTH, CLASSES).double()
    x, y = torch.randn(steps, 3, WIDTH, dtype=torch.float64), torch.randint(0, CLASSES, (3,))
    exact = []
    for i in range(3):
        grads = torch.autograd.grad(loss(model(x[:, i : i + 1]), y[i : i + 1]).sum(), list(model.parameters()))
        exact.append(sum(g.square().sum() for g in grads).sqrt())
    found = kdfast.grad_norms(model, x, y, loss=loss, batch_dim=1)
    torch.testing.assert_close(found, torch.stack(exact), rtol=1e-12, atol=0)
    if steps == 3:
        with pytest.raises(ShapeError, match="`batch_dim`"):
            kdfast.grad_norms(model, x, y, loss=loss)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_every_input_is_split_along_the_dimension():
    model = nn.Transformer(WIDTH, 2, 1, 1, 8, dropout=0.0).double()
    a, b = torch.randn(7, 3, WIDTH, dtype=torch.float64), torch.randn(4, 3, WIDTH, dtype=torch.float64)

    def loss(outputs, labels):
        return outputs.square().sum((0, 2))

    exact = []
    for i in range(3):
        value = loss(model(a[:, i : i + 1], b[:, i : i + 1]), None).sum()
        exact.append(sum(g.square().sum() for g in torch.autograd.grad(value, list(model.parameters()))).sqrt())
    for inputs in ((a, b), {"src": a, "tgt": b}):
        found = kdfast.grad_norms(model, inputs, None, loss=loss, batch_dim=1)
        torch.testing.assert_close(found, torch.stack(exact), rtol=1e-10, atol=0)


@pytest.mark.parametrize("per_layer", [False, True])
def test_no_samples_give_an_empty_result(per_layer):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, CLASSES))
    found = kdfast.grad_norms(model, torch.randn(0, 3, 6, 6), torch.zeros(0, dtype=torch.int64), per_layer=per_layer)
    results = found if per_layer else {"": found}
    assert list(results) == (["0", "2"] if per_layer else [""])
    assert all(x.shape == (0,) and x.dtype == torch.float32 for x in results.values())
    with pytest.raises(UsageError, match="`loss` is 'hinge'"):
        kdfast.grad_norms(model, torch.randn(0, 3, 6, 6), torch.zeros(0, dtype=torch.int64), loss="hinge")
