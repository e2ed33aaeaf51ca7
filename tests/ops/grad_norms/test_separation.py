"""Models that reorder or mix their samples: refused, or right by a fallback, also where every shape fits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdfast
from kdfast.errors import ShapeError, UsageError
from kdfast.ops.grad_norms.recording import separation

REFUSED = "in another order than that of the inputs, or on a mixture of them"


class SortedByLength(nn.Module):
    """As for packed sequences: the longest first, and back."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x, lengths):
        order = lengths.argsort(descending=True)
        out = self.rnn(x[order])[0][torch.arange(len(lengths)), lengths[order] - 1]
        return self.head(out[order.argsort()])


class SortedByExpert(nn.Module):
    """A mixture of experts whose samples are grouped by expert, and back."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.Parameter(torch.randn(3, 6, 4)), nn.Linear(4, 3)

    def forward(self, x):
        expert = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        order = expert.argsort()
        out = torch.bmm(x[order][:, None], self.experts[expert[order]])[:, 0]
        return self.head(out[order.argsort()])


class Mixed(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.body, self.mix, self.head = nn.Linear(6, 4), mix, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.mix(self.body(x)))


def by_length(lengths):
    return torch.randn(len(lengths), 5, 6).double(), lengths


REORDERED = {
    "length": (SortedByLength, lambda n: by_length(torch.randint(1, 6, (n,)))),
    "length, descending": (SortedByLength, lambda n: by_length(5 - torch.arange(n) * 5 // n)),
    "length, ascending": (SortedByLength, lambda n: by_length(torch.arange(n) * 5 // n + 1)),
    "expert": (SortedByExpert, lambda n: torch.randn(n, 6).double()),
}
MIXES = {
    "batch_norm": lambda t: F.batch_norm(t, None, None, training=True),
    "mean": lambda t: t - t.mean(0),
    "softmax": lambda t: t.softmax(0),
}


def exact(model, inputs, labels):
    """Return the norms by autograd, where each sample's loss may depend on the whole batch."""
    losses = F.cross_entropy(model(*(inputs if isinstance(inputs, tuple) else (inputs,))), labels, reduction="none")
    return norms(losses, model)


def norms(losses, model):
    found = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    return torch.stack([sum(g.square().sum() for g in grads).sqrt() for grads in found])


@pytest.mark.parametrize("n", [7, 9, 16])
@pytest.mark.parametrize("name", REORDERED)
def test_reordered_samples_are_refused_and_the_loop_is_exact(name, n):
    make, inputs_of = REORDERED[name]
    model, inputs, labels = make().double(), inputs_of(n), torch.randint(0, 3, (n,))
    for _ in range(2):
        with pytest.raises(UsageError, match=REFUSED):
            kdfast.grad_norms(model, inputs, labels)
    with pytest.raises(UsageError, match=REFUSED):
        kdfast.fisher_diagonal(model, [(inputs, labels)])
    found = kdfast.grad_norms(model, inputs, labels, fallback="loop")
    torch.testing.assert_close(found, exact(model, inputs, labels), rtol=1e-10, atol=0)


@pytest.mark.parametrize("n", [2, 5, 6, 64])
@pytest.mark.parametrize("mix", MIXES)
def test_statistics_of_the_batch_are_refused(mix, n):
    model, x, y = Mixed(MIXES[mix]), torch.randn(n, 6), torch.randint(0, 3, (n,))
    with pytest.raises((UsageError, ShapeError), match=rf"{REFUSED}|depends on more than its part"):
        kdfast.grad_norms(model, x, y)
    for fallback in ("vmap", "loop"):
        with pytest.raises((UsageError, ShapeError), match=r"than in the batch|on more than its part|cannot run"):
            kdfast.grad_norms(model, x, y, fallback=fallback)


def test_a_loss_that_compares_samples_is_refused():
    def contrast(outputs, labels):
        z = F.normalize(outputs, dim=1)
        return F.cross_entropy(z @ z.detach().roll(1, 0).T + z @ z.T, torch.arange(len(z)), reduction="none")

    with pytest.raises(UsageError, match=REFUSED):
        kdfast.grad_norms(nn.Linear(6, 3), torch.randn(8, 6), None, loss=contrast)


def test_a_loss_for_the_whole_batch_alone_is_taken_as_it_is():
    weights = torch.rand(8, dtype=torch.float64)
    model, x = nn.Linear(6, 3).double(), torch.randn(8, 6).double()
    found = kdfast.grad_norms(model, x, None, loss=lambda outputs, labels: weights * outputs.square().sum(1))
    torch.testing.assert_close(found, norms(weights * model(x).square().sum(1), model))


def test_samples_are_checked_once_for_each_model_loss_and_mode(monkeypatch):
    runs = []
    monkeypatch.setattr(separation, "_mixed_calls", lambda *args: runs.append(args) or [])
    model, x, y = Mixed(nn.Dropout(0.5)), torch.randn(8, 6), torch.randint(0, 3, (8,))
    for _ in range(2):
        kdfast.grad_norms(model, x, y)
        kdfast.grad_norms(model, x, y, loss=lambda outputs, labels: outputs.square().sum(1))
    assert len(runs) == 2
    kdfast.grad_norms(model.eval(), x, y)
    kdfast.grad_norms(Mixed(nn.ReLU()), x, y)
    assert len(runs) == 4


def test_the_check_leaves_random_numbers_and_buffers_alone():
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.BatchNorm1d(4).eval(), nn.Linear(4, 3))
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    torch.manual_seed(1)
    first, state = kdfast.grad_norms(model, x, y), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(kdfast.grad_norms(model, x, y), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_between_the_outputs_of_an_operation_count_once():
    class Cells(nn.Module):
        """Of an LSTM cell's outputs, h is computed from c."""

        def __init__(self, steps):
            super().__init__()
            self.cell, self.head, self.steps = nn.LSTMCell(6, 4), nn.Linear(4, 3), steps

        def forward(self, x):
            state = None
            for _ in range(self.steps):
                state = self.cell(x, state)
            return self.head(state[0] + state[1])

    for steps in (1, 7):
        model, x, y = Cells(steps).double(), torch.randn(5, 6).double(), torch.randint(0, 3, (5,))
        torch.testing.assert_close(kdfast.grad_norms(model, x, y), exact(model, x, y), rtol=1e-12, atol=0)
