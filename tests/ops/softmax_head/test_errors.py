"""Bad input of the head's functions: an error that names the argument, never a silent zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kdfast
from kdfast.errors import DataError, ShapeError, SolveError

N, D, C = 20, 4, 3


@pytest.fixture
def good():
    return {"x": torch.randn(N, D), "z": torch.randn(N, C), "y": torch.arange(N) % C}


CALLS = {
    "norms": lambda x, z, y: kdfast.head_grad_norms(z, y, x),
    "hvp": lambda x, z, y: kdfast.head_hvp(x, z, torch.ones(C, D + 1)),
    "solve": lambda x, z, y: kdfast.head_solve(x, z, torch.ones(C, D + 1), l2=0.1),
    "cg": lambda x, z, y: kdfast.head_solve(x, z, torch.ones(C, D + 1), l2=0.1, method="cg"),
    "self": lambda x, z, y: kdfast.head_self_influence(x, z, y, l2=0.1),
    "influence": lambda x, z, y: kdfast.head_influence(
        x, z, y, torch.ones(2, D), torch.ones(2, C), torch.tensor([0, 1]), l2=0.1
    ),
    "validation": lambda x, z, y: kdfast.head_influence(
        torch.randn(N, D), torch.randn(N, C), torch.arange(N) % C, x, z, y, l2=0.1
    ),
    "removal": lambda x, z, y: kdfast.head_leave_one_out(x, z, y, torch.tensor([1]), l2=0.1),
}
LABELLED = sorted(set(CALLS) - {"hvp", "solve", "cg"})


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("argument", "name"), [("x", "features"), ("z", "logits")])
def test_numbers_that_are_not_finite(good, call, argument, name, value):
    good[argument][7, 1] = value
    with pytest.raises(DataError, match=f"{name} of sample 7 are not finite"):
        call(**good)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("label", [-1, C, -100])
def test_labels_out_of_range(good, name, label):
    good["y"][11] = label
    with pytest.raises(DataError, match=f"labels of sample 11 is {label}: classes of 3 logits"):
        CALLS[name](**good)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_empty_batch(good, call):
    with pytest.raises(DataError, match="features hold no rows"):
        call(**{key: value[:0] for key, value in good.items()})


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_head_of_one_class(good, call):
    good["z"] = good["z"][:, :1]
    with pytest.raises(ShapeError, match="fewer than two classes"):
        call(**good)


@pytest.mark.parametrize("name", ["self", "influence", "removal"])
def test_training_labels_of_one_class(good, name):
    good["y"][:] = 2
    with pytest.raises(DataError, match="labels are all 2"):
        CALLS[name](**good)
    with pytest.raises(DataError, match="labels are all 2"):
        kdfast.head_newton(good["x"], good["y"], l2=0.1)


def test_labels_of_one_class_are_fine_where_nothing_is_trained(good):
    good["y"][:] = 2
    assert (kdfast.head_grad_norms(good["z"], good["y"], good["x"]) > 0).all()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("x", lambda x: x[:-1], "shape"),
        ("x", lambda x: x[:, 0], "features have shape"),
        ("x", lambda x: x.long(), "features are torch.int64: give floating-point"),
        ("z", lambda z: z[:-1], "logits have shape"),
        ("z", lambda z: z[0], "logits have shape"),
        ("z", lambda z: z.int(), "logits are torch.int32: give floating-point"),
        ("z", lambda z: z.to("meta"), "on meta"),
        ("z", lambda z: None, "logits"),
    ],
)
def test_shapes_types_and_devices(good, call, argument, change, message):
    good[argument] = change(good[argument])
    with pytest.raises(ShapeError, match=message):
        call(**good)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y[:-1], "labels have shape"),
        (lambda y: y[:, None], "labels have shape"),
        (lambda y: y.float(), "labels are torch.float32: give int64"),
        (lambda y: y.to("meta"), "labels are on meta"),
        (lambda y: None, "labels are missing"),
        (lambda y: y.tolist(), "labels is a list"),
    ],
)
def test_labels_that_do_not_fit(good, name, change, message):
    good["y"] = change(good["y"])
    with pytest.raises(ShapeError, match=message):
        CALLS[name](**good)


@pytest.mark.parametrize(
    ("v", "kind", "message"),
    [
        (torch.ones(C, D), ShapeError, r"D = 5 counts the bias"),
        (torch.ones(2, D + 1), ShapeError, "has shape"),
        (torch.ones(0, C, D + 1), ShapeError, "has shape"),
        (torch.ones(C, D + 1, dtype=torch.int64), ShapeError, "give floating-point"),
        (torch.ones(C, D + 1, device="meta"), ShapeError, "on meta"),
        (torch.full((C, D + 1), float("nan")), DataError, "is not finite"),
    ],
)
def test_vectors_that_do_not_fit(good, v, kind, message):
    with pytest.raises(kind, match=f"^v .*{message}"):
        kdfast.head_hvp(good["x"], good["z"], v)
    with pytest.raises(kind, match=f"^b .*{message}"):
        kdfast.head_solve(good["x"], good["z"], v, l2=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": 1e-40}, "temperature is 1e-40"),
        ({"l2": -1.0}, "l2 is -1"),
        ({"tile_rows": 0}, "tile_rows is 0"),
    ],
)
def test_options_out_of_range(good, options, message):
    with pytest.raises(ShapeError, match=message):
        kdfast.head_hvp(good["x"], good["z"], torch.ones(C, D + 1), **options)
    with pytest.raises(ShapeError, match=message):
        kdfast.head_grad_norms(good["z"], good["y"], good["x"], **options)


def test_options_of_solves(good):
    with pytest.raises(ShapeError, match="max_iterations is 0"):
        kdfast.head_solve(good["x"], good["z"], torch.ones(C, D + 1), l2=0.1, method="cg", max_iterations=0)
    b = torch.ones(C, D + 1)
    for options, message in (({"tol": 0.0}, "tol is 0"), ({"method": "lu"}, "method is 'lu'")):
        with pytest.raises(ShapeError, match=message):
            kdfast.head_solve(good["x"], good["z"], b, l2=0.1, **options)
    with pytest.raises(ShapeError, match=r"corrected=True needs the Hessian as a matrix.*15 weights"):
        kdfast.head_self_influence(good["x"], good["z"], good["y"], l2=0.1, corrected=True, method="cg")
    for rows in (torch.tensor([N]), torch.tensor([-1])):
        with pytest.raises(IndexError, match=r"rows must lie in \[0, 20\)"):
            kdfast.head_leave_one_out(good["x"], good["z"], good["y"], rows, l2=0.1)
    with pytest.raises(ShapeError, match="rows are"):
        kdfast.head_leave_one_out(good["x"], good["z"], good["y"], torch.tensor([0.5]), l2=0.1)


def test_a_missing_teacher_and_missing_weights(good):
    with pytest.raises(ShapeError, match="teacher is missing"):
        kdfast.head_grad_norms(good["z"], good["y"], good["x"], alpha=0.5)
    with pytest.raises(ShapeError, match="weights are missing"):
        kdfast.head_grad_norms(good["z"], good["y"], good["x"], l2=0.5)
    with pytest.raises(ShapeError, match="weights have shape"):
        kdfast.head_grad_norms(good["z"], good["y"], good["x"], l2=0.5, weights=torch.ones(C, D))
    bad = torch.full((N, C), float("nan"))
    with pytest.raises(DataError, match="teacher of sample 0 are not finite"):
        kdfast.head_grad_norms(good["z"], good["y"], good["x"], alpha=0.5, teacher=bad)


def test_another_heads_validation_data(good):
    with pytest.raises(ShapeError, match="val_features and val_logits have 5 features and 3 classes"):
        kdfast.head_influence(*good.values(), torch.ones(2, 5), torch.ones(2, 3), torch.tensor([0, 1]), l2=0.1)
    with pytest.raises(DataError, match="val_labels of sample 1 is 9"):
        kdfast.head_influence(*good.values(), torch.ones(2, D), torch.ones(2, C), torch.tensor([0, 9]), l2=0.1)


def test_blocks(good):
    x, z, y = good["x"], good["z"], good["y"]
    with pytest.raises(ShapeError, match="features are blocks, but logits"):
        kdfast.head_grad_norms(z, y, [(x, z, y)])
    with pytest.raises(ShapeError, match="a block of features must be a tuple"):
        kdfast.head_grad_norms(None, None, [x])
    with pytest.raises(DataError, match="features hold no rows"):
        kdfast.head_grad_norms(None, None, [])
    with pytest.raises(ShapeError, match=r"features have shape \(3, 2\)"):
        kdfast.head_grad_norms(None, None, [(x, z, y), (x[:3, :2], z[:3], y[:3])])
    with pytest.raises(DataError, match="an iterator, which can be read once, but a solve reads"):
        kdfast.head_self_influence(iter([(x, z, y)]), None, None, l2=0.1)
    with pytest.raises(DataError, match="labels of sample 22 is 7"):
        kdfast.head_grad_norms(None, None, iter([(x, z, y), (x[:3], z[:3], torch.tensor([0, 1, 7]))]))
    with pytest.raises(DataError, match="features of sample 20 are not finite"):
        kdfast.head_grad_norms(None, None, iter([(x, z, y), (x[:1] * float("nan"), z[:1], y[:1])]))


def test_overflow_is_not_infinity(good):
    with pytest.raises(DataError, match=r"the gradient norms overflow torch.float32"):
        kdfast.head_grad_norms(good["z"], good["y"], good["x"] * 1e30)
    with pytest.raises(DataError, match=r"products overflow torch\.float32"):
        kdfast.head_hvp(good["x"] * 1e30, good["z"], torch.randn(C, D + 1))


def test_overflow_of_what_is_returned_is_not_infinity(good):
    x, z, y = good["x"], good["z"], good["y"]
    with pytest.raises(DataError, match=r"products overflow torch\.float16"):
        kdfast.head_hvp((x * 100).half(), z.half(), torch.full((C, D + 1), 1e4).half() * torch.randn(C, D + 1).half())
    with pytest.raises(DataError, match=r"effects of removals overflow torch\.float32"):
        kdfast.head_self_influence(x * 1e20, z * 1e6, y, l2=1e-3)
    with pytest.raises(DataError, match="weights are not finite"):
        kdfast.head_grad_norms(z, y, x, l2=0.1, weights=torch.full((C, D + 1), float("nan")))


def test_what_is_no_tensor(good):
    x, z, y = good["x"], good["z"], good["y"]
    with pytest.raises(ShapeError, match="v is a ndarray: give a tensor"):
        kdfast.head_hvp(x, z, np.ones((C, D + 1)))
    with pytest.raises(ShapeError, match="b is a list: give a tensor"):
        kdfast.head_solve(x, z, [1.0], l2=0.1)
    with pytest.raises(ShapeError, match="rows is a list: give a tensor"):
        kdfast.head_leave_one_out(x, z, y, [1, 2], l2=0.1)
    with pytest.raises(ShapeError, match="init is a ndarray: give a tensor"):
        kdfast.head_newton(x, y, l2=0.1, init=np.ones((C, D + 1)))
    with pytest.raises(ShapeError, match="weights is a ndarray: give a tensor"):
        kdfast.head_grad_norms(z, y, x, l2=0.1, weights=np.ones((C, D + 1)))


@pytest.mark.parametrize(("rows", "message"), [(12, "hold 12 rows, and held 20 before"), (25, "hold over 20 rows")])
def test_blocks_that_change_from_one_reading_to_the_next(rows, message):
    class Changing:
        readings = 0

        def __iter__(self):
            self.readings += 1
            n = N if self.readings < 3 else rows
            yield torch.randn(n, D), torch.randn(n, C), torch.arange(n) % C

    with pytest.raises(DataError, match=message):
        kdfast.head_self_influence(Changing(), None, None, l2=0.1)


def test_newton(good):
    x, y = good["x"], good["y"]
    with pytest.raises(ShapeError, match=r"init has shape \(3, 4\): \(C, 5\) is needed"):
        kdfast.head_newton(x, y, l2=0.1, init=torch.ones(C, D))
    with pytest.raises(DataError, match="init is not finite"):
        kdfast.head_newton(x, y, l2=0.1, init=torch.full((C, D + 1), float("nan")))
    with pytest.raises(ShapeError, match="tol is -1"):
        kdfast.head_newton(x, y, l2=0.1, tol=-1)
    with pytest.raises(SolveError, match=r"tol|rounding"):
        kdfast.head_newton(x, y, l2=0.1, tol=1e-300)
    with pytest.raises(DataError, match="features of sample 3 are not finite"):
        kdfast.head_newton(torch.where(torch.arange(N)[:, None] == 3, torch.inf, x), y, l2=0.1)
    with pytest.raises(DataError, match="labels of sample 5 is 2: classes of 2 logits"):
        kdfast.head_newton(x, y.index_fill(0, torch.arange(5), 0), l2=0.1, classes=2)
    with pytest.raises(DataError, match="say nothing about the classes"):
        kdfast.head_newton(x, None, l2=0.1)
    with pytest.raises(ShapeError, match="are needed"):
        kdfast.head_logits(x, torch.ones(C, D + 2))


def test_read_only_and_big_endian_arrays(good):
    x = good["x"].numpy().astype(">f4")
    x.flags.writeable = False
    found = kdfast.head_grad_norms(good["z"].numpy(), np.asarray(good["y"], np.int32), x)
    torch.testing.assert_close(found, kdfast.head_grad_norms(good["z"], good["y"], good["x"]))
