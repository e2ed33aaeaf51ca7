"""The student is tried on the batches of an epoch before a run starts."""

import numpy as np
import pytest
import torch
from torch import nn

from kdfast.data.source import ArraySplit, Source, default_view_spec
from kdfast.distillation.config import RunConfig
from kdfast.distillation.inputs import check_student
from kdfast.errors import UsageError
from kdfast.nets import NETS


def pooled(classes: int) -> nn.Module:
    """Normalizes one value per channel and sample, which needs two samples."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, classes)
    )


@pytest.fixture
def source() -> Source:
    split = ArraySplit(np.zeros((12, 8, 8, 3), np.uint8), np.arange(12) % 3, "images")
    return Source("DATA", "npz", ("a", "b", "c"), split, split, default_view_spec((8, 8, 3), flip=False))


@pytest.mark.parametrize(("samples", "batch_size"), [(12, 4), (10, 4), (12, 12), (9, 8), (13, 6)])
def test_a_last_batch_of_one_sample_is_refused_if_the_network_cannot_train_on_it(
    monkeypatch, source, samples, batch_size
):
    monkeypatch.setitem(NETS, "pooled", pooled)
    last = samples % batch_size or batch_size
    check_student(RunConfig("resnet8", batch_size=batch_size), samples, source)
    if last > 1:
        check_student(RunConfig("pooled", batch_size=batch_size), samples, source)
    else:
        with pytest.raises(UsageError, match=r"cannot train on one \(Expected more than 1 value.*other than"):
            check_student(RunConfig("pooled", batch_size=batch_size), samples, source)


def test_the_random_numbers_of_the_caller_do_not_depend_on_the_trial_batch(monkeypatch, source):
    def built(classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, classes))

    monkeypatch.setitem(NETS, "dropout", built)
    torch.manual_seed(0)
    built(3)
    expected = torch.rand(1)
    torch.manual_seed(0)
    check_student(RunConfig("dropout", batch_size=4), 12, source)
    assert torch.equal(torch.rand(1), expected)
