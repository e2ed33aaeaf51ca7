"""The registered loss against torchdistill's own one, whose ``alpha`` is the weight of the labels."""

import pytest
import torch

for package in ("torchvision", "torchdistill"):
    # A torchvision built for another torch raises a RuntimeError.
    pytest.importorskip(package, exc_type=(ImportError, RuntimeError))

from torchdistill.losses.registry import get_mid_level_loss  # noqa: E402

from kdfast.examples import torchdistill_loss as example  # noqa: E402


def test_loss_is_that_of_torchdistill():
    torch.manual_seed(0)
    logits, labels, teacher = torch.randn(6, 10, requires_grad=True), torch.randint(10, (6,)), torch.randn(6, 10)
    modules = {
        "student_module_path": "head", "student_module_io": "output",
        "teacher_module_path": ".", "teacher_module_io": "output",
    }  # fmt: skip
    both = []
    for key, alpha in (("KDLoss", 0.3), ("kdfast", 0.7)):
        loss = get_mid_level_loss({"key": key, "kwargs": {**modules, "alpha": alpha, "temperature": 4.0}})
        value = loss({"head": {"output": logits}}, {".": {"output": teacher}}, labels)
        both.append((value, *torch.autograd.grad(value, logits)))
    torch.testing.assert_close(both[1], both[0])


def test_configuration_trains_with_the_rows_of_each_sample():
    before = dict(example.CONFIG["optimizer"]["kwargs"])
    result = example.main(epochs=4)
    assert result.losses[-1] < 0.2 * result.losses[0]
    assert result.accuracy > 0.8
    assert example.CONFIG["optimizer"]["kwargs"] == before
