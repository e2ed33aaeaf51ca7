"""Averages of teachers: the weights, and the statistics of batch norms."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from kdfast.data.order import epoch_order
from kdfast.data.source import Source
from kdfast.data.views import Normalization, apply_views, draw_view_indices
from kdfast.errors import CheckpointError, UsageError
from kdfast.nets import average as module
from kdfast.nets.average import average_teachers
from kdfast.nets.checkpoint import Model


def batches(source, model, seed, size, count):
    """Yield the network inputs of the pass, as the docstring describes them."""
    ids = epoch_order(np.arange(len(source.train)), seed, 0)[: size * count]
    views = draw_view_indices(seed, 0, ids, source.view_spec.count)
    for i in range(0, len(ids), size):
        part = slice(i, i + size)
        images, chosen = torch.from_numpy(source.train.read(ids[part])), torch.from_numpy(views[part])
        yield apply_views(images, chosen, source.view_spec, model.normalization, sample_ids=ids[part])


@pytest.fixture
def teachers(new_teacher):
    return [new_teacher(seed) for seed in (0, 1, 2)]


@pytest.mark.parametrize(("size", "count"), [(256, 1), (20, 3), (25, 2)])
def test_weights_are_means_and_statistics_those_of_a_pass(teachers, source, monkeypatch, size, count):
    monkeypatch.setattr(module, "_BATCH_SIZE", size)
    before = [x.digest for x in teachers]
    found = average_teachers(teachers, source, seed=3)
    assert [x.digest for x in teachers] == before
    expected = copy.deepcopy(teachers[0].net)
    for name, parameter in expected.named_parameters():
        values = [dict(x.net.named_parameters())[name].double() for x in teachers]
        parameter.data = torch.stack(values).mean(0).float()
    torch.optim.swa_utils.update_bn(batches(source, teachers[0], 3, size, count), expected)
    state = found.net.state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(state[name], value, msg=name)
    about = found.metadata["averaged"]
    assert (about["teachers"], about["samples"]) == (before, min(60, size * count))
    norms = [x for x in found.net.modules() if isinstance(x, nn.BatchNorm2d)]
    assert all(not x.training and x.momentum == 0.1 for x in norms)


def test_one_teacher_keeps_its_weights(teacher, source):
    found = average_teachers([teacher], source)
    own, new = teacher.net.state_dict(), found.net.state_dict()
    changed = {name.rsplit(".")[-1] for name in own if not torch.equal(own[name], new[name])}
    assert changed == {"running_mean", "running_var"}


def test_the_seed_determines_the_statistics(teachers, source):
    digests = [average_teachers(teachers, source, seed=seed).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_dropout_acts_as_in_evaluation(source):
    def model(p):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(p), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
        return Model(net, "own", 4, tuple("0123"), Normalization((0.5,) * 3, (0.25,) * 3))

    assert average_teachers([model(0.9)], source).digest == average_teachers([model(0.0)], source).digest


def test_networks_without_batch_norms_need_no_pass(source):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    model = Model(net, "own", 4, tuple("0123"), Normalization((0.5,) * 3, (0.25,) * 3))
    steps = []
    found = average_teachers([model], source, progress=lambda *step: steps.append(step))
    assert (found.digest, found.metadata["averaged"]["samples"], steps) == (model.digest, 0, [])


def test_classes_of_another_order_are_brought_into_that_of_the_data(teachers, source):
    names = ("d", "c", "b", "a")
    for model in teachers:
        model.class_names = names
    renamed = Source(source.path, source.kind, names[::-1], source.train, source.test, source.view_spec)
    digest = teachers[0].digest
    with pytest.warns(UserWarning, match="order"):
        found = average_teachers(teachers, renamed)
    assert found.class_names == names[::-1]
    weights = torch.stack([x.net.fc.weight for x in teachers]).mean(0)
    torch.testing.assert_close(found.net.fc.weight, weights.flip(0))
    assert (teachers[0].digest, teachers[0].class_names) == (digest, names)


def test_refuses_teachers_that_differ_in_more_than_their_weights(teachers, source):
    with pytest.raises(UsageError, match="pass at least one model"):
        average_teachers([], source)
    changes = {
        "architecture": {"name": "resnet20"},
        "classes": {"class_names": tuple("abcd")},
        "normalization": {"normalization": Normalization((0.5,) * 3, (0.25,) * 3)},
    }
    for what, change in changes.items():
        other = copy.copy(teachers[1])
        vars(other).update(change)
        with pytest.raises(CheckpointError, match=f"differ in their {what}: average networks of one"):
            average_teachers([teachers[0], other], source)
