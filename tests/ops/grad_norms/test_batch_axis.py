"""Rows that are not samples, even if there are as many; rows shared by all samples; Hugging Face models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdfast
from kdfast.errors import DataError, ShapeError, UsageError

CLASSES, LENGTH, WIDTH = 3, 6, 4


def expected(model, x, y, module=None):
    """Return the norm of each sample's gradient by autograd, running the model on one sample at a time."""
    parameters = list((module or model).parameters())
    out = []
    for i in range(len(y)):
        one = {k: v[i : i + 1] for k, v in x.items()} if isinstance(x, dict) else x[i : i + 1]
        outputs = model(**one).logits if isinstance(x, dict) else model(one)
        grads = torch.autograd.grad(F.cross_entropy(outputs, y[i : i + 1]), parameters, allow_unused=True)
        out.append(sum(g.double().square().sum() for g in grads if g is not None).sqrt())
    return torch.stack(out)


class Positions(nn.Module):
    """Adds position embeddings to every sample, with or without a leading dimension of 1."""

    def __init__(self, leading):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(10, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.leading = leading

    def forward(self, ids):
        positions = torch.arange(ids.shape[1])
        return self.head(
            (self.tokens(ids) + self.positions(positions[None] if self.leading else positions)).tanh().mean(1)
        )


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.mix(x.transpose(0, 1)).tanh().mean(0))


class Table(nn.Module):
    """Computes a table for all samples, then indexes its rows as one list."""

    def __init__(self):
        super().__init__()
        self.make, self.head = nn.Linear(2, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("positions", torch.randn(1, LENGTH, 2, dtype=torch.float64))

    def forward(self, x):
        rows = self.make(self.positions).reshape(-1, WIDTH)[:LENGTH]
        return self.head((x + rows).tanh().mean(1))


@pytest.mark.parametrize("n", [1, 2, 3, 4, LENGTH, 17])
def test_row_shared_by_all_samples(n):
    model = Positions(leading=True).double()
    ids, y = torch.randint(0, 10, (n, LENGTH)), torch.randint(0, CLASSES, (n,))
    torch.testing.assert_close(kdfast.grad_norms(model, ids, y), expected(model, ids, y), rtol=1e-12, atol=0)


@pytest.mark.parametrize("fallback", ["error", "vmap", "loop"])
@pytest.mark.parametrize("n", [2, 4, LENGTH])
@pytest.mark.parametrize("kind", ["positions", "time first", "table"])
def test_rows_that_are_not_samples_even_if_there_are_as_many(n, kind, fallback):
    if kind == "positions":
        model, x = Positions(leading=False).double(), torch.randint(0, 10, (n, LENGTH))
    else:
        model = (TimeFirst if kind == "time first" else Table)().double()
        x = torch.randn(n, LENGTH, WIDTH, dtype=torch.float64)
    y = torch.randint(0, CLASSES, (n,))
    found = kdfast.grad_norms(model, x, y, fallback=fallback)
    torch.testing.assert_close(found, expected(model, x, y), rtol=1e-12, atol=0)


SHARED = {
    "added": lambda p, n: p,
    "squeezed": lambda p, n: p.squeeze(0),
    "indexed": lambda p, n: p[0],
    "viewed": lambda p, n: p.view(LENGTH, WIDTH),
    "summed": lambda p, n: p.sum(0),
    "averaged": lambda p, n: p.mean(0),
    "repeated": lambda p, n: p.repeat(n, 1, 1),
    "joined": lambda p, n: torch.cat([p] * n),
    "a product": lambda p, n: p[0] @ (p[0].T @ p[0]),
    "einsum": lambda p, n: torch.einsum("otd->td", p),
}


class Shared(nn.Module):
    """Uses position embeddings (1, T, D) in one of the forms of ``SHARED``."""

    def __init__(self, use):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(10, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.use = SHARED[use]

    def forward(self, ids):
        positions = self.use(self.positions(torch.arange(LENGTH)[None]), len(ids))
        return self.head((self.tokens(ids) + positions).tanh().mean(1))


@pytest.mark.parametrize("fallback", ["error", "vmap", "loop"])
@pytest.mark.parametrize("n", [5, LENGTH, WIDTH])
@pytest.mark.parametrize("use", SHARED)
def test_shared_row_is_scored_correctly_or_rejected(use, n, fallback):
    model = Shared(use).double()
    ids, y = torch.randint(0, 10, (n, LENGTH)), torch.randint(0, CLASSES, (n,))
    if fallback == "error" and use == "joined":
        with pytest.raises(UsageError, match=r"parameter 'positions\.weight' (is not covered|enters other)"):
            kdfast.grad_norms(model, ids, y)
        return
    found = kdfast.grad_norms(model, ids, y, fallback=fallback)
    torch.testing.assert_close(found, expected(model, ids, y), rtol=1e-12, atol=0)


def test_shared_row_under_dropout_uses_a_single_draw():
    class WithDropout(Positions):
        def forward(self, ids):
            hidden = self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])
            return self.head(F.dropout(hidden, 0.5, self.training).mean(1))

    model = WithDropout(leading=True).double().train()
    ids, y = torch.randint(0, 10, (5, LENGTH)), torch.randint(0, CLASSES, (5,))
    torch.manual_seed(0)
    found = kdfast.grad_norms(model, ids, y)
    after = torch.rand(1)
    torch.manual_seed(0)
    losses = F.cross_entropy(model(ids), y, reduction="none")
    assert torch.rand(1) == after
    grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    exact = torch.stack([sum(g.square().sum() for g in each).sqrt() for each in grads])
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)


