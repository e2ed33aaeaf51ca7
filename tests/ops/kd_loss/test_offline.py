"""Teachers of log-probabilities and of drawn classes, against float64 autograd, written-out sums and enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch

import kdfast
from kdfast.errors import ShapeError
from kdfast.ops.kd_loss.offline import tempered_tail

pytestmark = pytest.mark.filterwarnings("ignore:kdfast. kd_loss on cpu falls back to reference:RuntimeWarning")


def make_logits(rows=5, classes=40, seed=0, spread=3.0):
    return spread * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(teacher, logits, temperature, **options):
    z = logits.clone().requires_grad_()
    loss = kdfast.kd_loss(z, None, teacher, alpha=1.0, temperature=temperature, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), gradient


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("temperature", "stored_at"), [(1.0, 1.0), (2.5, 2.5)])
def test_tail_is_exact_at_the_temperature_of_the_logprobs(temperature, stored_at, direction):
    teacher, student = make_logits(), make_logits(seed=1)
    values, ids = (teacher / stored_at).log_softmax(1).topk(6, 1)
    given = kdfast.TopKTeacher.from_logprobs(values, ids, temperature, logprob_temperature=stored_at)
    # The k + 1 outcomes, written out.
    z = student.clone().requires_grad_()
    q, p = (teacher / temperature).softmax(1), (z / temperature).softmax(1)
    q, p = (torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(1, keepdim=True)], 1) for x in (q, p))
    a, b = (q, p) if direction == "forward" else (p, q)
    expected = temperature**2 * (a * (a.log() - b.log())).sum(1)
    (gradient,) = torch.autograd.grad(expected.sum(), z)
    loss, found = loss_of(given, student, temperature, direction=direction, reduction="none")
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_drawn_token_may_be_repeated_or_outside_of_the_top_k():
    logp = make_logits(2, 30).log_softmax(1)
    values, ids = logp.topk(4, 1)
    outside = logp.argmin(1, keepdim=True)[:1]
    drawn = torch.cat([outside, ids[1:, 2:3]])  # like vLLM: the drawn token first
    wide = kdfast.TopKTeacher.from_logprobs(
        torch.cat([logp.gather(1, drawn), values], 1), torch.cat([drawn, ids], 1), 1.0, classes=30
    )
    kept = ~torch.isneginf(wide.values)
    assert kept.sum(1).tolist() == [5, 4]
    mass = wide.values.exp().sum(1) + wide.tail.exp()
    torch.testing.assert_close(mass, torch.ones(2), rtol=1e-6, atol=1e-6)
    kdfast.kd_loss(torch.randn(2, 30), None, wide, alpha=1.0, temperature=1.0)  # refuses classes that repeat


@pytest.mark.parametrize("temperature", [0.5, 0.8, 2.0, 4.0])
def test_kept_classes_are_exact_and_tail_is_within_attained_bounds(temperature):
    logp = make_logits(200, 60, spread=2.0).log_softmax(1)
    values, ids = logp.topk(8, 1)
    rest = (1 - values.exp().sum(1)).log()
    rank, others = torch.full((200,), 8), torch.full((200,), 52)
    tail = tempered_tail(rest, values[:, -1], rank, others, 1 / temperature)
    true = (logp / temperature).scatter(1, ids, -torch.inf).logsumexp(1)
    assert ((tail.low - 1e-9 <= true) & (true <= tail.high + 1e-9)).all()
    assert ((tail.low <= tail.estimate) & (tail.estimate <= tail.high)).all()
    # Both bounds are attained: all others alike, and as many as possible like the last of the top.
    mass, most = rest.exp(), values[:, -1].exp()
    alike = (52 * (mass / 52) ** (1 / temperature)).log()
    full = (mass / most).floor()
    like_most = (full * most ** (1 / temperature) + (mass - full * most) ** (1 / temperature)).log()
    torch.testing.assert_close(tail.low, torch.minimum(alike, like_most), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tail.high, torch.maximum(alike, like_most), rtol=1e-6, atol=1e-6)
    # The estimate is nearer to the truth than either bound, on average.
    error = (tail.estimate - true).abs().mean()
    assert error < 0.5 * min((tail.low - true).abs().mean(), (tail.high - true).abs().mean())
    given = kdfast.TopKTeacher.from_logprobs(values, ids, temperature, classes=60)
    torch.testing.assert_close(given.values.double(), values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(given.tail.double(), tail.estimate, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0, 1.3, 6.0])
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 2.0])
def test_estimate_is_exact_for_power_laws(exponent, power):
    k, classes = 20, 3000
    log_p = -exponent * torch.arange(1, classes + 1, dtype=torch.float64).log()
    log_p = log_p.log_softmax(0)
    tail = tempered_tail(
        log_p[k:].logsumexp(0)[None], log_p[k - 1 : k], torch.tensor([k]), torch.tensor([classes - k]), power
    )
    true = (power * log_p[k:]).logsumexp(0)
    assert float((tail.estimate - true).abs()) < 1e-3
    assert float(tail.low) <= float(true) + 1e-9


def test_tail_of_one_and_of_no_other_class():
    logp = make_logits(4, 5).log_softmax(1)
    values, ids = logp.topk(4, 1)
    tail = kdfast.TopKTeacher.from_logprobs(values, ids, 3.0, classes=5).tail
    torch.testing.assert_close(tail.double(), logp.min(1).values / 3, rtol=1e-5, atol=1e-5)
    values, ids = logp.topk(5, 1)
    assert torch.isneginf(kdfast.TopKTeacher.from_logprobs(values, ids, 3.0, classes=5).tail).all()


def test_reverse_divergence_is_finite_where_rounding_hides_the_rest():
    values = torch.tensor([[0.0, -20.0]])  # sums to 1 in float32
    for temperature in (1.0, 2.0):
        given = kdfast.TopKTeacher.from_logprobs(values, torch.tensor([[3, 1]]), temperature, classes=8)
        loss = kdfast.kd_loss(torch.randn(1, 8), None, given, alpha=1.0, temperature=temperature, direction="reverse")
        assert math.isfinite(loss)


def test_ragged_rows_by_offsets_and_by_padding_are_the_same():
    logp = make_logits(4, 20).log_softmax(1)
    counts = [3, 0, 1, 5]
    rows = [logp[i].topk(n) for i, n in enumerate(counts)]
    flat = torch.cat([row.values for row in rows]), torch.cat([row.indices for row in rows])
    ragged = kdfast.TopKTeacher.from_logprobs(
        flat[0].numpy(), flat[1].numpy().astype(np.uint16), 2.0, classes=20, offsets=np.cumsum([0, *counts])
    )
    values, ids = torch.full((4, 5), -torch.inf, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.int64)
    for i, row in enumerate(rows):
        values[i, : counts[i]], ids[i, : counts[i]] = row.values, row.indices
    padded = kdfast.TopKTeacher.from_logprobs(values, ids, 2.0, classes=20)
    for a, b in zip(ragged, padded, strict=True):
        assert torch.equal(a, b)
    loss = kdfast.kd_loss(torch.randn(4, 20), None, ragged, alpha=1.0, temperature=2.0, reduction="none")
    assert loss[1] == 0
    assert (loss[[0, 2, 3]] > 0).all()


def test_without_tail_the_teacher_is_divided_by_the_mass_of_the_kept_classes():
    teacher, student = make_logits(), make_logits(seed=1)
    values, ids = teacher.log_softmax(1).topk(6, 1)
    given = kdfast.TopKTeacher.from_logprobs(values, ids, 2.0, tail=False)
    # As trainers do that keep k log-probabilities: the student's softmax is over all classes.
    q = (values / 2).softmax(1)
    expected = 4 * (q * (q.log() - (student / 2).log_softmax(1).gather(1, ids))).sum(1)
    loss = loss_of(given, student, 2.0, reduction="none")[0]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    # Biased: the gradient does not vanish at the teacher.
    assert loss_of(given, teacher, 2.0)[1].abs().max() > 1e-3
    exact = kdfast.TopKTeacher.from_logprobs(values, ids, 1.0)
    assert loss_of(exact, teacher, 1.0)[1].abs().max() < 1e-6


def full_gradient(teacher, student, temperature):
    return temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1))


def test_gradient_of_drawn_classes_is_unbiased_by_enumeration():
    temperature, draws, classes = 1.5, 3, 4
    teacher, student = make_logits(1, classes), make_logits(1, classes, seed=1)
    p = (teacher / temperature).softmax(1)[0]
    every = torch.tensor(list(itertools.product(range(classes), repeat=draws)))
    chance = p[every].prod(1)
    given = kdfast.TopKTeacher.from_samples(every, temperature, classes=classes)
    loss, gradient = loss_of(given, student.expand(len(every), -1), temperature, reduction="none")
    mean = (chance.unsqueeze(1) * gradient).sum(0)
    torch.testing.assert_close(mean, full_gradient(teacher, student, temperature)[0], rtol=1e-5, atol=1e-6)
    full = kdfast.kd_loss(student, None, teacher, alpha=1.0, temperature=temperature)
    assert float((chance * loss).sum()) > float(full)  # the value is not unbiased


def test_gradient_of_weighted_draws_is_unbiased_with_the_mean_weight_by_enumeration():
    temperature, draws, classes = 2.0, 2, 5
    teacher, student = make_logits(1, classes), make_logits(1, classes, seed=1)
    p = (teacher / temperature).softmax(1)[0]
    q = (0.5 * teacher / temperature).softmax(1)[0]
    every = torch.tensor(list(itertools.product(range(classes), repeat=draws)))
    chance, weights = q[every].prod(1), (p / q)[every]
    given = kdfast.TopKTeacher.from_samples(every, temperature, weights=weights)
    rows = student.expand(len(every), -1)
    gradient = loss_of(given, rows, temperature, weights=weights.mean(1), reduction="sum")[1]
    mean = (chance.unsqueeze(1) * gradient).sum(0)
    torch.testing.assert_close(mean, full_gradient(teacher, student, temperature)[0], rtol=1e-5, atol=1e-6)
    plain = (chance.unsqueeze(1) * loss_of(given, rows, temperature, reduction="sum")[1]).sum(0)
    assert float((plain - full_gradient(teacher, student, temperature)[0]).abs().max()) > 1e-2


def test_mean_gradient_of_many_draws_is_within_its_standard_error():
    teacher, student = make_logits(1, 50), make_logits(1, 50, seed=1)
    p = teacher.softmax(1)
    ids = torch.multinomial(p.expand(4000, -1), 12, replacement=True, generator=torch.Generator().manual_seed(3))
    gradient = loss_of(kdfast.TopKTeacher.from_samples(ids), student.expand(4000, -1), 1.0, reduction="none")[1]
    error = gradient.std(0) / math.sqrt(4000)
    z = (gradient.mean(0) - full_gradient(teacher, student, 1.0)[0]) / error.clamp_min(1e-9)
    assert z[p[0] > 1e-4].abs().max() < 4.5


def test_rows_without_draws_and_draws_to_leave_out():
    ids = torch.tensor([[2, -1, 2, 5], [-1, -1, -1, -1]])
    given = kdfast.TopKTeacher.from_samples(ids, classes=6)
    shown = {int(c): float(v.exp()) for v, c in zip(given.values[0], given.classes[0], strict=True) if v > -torch.inf}
    assert shown == pytest.approx({2: 2 / 3, 5: 1 / 3})
    loss = kdfast.kd_loss(torch.randn(2, 6), None, given, alpha=1.0, temperature=1.0, reduction="none")
    assert loss[1] == 0


VALUES, IDS = [[-1.0, -2.0]], [[0, 1]]


@pytest.mark.parametrize(
    ("values", "ids", "options", "error", "message"),
    [
        ([[1.5, -2.0]], IDS, {}, ShapeError, r"`values\[0, 0\]` is 1.5: log-probabilities are at most 0"),
        ([[math.nan, -2.0]], IDS, {}, ShapeError, r"`values\[0, 0\]` is nan"),
        ([[-0.1, -0.2]], IDS, {}, ShapeError, r"row 0 sum to 1.724"),
        (VALUES, [[0, 9]], {"classes": 9}, IndexError, r"`ids\[0, 1\]` is 9: must be below 9"),
        (VALUES, [[0, -3]], {}, IndexError, r"`ids\[0, 1\]` is -3: must not be negative"),
        (VALUES, [[0.0, 1.0]], {}, ShapeError, "`ids` are torch.float32"),
        ([[1, 2]], IDS, {}, TypeError, "`values` are torch.int64"),
        (VALUES, [[0, 1, 2]], {}, ShapeError, r"shapes \(1, 2\) and \(1, 3\)"),
        (VALUES, IDS, {"temperature": 2.0}, ShapeError, "pass `classes`, the size of the vocabulary"),
        (VALUES, IDS, {"temperature": 0.0}, ShapeError, "`temperature` is 0.0"),
        (VALUES, IDS, {"top_k": -1}, ShapeError, "`top_k` is -1"),
        ([-1.0, -2.0], [0, 1], {"offsets": [0, 3]}, ShapeError, "`offsets` must begin with 0"),
        ([[-1.0, -30.0]], IDS, {"temperature": 2.0, "classes": 99}, ShapeError, "row 0: 97 other classes have"),
    ],
)
def test_refuses_what_is_no_set_of_logprobs(values, ids, options, error, message):
    options = {"temperature": 1.0, **options}
    with pytest.raises(error, match=message):
        kdfast.TopKTeacher.from_logprobs(values, ids, **options)


def test_top_k_says_which_entries_bound_the_others():
    values = torch.tensor([[-1.0, -2.0, -30.0]])  # the last one was drawn
    given = kdfast.TopKTeacher.from_logprobs(values, torch.tensor([[0, 1, 2]]), 2.0, classes=99, top_k=2)
    assert torch.isfinite(given.tail).all()


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([[1, 2]], {"weights": [[1.0]]}, ShapeError, r"`weights` have shape \(1, 1\)"),
        ([[1, 2]], {"weights": [[1.0, -1.0]]}, ShapeError, r"`weights\[0, 1\]` is -1"),
        ([[1, 7]], {"classes": 7}, IndexError, r"`ids\[0, 1\]` is 7"),
    ],
)
def test_refuses_what_are_no_draws(ids, options, error, message):
    with pytest.raises(error, match=message):
        kdfast.TopKTeacher.from_samples(ids, **options)
