"""TopKTeacher: saved and loaded, with int64 class ids, and with rows of fewer than k classes."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch

import kdfast
from kdfast.errors import ShapeError
from kdfast.ops.kd_loss import TopKTeacher, native, topk_teacher

pytestmark = pytest.mark.usefixtures("no_poison")
N, M, C, K = 6, 9, 40, 5
INF = float("inf")


@pytest.fixture
def args():
    labels, rows = torch.randint(0, C, (N,)), torch.randint(0, M, (N,))
    labels[2] = -100
    return 3 * torch.randn(N, C), labels, rows


@pytest.fixture
def teacher():
    return topk_teacher(3 * torch.randn(M, C), K, 4.0)


def same(a, b):
    return type(a) is type(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_torch_load_reads_it_by_default(tmp_path, teacher):
    path = tmp_path / "teacher.pt"
    torch.save({"teacher": teacher, "epoch": 3}, path)
    assert same(torch.load(path, weights_only=True)["teacher"], teacher)
    script = "import sys, torch\nfrom kdfast import TopKTeacher\nt = torch.load(sys.argv[1])['teacher']\n"
    script += "assert type(t) is TopKTeacher and t.classes.dtype == torch.int32"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)


def test_copies_keep_its_type(teacher):
    assert same(pickle.loads(pickle.dumps(teacher)), teacher)
    assert same(copy.deepcopy(teacher), teacher)


def loss_and_gradient(backend, args, teacher, **options):
    logits, labels, rows = args
    z = logits.detach().requires_grad_()
    loss = kdfast.kd_loss(z, labels, teacher, rows, backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_int64_ids_are_the_same_as_int32(kd_loss_backend, args, teacher, direction, layout):
    classes = teacher.classes.long()
    wide = teacher._replace(classes=classes if layout == "contiguous" else classes.t().contiguous().t())
    expected = loss_and_gradient(kd_loss_backend, args, teacher, direction=direction)
    assert all(map(torch.equal, loss_and_gradient(kd_loss_backend, args, wide, direction=direction), expected))
    terms = kdfast.kd_loss_terms(args[0], args[1], wide, args[2], backend=kd_loss_backend)
    assert all(
        map(torch.equal, terms, kdfast.kd_loss_terms(args[0], args[1], teacher, args[2], backend=kd_loss_backend))
    )


def test_int64_ids_in_compiled_and_transformed_code(args, teacher):
    logits, labels, rows = args
    wide = teacher._replace(classes=teacher.classes.long())
    expected = kdfast.kd_loss(logits, labels, teacher, rows)
    compiled = torch.compile(kdfast.kd_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, labels, wide, rows), expected)
    several = torch.func.vmap(lambda z: kdfast.kd_loss(z, labels, wide, rows))(logits.expand(2, N, C))
    torch.testing.assert_close(several, expected.expand(2))


PADDING = {
    "class 0": lambda ids: torch.zeros_like(ids[:, :2]),
    "a class of the row": lambda ids: ids[:, :1].expand(-1, 2),
    "distinct classes": lambda ids: torch.stack([free_class(ids, 0), free_class(ids, 1)], 1),
}


def free_class(ids, which):
    """A class per row that is not among its ids."""
    free = torch.ones(len(ids), C, dtype=torch.bool).scatter_(1, ids.long(), False)
    return torch.stack([row.nonzero()[which, 0] for row in free]).to(ids.dtype)


def padded(teacher, ids, where):
    """The teacher with two more entries, whose values are -inf, at the start or at the end of each row."""
    values = torch.full((M, 2), -INF, dtype=teacher.values.dtype)
    pairs = [(values, teacher.values), (ids, teacher.classes)]
    joined = [torch.cat(pair if where == "start" else pair[::-1], 1) for pair in pairs]
    return TopKTeacher(*joined, teacher.tail)


@pytest.mark.parametrize("name", list(PADDING))
@pytest.mark.parametrize("where", ["start", "end"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entries_of_minus_infinity_are_left_out(kd_loss_backend, args, teacher, name, where, direction, dtype):
    teacher = teacher._replace(values=teacher.values.to(dtype))
    filled = padded(teacher, PADDING[name](teacher.classes), where)
    for options in ({}, {"temperature": 3.0, "reduction": "none"}, {"alpha": 1.0}):
        expected = loss_and_gradient(kd_loss_backend, args, teacher, direction=direction, **options)
        found = loss_and_gradient(kd_loss_backend, args, filled, direction=direction, **options)
        assert expected[0].isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    if kd_loss_backend == "native":  # and the same instruction set by instruction set
        call = kdfast.ops.kd_loss.validation.make_call(
            args[0], args[1], filled, args[2], None, alpha=0.5, temperature=4.0, t_squared=True, ignore_index=-100,
            reduction="mean", direction=direction, divergence="kl", jsd_beta=0.5, dkd_weights=(1.0, 8.0),
        )  # fmt: skip
        results = [native.kd_loss(call, True, isa_limit=limit) for limit in (0, 1, 2)]
        assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


def test_masked_classes_among_the_k_count_as_the_tail(kd_loss_backend, args):
    """With fewer finite logits than k, the k-th entries are -inf, and so is the tail: as if all of them were in it."""
    logits = 3 * torch.randn(M, C)
    logits[:, 3:] = -INF
    dense = loss_and_gradient(kd_loss_backend, args, logits)
    topk = loss_and_gradient(kd_loss_backend, args, topk_teacher(logits, K, 4.0))
    for a, b in zip(topk, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_class_that_repeats_is_refused_in_the_rows_that_are_used(kd_loss_backend, args, teacher, used, threads):
    logits, labels, rows = args
    teacher.classes[7, 4] = teacher.classes[7, 1]
    rows[:] = 3
    rows[4] = 7 if used else 2
    labels[4] = 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if used:
            with pytest.raises(
                ShapeError, match=rf"`teacher.classes\[7\]` holds class {int(teacher.classes[7, 1])} twice"
            ):
                kdfast.kd_loss(logits, labels, teacher, rows, backend=kd_loss_backend)
            labels[4] = -100  # an ignored row may hold anything
        assert kdfast.kd_loss(logits, labels, teacher, rows, backend=kd_loss_backend).isfinite()
    finally:
        torch.set_num_threads(before)


def test_a_class_that_repeats_makes_its_row_nan_where_values_cannot_be_read(args, teacher):
    logits, labels, rows = args
    teacher.classes[7, 4] = teacher.classes[7, 1]
    rows[:] = 3
    rows[4], labels[4] = 7, 1
    grad = torch.func.grad(lambda z: kdfast.kd_loss(z, labels, teacher, rows, reduction="sum", backend="reference"))(
        logits
    )
    assert grad.isnan().any(1).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_classes_left_out_share_the_tail_as_in_other_logits(temperature):
    logits, like = 3 * torch.randn(2, M, C, dtype=torch.float64)
    teacher = topk_teacher(logits, K, temperature)
    filled = teacher.to_logits(like, temperature)
    assert (filled.shape, filled.dtype) == ((M, C), torch.float64)
    p, q, guess = ((x / temperature).softmax(1) for x in (logits, filled, like))
    kept = torch.zeros(M, C, dtype=torch.bool).scatter(1, teacher.classes.long(), True)
    torch.testing.assert_close(q[kept], p[kept], rtol=1e-5, atol=0)
    shares = (guess * ~kept) / (guess * ~kept).sum(1, keepdim=True) * (p * ~kept).sum(1, keepdim=True)
    torch.testing.assert_close(q[~kept], shares[~kept], rtol=1e-5, atol=0)


def test_a_teacher_filled_from_its_own_logits_is_whole():
    logits = 3 * torch.randn(M, C)
    teacher = topk_teacher(logits, K, 4.0)
    torch.testing.assert_close(teacher.to_logits(logits + 7, 4.0), logits, rtol=1e-4, atol=1e-4)


def test_entries_left_out_count_to_the_tail():
    values = torch.tensor([[2.0, -INF, 1.0], [2.0, 0.0, 1.0]])
    classes = torch.tensor([[1, 1, 0], [1, 2, 0]], dtype=torch.int32)
    filled = TopKTeacher(values, classes, torch.tensor([0.0, -INF])).to_logits(torch.zeros(2, 4), 2.0)
    each = 2.0 * (0.0 - math.log(2))
    torch.testing.assert_close(filled, torch.tensor([[1.0, 2.0, each, each], [1.0, 2.0, 0.0, -INF]]))


def test_all_classes_kept_need_no_tail():
    logits = torch.randn(3, 4)
    values, classes = logits.sort(1)
    filled = TopKTeacher(values, classes.int(), torch.full((3,), -INF)).to_logits(torch.randn(3, 4), 1.0)
    assert torch.equal(filled, logits)


@pytest.mark.parametrize(
    ("like", "temperature", "error", "message"),
    [
        (torch.zeros(M - 1, C), 4.0, ShapeError, rf"`like` has shape \({M - 1}, {C}\): must be \({M}, C\)"),
        (torch.zeros(C), 4.0, ShapeError, "`like` has shape"),
        (torch.zeros(M, K), 4.0, IndexError, f"must be 0 to {K - 1}, as in `like`"),
        (torch.zeros(M, C), 0.0, ShapeError, "`temperature` is 0"),
    ],
)
def test_other_logits_must_fit(teacher, like, temperature, error, message):
    with pytest.raises(error, match=message):
        teacher.to_logits(like, temperature)
