"""Fine-tune a trained teacher on a held-out part of the training split towards a flat minimum of its loss."""

from __future__ import annotations

from kdfast.teacher.flatten.config import FlattenConfig
from kdfast.teacher.flatten.flatten import describe_flattening, flatten_teacher, is_flattened_from
from kdfast.teacher.flatten.perturbations import SHARPNESS

__all__ = ["SHARPNESS", "FlattenConfig", "describe_flattening", "flatten_teacher", "is_flattened_from"]
