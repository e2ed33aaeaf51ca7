"""Rates of this machine: the seconds of each unit of the work of a plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Seconds of a unit of each kind of work; 0 for work that a plan does not have.

    Attributes:
        opening: Opening the data in a command.
        digested: An image that is read for the fingerprint of the data; 0 if that is remembered.
        summed: An image that is read for the mean and standard deviation of the pixels; likewise.
        loading: An image that is decoded before a training.
        cached: A sample in a cache of one view.
        view: A further view of it.
        teacher_tested: A test image, through the teacher.
        trained: An image of a training step.
        initial: An image of a step in which some terms train alone.
        tested: A test image, through the student.
        recorded: A sample in an epoch of recorded training.
        flattened: A step of flattening.
        fisher: A sample of a Fisher.
        scored: A sample of a score that differentiates the network.
        selection: The selection, of all samples.
        written: A byte, as it is written to the disk.
    """

    opening: float = 0.0
    digested: float = 0.0
    summed: float = 0.0
    loading: float = 0.0
    cached: float = 0.0
    view: float = 0.0
    teacher_tested: float = 0.0
    trained: float = 0.0
    initial: float = 0.0
    tested: float = 0.0
    recorded: float = 0.0
    flattened: float = 0.0
    fisher: float = 0.0
    scored: float = 0.0
    selection: float = 0.0
    written: float = 0.0
