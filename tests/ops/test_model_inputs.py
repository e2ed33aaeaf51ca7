"""Inputs of models in every container, and their samples."""

import pytest
import torch
from torch import nn

from kdfast.errors import ShapeError, UsageError
from kdfast.ops.model_inputs import (
    batched_tensors,
    count_samples,
    iter_tensors,
    select_samples,
    unchanged_buffers,
    unwrap,
)

X, MASK = torch.arange(12.0).view(2, 3, 2), torch.eye(3)
CONTAINERS = {"tensor": X, "tuple": (X, MASK, 1.5), "list": [X, MASK], "dict": {"x": X, "mask": MASK, "scale": 1.5}}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_samples_of_every_container(kind):
    inputs = CONTAINERS[kind]
    assert next(iter_tensors(inputs))[1] is X
    assert count_samples(inputs, None, 0) == 2
    assert count_samples(inputs, torch.zeros(3), 1) == 3
    found = select_samples(inputs, 3, [2, 0], dim=1, first_only=True)
    picked = found if kind == "tensor" else found["x"] if kind == "dict" else found[0]
    assert torch.equal(picked, X[:, [2, 0]])
    if kind != "tensor":
        assert batched_tensors(inputs, 3, 1)[0] == (["x", "mask"] if kind == "dict" else [0, 1])
        assert (found["mask"] if kind == "dict" else found[1]) is MASK


@pytest.mark.parametrize(
    ("labels", "dim", "message"),
    [
        (torch.zeros(3), 0, r"3 entries, and `inputs` of shape \(2, 3, 2\) has 2 .*: pass `batch_dim`=1"),
        (torch.zeros(5), 0, r"5 entries.* one label per sample"),
        (torch.zeros(5), 3, r"`inputs` has shape \(2, 3, 2\), without dimension 3"),
    ],
)
def test_rejects_other_numbers_of_samples(labels, dim, message):
    with pytest.raises(ShapeError, match=message):
        count_samples(X, labels, dim)


def test_wrappers_are_looked_through():
    model = nn.Linear(2, 3)
    assert unwrap(model) is model
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(torch.compile(model, backend="eager")) is model


def test_buffers_are_restored_even_after_an_error():
    model = nn.BatchNorm1d(2).train()
    before = {name: (x, x.clone()) for name, x in model.named_buffers()}

    def run():
        with unchanged_buffers(model):
            model(torch.randn(4, 2))
            model.running_mean = torch.ones(2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    for name, x in model.named_buffers():
        assert x is before[name][0]
        assert torch.equal(x, before[name][1])


def test_rejects_buffers_that_change_in_eval_mode():
    model = nn.BatchNorm1d(2).eval()
    with (
        pytest.raises(UsageError, match="buffer 'running_mean' is changed by a layer in eval mode"),
        unchanged_buffers(model),
    ):
        model.running_mean.add_(1)
