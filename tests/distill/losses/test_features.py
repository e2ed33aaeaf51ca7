"""Terms on activations against loops written from their papers' formulas, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from kdfast.distillation.losses.base import Outputs, TapShapes
from kdfast.distillation.losses.features import relations
from kdfast.distillation.losses.registry import LOSSES, get_term
from kdfast.errors import UsageError
from tests.distill.losses.conftest import STUDENT, TEACHER, draw_outputs

# test_contrastive.py has the term that keeps something of every sample.
FEATURE_TERMS = [name for name, entry in LOSSES.items() if entry.taps and name != "crd"]
STAGES = ("stage1", "stage2", "stage3")


def build(name, shapes):
    torch.manual_seed(0)
    term = get_term(name).build(shapes, dict(get_term(name).options)).double()
    return term.train()


def shrink(x, size):
    """Average blocks of a map down to size x size."""
    b, c, h, _ = x.shape
    block = h // size
    return x.reshape(b, c, size, block, size, block).mean(axis=(3, 5))


def unit(x, axis):
    return x / np.sqrt((x**2).sum(axis=axis, keepdims=True))


def same_size(s, t):
    size = min(s.shape[2], t.shape[2])
    return shrink(s, size), shrink(t, size)


def attention(x):
    return unit((x**2).mean(1).reshape(len(x), -1), 1)


def array(x):
    return x.detach().numpy()


def through(module, x):
    return array(module(x))


def smooth_l1(x):
    return np.where(np.abs(x) < 1, 0.5 * x**2, np.abs(x) - 0.5)


def check(value, expected):
    assert value.item() == pytest.approx(expected, rel=1e-10)


def test_fitnets(student, teacher, labels, shapes):
    term = build("fitnets", shapes)
    mapped = through(term.adapter, student.taps["stage2"])
    check(term(student, teacher, labels), ((mapped - array(teacher.taps["stage2"])) ** 2).mean())
    assert mapped.min() == 0, "the adapter ends in a ReLU, as the teacher's stages do"


def test_attention_is_the_mean_of_squares_and_not_a_norm(student, teacher, labels, shapes):
    expected = 0.0
    for stage in STAGES:
        s, t = same_size(array(student.taps[stage]), array(teacher.taps[stage]))
        expected += ((attention(s) - attention(t)) ** 2).mean()
    check(build("at", shapes)(student, teacher, labels), expected)


def test_activation_boundaries_case_by_case(student, teacher, labels, shapes):
    term = build("ab", shapes)
    expected = 0.0
    for stage, adapter in enumerate(term.adapters):
        name = f"preactivation{stage + 1}"
        s, t = same_size(through(adapter, student.taps[name]), array(teacher.taps[name]))
        loss = 0.0
        for a, b in zip(s.ravel(), t.ravel(), strict=True):
            if b <= 0 and a > -1:
                loss += (a + 1) ** 2
            if b > 0 and a <= 1:
                loss += (a - 1) ** 2
        expected += 2.0 ** (stage - 2) * 3 / (1000 * len(s)) * loss
    check(term(student, teacher, labels), expected)


def test_factor_transfer(student, teacher, labels, shapes):
    term = build("ft", shapes)
    code = through(term.encoder.eval(), teacher.taps["stage3"])
    assert code.shape[1] == TEACHER["stage3"][0] // 2
    ours, theirs = same_size(through(term.translator, student.taps["stage3"]), code)
    check(term(student, teacher, labels), np.abs(attention(ours) - attention(theirs)).mean())
    decoded = through(term.decoder.train(), term.encoder.train()(teacher.taps["stage3"]))
    check(term.preparation(teacher), ((decoded - array(teacher.taps["stage3"])) ** 2).mean())


def test_factor_transfer_leaves_the_fitted_paraphraser_alone(student, teacher, labels, shapes):
    term = build("ft", shapes)
    term(student, teacher, labels).backward()
    moved = {name.split(".")[0] for name, p in term.named_parameters() if p.grad is not None}
    assert moved == {"translator"}


def test_flow(student, same_width_teacher, labels):
    term = build("fsp", TapShapes(STUDENT, STUDENT))
    taps = ("stem", *STAGES)
    expected = 0.0
    for first, second in itertools.pairwise(taps):
        matrices = []
        for outputs in (student, same_width_teacher):
            a, b = same_size(array(outputs.taps[first]), array(outputs.taps[second]))
            matrices.append(np.einsum("bihw,bjhw->bij", a, b) / (a.shape[2] * a.shape[3]))
        expected += ((matrices[0] - matrices[1]) ** 2).mean()
    check(term(student, same_width_teacher, labels), expected)


def test_flow_needs_equal_channels(shapes):
    with pytest.raises(UsageError, match=r"fsp needs equal numbers of channels.*'stage1'.*\(4, 8, 8\).*\(5, 8, 8\)"):
        build("fsp", shapes)


def test_selectivity(student, teacher, labels, shapes):
    expected = 0.0
    for stage in STAGES:
        s, t = same_size(array(student.taps[stage]), array(teacher.taps[stage]))
        s, t = (unit(x.reshape(*x.shape[:2], -1), 2) for x in (s, t))

        def kernel(a, b):
            return np.mean([[[(u @ v) ** 2 for v in y] for u in x] for x, y in zip(a, b, strict=True)])

        expected += kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)
    check(build("nst", shapes)(student, teacher, labels), expected)


def test_probabilities_are_averaged_over_all_pairs(student, teacher, labels, shapes):
    def conditional(x):
        cosines = (unit(x, 1) @ unit(x, 1).T + 1) / 2
        return cosines / cosines.sum(1, keepdims=True)

    s, t = (conditional(array(x.taps["pooled"])) for x in (student, teacher))
    expected = sum(b * math.log((b + 1e-7) / (a + 1e-7)) for a, b in zip(s.ravel(), t.ravel(), strict=True)) / s.size
    check(build("pkt", shapes)(student, teacher, labels), expected)


def relational_loss(s, t):
    def distances(x):
        d = np.array([[math.dist(a, b) for b in x] for a in x])
        return d / d[d > 0].mean()

    def angles(x):
        found = np.zeros((len(x),) * 3)
        for j in range(len(x)):
            for k in range(len(x)):
                for m in range(len(x)):
                    a, b = x[k] - x[j], x[m] - x[j]
                    if k != j and m != j:
                        found[j, k, m] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        return found

    distance = smooth_l1(distances(s) - distances(t)).mean()
    return 25 * distance + 50 * smooth_l1(angles(s) - angles(t)).mean()


@pytest.mark.parametrize("tile", [relations.TILE, 1])
def test_relations(student, teacher, labels, shapes, tile, monkeypatch):
    monkeypatch.setattr(relations, "TILE", tile)
    expected = relational_loss(array(student.taps["pooled"]), array(teacher.taps["pooled"]))
    check(build("rkd", shapes)(student, teacher, labels), expected)


def test_relations_of_a_single_sample_are_zero(shapes, labels):
    student, teacher = draw_outputs(STUDENT, 0, batch=1, requires_grad=True), draw_outputs(TEACHER, 1, batch=1)
    value = build("rkd", shapes)(student, teacher, labels[:1])
    value.backward()
    assert value == 0
    assert student.taps["pooled"].grad.abs().sum() == 0


def test_relations_of_equal_samples_have_a_finite_gradient(shapes, labels):
    student, teacher = draw_outputs(STUDENT, 0), draw_outputs(TEACHER, 1)
    rows = student.taps["pooled"].clone()
    rows[1] = rows[0]
    rows.requires_grad_()
    build("rkd", shapes)(Outputs(student.logits, {"pooled": rows}), teacher, labels).backward()
    assert rows.grad.isfinite().all()


def test_relations_keep_no_buffer_of_all_triples(monkeypatch):
    monkeypatch.setattr(relations, "TILE", 64)
    size = 32
    sizes = []
    ours, theirs = torch.randn(size, 4, requires_grad=True), torch.randn(size, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        relations.angle_loss(ours, theirs).backward()
    assert max(sizes) <= size**2


@pytest.mark.parametrize(("name", "tap"), [("sp", "stage3"), ("sp-pooled", "pooled")])
def test_similarity(student, teacher, labels, shapes, name, tap):
    s, t = (unit((g := array(x.taps[tap]).reshape(len(x.logits), -1)) @ g.T, 1) for x in (student, teacher))
    check(build(name, shapes)(student, teacher, labels), ((s - t) ** 2).sum() / len(s) ** 2)


def test_variational_information(student, teacher, labels, shapes):
    term = build("vid", shapes)
    with torch.no_grad():
        for stage in term.stages:
            stage.rho += torch.randn_like(stage.rho)
    expected = 0.0
    for name, stage in zip(STAGES, term.stages, strict=True):
        ours, theirs = (x.taps[name] for x in (student, teacher))
        if ours.shape[2] != theirs.shape[2]:
            theirs = torch.from_numpy(shrink(array(theirs), ours.shape[2]))
        mean, rho = through(stage.mean, ours), array(stage.rho)
        variance = (np.log1p(np.exp(rho)) + 1e-5)[None, :, None, None]
        expected += (0.5 * ((mean - array(theirs)) ** 2 / variance + np.log(variance))).mean()
    check(term(student, teacher, labels), expected)


def test_variance_starts_at_five_and_is_trained_without_decay(student, teacher, labels, shapes):
    term = build("vid", shapes)
    free = term.parameters_without_decay()
    assert [len(p) for p in free] == [TEACHER[name][0] for name in STAGES]
    for rho in free:
        assert np.allclose(np.log1p(np.exp(array(rho))) + 1e-5, 5)
    term(student, teacher, labels).backward()
    assert all(rho.grad.abs().min() > 0 for rho in free)


def test_review(student, teacher, labels, shapes):
    term = build("review", shapes)

    def pooled(x, grid):
        return shrink(x, grid) if x.shape[2] % grid == 0 else None

    def distance(s, t):
        total, weights = ((s - t) ** 2).mean(), 1.0
        for grid, weight in zip([g for g in (4, 2, 1) if g < s.shape[2]], (1 / 2, 1 / 4, 1 / 8), strict=False):
            total += weight * ((pooled(s, grid) - pooled(t, grid)) ** 2).mean()
            weights += weight
        return total / weights

    expected, deeper = 0.0, None
    for tap, stage in reversed(list(zip(("stage1", "stage2", "stage3", "pooled"), term.stages, strict=True))):
        ours, theirs = (x.taps[tap] for x in (student, teacher))
        if tap == "pooled":
            ours, theirs = ours[..., None, None], theirs[..., None, None]
        x = through(stage.narrow, ours)
        if deeper is not None:
            factor = x.shape[2] // deeper.shape[2]
            deeper = deeper.repeat(factor, axis=2).repeat(factor, axis=3)
            shares = through(stage.attention, torch.from_numpy(np.concatenate([x, deeper], 1)))
            x = x * shares[:, 0:1] + deeper * shares[:, 1:2]
        deeper = x
        expected += distance(*same_size(through(stage.widen, torch.from_numpy(x)), array(theirs)))
    check(term(student, teacher, labels), expected)


@pytest.mark.parametrize("name", [name for name in FEATURE_TERMS if name != "fsp"])
def test_gradients(name, labels, shapes):
    """Gradients at the student's activations and at the term's parameters against finite differences."""
    term = build(name, shapes)
    student, teacher = draw_outputs(STUDENT, 4, requires_grad=True), draw_outputs(TEACHER, 5)
    read = [student.taps[tap] for tap in get_term(name).taps]
    # Factor transfer's auto-encoder is fixed once it is fitted.
    inputs = [*read, *(p for part, p in term.named_parameters() if not part.startswith(("encoder", "decoder")))]
    value = term(student, teacher, labels)
    grads = torch.autograd.grad(value, inputs, allow_unused=True)
    generator = torch.Generator().manual_seed(6)
    for x, grad in zip(inputs, grads, strict=True):
        direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                x += step * direction
                ends.append(term(student, teacher, labels).item())
                x -= step * direction
        slope = (ends[0] - ends[1]) / 2e-6
        expected = 0.0 if grad is None else (grad * direction).sum().item()
        assert slope == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", FEATURE_TERMS)
def test_no_gradient_reaches_the_teacher_and_equal_networks_have_a_small_loss(name, labels):
    term = build(name, TapShapes(STUDENT, STUDENT))
    student = draw_outputs(STUDENT, 7, requires_grad=True)
    other = draw_outputs(STUDENT, 8)
    term(student, other, labels).backward()
    assert all(p.grad is None for p in other.taps.values())
    if name not in ("fitnets", "ab", "ft", "vid", "review"):  # those have an adapter between the two
        same = Outputs(student.logits.detach(), {k: v.detach() for k, v in student.taps.items()})
        assert term(student, same, labels).item() == pytest.approx(0, abs=1e-6)
