"""The loss from hidden states and the weights of the last layer: ``kd_loss`` without the logits of all rows."""

from kdfast.ops.kd_loss.linear.api import LinearTeacher, linear_kd_loss

__all__ = ["LinearTeacher", "linear_kd_loss"]
