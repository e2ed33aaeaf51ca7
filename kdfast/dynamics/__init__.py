"""Training dynamics: record a network's per-sample outputs after each epoch, and read them."""

from kdfast.dynamics.reader import Dynamics
from kdfast.dynamics.recorder import DynamicsRecorder

__all__ = ["Dynamics", "DynamicsRecorder"]
