"""Arguments that kd_loss rejects, and the text of its messages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import kdfast
from kdfast.errors import ShapeError
from kdfast.ops.kd_loss import TopKTeacher, topk_teacher


def good():
    return {
        "logits": torch.randn(4, 6),
        "labels": torch.randint(0, 6, (4,)),
        "teacher": torch.randn(9, 6),
        "rows": torch.tensor([8, 0, 0, 3]),
    }


def sparse(**changes):
    values, classes, tail = topk_teacher(torch.randn(9, 6), 2, 4.0)
    return TopKTeacher(**{"values": values, "classes": classes, "tail": tail, **changes})


BAD = {
    "logits 1-D": ({"logits": torch.randn(6)}, ShapeError, r"`logits` has shape \(6,\)"),
    "logits 3-D": ({"logits": torch.randn(2, 4, 6)}, ShapeError, r"`labels` has shape \(4,\): must be \(8,\)"),
    "logits int": ({"logits": torch.ones(4, 6, dtype=torch.int64)}, TypeError, "`logits` are torch.int64"),
    "logits list": ({"logits": [[1.0]]}, TypeError, "`logits` is list"),
    "no classes": ({"logits": torch.randn(4, 0)}, ShapeError, "at least one class"),
    "labels int32": ({"labels": torch.zeros(4, dtype=torch.int32)}, TypeError, r"`labels` is torch.int32.*\.long\(\)"),
    "labels short": ({"labels": torch.zeros(3, dtype=torch.int64)}, ShapeError, r"`labels` has shape \(3,\)"),
    "labels 2-D": ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, ShapeError, "`labels` has shape"),
    "labels None": ({"labels": None}, ShapeError, "`labels` are None"),
    "labels meta": ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, TypeError, "`labels` is on meta"),
    "label high": ({"labels": torch.tensor([0, 6, 1, 1])}, IndexError, r"`labels\[1\]` is 6"),
    "label negative": ({"labels": torch.tensor([0, 1, -7, 1])}, IndexError, r"`labels\[2\]` is -7"),
    "rows float": ({"rows": torch.zeros(4)}, TypeError, "`rows` is torch.float32"),
    "rows int32": ({"rows": torch.zeros(4, dtype=torch.int32)}, TypeError, "must be int64"),
    "row high": ({"rows": torch.tensor([0, 1, 2, 9])}, IndexError, r"`rows\[3\]` is 9"),
    "row high, teacher not read": ({"rows": torch.tensor([0, 1, 2, 9]), "alpha": 0.0}, IndexError, r"`rows\[3\]` is 9"),
    "row negative": ({"rows": torch.tensor([0, -1, 2, 3])}, IndexError, r"`rows\[1\]` is -1"),
    "rows missing": ({"rows": None}, ShapeError, "`teacher` has 9 rows and `logits` have 4: pass `rows`"),
    "teacher classes": ({"teacher": torch.randn(9, 5)}, ShapeError, "5 classes and `logits` have 6"),
    "teacher int": ({"teacher": torch.ones(9, 6, dtype=torch.int8)}, TypeError, "`teacher` is torch.int8"),
    "teacher grad": ({"teacher": torch.randn(9, 6, requires_grad=True)}, TypeError, r"teacher\.detach\(\)"),
    "teacher meta": ({"teacher": torch.randn(9, 6, device="meta")}, TypeError, "`teacher` is on meta"),
    "teacher dict": ({"teacher": {"values": 1}}, TypeError, "TopKTeacher"),
    "weights 2-D": ({"weights": torch.ones(4, 1)}, ShapeError, "`weights` has shape"),
    "weights short": ({"weights": torch.ones(3)}, ShapeError, r"`weights` has shape \(3,\)"),
    "weights int": ({"weights": torch.ones(4, dtype=torch.int64)}, TypeError, "`weights` is torch.int64"),
    "alpha high": ({"alpha": 1.5}, ShapeError, "`alpha` is 1.5"),
    "alpha nan": ({"alpha": math.nan}, ShapeError, "`alpha` is nan"),
    "alpha text": ({"alpha": "half"}, TypeError, "`alpha` is 'half'"),
    "alpha vector": ({"alpha": torch.ones(2)}, ShapeError, r"`alpha` has shape \(2,\): pass a number"),
    "alpha meta": ({"alpha": torch.ones((), device="meta")}, TypeError, "`alpha` is a tensor .* on meta"),
    "alpha grad": ({"alpha": torch.ones((), requires_grad=True)}, TypeError, "requires a gradient"),
    "logits sparse": (
        {"logits": torch.randn(4, 6).to_sparse()},
        TypeError,
        r"`logits` is a torch.sparse_coo.*to_dense",
    ),
    "teacher sparse": ({"teacher": torch.randn(9, 6).to_sparse()}, TypeError, "`teacher` is a torch.sparse_coo"),
    "rows meta": ({"rows": torch.zeros(4, dtype=torch.int64, device="meta")}, TypeError, "`rows` is on meta"),
    "rows short": ({"rows": torch.tensor([0])}, ShapeError, r"`rows` has shape \(1,\)"),
    "labels one-hot": (
        {"labels": torch.eye(6, dtype=torch.int64)[:4]},
        ShapeError,
        "`labels` has shape .* pass probabilities as floating-point numbers",
    ),
    "rows list": ({"rows": [0, 1, 2, 3]}, TypeError, "`rows` is list"),
    "weights meta": ({"weights": torch.ones(4, device="meta")}, TypeError, "`weights` is on meta"),
    "teacher empty": ({"teacher": torch.randn(0, 6)}, IndexError, "`teacher` has no rows"),
    "logits nested": (
        {"logits": torch.nested.as_nested_tensor([torch.randn(6), torch.randn(2)], layout=torch.jagged)},
        TypeError,
        "`logits` is a nested tensor: .* pad it",
    ),
    "top-k grad": (
        {"teacher": sparse(values=torch.randn(9, 2, requires_grad=True))},
        TypeError,
        r"`teacher\.values` requires a gradient.*teacher\.values\.detach\(\)",
    ),
    "top-k tail grad": (
        {"teacher": sparse(tail=torch.randn(9, requires_grad=True))},
        TypeError,
        r"`teacher\.tail` requires a gradient.*teacher\.tail\.detach\(\)",
    ),
    "top-k rows": ({"teacher": sparse(), "rows": torch.tensor([0, 1, 2, 9])}, IndexError, r"`rows\[3\]` is 9"),
    "alpha negative": ({"alpha": -0.1}, ShapeError, "`alpha` is -0.1"),
    "temperature negative": ({"temperature": -1.0}, ShapeError, "`temperature` is -1.0"),
    "temperature tiny": ({"temperature": 1e-40}, ShapeError, "`temperature` is 1e-40: must be a positive number"),
    "temperature meta": (
        {"temperature": torch.ones((), device="meta")},
        TypeError,
        "`temperature` is a tensor.*on meta",
    ),
    "temperature complex": (
        {"temperature": torch.tensor(1j)},
        TypeError,
        "`temperature` is a tensor of torch.complex64",
    ),
    "temperature huge": ({"temperature": 2e15}, ShapeError, "`temperature` is 2000000000000000.0: must be a positive"),
    "alpha bool": ({"alpha": torch.tensor(True)}, TypeError, "`alpha` is a tensor of torch.bool"),
    "ignore_index bool": ({"ignore_index": True}, TypeError, "`ignore_index` is True: pass an integer"),
    "temperature None": ({"temperature": None}, TypeError, "`temperature` is None"),
    "ignore_index too large": ({"ignore_index": 2**63}, ShapeError, "must fit into int64"),
    "ignore_index None": ({"ignore_index": None}, TypeError, "`ignore_index` is None: pass an integer"),
    "temperature 0": ({"temperature": 0.0}, ShapeError, "`temperature` is 0.0"),
    "temperature inf": ({"temperature": math.inf}, ShapeError, "`temperature` is inf"),
    "temperature nan": ({"temperature": math.nan}, ShapeError, "`temperature` is nan"),
    "t_squared": ({"t_squared": "no"}, TypeError, "`t_squared` is 'no': pass True or False"),
    "reduction": ({"reduction": "average"}, ShapeError, "'average'.*'mean'"),
    "direction": ({"direction": "back"}, ShapeError, "'back'.*'forward'"),
    "top-k shapes": ({"teacher": sparse(tail=torch.randn(8))}, ShapeError, r"\(M, k\), \(M, k\) and \(M,\)"),
    "top-k int16": (
        {"teacher": sparse(classes=torch.zeros(9, 2, dtype=torch.int16))},
        TypeError,
        "`teacher.classes` is torch.int16: must be int32 or int64",
    ),
    "top-k int64 high": (
        {"teacher": sparse(classes=torch.full((9, 2), 2**32, dtype=torch.int64))},
        IndexError,
        r"`teacher.classes\[\d, 0\]` is",
    ),
    "top-k high": (
        {"teacher": sparse(classes=torch.full((9, 2), 6).int())},
        IndexError,
        r"`teacher.classes\[\d, 0\]` is 6",
    ),
    "top-k wide": (
        {"teacher": TopKTeacher(torch.randn(9, 7), torch.zeros(9, 7).int(), torch.zeros(9))},
        ShapeError,
        "must be 1 to 6",
    ),
    "top-k twice": (
        {"teacher": sparse(classes=torch.ones(9, 2).int())},
        ShapeError,
        r"`teacher.classes\[\d\]` holds class 1 twice: .* -inf",
    ),
    "top-k twice in a row that no sample uses": (
        {"teacher": sparse(classes=torch.tensor([[0, 1]] * 5 + [[2, 2]] + [[0, 1]] * 3)), "validate": True},
        ShapeError,
        r"`teacher.classes\[5\]` holds class 2 twice",
    ),
}


def test_accepts_unusual_but_valid_arguments(kd_loss_backend):
    common = {**good(), "backend": kd_loss_backend}
    expected = kdfast.kd_loss(**common)
    torch.testing.assert_close(kdfast.kd_loss(**common, ignore_index=np.int64(-100)), expected)
    assert kdfast.kd_loss(**common, temperature=1e15, weights=torch.ones(4)).isfinite()
    teacher = sparse()
    teacher.classes[5] = 77  # a row that no sample uses
    assert kdfast.kd_loss(**{**common, "teacher": teacher}).isfinite()


@pytest.mark.parametrize("name", list(BAD))
def test_rejected(kd_loss_backend, name):
    changes, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        kdfast.kd_loss(**{**good(), **changes}, backend=kd_loss_backend)


@pytest.mark.parametrize("name", ["logits list", "labels None", "teacher classes", "row high", "temperature 0"])
def test_terms_reject_it_too(kd_loss_backend, name):
    changes, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        kdfast.kd_loss_terms(**{**good(), **changes}, backend=kd_loss_backend)


@pytest.mark.parametrize("k", [0, 2])
def test_accepts_a_float64_teacher(kd_loss_backend, k):
    arguments = good()
    if k:
        arguments["teacher"] = topk_teacher(arguments["teacher"], k, 4.0)
    expected = kdfast.kd_loss(**arguments, backend=kd_loss_backend)
    teacher = arguments["teacher"]
    arguments["teacher"] = teacher._replace(values=teacher.values.double()) if k else teacher.double()
    torch.testing.assert_close(kdfast.kd_loss(**arguments, backend=kd_loss_backend), expected)


def test_ignored_rows_may_be_out_of_range(kd_loss_backend):
    arguments = good()
    arguments["labels"][1], arguments["rows"][1] = -100, 10**9
    assert kdfast.kd_loss(**arguments, backend=kd_loss_backend, validate=True).isfinite()


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_accepts_numpy_scalars(kd_loss_backend, kind):
    arguments = good()
    loss = kdfast.kd_loss(**arguments, temperature=kind(2), backend=kd_loss_backend)
    torch.testing.assert_close(loss, kdfast.kd_loss(**arguments, temperature=2.0, backend=kd_loss_backend))
    assert torch.equal(
        topk_teacher(arguments["teacher"], 2, kind(2)).tail, topk_teacher(arguments["teacher"], 2, 2.0).tail
    )


def test_accepts_scalar_tensors(kd_loss_backend):
    arguments = good()
    loss = kdfast.kd_loss(**arguments, alpha=torch.tensor(0.25), temperature=torch.tensor(2.0), backend=kd_loss_backend)
    torch.testing.assert_close(loss, kdfast.kd_loss(**arguments, alpha=0.25, temperature=2.0, backend=kd_loss_backend))


@pytest.mark.parametrize(
    ("teacher", "k", "temperature", "kind", "message"),
    [
        (torch.randn(2, 6), 7, 4.0, ShapeError, r"\[1, 6\]"),
        (torch.randn(2, 6), 0, 4.0, ShapeError, r"\[1, 6\]"),
        (torch.randn(2, 6), 2.0, 4.0, TypeError, "`k` is 2.0"),
        (torch.randn(2, 6), 2, 0.0, ShapeError, "`temperature` is 0.0"),
        (torch.randn(2, 6), 2, "warm", TypeError, "`temperature` is 'warm'"),
        (torch.randn(6), 2, 4.0, ShapeError, r"`teacher` has shape \(6,\)"),
        (torch.ones(2, 6).int(), 2, 4.0, TypeError, "`teacher` is torch.int32"),
        ([[1.0]], 1, 4.0, TypeError, "`teacher` is list"),
    ],
)
def test_topk_teacher_rejects(teacher, k, temperature, kind, message):
    with pytest.raises(kind, match=message):
        topk_teacher(teacher, k, temperature)


def test_vmap_checks_rows_against_their_own_teacher():
    logits, teacher = torch.randn(2, 3, 6), torch.randn(2, 5, 6)
    labels, rows = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[0, 1, 5], [0, 1, 2]])
    with pytest.raises(IndexError, match="rows"):
        torch.func.vmap(kdfast.kd_loss)(logits, labels, teacher, rows)


@pytest.mark.parametrize("name", ["logits", "labels", "teacher", "rows", "weights"])
def test_wrapper_subclasses_are_dispatched(name):
    """They have no memory of their own to pass to the kernel."""
    from torch.testing._internal.two_tensor import TwoTensor

    arguments = {**good(), "weights": torch.rand(4)}
    expected = kdfast.kd_loss(**arguments)
    arguments[name] = TwoTensor(arguments[name], arguments[name].clone())
    found = kdfast.kd_loss(**arguments)
    assert isinstance(found, TwoTensor)
    torch.testing.assert_close(found.a, expected)
    torch.testing.assert_close(found.b, expected)


class DTensor(torch.Tensor):
    """Stands for a tensor that is split over processes."""


@pytest.mark.parametrize("function", [kdfast.kd_loss, kdfast.kd_loss_terms])
@pytest.mark.parametrize("name", ["logits", "labels", "teacher", "rows"])
def test_rejects_tensors_that_are_split_over_processes(name, function):
    arguments = good()
    arguments[name] = arguments[name].as_subclass(DTensor)
    with pytest.raises(TypeError, match=rf"`{name}` is a DTensor, .* pass `{name}`\.full_tensor\(\)"):
        function(**arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_does_not_matter(kd_loss_backend, dtype):
    arguments = good()
    expected = kdfast.kd_loss_terms(**arguments, backend=kd_loss_backend)
    torch.set_default_dtype(dtype)
    try:
        found = kdfast.kd_loss_terms(**arguments, backend=kd_loss_backend)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sum_of_half_precision_weights_is_not_rounded(kd_loss_backend, dtype):
    n = 70_000
    logits, teacher, labels = torch.randn(n, 3), torch.randn(n, 3), torch.randint(0, 3, (n,))
    weights = torch.ones(n, dtype=dtype, requires_grad=True)
    loss = kdfast.kd_loss(logits, labels, teacher, weights=weights, backend=kd_loss_backend)
    torch.testing.assert_close(loss.detach(), kdfast.kd_loss(logits, labels, teacher), rtol=1e-5, atol=0)
    assert torch.autograd.grad(loss, weights)[0].isfinite().all()
