"""Caches of classes that were drawn at random."""

import itertools
import math

import pytest
import torch

import kdfast
from kdfast.errors import CacheMismatch, DataError, UsageError

VOCABULARY = 4
P = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
Q = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize("weighted", [False, True])
def test_mean_gradient_over_all_draws_is_that_of_the_full_teacher(tmp_path, weighted):
    temperature, proposal = 2.0, Q if weighted else P
    draws = list(itertools.product(range(VOCABULARY), repeat=2))
    with kdfast.TokenWriter(tmp_path / "t", VOCABULARY, temperature=temperature, sampled=True) as writer:
        for draw in draws:  # a text for each: the same draw at both tokens
            ids = torch.tensor([draw, draw])
            weights = (P / proposal).gather(1, ids) if weighted else None
            writer.add_samples(ids, weights=weights, labels=[0, 1])
    batch = kdfast.TokenTeacher.open(tmp_path / "t").lookup(range(len(draws)))
    z = torch.tensor([[0.3, -0.2, 0.5, 0.1], [1.0, 0.0, -1.0, 2.0]])
    logits = z.repeat(len(draws), 1, 1).requires_grad_()
    kdfast.kd_loss(
        logits.flatten(0, 1), batch.labels.flatten(), batch.teacher, batch.rows.flatten(), alpha=0.7,
        temperature=temperature, weights=batch.weights.flatten(), reduction="sum",
    ).backward()  # fmt: skip
    chances = torch.stack([proposal[:, list(draw)].prod(1) for draw in draws])  # (draws, tokens)
    mean = (chances.unsqueeze(2) * logits.grad.double()).sum(0)
    x = z.double().requires_grad_()
    kl = (P * (P.log() - (x / temperature).log_softmax(1))).sum()
    ce = -(x.log_softmax(1)[0, 0] + x.log_softmax(1)[1, 1])
    (0.7 * temperature**2 * kl + 0.3 * ce).backward()
    torch.testing.assert_close(mean, x.grad, rtol=0, atol=2e-3)  # shares are stored in float16


def test_stores_the_shares_and_mean_weights_of_the_draws(tmp_path):
    ids = torch.tensor([[3, 1, 3], [2, -1, -1], [-1, -1, -1], [0, 1, 2]])
    weights = torch.tensor([[2.0, 1.0, 0.5], [3.0, 9.0, 9.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    with kdfast.TokenWriter(tmp_path / "t", VOCABULARY, sampled=True) as writer:
        writer.add_samples(ids, weights=weights)
        writer.add_samples([[0]], sequence=None)
    teacher = kdfast.TokenTeacher.open(tmp_path / "t")
    assert teacher.sampled
    batch = teacher.lookup([0, 1])
    torch.testing.assert_close(batch.weights, torch.tensor([[3.5 / 3, 3.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    assert batch.mask.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert batch.to("cpu").weights is not None
    assert batch.teacher.classes[0].tolist() == [3, 1]
    shares = torch.tensor([math.log(2.5 / 3.5), math.log(1 / 3.5)])
    torch.testing.assert_close(batch.teacher.values[0], shares, rtol=1e-3, atol=0)
    assert batch.teacher.tail.tolist() == [-math.inf, -math.inf, 0, 0, -math.inf]


def test_draws_serve_only_the_temperature_at_which_they_were_drawn(tmp_path):
    with kdfast.TokenWriter(tmp_path / "t", VOCABULARY, temperature=2.0, sampled=True) as writer:
        writer.add_samples([[0, 1]], labels=[0])
    teacher = kdfast.TokenTeacher.open(tmp_path / "t")
    # A share of the probability at the temperature of the loss: logits are its log times T.
    torch.testing.assert_close(
        teacher.lookup([0]).teacher.values, torch.full((1, 2), 2 * math.log(0.5)), rtol=1e-3, atol=0
    )
    with pytest.raises(UsageError, match="`temperature` is 1, and the classes were drawn at 2"):
        teacher.lookup([0], 1.0)
    with pytest.raises(UsageError, match="drawn at random"):
        kdfast.token_scores(teacher)


def test_draws_and_log_probabilities_are_not_mixed(tmp_path):
    with kdfast.TokenWriter(tmp_path / "t", VOCABULARY, sampled=True) as writer:
        writer.add_samples([[0, 1]])
        with pytest.raises(UsageError, match="`sampled` is True: use `add_samples`"):
            writer.add([[-1.0]], [[0]])
    with pytest.raises(CacheMismatch, match="sampled"):
        kdfast.TokenWriter(tmp_path / "t", VOCABULARY)
    with kdfast.TokenWriter(tmp_path / "u", VOCABULARY) as writer:
        writer.add([[-1.0]], [[0]])
        with pytest.raises(UsageError, match="`sampled` is False: use `add`"):
            writer.add_samples([[0, 1]])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[4]], {}, r"`ids\[0, 0\]` is 4: must be below 4"),
        ([0, 1], {}, "`ids` are torch.int64 of shape"),
        ([[0.5]], {}, "`ids` are torch.float64"),
        ([[0, 1]], {"weights": [[1.0]]}, "`weights` have shape"),
        ([[0, 1]], {"weights": [[1.0, -1.0]]}, r"`weights\[0, 1\]` is -1"),
        ([[0, 1]], {"labels": [0, 1]}, "the tokens are int64 of shape"),
    ],
)
def test_refuses_draws_that_do_not_fit(tmp_path, ids, options, message):
    writer = kdfast.TokenWriter(tmp_path / "t", VOCABULARY, sampled=True)
    with pytest.raises(DataError, match=message):
        writer.add_samples(ids, **options)
    writer.close()
