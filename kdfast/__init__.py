"""kdfast: knowledge distillation on pruned data. The public names, imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from kdfast.api.data import open_data as open_data  # noqa: I001 - several names in a line
    from kdfast.api.selection import prune as prune, score as score
    from kdfast.api.teacher import cache as cache, evaluate as evaluate, load_teacher as load_teacher
    from kdfast.api.training import distill as distill
    from kdfast.data.readers.bare_labels import from_labels as from_labels
    from kdfast.data.readers.datasets import from_datasets as from_datasets
    from kdfast.data.subset import write_subset as write_subset
    from kdfast.distillation.train import Monitoring as Monitoring
    from kdfast.dynamics.reader import Dynamics as Dynamics
    from kdfast.dynamics.recorder import DynamicsRecorder as DynamicsRecorder
    from kdfast.ops.grad_norms import (
        fisher_diagonal as fisher_diagonal,
        grad_dots as grad_dots,
        grad_norms as grad_norms,
        register_grad_norms as register_grad_norms,
    )
    from kdfast.ops.kd_loss import (
        KDLoss as KDLoss,
        TopKTeacher as TopKTeacher,
        kd_loss as kd_loss,
        kd_loss_terms as kd_loss_terms,
        topk_teacher as topk_teacher,
    )
    from kdfast.ops.kd_loss.linear import LinearTeacher as LinearTeacher, linear_kd_loss as linear_kd_loss
    from kdfast.ops.network_curvature import NetworkCurvature as NetworkCurvature, network_hvp as network_hvp
    from kdfast.ops.softmax_head import (
        head_grad_norms as head_grad_norms,
        head_hvp as head_hvp,
        head_influence as head_influence,
        head_leave_one_out as head_leave_one_out,
        head_logits as head_logits,
        head_newton as head_newton,
        head_self_influence as head_self_influence,
        head_solve as head_solve,
    )
    from kdfast.pruning.score_file import write_scores as write_scores
    from kdfast.pruning.token_scores import token_scores as token_scores
    from kdfast.teacher.tokens.importing import token_outputs as token_outputs
    from kdfast.teacher.tokens.read import TokenTeacher as TokenTeacher
    from kdfast.teacher.tokens.write import TokenWriter as TokenWriter
    from kdfast.teacher.writing.outputs import teacher_outputs as teacher_outputs

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
    "linear_kd_loss": "kdfast.ops.kd_loss.linear",
    "LinearTeacher": "kdfast.ops.kd_loss.linear",
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
    "token_outputs": "kdfast.teacher.tokens.importing",
    "token_scores": "kdfast.pruning.token_scores",
    "TokenTeacher": "kdfast.teacher.tokens.read",
    "TokenWriter": "kdfast.teacher.tokens.write",
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
