"""kd_loss as a loss of torchdistill's configurations, with cached logits as the teacher.

    python -m kdfast.examples.torchdistill_loss

Needs ``torchdistill`` and the ``torchvision`` for the installed torch. Importing this module registers three keys: the
loss "kdfast", which computes both of its terms and takes the place of "KDLoss" with any teacher; the data set wrapper
"kdfast_rows", which passes on each sample's index; and "kdfast_cached", which calls a teacher with the indices instead
of the images. The teacher then is a table of logits, ``torch.nn.Embedding.from_pretrained(logits)``.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.utils.data import RandomSampler, TensorDataset
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.interfaces.registry import register_forward_proc_func
from torchdistill.datasets.registry import register_dataset_wrapper
from torchdistill.datasets.wrapper import BaseDatasetWrapper
from torchdistill.losses.registry import register_mid_level_loss

import kdfast
from kdfast.examples._digits import accuracy, cached_logits, digits, mlp

__all__ = ["CONFIG", "KdfastLoss", "Result", "Rows", "call_cached", "main"]


class Result(NamedTuple):
    """Mean loss of each epoch, and the share of test images classified correctly."""

    losses: list[float]
    accuracy: float


@register_mid_level_loss(key="kdfast")
class KdfastLoss(nn.Module):
    """``kdfast.kd_loss`` of the logits of two modules.

    Args:
        student_module_path: The student's module with the logits; "." is the student.
        teacher_module_path: The teacher's.
        student_module_io: "output", or "input" for the logits that the module receives.
        teacher_module_io: The same for the teacher's.
        **options: As in ``kdfast.KDLoss``; ``alpha`` is the weight of the teacher.
    """

    def __init__(
        self,
        student_module_path: str = ".",
        teacher_module_path: str = ".",
        student_module_io: str = "output",
        teacher_module_io: str = "output",
        **options: Any,
    ) -> None:
        super().__init__()
        self.student, self.teacher = (student_module_path, student_module_io), (teacher_module_path, teacher_module_io)
        self.loss = kdfast.KDLoss(**options)

    def forward(self, student_io_dict: Any, teacher_io_dict: Any, targets: Any = None, **_: Any) -> Tensor:
        """Return the loss of what hooks have recorded of both models, and of the labels."""
        (path, io), (teacher_path, teacher_io) = self.student, self.teacher
        loss: Tensor = self.loss(student_io_dict[path][io], targets, teacher_io_dict[teacher_path][teacher_io])
        return loss


@register_dataset_wrapper(key="kdfast_rows")
class Rows(BaseDatasetWrapper):
    """Adds each sample's index."""

    def __getitem__(self, index: int) -> tuple[Any, Any, dict[str, Any]]:
        """Return a sample, its label and its index."""
        sample, target, extra = super().__getitem__(index)
        return sample, target, {**extra, "index": index}


@register_forward_proc_func(key="kdfast_cached")
def call_cached(model: nn.Module, images: Any, targets: Any = None, supp_dict: Any = None, **_: Any) -> Tensor:
    """Return the rows of a table of logits."""
    rows: Tensor = model(supp_dict["index"])
    return rows


CONFIG: dict[str, Any] = {
    "num_epochs": 5,
    "train_data_loader": {
        "dataset_id": "digits/train",
        "dataset_wrapper": {"key": "kdfast_rows"},
        "sampler": {"class_or_func": RandomSampler},
        "kwargs": {"batch_size": 32},
    },
    "teacher": {"forward_proc": "kdfast_cached", "requires_grad": False},
    "student": {"forward_proc": "forward_batch_only"},
    "optimizer": {"key": "AdamW", "kwargs": {"lr": 5e-3}},
    "criterion": {
        "key": "WeightedSumLoss",
        "kwargs": {
            "sub_terms": {
                "kd": {"criterion": {"key": "kdfast", "kwargs": {"alpha": 0.9, "temperature": 4.0}}, "weight": 1.0}
            }
        },
    },
}
"""What a file of torchdistill holds under "train"."""


def main(epochs: int = 5) -> Result:
    """Distill a small network on the digits.

    Args:
        epochs: Passes over the training samples.

    Returns:
        Losses and accuracy.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = digits()
    teacher = nn.Embedding.from_pretrained(cached_logits(data).float()).to(device)
    torch.manual_seed(0)
    student = mlp(32).to(device)
    config = {**copy.deepcopy(CONFIG), "num_epochs": epochs}  # a box changes its configuration
    box = get_distillation_box(
        teacher, student, {"digits/train": TensorDataset(data.x, data.y)}, config, device, None, distributed=False,
        lr_factor=1,
    )  # fmt: skip
    losses = []
    for epoch in range(epochs):
        box.pre_epoch_process(epoch=epoch)
        total = 0.0
        for x, y, extra in box.train_data_loader:
            box.pre_forward_process()
            moved = {key: value.to(device) for key, value in extra.items()}
            loss = box.forward_process(x.to(device), y.to(device), moved)
            box.post_forward_process(loss=loss)
            total += loss.item() * len(x)
        box.post_epoch_process()
        losses.append(total / len(data.x))
    result = Result(losses, accuracy(student, data.test_x.to(device), data.test_y.to(device)))
    print(result)
    return result


if __name__ == "__main__":
    typer.run(main)
