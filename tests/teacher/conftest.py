import numpy as np
import pytest
import torch

from kdfast.data.source import ArraySplit, Source
from kdfast.data.views import Normalization, ViewSpec
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model

COUNT, CLASSES = 60, 4


def make_source(seed=0, views=None, count=COUNT):
    draw = np.random.default_rng(seed)

    def split(size, name):
        images = draw.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8)
        return ArraySplit(images, np.arange(size) % CLASSES, name)

    names = tuple(map(str, range(CLASSES)))
    spec = views or ViewSpec(kind="shift", size=(8, 8), pad=1, flip=False)
    return Source("random pixels", "datasets", names, split(count, "train"), split(20, "test"), spec)


def make_teacher(seed=0, scale=20.0):
    """Make an untrained network with large logits and batch norm statistics that are not the identity."""
    torch.manual_seed(seed)
    net = build_net("resnet8", CLASSES)
    net.train()
    with torch.no_grad():
        net(torch.rand(32, 3, 8, 8))
        net.fc.weight *= scale
    norm = Normalization((0.5, 0.4, 0.6), (0.25, 0.2, 0.3))
    return Model(net.eval(), "resnet8", CLASSES, tuple("0123"), norm)


@pytest.fixture(scope="session")
def source():
    return make_source()


@pytest.fixture(scope="session")
def teacher():
    return make_teacher()


@pytest.fixture(scope="session")
def new_source():
    return make_source


@pytest.fixture(scope="session")
def new_teacher():
    return make_teacher
