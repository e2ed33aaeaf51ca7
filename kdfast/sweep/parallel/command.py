"""What workers on other machines find of the command that started them: its folder, its locks and its runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import kdfast
from kdfast.errors import OutputError, UsageError
from kdfast.files import open_own, sha256_json
from kdfast.sweep.results_log import ResultsLog

_ADVICE = "use a folder of a file system that all machines share and whose locks they all see, such as NFS 4"


@dataclass(frozen=True)
class Command:
    """What determines that a worker does what the command would do itself.

    Attributes:
        folder: The current folder of the command, which relative paths start from.
        import_path: Where the command imports modules from.
        log: The log of the rows.
        token: 64 hexadecimal digits: a key that the command has claimed, and the name of a file that it has locked.
        versions: Versions of kdfast and of torch.
        keys: Digest of the keys of all runs.
    """

    folder: str
    import_path: tuple[str, ...]
    log: ResultsLog
    token: str
    versions: tuple[str, str]
    keys: str

    def enter(self) -> None:
        """Make this process, on whatever machine, read and write the files of the command.

        Raises:
            OutputError: This machine has no such folder, or another one at the same path.
            UsageError: It has another version of kdfast or torch.
        """
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise OutputError(f"{_host()} has no folder {self.folder} ({error.strerror}): {_ADVICE}") from error
        sys.path.extend(path for path in self.import_path if path not in sys.path)
        if self.versions != (found := _versions()):
            raise UsageError(
                f"{_host()} has kdfast {found[0]} with torch {found[1]}, and the command has {self.versions[0]} with "
                f"{self.versions[1]}: install the same versions"
            )
        self._look()

    def check_keys(self, keys: Iterable[str]) -> None:
        """Check that the worker has the runs of the command.

        Raises:
            UsageError: It has others, because it read other data or settings.
        """
        if _digest(keys) != self.keys:
            raise UsageError(
                f"the runs of {_host()} differ from those of the command: give all machines the same data at the same "
                "path"
            )

    def _look(self) -> None:
        """Check that this is the command's folder, and report to it if its locks do not hold here.

        A lock that is free may also be that of a command that was killed, so the command is the judge.
        """
        try:
            descriptor = os.open(_path(self.log, self.token), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise OutputError(f"{_host()} has another folder at {self.log.folder.absolute()}: {_ADVICE}") from error
        except OSError as error:
            raise OutputError(f"{_host()} cannot write to {self.log.folder}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
            except BlockingIOError:
                free = False
            with self.log.claim(self.token) as claimed:
                if free or claimed:
                    os.pwrite(descriptor, _host().encode(), 0)
        except OSError as error:
            raise OutputError(
                f"{_host()} cannot lock files in {self.log.folder} ({error.strerror}): {_ADVICE}"
            ) from error
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def running_command(log: ResultsLog, keys: Iterable[str]) -> Iterator[Command]:
    """Hold a lock of every kind in the folder of the rows while workers run on other machines.

    Args:
        log: The log of the rows; its folder exists.
        keys: Keys of the runs.

    Raises:
        OutputError: The folder cannot be written.
    """
    token = secrets.token_hex(32)
    path = _path(log, token)
    descriptor = open_own(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with log.claim(token):
            yield Command(os.getcwd(), tuple(sys.path), log, token, _versions(), _digest(keys))
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink()


def check_locks(command: Command) -> None:
    """Check, while the command runs, that no worker has found its locks free.

    Raises:
        OutputError: One has.
    """
    host = _path(command.log, command.token).read_bytes().decode(errors="replace")
    if host:
        raise OutputError(f"{host} does not see the locks of {_host()} in {command.log.folder.absolute()}: {_ADVICE}")


def _path(log: ResultsLog, token: str) -> Path:
    return log.folder / f".command-{token[:16]}"


def _versions() -> tuple[str, str]:
    return kdfast.__version__, torch.__version__


def _digest(keys: Iterable[str]) -> str:
    return sha256_json({"keys": sorted(keys)})


def _host() -> str:
    return socket.gethostname()
