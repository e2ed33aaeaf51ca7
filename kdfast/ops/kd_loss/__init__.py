"""Knowledge-distillation loss against cached teacher logits: one operator with CPU, GPU and reference backends."""

from kdfast.ops.kd_loss.api import KDLoss, TopKTeacher, kd_loss, kd_loss_terms, topk_teacher

__all__ = ["KDLoss", "TopKTeacher", "kd_loss", "kd_loss_terms", "topk_teacher"]
