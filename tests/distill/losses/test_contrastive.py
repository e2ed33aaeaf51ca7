"""CRD against loops written from the paper's formulas in float64: value, gradient, negatives and memory banks."""

import math
import warnings

import numpy as np
import pytest
import torch

from kdfast.data.stateless_random import Purpose, hash64
from kdfast.distillation.losses.base import BatchSamples, Outputs, RunSamples, TapShapes
from kdfast.distillation.losses.features import contrastive
from kdfast.distillation.losses.registry import get_term
from kdfast.errors import DataWarning, UsageError

SAMPLES = RunSamples(np.arange(3, 63, 2), np.arange(30) * 7 % 30 % 4, 5)
TEMPERATURE, MOMENTUM, DIM = 0.1, 0.3, 6
WIDTHS = (8, 10)


def build(negatives=9, samples=SAMPLES, **options):
    torch.manual_seed(0)
    shapes = TapShapes({"pooled": WIDTHS[:1]}, {"pooled": WIDTHS[1:]})
    given = {"negatives": negatives, "temperature": TEMPERATURE, "momentum": MOMENTUM, "dim": DIM, **options}
    term = get_term("crd").build(shapes, given)
    term.set_samples(samples)
    return term.double()


def draw(ids, seed, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    pooled = [torch.randn(len(ids), w, generator=generator, dtype=torch.float64) for w in WIDTHS]
    outputs = [Outputs(x.new_zeros(len(ids), 4), {"pooled": x.requires_grad_(requires_grad)}) for x in pooled]
    return outputs, BatchSamples(torch.as_tensor(ids), torch.tensor(seed))


def evaluate(term, ids, seed, requires_grad=False):
    (student, teacher), batch = draw(ids, seed, requires_grad)
    return term(student, teacher, torch.zeros(len(ids), dtype=torch.int64), batch), student, teacher


def place(sample_id):
    return int(np.searchsorted(SAMPLES.ids, sample_id))


def rows_by_class():
    """The position of each row of the bank in the run."""
    return sorted(range(len(SAMPLES.ids)), key=lambda i: (SAMPLES.labels[i], i))


def expected_negatives(sample_id, step, count):
    """Every (m / count)-th sample of other classes, in the order of classes, from a random phase on."""
    others = [i for i in rows_by_class() if SAMPLES.labels[i] != SAMPLES.labels[place(sample_id)]]
    phase = int(hash64(Purpose.NEGATIVES, SAMPLES.seed, step, sample_id)[0] >> np.uint64(32)) / 2**32
    return [others[math.floor((k + phase) * len(others) / count)] for k in range(count)]


def unit(x):
    return x / x.norm()


class Reference:
    """The loss of one batch after another, sample by sample."""

    def __init__(self, term, count):
        self.count, self.n = count, len(SAMPLES.ids)
        self.layers = (term.student_embedding, term.teacher_embedding)
        order = np.argsort(rows_by_class())
        # Banks by position in the run: the student's embedding meets the teacher's bank, and the reverse.
        self.banks = [bank.clone()[order] for bank in (term.student_bank, term.teacher_bank)]
        self.z = None

    def __call__(self, ids, step, features):
        embeddings = [[unit(layer(x)) for x in rows] for layer, rows in zip(self.layers, features, strict=True)]
        raw = []
        for side in (0, 1):
            bank = self.banks[1 - side]
            for sample_id, v in zip(ids, embeddings[side], strict=True):
                picks = [place(sample_id), *expected_negatives(sample_id, step, self.count)]
                raw.append([torch.exp(v @ bank[j] / TEMPERATURE) for j in picks])
        size = len(ids)
        if self.z is None:
            self.z = [self.n * np.mean([[e.item() for e in r] for r in part]) for part in (raw[:size], raw[size:])]
        noise, total = self.count / self.n, 0.0
        for index, (positive, *negatives) in enumerate(raw):
            z = self.z[index // size]
            total = total - torch.log((positive / z) / (positive / z + noise))
            total = total - sum(torch.log(noise / (e / z + noise)) for e in negatives)
        self.banks = [bank.clone() for bank in self.banks]
        for side in (0, 1):
            for sample_id, v in zip(ids, embeddings[side], strict=True):
                i = place(sample_id)
                self.banks[side][i] = unit(MOMENTUM * self.banks[side][i] + (1 - MOMENTUM) * v.detach())
        return total / size


@pytest.mark.parametrize("tile", [contrastive.TILE, 60])
def test_values_and_gradients_over_three_steps(tile, monkeypatch):
    monkeypatch.setattr(contrastive, "TILE", tile)
    term = build()
    reference = Reference(term, 9)
    for step, ids in enumerate(([3, 5, 9, 61, 33], [7, 5, 11], [3, 61, 19, 21])):
        value, student, teacher = evaluate(term, ids, step, requires_grad=True)
        inputs = [student.taps["pooled"], *term.parameters()]
        grads = torch.autograd.grad(value, inputs)
        expected = reference(ids, step, [x.taps["pooled"] for x in (student, teacher)])
        assert value.item() == pytest.approx(expected.item(), rel=1e-10)
        for grad, other in zip(grads, torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-12)
    order = rows_by_class()
    for bank, other in zip((term.student_bank, term.teacher_bank), reference.banks, strict=True):
        torch.testing.assert_close(bank, other[order])


def test_negatives_are_distinct_of_other_classes_and_equally_likely():
    term = build()
    by_row = np.array(rows_by_class())
    labels, i = SAMPLES.labels, place(9)
    others = np.flatnonzero(labels != labels[i])
    drawn = []
    for step in range(600):
        rows = term._draw_negatives(torch.tensor([i]), BatchSamples(torch.tensor([9]), torch.tensor(step)))[0]
        assert len(set(rows.tolist())) == 9
        drawn.append(by_row[rows])
    found, counts = np.unique(drawn, return_counts=True)
    assert found.tolist() == others.tolist()
    share = 9 / len(others)
    # Five standard deviations of a count of 600 draws.
    assert np.abs(counts / 600 - share).max() < 5 * math.sqrt(share * (1 - share) / 600)


def test_all_samples_of_other_classes_are_drawn_where_there_are_too_few_and_a_line_says_so():
    fewest = 30 - np.bincount(SAMPLES.labels).max()
    with pytest.warns(DataWarning, match=rf"crd is to draw 1000 negatives.*only {fewest} of other classes"):
        term = build(negatives=1000)
    largest = int(np.bincount(SAMPLES.labels).argmax())
    i = int(np.flatnonzero(SAMPLES.labels == largest)[0])
    batch = BatchSamples(torch.tensor([SAMPLES.ids[i]]), torch.tensor(4))
    drawn = np.array(rows_by_class())[term._draw_negatives(torch.tensor([i]), batch)[0]]
    assert sorted(drawn) == np.flatnonzero(SAMPLES.labels != largest).tolist()


def test_negatives_depend_on_seed_step_and_sample_but_not_on_the_batch():
    def negatives(ids, step, seed=SAMPLES.seed):
        term = build(samples=RunSamples(SAMPLES.ids, SAMPLES.labels, seed))
        places = torch.tensor([place(i) for i in ids])
        return term._draw_negatives(places, BatchSamples(torch.tensor(ids), torch.tensor(step)))

    together = negatives([3, 5, 9], 7)
    assert torch.equal(together[2], negatives([9], 7)[0])
    assert not torch.equal(together[2], negatives([9], 8)[0])
    assert not torch.equal(together[2], negatives([9], 7, seed=6)[0])


def test_the_hash_on_the_device_is_the_one_on_the_cpu():
    ids, step = np.array([0, 1, 12345678901]), 2**40 + 3
    expected = hash64(Purpose.NEGATIVES, 2**63 - 1, step, ids).view(np.int64)
    state = int(hash64(Purpose.NEGATIVES, 2**63 - 1)[0])
    assert contrastive.hash_on_device(state, torch.tensor(step), torch.from_numpy(ids)).tolist() == expected.tolist()


def test_the_constants_stay_those_of_the_first_batch_in_a_loaded_term():
    term = build()
    evaluate(term, [3, 5, 9], 0)
    constants = term.log_z.clone()
    loaded = build()
    loaded.load_state_dict(term.state_dict())
    for seed in (1, 2):
        values = [evaluate(x, [7, 5], seed)[0].item() for x in (term, loaded)]
        assert values[0] == values[1]
    assert torch.equal(term.log_z, constants)
    assert torch.equal(loaded.log_z, constants)
    assert torch.equal(loaded.student_bank, term.student_bank)


def test_large_similarities_over_a_small_temperature_stay_finite():
    term = build(temperature=1e-3).float()
    (student, teacher), batch = draw([3, 5, 9], 0)
    single = [Outputs(x.logits.float(), {"pooled": x.taps["pooled"].float()}) for x in (student, teacher)]
    value = term(*single, torch.zeros(3, dtype=torch.int64), batch)
    assert value.isfinite()


def test_no_buffer_of_embeddings_of_all_negatives_is_kept():
    samples = RunSamples(np.arange(400), np.arange(400) % 8, 0)
    term = build(negatives=300, samples=samples)
    sizes = []
    (student, teacher), batch = draw(np.arange(16), 0, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        term(student, teacher, torch.zeros(16, dtype=torch.int64), batch).backward()
    assert max(sizes) <= 16 * max(DIM, *WIDTHS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": 0.0}, "crd has negatives 0: pass an integer from 1 to 2147483647"),
        ({"dim": 1.5}, r"crd has dim 1\.5: pass an integer"),
        ({"dim": 1e30}, r"crd has dim 1e\+30: pass an integer from 1 to 65536"),
        ({"temperature": 0.0}, "crd has temperature 0: pass a number above 0"),
        ({"momentum": 1.0}, r"crd has momentum 1: pass a number in \[0, 1\)"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(UsageError, match=message):
        build(**options)


def test_samples_of_one_class_are_refused():
    with pytest.raises(UsageError, match="all 5 samples are of class 2: keep samples of two classes"):
        build(samples=RunSamples(np.arange(5), np.full(5, 2), 0))


def test_a_term_without_samples_says_what_it_needs():
    shapes = TapShapes({"pooled": (8,)}, {"pooled": (10,)})
    term = get_term("crd").build(shapes, dict(get_term("crd").options)).double()
    (student, teacher), batch = draw([3], 0)
    with pytest.raises(UsageError, match="call set_samples"):
        term(student, teacher, torch.zeros(1, dtype=torch.int64), batch)


def test_enough_negatives_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build()
