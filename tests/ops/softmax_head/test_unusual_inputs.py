"""Any input gives the result of the plain tensors or an error of kdfast, in every function and argument."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

import kdfast
from kdfast.errors import DataError, KdfastError, ShapeError

N, D, C = 24, 3, 3
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(C, D + 1))
PLAIN = {
    "features": RNG.normal(size=(N, D)),
    "logits": RNG.normal(size=(N, C)),
    "labels": np.arange(N) % C,
    "val_features": RNG.normal(size=(7, D)),
    "val_logits": RNG.normal(size=(7, C)),
    "val_labels": np.arange(7) % C,
    "teacher": RNG.normal(size=(N, C)),
}
TENSORS = {"v": VECTORS, "b": VECTORS, "rows": np.array([0, 3]), "weights": VECTORS}
VALIDATION = ("val_features", "val_logits", "val_labels")
ROWS = ("features", "logits", "labels")
# Function, arrays that it takes, tensors that it takes, and options.
CALLS = {
    "norms": (kdfast.head_grad_norms, ROWS, (), {}),
    "hvp": (kdfast.head_hvp, ("features", "logits"), ("v",), {}),
    "solve": (kdfast.head_solve, ("features", "logits"), ("b",), {"l2": 0.1}),
    "cg": (kdfast.head_solve, ("features", "logits"), ("b",), {"l2": 0.1, "method": "cg"}),
    "newton": (kdfast.head_newton, ("features", "labels"), (), {"l2": 0.1}),
    "newton cg": (kdfast.head_newton, ("features", "labels"), (), {"l2": 0.1, "method": "cg"}),
    "distilled": (kdfast.head_newton, ("features", "labels", "teacher"), (), {"l2": 0.1, "alpha": 0.5}),
    "influence": (kdfast.head_influence, (*ROWS, *VALIDATION), (), {"l2": 0.1, "method": "cg"}),
    "self": (kdfast.head_self_influence, ROWS, (), {"l2": 0.1}),
    "leave one out": (kdfast.head_leave_one_out, ROWS, ("rows",), {"l2": 0.1}),
    "logits": (kdfast.head_logits, (), ("features", "weights"), {}),
}
SITES = [(call, name) for call, (_, arrays, tensors, _) in CALLS.items() for name in (*arrays, *tensors)]


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


# The same numbers, stored in another way.
STORED = {
    "negative strides": lambda x: x[::-1].copy()[::-1],
    "negative strides of columns": lambda x: x[..., ::-1].copy()[..., ::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "read-only": read_only,
    "Fortran order": np.asfortranarray,
    "every second row": lambda x: x.repeat(2, axis=0)[::2],
}
# Numbers that a function may accept or refuse.
CHANGED = {
    "list": lambda x: x.tolist(),
    "None": lambda x: None,
    "number": lambda x: 3,
    "text": lambda x: "abc",
    "float16": lambda x: x.astype(np.float16),
    "longdouble": lambda x: x.astype(np.longdouble),
    "complex": lambda x: x.astype(complex),
    "bool": lambda x: x > 0,
    "objects": lambda x: x.astype(object),
    "strings": lambda x: x.astype(str),
    "dates": lambda x: x.astype("datetime64[s]"),
    "uint16": lambda x: x.astype(np.uint16),
    "uint64": lambda x: x.astype(np.int64).astype(np.uint64),
    "masked": np.ma.masked_array,
    "empty": lambda x: x[:0],
    "no columns": lambda x: x[..., :0],
    "0-d": lambda x: np.array(1.0),
    "3-d": lambda x: x[None],
    "one row less": lambda x: x[:-1],
    "NaN": lambda x: np.where(x == x.max(), np.nan, x),
    "infinite": lambda x: np.where(x == x.max(), np.inf, x),
    "huge": lambda x: x * 1e200,
    "large integers": lambda x: (x * 1e12).astype(np.int64),
    "negative": lambda x: -x - 1,
    "bfloat16": lambda x: torch.tensor(x).bfloat16(),
    "float8": lambda x: torch.tensor(x).to(torch.float8_e4m3fn),
    "sparse": lambda x: torch.tensor(x).to_sparse(),
    "meta": lambda x: torch.tensor(x).to("meta"),
    "0-d tensor": lambda x: torch.tensor(1.0),
}


def run(call: str, changed: dict | None = None) -> torch.Tensor:
    function, arrays, tensors, options = CALLS[call]
    given = {name: PLAIN[name] for name in arrays}
    given |= {name: torch.from_numpy({**PLAIN, **TENSORS}[name]) for name in tensors}
    return function(**{**given, **options, **(changed or {})})


@pytest.mark.parametrize(("call", "name"), SITES)
def test_storage_does_not_matter(call: str, name: str) -> None:
    plain = {**PLAIN, **TENSORS}[name]
    is_tensor, expected = name in CALLS[call][2], run(call)
    for how, change in STORED.items():
        given = change(plain)
        assert np.array_equal(given, plain)
        if is_tensor:
            with pytest.raises(ShapeError, match=f"`{name}` has type ndarray: pass a tensor"):
                run(call, {name: given})
        else:
            torch.testing.assert_close(run(call, {name: given}), expected, msg=how)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("call", "name"), SITES)
def test_other_values_give_a_result_or_an_error_of_kdfast(call: str, name: str) -> None:
    plain = {**PLAIN, **TENSORS}[name]
    refused = []
    for how, change in CHANGED.items():
        # IndexError is documented for `rows`.
        with contextlib.suppress(IndexError) if name == "rows" else contextlib.nullcontext():
            try:
                found = run(call, {name: change(plain)})
            except KdfastError as error:
                refused.append(str(error))
            else:
                assert isinstance(found, torch.Tensor), how
    assert len(refused) > 10


def test_features_of_any_float_dtype_are_combined_with_logits_of_any() -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    x, z, y = (torch.from_numpy(PLAIN[name]) for name in ROWS)
    for features in dtypes:
        for logits in dtypes:
            blocks = [(x.to(features)[part], z.to(logits)[part], y[part]) for part in (slice(9), slice(9, N))]
            found = kdfast.head_newton(blocks, None, l2=0.1)
            torch.testing.assert_close(found, kdfast.head_newton(x.to(features).double(), y, l2=0.1))
            effects = kdfast.head_self_influence(x.to(features), z.to(logits), y, l2=0.1)
            expected = kdfast.head_self_influence(x.to(features).double(), z.to(logits).double(), y, l2=0.1)
            torch.testing.assert_close(effects.double(), expected, rtol=1e-4, atol=1e-7)


def test_features_whose_products_overflow_are_named() -> None:
    for method in ("cg", "cholesky"):
        with pytest.raises(DataError, match="scale the features down"):
            kdfast.head_newton(PLAIN["features"] * 1e200, PLAIN["labels"], l2=0.1, method=method)


def test_labels_that_would_make_too_large_a_head_are_named() -> None:
    labels = PLAIN["labels"].copy()
    labels[3] = 10**15
    with pytest.raises(DataError, match="correct the largest of `labels`"):
        kdfast.head_newton(PLAIN["features"], labels, l2=0.1)
