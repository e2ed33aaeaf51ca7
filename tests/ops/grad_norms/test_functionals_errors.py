"""Arguments that do not fit metric norms, Fisher diagonal and dot products; and half precision."""

import pytest
import torch
from torch import nn

import kdfast
from kdfast.errors import DataError, ShapeError, UsageError

N, CLASSES = 5, 4


def metric_for(model):
    return {name: torch.rand_like(p).detach() + 0.1 for name, p in model.named_parameters()}


def vectors_for(model):
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


def small():
    return nn.Linear(3, CLASSES), torch.randn(N, 3), torch.randint(0, CLASSES, (N,))


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast):
    model, x, y = small()
    metric, vectors = metric_for(model), vectors_for(model)
    expected = [
        kdfast.grad_norms(model, x, y, metric=metric),
        kdfast.grad_dots(model, x, y, vectors),
        kdfast.fisher_diagonal(model, [(x, y)])["weight"],
    ]
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = [
            kdfast.grad_norms(model, x, y, metric=metric),
            kdfast.grad_dots(model, x, y, vectors),
            kdfast.fisher_diagonal(model, [(x, y)])["weight"],
        ]
    assert [value.dtype for value in found] == [torch.float32, torch.float32, torch.float64]
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=0.03, atol=0.03 * float(exact.abs().max()))


BAD = [
    (lambda v: {"weight": v["weight"]}, UsageError, "has no entry for parameter 'bias': pass a tensor of shape"),
    (lambda v: {**v, "other": v["bias"]}, UsageError, "has an entry for 'other', which is no trainable parameter"),
    (lambda v: {**v, "bias": v["bias"][:2]}, ShapeError, r"\['bias'\]` has shape \(2,\): the parameter has \(4,\)"),
    (lambda v: {**v, "bias": v["bias"].long()}, UsageError, r"\['bias'\]` is of dtype torch.int64"),
    (lambda v: {**v, "bias": 1.0}, UsageError, r"\['bias'\]` is a float: pass a floating-point tensor"),
    (lambda v: {**v, "bias": v["bias"].to("meta")}, UsageError, r"\['bias'\]` is on meta"),
    (lambda v: list(v.values()), UsageError, "is a list: pass a dict of parameter names and tensors"),
    (lambda v: {**v, "bias": v["bias"] * float("nan")}, DataError, r"\['bias'\]` has "),
    (lambda v: {**v, "bias": v["bias"] * float("inf")}, DataError, r"\['bias'\]` has "),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_rejects_metrics_and_vectors_that_do_not_fit(change, error, message):
    model, x, y = small()
    with pytest.raises(error, match=f"`metric.*{message}"):
        kdfast.grad_norms(model, x, y, metric=change(metric_for(model)))
    with pytest.raises(error, match=f"`vectors.*{message}"):
        kdfast.grad_dots(model, x, y, change(vectors_for(model)))


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_rejects_metrics_that_are_not_positive(value):
    model, x, y = small()
    metric = metric_for(model)
    metric["weight"][2, 1] = value
    with pytest.raises(DataError, match=rf"`metric\['weight'\]` has the entry {value:g}: must be finite and positive"):
        kdfast.grad_norms(model, x, y, metric=metric)


@pytest.mark.parametrize("method", ["gram", "pixel"])
def test_rejects_algorithms_without_elements(method):
    model, x, y = small()
    with pytest.raises(UsageError, match=f"`method` is '{method}': a `metric` needs 'auto' or 'direct'"):
        kdfast.grad_norms(model, x, y, metric=metric_for(model), method=method)


def test_rejects_batches_that_do_not_fit():
    model, x, y = small()
    with pytest.raises(UsageError, match="`batches` is empty"):
        kdfast.fisher_diagonal(model, [])
    with pytest.raises(UsageError, match="`batches` yields a Tensor: yield pairs"):
        kdfast.fisher_diagonal(model, x)
    with pytest.raises(UsageError, match="`fallback` is 'skip'"):
        kdfast.fisher_diagonal(model, [(x, y)], fallback="skip")
    with pytest.raises(UsageError, match="`fallback` is 'skip'"):
        kdfast.grad_dots(model, x, y, vectors_for(model), fallback="skip")
    with pytest.raises(DataError, match="parameter 'weight' overflows"):
        kdfast.fisher_diagonal(model, [(x * 1e25, y)], loss=lambda out, t: out.sum(1))


def test_result_that_overflows_by_the_metric_or_the_vectors():
    model, x, y = small()
    with pytest.raises(DataError, match=r"sample 0 .* overflows: .* tiny entries of a metric"):
        kdfast.grad_norms(model, x, y, metric={k: v.double() * 1e-300 for k, v in metric_for(model).items()})
    with pytest.raises(DataError, match=r"sample \d .* overflows: .* huge ones of a vector"):
        kdfast.grad_dots(model, x * 1e9, y, {k: v * 1e37 for k, v in vectors_for(model).items()})
