"""Training dynamics: per-sample outputs of a network, recorded after each epoch, and their reader."""

from kdfast.dynamics.reader import Dynamics
from kdfast.dynamics.recorder import DynamicsRecorder

__all__ = ["Dynamics", "DynamicsRecorder"]
