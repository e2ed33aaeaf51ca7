"""Compare the Triton kernels with float64 and print the failures of each group of cases as JSON.

test_triton.py (with TRITON_INTERPRET=1) and test_cuda.py run this file as a program. Its arguments are the device and,
unless all groups are to run, the names of their functions. On a CPU, where the kernels are interpreted, float16 and
bfloat16 are combined with one temperature each, unless `KDFAST_ALL_CASES` is set.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import mmap
import os
import sys
from pathlib import Path

import torch

import kdfast
from kdfast.ops.kd_loss import TopKTeacher, topk_teacher
from kdfast.ops.triton_rows import scale_rows, weight_sums

sys.path.append(str(Path(__file__).parents[2]))
import triton_interpreter  # noqa: F401  (corrects the interpreter)

torch.manual_seed(0)
# Relative rounding error. For bfloat16 that of truncation: the interpreter truncates, a GPU rounds to nearest.
ROUNDING = {torch.float32: 1e-7, torch.bfloat16: 2**-7, torch.float16: 2**-11}
GROUPS: dict[str, tuple[int, list[str]]] = {}
"""Number of checks and failures of each group."""


def temperatures(dtype):
    """Return the temperatures to test with a dtype: 1, a power of two, and one whose reciprocal is rounded."""
    one = {torch.bfloat16: [3.0], torch.float16: [1.0]}
    whole = torch.get_default_device().type != "cpu" or "KDFAST_ALL_CASES" in os.environ
    return [1.0, 4.0, 3.0] if whole else one.get(dtype, [1.0, 4.0, 3.0])


def make_case(n, c, dtype=torch.float32, spread=3.0):
    z, t = (spread * torch.randn(n, c)).to(dtype), (spread * torch.randn(n + 2, c)).half()
    y, r = torch.randint(0, c, (n,)), torch.randint(0, n + 2, (n,))
    if n > 2:
        y[1], r[2] = -100, r[0]
    return z, y, t, r


def record(group, ok, what):
    count, failures = GROUPS.get(group, (0, []))
    GROUPS[group] = count + 1, failures if ok else [*failures, str(what)]


def run_both(z, *args, **options):
    results = []
    for x, backend in ((z, "triton"), (z.double(), "reference")):
        x = x.detach().requires_grad_()
        loss = kdfast.kd_loss(x, *args, **options, backend=backend)
        results += [loss.detach(), torch.autograd.grad(loss.sum(), x)[0]]
    return results


def check(group, z, *args, slack=5e-6, least=1e-12, **options):
    """Check loss and gradient; `least` is the size of the terms whose difference the loss is."""
    loss, grad, true_loss, true_grad = run_both(z, *args, **options)
    errors = [
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(floor)).item()
        for a, b, floor in ((loss, true_loss, least), (grad, true_grad, 1e-12))
    ]
    ok = errors[0] < 5e-6 and errors[1] < slack + 1.01 * ROUNDING[z.dtype]
    record(group, ok, (tuple(z.shape), z.dtype, options, errors))


def dense():
    for dtype in ROUNDING:
        for n, c in [(1, 1), (3, 2), (70, 10), (20, 100), (5, 257), (3, 1000), (2, 4099)]:
            for t, direction in itertools.product(temperatures(dtype), ("forward", "reverse")):
                slack = 2e-5 if direction == "reverse" else 5e-6
                check("dense", *make_case(n, c, dtype), temperature=t, direction=direction, slack=slack)
    for t, direction in ((2.0, "forward"), (3.0, "reverse")):
        check("dense", *make_case(2, 20001), temperature=t, direction=direction, slack=2e-5)
        check("dense", *make_case(2, 32768, torch.float16), temperature=t, direction=direction, slack=2e-5)
    z, y, t, r = make_case(2, 40000)
    t, z = t.sort(1).values, z.sort(1).values  # the maximum increases with every tile
    check("dense", z, y, t, r)
    check("dense", 30 * z, y, t, r, temperature=1.0)


def options():
    for alpha, squared, reduction in itertools.product((0.0, 0.3, 1.0), (True, False), ("mean", "sum", "none")):
        check("options", *make_case(5, 60), alpha=alpha, t_squared=squared, reduction=reduction, temperature=2.0)
    for alpha, direction in itertools.product((0.0, 0.5, 1.0), ("forward", "reverse")):
        args = make_case(3, 9000)
        check("options", *args, alpha=alpha, direction=direction, slack=2e-5)
        losses = [
            kdfast.kd_loss(z, *args[1:], alpha=alpha, direction=direction, backend="triton").detach()
            for z in (args[0], args[0].clone().requires_grad_())
        ]
        record("options", torch.equal(*losses), "loss without a gradient")
    z, _, t, r = make_case(5, 60)
    check("options", z, None, t, r, alpha=1.0)
    check("options", z, None, t[:5], None, alpha=1.0)


def strides():
    z, y, t, r = make_case(6, 100)
    check("strides", z.t().contiguous().t(), y, t.t().contiguous().t(), r)
    check("strides", z[:1].expand(6, -1), y, t[:1].expand(8, -1), r)
    check("strides", torch.cat([z, z], 1)[:, 3:103], y, t, r)
    check("strides", z, torch.stack([y, y], 1)[:, 0], t, torch.stack([r, r], 1)[:, 1])


def masked():
    for c, direction in itertools.product((100, 17000), ("forward", "reverse")):
        z, y, t, r = make_case(3, c)
        hidden = torch.arange(c) % 3 == 0
        z[:, hidden], t[:, hidden] = -math.inf, -math.inf
        y = torch.where(y < 0, y, 1)
        check("masked", z, y, t, r, direction=direction, slack=2e-5)
        z[:, : c // 2], t[:, : c // 2] = -math.inf, -math.inf  # all classes of the first tile are masked
        y = torch.where(y < 0, y, c // 2 + 1 + (c // 2 + 1) % 3 % 2)
        z[:, c // 2 :], t[:, c // 2 :] = torch.randn(3, c - c // 2), torch.randn(5, c - c // 2).half()
        check("masked", z, y, t, r, direction=direction, slack=2e-5)
    for c, t in itertools.product((100, 17000), (1.0, 4.0)):
        z, y, teacher, r = make_case(3, c)
        lowest = torch.finfo(torch.float32).min
        z[0], z[2, : c // 2], y[2] = lowest, lowest, c - 1
        teacher[r[2], : c // 2] = -math.inf
        check("masked", z, y, teacher, r, temperature=t)
    z, y, t, r = make_case(3, 100)
    z[:, 5] = -math.inf
    y = torch.where(y < 0, y, 1)
    record("masked", run_both(z, y, t, r)[0] == math.inf, "a class masked for the student only")
    z[:, 5] = math.nan
    record("masked", run_both(z, y, t, r)[0].isnan(), "NaN")


def large():
    for c, value, direction in itertools.product((40, 17000), (1e4, -1e4), ("forward", "reverse")):
        z, y, t, r = make_case(3, c)
        z[:, 3], t[:, 7] = value, value
        check("large", z, y, t, r, direction=direction, slack=2e-5)
        check("large", (z + value).round(), y, t, r, direction=direction, slack=2e-5)


def ties():
    """Several classes with the largest logit: the threads of a row must agree on one of them."""
    for (n, c), dtype in itertools.product([(40, 10), (20, 100), (3, 1000), (2, 17000)], ROUNDING):
        z, y, t, r = make_case(n, c, dtype)
        for direction in ("forward", "reverse"):
            check("ties", (z / 4).round(), y, t, r, direction=direction, slack=2e-5)
            check("ties", z * 0, y, t, r, direction=direction, slack=2e-5)


def topk():
    cases = [(dtype, t) for dtype in ROUNDING for t in temperatures(dtype)]
    for (dtype, t), (n, c) in itertools.product(cases, [(3, 33), (2, 5000)]):
        z, y, teacher, r = make_case(n, c, dtype)
        for k, direction in ((1, "forward"), (5, "forward"), (5, "reverse"), (33, "forward")):
            sparse = topk_teacher(teacher, k, t)
            check("topk", z, y, sparse, r, temperature=t, direction=direction, slack=2e-5)
            check("topk", z, None, sparse, r, temperature=t, direction=direction, alpha=1.0, slack=2e-5, least=t**2)
        check("topk", 60 * z, y, topk_teacher(teacher, 4, t), r, temperature=t, slack=2e-5)
    z, y, t, r = make_case(5, 37)
    teacher = topk_teacher(t, 5, 4.0)
    check("topk", z, y, teacher._replace(tail=torch._neg_view(-teacher.tail)), r)


def topk_shapes():
    """Rows of one and of several tiles, several rows a program, and the teacher's classes anywhere in them."""
    for n, c, k, direction in (
        (30, 33, 5, "forward"), (30, 33, 32, "reverse"), (3, 1000, 256, "forward"), (2, 20001, 64, "reverse"),
        (2, 32000, 10, "forward"), (1, 70000, 300, "forward"),
    ):  # fmt: skip
        z, y, teacher, r = make_case(n, c)
        sparse = topk_teacher(teacher, k, 4.0)
        check("topk shapes", z, y, sparse, r, direction=direction, slack=2e-5)
        for start in (0, c - k):  # all in the first or the last tile
            ids = start + torch.stack([torch.randperm(k) for _ in range(n + 2)]).int()
            check("topk shapes", z, y, sparse._replace(classes=ids), r, direction=direction, slack=2e-5)
        y = sparse.classes[r, k // 2].long()
        check("topk shapes", z, y, sparse, r, direction=direction, weights=torch.rand(n), slack=2e-5)


def topk_edges():
    """A tail without mass, masked classes, ignored rows, and the loss without a gradient."""
    for c, direction in ((40, "forward"), (20000, "forward"), (40, "reverse")):
        z, y, t, r = make_case(4, c)
        sparse = topk_teacher(t, 5, 4.0)
        if direction == "forward":
            empty = sparse._replace(tail=torch.full((6,), -math.inf))
            check("topk edges", z, y, empty, r, slack=2e-5)
        hidden = torch.zeros(4, c, dtype=torch.bool)
        hidden[:, ::3] = True
        hidden.scatter_(1, sparse.classes[r].long(), False)
        hidden.scatter_(1, y.clamp_min(0)[:, None], False)
        check("topk edges", z.masked_fill(hidden, -math.inf), y, sparse, r, direction=direction, slack=2e-5)
        for ids in (sparse.classes[:, :1].expand(-1, 2), torch.zeros_like(sparse.classes[:, :2])):
            left_out = torch.full_like(sparse.values[:, :2], -math.inf)
            padded = TopKTeacher(
                torch.cat([left_out[:, :1], sparse.values, left_out[:, 1:]], 1),
                torch.cat([ids[:, :1], sparse.classes, ids[:, 1:]], 1).contiguous(),
                sparse.tail,
            )
            check("topk edges", z, y, padded, r, direction=direction, slack=2e-5)
        with torch.no_grad():
            loss = kdfast.kd_loss(z, y, sparse, r, direction=direction, backend="triton")
        same = torch.equal(loss, run_both(z, y, sparse, r, direction=direction)[0])
        record("topk edges", same, "loss without a gradient")
        bad = sparse._replace(classes=sparse.classes.clone().fill_(c + 3))
        loss, grad = run_triton(z * math.nan, torch.full((4,), -100), bad, r, direction=direction)
        record("topk edges", bool(loss == 0) and bool((grad == 0).all()), "ignored rows")


def run_triton(z, *args, **options):
    x = z.detach().requires_grad_()
    loss = kdfast.kd_loss(x, *args, **options, backend="triton")
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def far():
    """Logits that are far apart: the error is at most that of PyTorch in float32 plus 1e-6."""
    spreads = ((10.0, 1.0), (1.0, 100.0), (100.0, 100.0), (1e4, 10.0), (1e4, 1e4))
    for (a, b), k, t, direction in itertools.product(spreads, (0, 5, 33), (1.0, 3.0), ("forward", "reverse")):
        z, y, teacher, r = make_case(3, 33, spread=1.0)
        z, teacher = z * a, teacher.float() * b
        if k == 33:  # the tail has no mass, and some classes are masked for both
            z[:, 3::4], teacher[:, 3::4], y = -math.inf, -math.inf, torch.where(y % 4 == 3, y - 1, y)
        args = (z, y, topk_teacher(teacher, k, t) if k else teacher, r)
        record("far", *compare_with_eager(*args, temperature=t, direction=direction, alpha=0.5))
    z, y, teacher, r = make_case(2, 40000, spread=1e4)  # the maxima change between tiles
    record("far", *compare_with_eager(z, y, teacher, r, direction="reverse"))
    z[:, 7], teacher[:, 7] = z.max() / 2, -math.inf  # an infinite gap in one tile, negligible after the next
    z[:, 20000] = z.max() * 2
    record("far", *compare_with_eager(z, y, teacher, r, direction="reverse"))


def compare_with_eager(z, *args, least=1e-12, **options):
    """Return whether the errors are at most those of the float32 reference, and the errors."""
    loss, grad, true_loss, true_grad = run_both(z, *args, **options)
    x = z.detach().requires_grad_()
    eager_loss = kdfast.kd_loss(x, *args, **options, backend="reference")
    (eager_grad,) = torch.autograd.grad(eager_loss.sum(), x)
    pairs = []
    for value, eager, truth in ((loss, eager_loss.detach(), true_loss), (grad, eager_grad, true_grad)):
        scale = truth.abs().max().clamp_min(least)
        pairs.append([((a.double() - truth).abs().max() / scale).item() for a in (value, eager)])
    return all(a <= b + 1e-6 for a, b in pairs), (options, pairs)


def ignored():
    z, y, t, r = make_case(4, 50)
    for reduction in ("mean", "sum", "none"):
        loss, grad, *_ = run_both(z * math.nan, y.fill_(-100), t, r, reduction=reduction)
        record("ignored", bool((loss == 0).all() and (grad == 0).all()), reduction)
    loss, grad, *_ = run_both(z[:0], y[:0], t, r[:0])
    record("ignored", bool(loss == 0) and grad.shape == (0, 50), "no rows")
    for c, direction in itertools.product((10, 50, 100, 257, 1000), ("forward", "reverse")):
        z, y, t, r = make_case(20, c)
        y[::3], r[:] = -100, torch.arange(20)
        loss, grad = run_triton(z, y, t, r, direction=direction)
        z[::3], t[:20:3], r[::3] = math.nan, math.nan, 10**12  # of rows that share a program with others
        again = run_triton(z, y, t, r, direction=direction)
        same = [torch.equal(a, b) for a, b in zip((loss, grad), again, strict=True)]
        record("ignored", all(same) and bool((grad[::3] == 0).all()), (c, direction))


def out_of_range():
    z, y, t, r = make_case(4, 50)
    y[1] = 3
    sparse = topk_teacher(t, 3, 4.0)
    bad_ids = sparse._replace(classes=sparse.classes.clone().fill_(77))
    calls = {"rows": (y, t, torch.tensor([0, 10**12, -1, 3])), "labels": (torch.tensor([1, 50, -1, 2]), t, r)}
    calls |= {"top-k rows": (y, sparse, torch.tensor([0, 99, -5, 3])), "class ids": (y, bad_ids, r)}
    for name, (labels, teacher, rows) in calls.items():
        x = z.clone().requires_grad_()
        loss = kdfast.kd_loss(x, labels, teacher, rows, reduction="none", backend="triton")
        (grad,) = torch.autograd.grad(loss.sum(), x)
        bad = torch.tensor([name == "class ids", True, True, name == "class ids"])
        same = bool((loss.isnan() == bad).all() and (grad.isnan().all(1) == bad).all())
        record("out of range", same, (name, loss, grad.isnan().all(1)))
        try:
            kdfast.kd_loss(x, labels, teacher, rows, validate=True, backend="triton")
            record("out of range", False, f"{name}: validate=True did not raise")
        except IndexError:
            record("out of range", True, name)


def map_memory(size):
    """Return the C library and the address of new memory, whose pages are allocated when they are first written."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return libc, libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)


def distant_columns():
    """Columns of a teacher that are 2^30 elements apart, so that offsets exceed 31 bits."""
    if torch.get_default_device().type != "cpu":
        return
    step = 2**30
    _, base = map_memory(2 * (2 * step + 1))
    memory = (ctypes.c_char * (2 * (2 * step + 1))).from_address(base)
    values = torch.frombuffer(memory, dtype=torch.float16).as_strided((1, 3), (1, step))
    values.copy_(torch.randn(1, 3))
    z, y = torch.randn(1, 20), torch.tensor([4])
    classes, tail = torch.tensor([[3, 9, 4]], dtype=torch.int32), torch.zeros(1)
    results = []
    for teacher_values in (values, values.contiguous()):
        x = z.clone().requires_grad_()
        loss = kdfast.kd_loss(x, y, TopKTeacher(teacher_values, classes, tail), backend="triton")
        results.append((loss, torch.autograd.grad(loss, x)[0]))
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    record("strides", same, "distant columns")


def at_page_end(rows, columns):
    """Return a float32 tensor (rows, columns) that ends with a page, before a page that cannot be read."""
    page, size = mmap.PAGESIZE, 4 * rows * columns
    length = -(-size // page) * page
    libc, base = map_memory(length + page)
    assert libc.mprotect(ctypes.c_void_p(base + length), page, 0) == 0
    memory = (ctypes.c_char * size).from_address(base + length - size)
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, columns)


def rows_at_a_page_end():
    """Programs with more columns and rows than there are must not read after the last row."""
    if torch.get_default_device().type != "cpu":
        return
    for n, c in ((3, 10), (5, 100), (1, 100), (3, 257), (1, 1000)):
        _, y, _, r = make_case(n, c)
        z, t = at_page_end(n, c), at_page_end(n + 2, c)
        z.normal_(), t.normal_()
        check("strides", z, y, t, r)


def class_id_after_the_last_class():
    """A class id that is out of range but within the last tile must not be dereferenced."""
    if torch.get_default_device().type != "cpu":
        return
    z, t = at_page_end(1, 1000), torch.randn(1, 2)
    z.normal_().requires_grad_()
    for last, bad in ((999, False), (1015, True)):
        teacher = TopKTeacher(t, torch.tensor([[3, last]], dtype=torch.int32), torch.zeros(1))
        loss = kdfast.kd_loss(z, torch.tensor([0]), teacher, backend="triton")
        (grad,) = torch.autograd.grad(loss, z)
        record("out of range", loss.isnan() == bad and bool(grad.isnan().all()) == bad, ("page end", last))


def scaling():
    for dtype, (n, c) in itertools.product(ROUNDING, [(5, 33), (1100, 10), (3, 9000), (4, 8192)]):
        grad = torch.randn(n, c).to(dtype)
        for factor in (torch.tensor(3.0), torch.tensor(1.0), torch.rand(n, 2)[:, 1], torch.tensor(2.0).expand(n)):
            expected = grad.double() * (factor.double().expand(n) * 0.5)[:, None]
            for in_place in (False, True):
                source = grad.clone()
                scaled = scale_rows(source, factor, 0.5, in_place=in_place)
                near = torch.allclose(scaled.double(), expected, rtol=1.01 * ROUNDING[dtype], atol=1e-6)
                record("scaling", near and (scaled is source) == in_place, (dtype, n, factor, in_place))
                record("scaling", in_place or torch.equal(source, grad), "changed its input")


def weights():
    z, y, t, r = make_case(6, 40)
    for w, reduction in itertools.product(
        (torch.rand(6), torch.rand(6, dtype=torch.float64), torch.zeros(6)), ("mean", "none")
    ):
        check("weights", z, y, t, r, weights=w, reduction=reduction)
    check("weights", z.half(), y, t, r, weights=torch.rand(6))
    for n in (1, 1024, 1025, 70000, 300000):
        labels, w = torch.randint(0, 4, (n, 2))[:, 1], torch.rand(n)
        for args in ((labels, None), (None, w), (labels, w), (labels.contiguous(), w.double())):
            total = weight_sums(*args, ignore_index=3).double().sum()
            counted = torch.ones(n) if args[0] is None else labels != 3
            expected = (counted * (1.0 if args[1] is None else w.double())).sum()
            ok = total == expected if args[1] is None else torch.isclose(total, expected, rtol=1e-6)
            record("weights", ok, ("sum", n, total, expected))


ALL = (
    dense,
    options,
    strides,
    masked,
    large,
    ties,
    topk,
    topk_shapes,
    topk_edges,
    far,
    ignored,
    out_of_range,
    class_id_after_the_last_class,
    rows_at_a_page_end,
    distant_columns,
    scaling,
    weights,
)

if __name__ == "__main__":
    device, *names = sys.argv[1:]
    torch.set_default_device(device)
    for group in ALL:
        if not names or group.__name__ in names:
            group()
    print(json.dumps(GROUPS))
