"""Launches of every Triton kernel of kdfast, made by its own launch code with meta tensors."""

from __future__ import annotations

import ast
import importlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import kdfast

__all__ = ["TABLE_CLASSES", "Case", "cases", "launched_kernels"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIVERGENCES = ("jsd", "dkd", "standardized")
QUICK_CLASSES = (10, 100, 1000, 16384, 32000)
TABLE_CLASSES = (10, 100, 1000, 8192, 16384, 32000, 131072, 262144)
ROWS = {1000: 66528, 16384: 9504, 2**31: 2376}  # by largest number of classes; multiples of 108 and 132


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: What it is called in tables and files.
        kernel: The Triton function that is counted; the call may launch others.
        run: Makes the call.
        elements: Elements that the kernel computes.
        traffic: Bytes that it must move at least.
        widths: Bytes that a load or store should move at once, by argument: 16, or less where rows are not aligned.
        quick: Whether the case is in the small selection.
        table: Classes, dtype and direction, for a row of the printed table; else empty.
        data_branches: Branches that depend on the data; what they may skip is counted.
    """

    name: str
    kernel: str
    run: Callable[[], Any]
    elements: int
    traffic: int
    widths: dict[str, int]
    quick: bool = False
    table: tuple[Any, ...] = ()
    data_branches: int = 0


def cases() -> Iterator[Case]:
    """Yield all cases: losses with dense and top-k teachers, of a last layer, and the kernels around them."""
    for c in TABLE_CLASSES:
        for student, teacher in ((a, b) for a in DTYPES for b in DTYPES):
            for direction in ("forward", "reverse"):
                quick = (student, teacher) in (("bf16", "fp16"), ("fp32", "fp32")) and c in QUICK_CLASSES
                yield dense(c, student, teacher, direction, quick=quick and (direction == "forward" or c == 16384))
    yield from dense_options()
    yield from divergence_cases()
    yield from topk_cases()
    yield from linear_cases()
    yield from row_cases()
    yield from view_cases()


def dense(
    c: int,
    student: str = "bf16",
    teacher: str = "fp16",
    direction: str = "forward",
    quick: bool = False,
    **options: Any,
) -> Case:
    """Return a call of ``kd_loss`` with a dense teacher; ``options`` as for ``loss_call``."""
    call = loss_call(c, DTYPES[student], DTYPES[teacher], direction, **options)
    is_kl = call.divergence == "kl"
    grad = options.get("grad", True)
    n, z, t = len(call.logits), call.logits, call.teacher
    widths = {"z_ptr": width(z), "grad_ptr": width(z.new_empty(z.shape))} if grad else {"z_ptr": width(z)}
    read = [z, t] if call.use_kl else [z]
    if call.use_kl:
        # Beside vectors of float32 logits, a vector of as many 16-bit logits has half the bytes.
        widths["t_ptr"] = min(width(t), width(z) * t.element_size() // z.element_size())
    traffic = sum(n * c * x.element_size() for x in (*read, *([z] if grad else [])))
    given = {name: value for name, value in options.items() if name != "divergence"}
    what = direction if is_kl else call.divergence
    name = " ".join(["dense", f"C={c}", student, teacher, what, *(f"{k}={v}" for k, v in given.items())])
    table = (c, student, what) if teacher == "fp16" and not given and c in TABLE_CLASSES else ()
    kernel = "dense_kernel" if is_kl else "divergence_kernel"
    branches = int(options.get("own", False) and not is_kl)
    return Case(name, kernel, lambda: run_loss(call, grad), n * c, traffic, widths, quick, table, branches)


def dense_options() -> Iterator[Case]:
    """Yield the other variants of the dense kernel: options, few rows, odd widths and strides."""
    for c in (100, 1000, 32000):
        for direction in ("forward", "reverse"):
            yield dense(c, direction=direction, grad=False, quick=c == 1000)
            for options in ({"rows": False}, {"weights": True}, {"alpha": 1.0, "labels": False}, {"temperature": 3.0}):
                yield dense(c, direction=direction, **options)
        for options in ({"alpha": 0.0}, {"temperature": 1.0}, {"temperature": 2.0}, {"reduction": "sum"}, {"n": 128}):
            yield dense(c, **options)
        for direction in ("forward", "reverse"):
            yield dense(c, direction=direction, own=True)
            yield dense(c, direction=direction, smoothing=0.1)
        yield dense(c, padding=8)
        yield dense(c, column_major=True)
    for c in (3, 33, 257, 1001, 4099, 50257):
        yield dense(c, quick=c == 257)
        yield dense(c, "fp32", "fp32", "reverse")


def divergence_cases() -> Iterator[Case]:
    """Yield the divergences other than KL, and variants of their kernel."""
    for name in DIVERGENCES:
        for c in (100, 1000, 8192, 32000, 131072):
            for student in ("fp32", "bf16"):
                yield dense(c, student, divergence=name, quick=(student, c) in (("bf16", 1000), ("bf16", 32000)))
        for c in (100, 1000, 32000):
            options = ({"grad": False}, {"rows": False}, {"weights": True}, {"temperature": 1.0}, {"temperature": 3.0})
            own = ({"own": True}, {"own": True, "smoothing": 0.1}, {"smoothing": 0.1})
            for given in (*options, *own, {"alpha": 1.0}, {"n": 128}):
                yield dense(c, divergence=name, **given)
            yield dense(c, divergence=name, padding=8)
            yield dense(c, divergence=name, column_major=True)
        for c in (3, 33, 257, 1001, 4099, 50257):
            yield dense(c, divergence=name)
            yield dense(c, "fp32", "fp32", divergence=name)


def topk_cases() -> Iterator[Case]:
    """Yield calls of ``kd_loss`` with a top-k teacher."""
    for c in (1000, 32000, 131072):
        for student in DTYPES:
            for direction in ("forward", "reverse"):
                for k in (10, 50):
                    quick = (c, student, k) == (32000, "bf16", 50)
                    yield topk(c, student, "fp16", direction, k, quick=quick)
        for teacher in ("fp32", "bf16"):
            yield topk(c, "bf16", teacher, "forward", 50)
    for options in ({"grad": False}, {"weights": True}, {"rows": False}, {"alpha": 1.0, "labels": False}):
        yield topk(32000, "bf16", "fp16", "forward", 50, **options)


def topk(c: int, student: str, teacher: str, direction: str, k: int, quick: bool = False, **options: Any) -> Case:
    """Return a call of ``kd_loss`` with a top-k teacher."""
    call = loss_call(c, DTYPES[student], DTYPES[teacher], direction, k=k, **options)
    grad = options.get("grad", True)
    n, z = len(call.logits), call.logits
    widths = {"z_ptr": width(z), "grad_ptr": width(z)} if grad else {"z_ptr": width(z)}
    traffic = n * (c * z.element_size() * (2 if grad else 1) + k * (4 + call.teacher.element_size()))
    given = [f"{name}={value}" for name, value in options.items()]
    name = " ".join(["topk", f"C={c}", f"k={k}", student, teacher, direction, *given])
    table = (c, student, f"top-{k} {direction}") if teacher == "fp16" and k == 50 and not options else ()
    # Only the teacher's classes above -inf are marked.
    return Case(name, "topk_kernel", lambda: run_loss(call, grad), n * c, traffic, widths, quick, table, 1)


def linear_cases() -> Iterator[Case]:
    """Yield chunks of ``linear_kd_loss``, whose gradient overwrites the logits: with each form of a teacher."""
    for v in (32000, 128256):
        for student in ("fp32", "bf16"):
            for form in ("logits", "hidden", "top-50"):
                yield linear(v, student, form)


def linear(v: int, student: str, form: str) -> Case:
    """Return a chunk of ``linear_kd_loss``: forward KL, or the Jensen-Shannon divergence for a teacher's last layer."""
    dtype, n, h, k = DTYPES[student], 1024, 512, 50
    labels = meta(n, dtype=torch.int64)
    teacher, options, of_teacher = meta(n, v, dtype=torch.float16), {"temperature": 4.0}, 2 * v
    if form == "hidden":
        teacher, of_teacher = (meta(n, h, dtype=dtype), meta(v, h, dtype=dtype)), dtype.itemsize * v
        options = {"temperature": 1.0, "divergence": "jsd"}
    elif form == "top-50":
        ids = meta(n, k, dtype=torch.int32)
        teacher, of_teacher = kdfast.TopKTeacher(meta(n, k, dtype=torch.float16), ids, meta(n)), k * (4 + 2)
    kernel = {"logits": "dense_kernel", "hidden": "divergence_kernel"}.get(form, "topk_kernel")
    run = linear_loss(meta(n, h, dtype=dtype), meta(v, h, dtype=dtype), labels, teacher, options)
    traffic = n * (2 * v * dtype.itemsize + of_teacher)
    name, table = f"linear V={v} {student} {form}", (v, student, f"linear, {form}")
    # Not every store of the top-k kernel can be followed to its argument.
    widths = {"z_ptr": 16} if form == "top-50" else {"z_ptr": 16, "grad_ptr": 16}
    return Case(name, kernel, run, n * v, traffic, widths, table=table, data_branches=int(form == "top-50"))


def linear_loss(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Any, options: dict[str, Any]) -> Any:
    """Return a function that computes a loss and all of its gradients in one chunk, as the operator does."""
    from kdfast.ops.kd_loss.linear import chunks
    from kdfast.ops.kd_loss.linear.validation import make_linear_call

    defaults = {
        "bias": None, "alpha": 0.5, "t_squared": True, "divergence": "forward", "beta": 0.5, "label_smoothing": 0.0,
        "class_weights": None, "weights": None, "teacher_kind": "logits", "ignore_index": -100, "softcap": None,
        "logit_scale": 1.0, "reduction": "mean", "num_items": None, "chunk": len(hidden), "memory": "fast",
    }  # fmt: skip
    call, _ = make_linear_call(hidden, weight, labels, teacher, None, {**defaults, **options})
    return lambda: chunks.compute(call, "triton", (True, True, False))


def row_cases() -> Iterator[Case]:
    """Yield the sum of the weights, and the product of a gradient with the factors of the backward pass."""
    kernels = loss_kernels()
    n, c = 66528, 1000
    for labels, weights in ((True, False), (True, True), (False, True)):
        call = loss_call(c, torch.bfloat16, torch.bfloat16, "forward", labels=labels, weights=weights, alpha=1.0)
        name = " ".join(["weight sum", *["labels"] * labels, *["weights"] * weights])
        traffic = n * (8 * labels + 4 * weights)
        widths = {"label_ptr": 16} if labels else {"weights_ptr": 16}
        yield Case(name, "weight_sum_kernel", lambda call=call: run_loss(call, True), n, traffic, widths, labels)
    for student, dtype in DTYPES.items():
        for per_row, in_place in ((False, True), (False, False), (True, True)):
            grad, factor = meta(n, c, dtype=dtype), meta(*([n] if per_row else []))
            widths = {"grad_ptr": 16, "out_ptr": 16}
            yield Case(
                " ".join(["scale", student, *["rows"] * per_row, *["in place"] * in_place]),
                "scale_rows_kernel" if per_row else "scale_kernel",
                lambda g=grad, f=factor, i=in_place: kernels.scale_rows(g, f, 0.5, in_place=i),
                n * c, 2 * n * c * grad.element_size(), widths, student == "bf16",
            )  # fmt: skip


def view_cases() -> Iterator[Case]:
    """Yield augmented batches of 32 and 224 pixels."""
    try:
        views = importlib.import_module("kdfast.ops.views.gather_triton")
        crops = importlib.import_module("kdfast.ops.views.crops_triton")
    except ImportError:
        return  # an older tree, counted for a comparison
    for size, pad in ((32, 4), (224, 28)):
        images, ids, affine = meta(50_000, size, size, 3, dtype=torch.uint8), meta(512, dtype=torch.int64), meta(2, 3)
        elements = 512 * size * size * 3
        for name, dtype in DTYPES.items():
            for rows in (ids, None):
                for flip in (True, False):
                    yield Case(
                        " ".join(["views", str(size), name, *["rows"] * (rows is not None), *["flip"] * flip]),
                        "gather_views_kernel",
                        lambda i=images, r=rows, v=ids, a=affine, p=pad, f=flip, d=dtype: (
                            views.gather_views(i, r, v, a, p, f, d)
                        ),
                        elements, elements * (1 + dtype.itemsize), {}, (name, size, flip) == ("bf16", 32, True),
                    )  # fmt: skip

    images, rows, affine = meta(50_000, 256, 256, 3, dtype=torch.uint8), meta(256, dtype=torch.int64), meta(2, 3)
    boxes = meta(256, 5, dtype=torch.int32)
    elements = 256 * 224 * 224 * 3
    for name, dtype in DTYPES.items():
        for some in (rows, None):
            yield Case(
                " ".join(["crops 224", name, *["rows"] * (some is not None)]),
                "crop_views_kernel",
                lambda r=some, d=dtype: crops.crop_views(images, r, boxes, affine, (224, 224), d),
                elements, elements * (1 + dtype.itemsize), {}, name == "bf16" and some is not None,
            )  # fmt: skip


def loss_call(
    c: int,
    student: torch.dtype,
    teacher: torch.dtype,
    direction: str,
    *,
    n: int | None = None,
    k: int | None = None,
    grad: bool = True,
    labels: bool = True,
    rows: bool = True,
    weights: bool = False,
    alpha: float = 0.5,
    temperature: float = 4.0,
    reduction: str = "mean",
    padding: int = 0,
    column_major: bool = False,
    divergence: str = "kl",
    own: bool = False,
    smoothing: float = 0.0,
) -> Any:
    """Return the arguments of a ``kd_loss`` call as the operator passes them to its kernels, on the meta device.

    Args:
        c: Number of classes.
        student: Dtype of the logits.
        teacher: Dtype of the teacher.
        direction: "forward" or "reverse".
        n: Number of rows; None for a number by ``c``.
        k: Classes of a top-k teacher; None for all.
        grad: Not used here: whether ``run_loss`` asks for the gradient.
        labels: Whether there are labels.
        rows: Whether teacher rows are picked by index.
        weights: Whether rows have weights.
        alpha: Weight of the divergence.
        temperature: Temperature.
        reduction: "mean", "sum" or "none".
        padding: Elements between rows of the logits.
        column_major: Whether the logits are a transposed matrix.
        divergence: As in ``kd_loss``.
        own: Whether each row has an alpha and a temperature of its own.
        smoothing: Label smoothing.
    """
    from kdfast.ops.kd_loss.call import KDCall

    n = n or next(rows for most, rows in ROWS.items() if c <= most)
    logits = meta(c, n, dtype=student).t() if column_major else meta(n, c + padding, dtype=student)[:, :c]
    index = meta(n, dtype=torch.int64)
    return KDCall(
        logits=logits,
        labels=index if labels else None,
        teacher=meta(n, k or c, dtype=teacher),
        rows=index if rows else None,
        classes=meta(n, k, dtype=torch.int32) if k else None,
        tail=meta(n) if k else None,
        weights=meta(n) if weights else None,
        alphas=meta(n) if own else None,
        temperatures=meta(n) if own else None,
        alpha=alpha,
        temperature=temperature,
        t_squared=True,
        ignore_index=-100,
        reduction=reduction,
        reverse=direction == "reverse",
        label_smoothing=smoothing,
        **({} if divergence == "kl" else {"divergence": divergence, "first_weight": 0.5, "second_weight": 0.5}),
    )


def run_loss(call: Any, grad: bool) -> None:
    """Make the call."""
    loss_kernels().kd_loss(call, grad)


def loss_kernels() -> Any:
    """Return the module that launches the kernels of ``kd_loss``, in this tree or an older one."""
    return importlib.import_module("kdfast.ops.kd_loss.dispatch").kernels("triton")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without memory; Triton takes its address to be aligned."""
    return torch.empty(shape, dtype=dtype, device="meta")


def width(x: Tensor) -> int:
    """Return the bytes that a load of a row can move at once: up to 16, as the columns and rows are aligned."""
    if x.stride(1) != 1:
        return x.element_size()
    common = math.gcd(16 // x.element_size(), x.shape[1], x.stride(0))
    return (common & -common) * x.element_size()


def launched_kernels() -> set[str]:
    """Return the names of the Triton functions in kdfast that are launched: those that no other one refers to."""
    root = Path(kdfast.__file__).parent
    found: dict[int, JITFunction] = {}
    for path in sorted(root.rglob("*.py")):
        if re.search(r"^\s*(import|from) triton\b", path.read_text(), re.MULTILINE):
            parts = path.relative_to(root.parent).with_suffix("").parts
            module = importlib.import_module(".".join(parts))
            found |= {id(x): x for x in vars(module).values() if isinstance(x, JITFunction)}
    used = {
        id(function.fn.__globals__.get(node.id))
        for function in found.values()
        for node in ast.walk(function.parse())
        if isinstance(node, ast.Name)
    }
    return {function.__name__ for key, function in found.items() if key not in used}
