"""How a command of several processes ends: one of them says why, and the others notice.

torchrun stops all processes when one has failed. Each of them would print a line, so they agree through torchrun's
store which one speaks: the first.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from datetime import timedelta

from kdfast.errors import Interrupted

_STORE_SECONDS = 5
_KEY = "kdfast/ended"


@functools.cache
def is_first_to_end() -> bool:
    """Return whether this process is the first of the command that ends with a message; the answer never changes.

    Where there is no store to ask, every process is.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    try:
        # Slow, and not needed by a single process; documented, though not exported to type checkers.
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=_STORE_SECONDS),
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return bool(store.add(f"{_KEY}/{attempt}", 1) == 1)
    except (KeyError, ValueError, RuntimeError):
        return True


@contextlib.contextmanager
def notice_lost_process() -> Iterator[None]:
    """Raise `Interrupted` in place of the error of a connection whose other end is gone."""
    try:
        yield
    except RuntimeError as error:
        if not is_connection_error(error):
            raise
        raise Interrupted("another process of this command has ended: run the same command again to resume") from error


def is_connection_error(error: BaseException) -> bool:
    """Return whether an error is that of a connection between processes."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