def test_unbatched_input_may_be_as_long_as_the_batch():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

        def forward(self, x, mask):
            return self.head((mask @ self.mix(x)).tanh().mean(1))

    model, mask = Masked().double(), torch.rand(LENGTH, LENGTH, dtype=torch.float64).tril()
    x, y = torch.randn(LENGTH, LENGTH, WIDTH, dtype=torch.float64), torch.randint(0, CLASSES, (LENGTH,))
    found = kdfast.grad_norms(model, (x, mask), y)
    torch.testing.assert_close(found, expected(lambda one: model(one, mask), x, y, model), rtol=1e-12, atol=0)


def test_probe_run_has_no_side_effects():
    """The additional run must not advance the random state that dropout draws from."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, CLASSES)).train()
    x, y = torch.randn(WIDTH, WIDTH), torch.randint(0, CLASSES, (WIDTH,))  # as many samples as features
    torch.manual_seed(0)
    kdfast.grad_norms(model, x, y)
    after = torch.rand(1)
    torch.manual_seed(0)
    model(x)
    assert torch.rand(1) == after
    assert all(not layer._forward_hooks for layer in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_rejects_model_that_fails_on_a_few_samples():
    class Picky(nn.Linear):
        def __call__(self, x):
            if len(x) < 4:
                raise ValueError("too few")
            return super().__call__(x)

    with pytest.raises(
        ShapeError, match=r"the run on a few samples .* failed \(too few\): use a batch of another size"
    ):
        kdfast.grad_norms(Picky(4, 3), torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))


def test_custom_loss_is_called_on_the_full_batch_only():
    weights, x, y = torch.rand(WIDTH), torch.randn(WIDTH, WIDTH), torch.randint(0, CLASSES, (WIDTH,))
    model = nn.Linear(WIDTH, CLASSES)  # as many samples as features
    found = kdfast.grad_norms(model, x, y, loss=lambda out, y: weights * F.cross_entropy(out, y, reduction="none"))
    torch.testing.assert_close(found, weights * kdfast.grad_norms(model, x, y))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("calls", [1, 2])
def test_detects_use_outside_the_layer_through_autocast_copies(autocast, calls):
    class UsedOutside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            for _ in range(calls):
                x = self.layer(x).tanh()
            return F.linear(x, self.layer.weight)

    model, x, y = UsedOutside(), torch.randn(5, WIDTH), torch.randint(0, WIDTH, (5,))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = kdfast.grad_norms(model, x, y)
        truth = expected(model, x, y)
    torch.testing.assert_close(found.double(), truth, rtol=0.05 if autocast else 1e-5, atol=0)


@pytest.mark.parametrize("fallback", ["error", "vmap", "loop"])
def test_unused_call_does_not_hide_use_outside_the_layer(fallback):
    class UnusedCall(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x):
            return {"unused": self.layer(x), "logits": F.linear(x.tanh(), self.layer.weight)}

    model, x, y = UnusedCall().double(), torch.randn(5, WIDTH, dtype=torch.float64), torch.randint(0, WIDTH, (5,))
    found = kdfast.grad_norms(model, x, y, fallback=fallback)
    losses = F.cross_entropy(model(x)["logits"], y, reduction="none")
    grads = [torch.autograd.grad(loss, model.layer.weight, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(found, torch.stack([g.norm() for g in grads]), rtol=1e-12, atol=0)


def test_instance_with_its_own_forward_matches_autograd():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double()
    first = model[0]
    first.forward = lambda x: F.linear(x, 2 * first.weight, first.bias)
    x, y = torch.randn(5, WIDTH, dtype=torch.float64), torch.randint(0, CLASSES, (5,))
    for fallback in ("error", "loop"):
        found = kdfast.grad_norms(model, x, y, fallback=fallback)
        torch.testing.assert_close(found, expected(model, x, y), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [20.0, 40.0, 60.0, 90.0])
def test_very_well_learned_samples_keep_their_precision(dtype, margin):
    """A gradient of about exp(-margin) is lost neither in p - 1 nor in its square."""
    layer = nn.Linear(2, 2, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[margin, 0.0], [0.0, 0.0]]))
    x = torch.tensor([[1.0, 0.0]], dtype=dtype)
    found = kdfast.grad_norms(layer, x, torch.tensor([0]))
    torch.testing.assert_close(
        found.double(), torch.tensor([2**0.5], dtype=torch.float64) * torch.e**-margin, rtol=1e-5, atol=0
    )


def test_rejects_gradient_that_is_not_finite():
    x, y = torch.full((2, WIDTH), 1e30), torch.tensor([0, 1])
    with pytest.raises(DataError, match="the gradient of sample 0 is not finite, or its square overflows"):
        kdfast.grad_norms(nn.Linear(WIDTH, CLASSES), x, y)
    with pytest.raises(DataError, match="the gradient of sample 1 is not finite"):
        kdfast.grad_norms(
            nn.Linear(WIDTH, CLASSES),
            torch.randn(2, WIDTH),
            y,
            loss=lambda out, y: torch.stack([out[0].sum(), (out[1].sum() * 0).sqrt()]),
        )


@pytest.mark.parametrize("labels", [[0, 1], None])
def test_rejects_labels_that_are_not_a_tensor_and_single_class_logits(labels):
    with pytest.raises(UsageError, match="`labels` is"):
        kdfast.grad_norms(nn.Linear(WIDTH, CLASSES), torch.randn(2, WIDTH), labels)
    with pytest.raises(ShapeError, match="one class"):
        kdfast.grad_norms(nn.Linear(WIDTH, 1), torch.randn(2, WIDTH), torch.zeros(2, dtype=torch.int64))


SMALL = {"num_labels": CLASSES, "pad_token_id": 0}


def make_hugging_face(name):
    transformers = pytest.importorskip("transformers")
    if name == "bert":
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=12, **SMALL,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0, **SMALL
        )
        return transformers.GPT2ForSequenceClassification(config)
    config = transformers.DistilBertConfig(
        vocab_size=30, dim=8, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=12, **SMALL
    )
    return transformers.DistilBertForSequenceClassification(config)


@pytest.mark.parametrize("n", [1, 3, LENGTH])
@pytest.mark.parametrize("name", ["bert", "gpt2", "distilbert"])
def test_hugging_face_models_match_autograd(name, n):
    model = make_hugging_face(name).eval()
    batch = {"input_ids": torch.randint(1, 30, (n, LENGTH)), "attention_mask": torch.ones(n, LENGTH, dtype=torch.int64)}
    y = torch.randint(0, CLASSES, (n,))
    truth = expected(model, batch, y)
    torch.testing.assert_close(kdfast.grad_norms(model, batch, y).double(), truth, rtol=1e-5, atol=0)
    if n == 3:
        found = kdfast.grad_norms(model, batch, y, fallback="loop")
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=0)
