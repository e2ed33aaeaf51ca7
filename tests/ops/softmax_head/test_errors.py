"""Bad input of the softmax head's functions raises an error that names the argument."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import kdfast
from kdfast.errors import DataError, ShapeError, SolveError

N, D, C = 20, 4, 3


@pytest.fixture
def data():
    return {"x": torch.randn(N, D), "z": torch.randn(N, C), "y": torch.arange(N) % C}


class DTensor(TwoTensor):
    """Like a tensor that is split over processes, it holds its values in other tensors and has no address."""


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
    "leave one out": lambda x, z, y: kdfast.head_leave_one_out(x, z, y, torch.tensor([1]), l2=0.1),
}
LABELLED = sorted(set(CALLS) - {"hvp", "solve", "cg"})


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("argument", "name"), [("x", "features"), ("z", "logits")])
def test_rejects_tensors_whose_values_are_elsewhere(data, call, argument, name):
    for kind, message in (
        (DTensor, r"split over processes: pass its \.full_tensor"),
        (TwoTensor, "pass a plain tensor"),
    ):
        given = kind(data[argument], data[argument])
        with pytest.raises(ShapeError, match=rf"{name}` is a {kind.__name__}, .*{message}"):
            call(**{**data, argument: given})


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("argument", "name"), [("x", "features"), ("z", "logits")])
def test_rejects_nonfinite_numbers(data, call, argument, name, value):
    data[argument][7, 1] = value
    with pytest.raises(DataError, match=f"{name}` of sample 7 is not finite"):
        call(**data)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("label", [-1, C, -100])
def test_rejects_labels_out_of_range(data, name, label):
    data["y"][11] = label
    with pytest.raises(DataError, match=f"labels` of sample 11 is {label}: 3 logits need labels"):
        CALLS[name](**data)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_rejects_empty_data(data, call):
    with pytest.raises(DataError, match="features` has no rows"):
        call(**{key: value[:0] for key, value in data.items()})


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_rejects_single_class_head(data, call):
    data["z"] = data["z"][:, :1]
    with pytest.raises(ShapeError, match="fewer than two classes"):
        call(**data)


@pytest.mark.parametrize("name", ["self", "influence", "leave one out"])
def test_rejects_training_labels_of_one_class(data, name):
    data["y"][:] = 2
    with pytest.raises(DataError, match="`labels` are all 2"):
        CALLS[name](**data)
    with pytest.raises(DataError, match="`labels` are all 2"):
        kdfast.head_newton(data["x"], data["y"], l2=0.1)


def test_norms_accept_labels_of_one_class(data):
    data["y"][:] = 2
    assert (kdfast.head_grad_norms(data["z"], data["y"], data["x"]) > 0).all()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("x", lambda x: x[:-1], "shape"),
        ("x", lambda x: x[:, 0], "features` has shape"),
        ("x", lambda x: x.long(), "features` has dtype torch.int64: pass floating-point"),
        ("z", lambda z: z[:-1], "logits` has shape"),
        ("z", lambda z: z[0], "logits` has shape"),
        ("z", lambda z: z.int(), "logits` has dtype torch.int32: pass floating-point"),
        ("z", lambda z: z.to("meta"), "on meta"),
        ("z", lambda z: None, "logits"),
    ],
)
def test_rejects_wrong_shapes_dtypes_and_devices(data, call, argument, change, message):
    data[argument] = change(data[argument])
    with pytest.raises(ShapeError, match=message):
        call(**data)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y[:-1], "labels` has shape"),
        (lambda y: y[:, None], "labels` has shape"),
        (lambda y: y.float(), "labels` has dtype torch.float32: pass int64"),
        (lambda y: y.to("meta"), "labels` is on meta"),
        (lambda y: None, "`labels` is missing"),
        (lambda y: y.tolist(), "labels` has type list"),
    ],
)
def test_rejects_malformed_labels(data, name, change, message):
    data["y"] = change(data["y"])
    with pytest.raises(ShapeError, match=message):
        CALLS[name](**data)


@pytest.mark.parametrize(
    ("v", "kind", "message"),
    [
        (torch.ones(C, D), ShapeError, "D = 5 includes the bias"),
        (torch.ones(2, D + 1), ShapeError, "has shape"),
        (torch.ones(0, C, D + 1), ShapeError, "has shape"),
        (torch.ones(C, D + 1, dtype=torch.int64), ShapeError, "pass floating-point"),
        (torch.ones(C, D + 1, device="meta"), ShapeError, "on meta"),
        (torch.full((C, D + 1), float("nan")), DataError, "is not finite"),
    ],
)
def test_rejects_malformed_vectors(data, v, kind, message):
    with pytest.raises(kind, match=f"^`v` .*{message}"):
        kdfast.head_hvp(data["x"], data["z"], v)
    with pytest.raises(kind, match=f"^`b` .*{message}"):
        kdfast.head_solve(data["x"], data["z"], v, l2=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "`alpha` is -0.1"),
        ({"alpha": 1.5}, "`alpha` is 1.5"),
        ({"temperature": 0.0}, "`temperature` is 0"),
        ({"temperature": 1e-40}, "`temperature` is 1e-40"),
        ({"l2": -1.0}, "`l2` is -1"),
        ({"tile_rows": 0}, "`tile_rows` is 0"),
    ],
)
def test_rejects_options_out_of_range(data, options, message):
    with pytest.raises(ShapeError, match=message):
        kdfast.head_hvp(data["x"], data["z"], torch.ones(C, D + 1), **options)
    with pytest.raises(ShapeError, match=message):
        kdfast.head_grad_norms(data["z"], data["y"], data["x"], **options)


def test_rejects_bad_solver_options(data):
    with pytest.raises(ShapeError, match="`max_iterations` is 0"):
        kdfast.head_solve(data["x"], data["z"], torch.ones(C, D + 1), l2=0.1, method="cg", max_iterations=0)
    b = torch.ones(C, D + 1)
    for options, message in (({"tol": 0.0}, "`tol` is 0"), ({"method": "lu"}, "`method` is 'lu'")):
        with pytest.raises(ShapeError, match=message):
            kdfast.head_solve(data["x"], data["z"], b, l2=0.1, **options)
    with pytest.raises(ShapeError, match=r"`corrected` needs the Hessian as a matrix.*15 weights"):
        kdfast.head_self_influence(data["x"], data["z"], data["y"], l2=0.1, corrected=True, method="cg")
    for rows in (torch.tensor([N]), torch.tensor([-1])):
        with pytest.raises(IndexError, match=r"`rows` has an index outside \[0, 20\)"):
            kdfast.head_leave_one_out(data["x"], data["z"], data["y"], rows, l2=0.1)
    with pytest.raises(ShapeError, match=r"`rows` has dtype torch\.float32"):
        kdfast.head_leave_one_out(data["x"], data["z"], data["y"], torch.tensor([0.5]), l2=0.1)


def test_rejects_missing_teacher_and_bad_weights(data):
    with pytest.raises(ShapeError, match="`teacher` is missing"):
        kdfast.head_grad_norms(data["z"], data["y"], data["x"], alpha=0.5)
    with pytest.raises(ShapeError, match="`weights` is missing"):
        kdfast.head_grad_norms(data["z"], data["y"], data["x"], l2=0.5)
    with pytest.raises(ShapeError, match="`weights` has shape"):
        kdfast.head_grad_norms(data["z"], data["y"], data["x"], l2=0.5, weights=torch.ones(C, D))
    bad = torch.full((N, C), float("nan"))
    with pytest.raises(DataError, match="`teacher` of sample 0 is not finite"):
        kdfast.head_grad_norms(data["z"], data["y"], data["x"], alpha=0.5, teacher=bad)


def test_rejects_a_teacher_without_its_weight(data):
    x, z, y = data["x"], data["z"], data["y"]
    calls = (
        lambda **o: kdfast.head_grad_norms(z, y, x, **o),
        lambda **o: kdfast.head_self_influence(x, z, y, l2=0.1, **o),
        lambda **o: kdfast.head_influence(x, z, y, x, z, y, l2=0.1, **o),
        lambda **o: kdfast.head_leave_one_out(x, z, y, torch.tensor([0]), l2=0.1, **o),
        lambda **o: kdfast.head_newton(x, y, l2=0.1, **o),
    )
    for call in calls:
        with pytest.raises(ShapeError, match="`teacher` is given without `alpha`"):
            call(teacher=z.flip(0))
        assert torch.equal(call(teacher=z.flip(0), alpha=0.0), call())


def test_rejects_validation_data_of_another_head(data):
    with pytest.raises(ShapeError, match="`val_features` and `val_logits` have 5 features and 3 classes"):
        kdfast.head_influence(*data.values(), torch.ones(2, 5), torch.ones(2, 3), torch.tensor([0, 1]), l2=0.1)
    with pytest.raises(DataError, match="`val_labels` of sample 1 is 9"):
        kdfast.head_influence(*data.values(), torch.ones(2, D), torch.ones(2, C), torch.tensor([0, 9]), l2=0.1)


def test_rejects_malformed_blocks(data):
    x, z, y = data["x"], data["z"], data["y"]
    with pytest.raises(ShapeError, match="`features` are blocks, but `logits`"):
        kdfast.head_grad_norms(z, y, [(x, z, y)])
    with pytest.raises(ShapeError, match="a block of `features` is not a tuple"):
        kdfast.head_grad_norms(None, None, [x])
    with pytest.raises(DataError, match="features` has no rows"):
        kdfast.head_grad_norms(None, None, [])
    with pytest.raises(ShapeError, match=r"`features` has shape \(3, 2\)"):
        kdfast.head_grad_norms(None, None, [(x, z, y), (x[:3, :2], z[:3], y[:3])])
    with pytest.raises(DataError, match="an iterator, which can be read only once, but a solve reads"):
        kdfast.head_self_influence(iter([(x, z, y)]), None, None, l2=0.1)
    with pytest.raises(DataError, match="`labels` of sample 22 is 7"):
        kdfast.head_grad_norms(None, None, iter([(x, z, y), (x[:3], z[:3], torch.tensor([0, 1, 7]))]))
    with pytest.raises(DataError, match="`features` of sample 20 is not finite"):
        kdfast.head_grad_norms(None, None, iter([(x, z, y), (x[:1] * float("nan"), z[:1], y[:1])]))


def test_overflow_raises(data):
    with pytest.raises(DataError, match=r"the gradient norms overflow torch.float32"):
        kdfast.head_grad_norms(data["z"], data["y"], data["x"] * 1e30)
    with pytest.raises(DataError, match=r"products overflow torch\.float32"):
        kdfast.head_hvp(data["x"] * 1e30, data["z"], torch.randn(C, D + 1))


@pytest.mark.parametrize("scale", [1e30, 1e31])
def test_overflow_in_float64_of_float32_features_raises(data, scale):
    with pytest.raises(DataError, match=r"products overflow torch\.float64: scale the features down$"):
        kdfast.head_newton(data["x"] * scale, data["y"], l2=0.1, method="cg")


def test_overflow_of_returned_dtype_raises(data):
    x, z, y = data["x"], data["z"], data["y"]
    with pytest.raises(DataError, match=r"products overflow torch\.float16"):
        kdfast.head_hvp((x * 100).half(), z.half(), torch.full((C, D + 1), 1e4).half() * torch.randn(C, D + 1).half())
    with pytest.raises(DataError, match=r"effects of removals overflow torch\.float32"):
        kdfast.head_self_influence(x * 1e20, z * 1e6, y, l2=1e-3)
    with pytest.raises(DataError, match="`weights` is not finite"):
        kdfast.head_grad_norms(z, y, x, l2=0.1, weights=torch.full((C, D + 1), float("nan")))


def test_rejects_non_tensors(data):
    x, z, y = data["x"], data["z"], data["y"]
    with pytest.raises(ShapeError, match="`v` has type ndarray: pass a tensor"):
        kdfast.head_hvp(x, z, np.ones((C, D + 1)))
    with pytest.raises(ShapeError, match="`b` has type list: pass a tensor"):
        kdfast.head_solve(x, z, [1.0], l2=0.1)
    with pytest.raises(ShapeError, match="`rows` has type list: pass a tensor"):
        kdfast.head_leave_one_out(x, z, y, [1, 2], l2=0.1)
    with pytest.raises(ShapeError, match="`init` has type ndarray: pass a tensor"):
        kdfast.head_newton(x, y, l2=0.1, init=np.ones((C, D + 1)))
    with pytest.raises(ShapeError, match="`weights` has type ndarray: pass a tensor"):
        kdfast.head_grad_norms(z, y, x, l2=0.1, weights=np.ones((C, D + 1)))


@pytest.mark.parametrize(("rows", "message"), [(12, "has 12 rows, but had 20 before"), (25, "has over 20 rows")])
def test_rejects_blocks_that_change_between_passes(rows, message):
    class Changing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            n = N if self.passes < 3 else rows
            yield torch.randn(n, D), torch.randn(n, C), torch.arange(n) % C

    with pytest.raises(DataError, match=message):
        kdfast.head_self_influence(Changing(), None, None, l2=0.1)


def test_newton_rejects_bad_input(data):
    x, y = data["x"], data["y"]
    with pytest.raises(ShapeError, match=r"`init` has shape \(3, 4\): pass \(C, 5\)"):
        kdfast.head_newton(x, y, l2=0.1, init=torch.ones(C, D))
    with pytest.raises(DataError, match="`init` is not finite"):
        kdfast.head_newton(x, y, l2=0.1, init=torch.full((C, D + 1), float("nan")))
    with pytest.raises(ShapeError, match="`tol` is -1"):
        kdfast.head_newton(x, y, l2=0.1, tol=-1)
    with pytest.raises(SolveError, match=r"tol|rounding"):
        kdfast.head_newton(x, y, l2=0.1, tol=1e-300)
    with pytest.raises(DataError, match="`features` of sample 3 is not finite"):
        kdfast.head_newton(torch.where(torch.arange(N)[:, None] == 3, torch.inf, x), y, l2=0.1)
    with pytest.raises(DataError, match="`labels` of sample 5 is 2: 2 logits need labels"):
        kdfast.head_newton(x, y.index_fill(0, torch.arange(5), 0), l2=0.1, classes=2)
    with pytest.raises(DataError, match="do not determine the number of classes"):
        kdfast.head_newton(x, None, l2=0.1)
    with pytest.raises(ShapeError, match=r"`features` has shape \(20, 4\) and `weights` \(3, 6\)"):
        kdfast.head_logits(x, torch.ones(C, D + 2))


def test_accepts_read_only_and_big_endian_arrays(data):
    x = data["x"].numpy().astype(">f4")
    x.flags.writeable = False
    found = kdfast.head_grad_norms(data["z"].numpy(), np.asarray(data["y"], np.int32), x)
    torch.testing.assert_close(found, kdfast.head_grad_norms(data["z"], data["y"], data["x"]))
