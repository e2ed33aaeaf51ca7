"""kdfast: knowledge distillation on pruned data. The public names, imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "cache": "kdfast.api.teacher",
    "distill": "kdfast.api.training",
    "evaluate": "kdfast.api.teacher",
    "from_datasets": "kdfast.data.readers.datasets",
    "from_labels": "kdfast.data.readers.bare_labels",
    "load_teacher": "kdfast.api.teacher",
    "Monitoring": "kdfast.distillation.train",
    "open_data": "kdfast.api.data",
    "prune": "kdfast.api.selection",
    "score": "kdfast.api.selection",
    "write_scores": "kdfast.pruning.score_file",
    "write_subset": "kdfast.data.subset",
    "Dynamics": "kdfast.dynamics.reader",
    "DynamicsRecorder": "kdfast.dynamics.recorder",
    "fisher_diagonal": "kdfast.ops.grad_norms",
    "grad_dots": "kdfast.ops.grad_norms",
    "grad_norms": "kdfast.ops.grad_norms",
    "kd_loss": "kdfast.ops.kd_loss",
    "kd_loss_terms": "kdfast.ops.kd_loss",
    "KDLoss": "kdfast.ops.kd_loss",
    "TopKTeacher": "kdfast.ops.kd_loss",
    "head_grad_norms": "kdfast.ops.softmax_head",
    "head_hvp": "kdfast.ops.softmax_head",
    "head_influence": "kdfast.ops.softmax_head",
    "head_leave_one_out": "kdfast.ops.softmax_head",
    "head_logits": "kdfast.ops.softmax_head",
    "head_newton": "kdfast.ops.softmax_head",
    "head_self_influence": "kdfast.ops.softmax_head",
    "head_solve": "kdfast.ops.softmax_head",
    "NetworkCurvature": "kdfast.ops.network_curvature",
    "network_hvp": "kdfast.ops.network_curvature",
    "register_grad_norms": "kdfast.ops.grad_norms",
    "teacher_outputs": "kdfast.teacher.writing.outputs",
    "topk_teacher": "kdfast.ops.kd_loss",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        found = globals()[name] = getattr(importlib.import_module(_PUBLIC[name]), name)
        return found
    raise AttributeError(f"module 'kdfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
