"""The task with cached logits against timm's own one, whose teacher computes the same logits."""

import pytest
import torch

for package in ("torchvision", "timm"):
    # A torchvision built for another torch raises a RuntimeError.
    pytest.importorskip(package, exc_type=(ImportError, RuntimeError))
pytest.importorskip("timm.task", reason="needs a timm with tasks")

import timm  # noqa: E402
from timm.task import LogitDistillationTask  # noqa: E402

from kdfast.examples import timm_task  # noqa: E402


class Table(torch.nn.Module):
    """A teacher that returns the same logits for any images."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, _):
        return self.logits


def test_gradient_is_that_of_timm_with_a_teacher_at_hand():
    torch.manual_seed(0)
    student = timm.create_model("test_resnet", num_classes=10).eval()
    images, labels, rows = torch.randn(6, 3, 32, 32), torch.randint(10, (6,)), torch.tensor([4, 0, 19, 4, 7, 3])
    cache = torch.randn(20, 10)
    criterion = torch.nn.CrossEntropyLoss()
    live = LogitDistillationTask(student, Table(cache[rows]), criterion, task_loss_weight=0.3, temperature=4.0)
    cached = timm_task.CachedDistillationTask(student, cache, alpha=0.7, temperature=4.0)
    assert "teacher_logits" not in cached.state_dict()
    losses = [live(images, labels)["loss"], cached(images, torch.stack([labels, rows], 1))["loss"]]
    expected, found = (torch.autograd.grad(loss, list(student.parameters())) for loss in losses)
    torch.testing.assert_close(losses[1], losses[0])
    assert max(float(g.abs().max()) for g in expected) > 0.01
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_student_learns():
    result = timm_task.main(epochs=4)
    assert result.losses[-1] < 0.75 * result.losses[0]
    assert result.accuracy > 0.3
