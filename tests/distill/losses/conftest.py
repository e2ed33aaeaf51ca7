"""Random outputs of two networks of different width and size, in float64."""

import pytest
import torch

from kdfast.distillation.losses.base import Outputs, TapShapes

BATCH, CLASSES = 5, 7
STUDENT = {
    "stem": (4, 8, 8), "stage1": (4, 8, 8), "stage2": (6, 4, 4), "stage3": (8, 2, 2),
    "preactivation1": (4, 8, 8), "preactivation2": (6, 4, 4), "preactivation3": (8, 2, 2), "pooled": (8,),
}  # fmt: skip
TEACHER = {
    "stem": (4, 8, 8), "stage1": (5, 8, 8), "stage2": (8, 4, 4), "stage3": (10, 4, 4),
    "preactivation1": (5, 8, 8), "preactivation2": (8, 4, 4), "preactivation3": (10, 4, 4), "pooled": (10,),
}  # fmt: skip


def draw_outputs(shapes, seed, batch=BATCH, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.requires_grad_(requires_grad)

    taps = {name: draw(batch, *shape) for name, shape in shapes.items()}
    return Outputs(2 * draw(batch, CLASSES), taps)


@pytest.fixture
def student():
    return draw_outputs(STUDENT, 0)


@pytest.fixture
def teacher():
    return draw_outputs(TEACHER, 1)


@pytest.fixture
def same_width_teacher():
    return draw_outputs(STUDENT, 2)


@pytest.fixture
def labels():
    return torch.randint(CLASSES, (BATCH,), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def shapes():
    return TapShapes(STUDENT, TEACHER)
