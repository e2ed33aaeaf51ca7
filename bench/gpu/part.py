"""A part of the queue, and what its exit code means."""

from __future__ import annotations

from dataclasses import dataclass

SKIPPED = 77
"""Exit code of a part that cannot run on this machine; the last line of its output says why."""

AGAIN = 75
"""Exit code of a part that recorded why it had to stop, and can go on in a new process."""


@dataclass(frozen=True)
class Part:
    """One command of the queue.

    Attributes:
        name: Name in results.jsonl.
        seconds: Time limit.
        command: Arguments of the Python interpreter.
        sources: Files and folders that the results depend on, relative to the repository.
        always: Whether the part prepares the machine, so that it runs even where its results are known.
        wheels: Whether the part imports the packages of `$WHEELS`.
        finished: Exit codes after which the part need not run again.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    sources: tuple[str, ...] = ("kdfast", "csrc")
    always: bool = False
    wheels: bool = False
    finished: tuple[int, ...] = (0,)
