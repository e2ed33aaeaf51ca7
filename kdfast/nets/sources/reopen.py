"""Choose the network of a checkpoint, and run no code for it that the user has not named."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdfast.errors import CheckpointError, UsageError
from kdfast.nets.sources.own_code import Code, CodeError, find_code, named_specs
from kdfast.nets.sources.spec import NetSpec, parse_spec


def choose_spec(
    path: str | os.PathLike[str], recorded: str, code: Mapping[str, Any] | None, given: str | None
) -> NetSpec:
    """Return the network to build for a checkpoint.

    Args:
        path: The checkpoint, for messages.
        recorded: The network's name in it.
        code: File and digest of the network's code in it, if it has any.
        given: The name that the user gives the network; None if not for this checkpoint.

    Raises:
        CheckpointError: The checkpoint holds another network than the given one.
        CodeError: Its code was not named in this process, or its file or folder is not there.
    """
    try:
        held = parse_spec(recorded)
    except UsageError as error:
        raise CheckpointError(f"{path} holds a network that cannot be built: {error}") from error
    named = named_specs() if given is None else [parse_spec(given)]
    if not held.runs_own_code and held.kind != "hf":
        if given is not None and str(named[0]) != str(held):
            raise CheckpointError(f"{path} holds {held}, not {named[0]}: set `net` to {held}")
        return held
    place = Code(**code) if code is not None else None
    if held.kind == "hf" and given is None and (Path(held.member).expanduser() / "config.json").is_file():
        return held  # a configuration runs no code of its folder
    found = _choose_named([spec for spec in named if _is_same(held, spec, place)], place)
    if found is None and given is not None and held.runs_own_code and named[0].runs_own_code:
        found = named[0] if named[0].member == held.member else None  # moved to a file of another name
    if found is None:
        raise CodeError(_refusal(path, held, place, given))
    if found.arguments and given is not None and found.arguments != held.arguments:
        raise CheckpointError(f"{path} holds {held}, not {found}: omit the arguments, or pass those of the file")
    return NetSpec(found.kind, found.place, found.member, held.arguments)


def describe_place(spec: NetSpec, code: Code | None) -> str:
    """Return a network's name without arguments, with the absolute path of its file or folder."""
    if code is None or (spec.kind == "module" and not _is_script(spec)):
        return spec.target
    return f"hf:{Path(code.file).parent}" if spec.kind == "hf" else f"{code.file}:{spec.member}"


def _is_script(spec: NetSpec) -> bool:
    """Return whether the network's class is in a program that was run, which is a file to every other program."""
    return spec.place == "__main__"


def _is_same(held: NetSpec, named: NetSpec, code: Code | None) -> bool:
    """Return whether the named network is the held one, possibly in a file or folder that was moved."""
    if _is_script(held) and code is not None and named.kind == "file":
        return held.member == named.member and Path(code.file).name == Path(named.place).name
    if held.kind != named.kind:
        return False
    if held.kind == "hf":
        return Path(held.member).name == Path(named.member).name or _same_config(named, code)
    if held.member != named.member:
        return False
    return held.place == named.place or (held.kind == "file" and Path(held.place).name == Path(named.place).name)


def _choose_named(named: Sequence[NetSpec], code: Code | None) -> NetSpec | None:
    """Return the one with the code of the checkpoint, or else the latest: files of one name may hold other networks."""
    if len(named) > 1 and code is not None:
        return next((spec for spec in named if _same_code(spec, code)), named[0])
    return named[0] if named else None


def _same_code(named: NetSpec, code: Code) -> bool:
    try:
        other = find_code(named)
    except CodeError:  # its file is not there any more
        return False
    return other is not None and other.sha256 == code.sha256


def _same_config(named: NetSpec, code: Code | None) -> bool:
    other = find_code(named)
    return code is not None and other is not None and other.sha256 == code.sha256


def _refusal(path: str | os.PathLike[str], held: NetSpec, code: Code | None, given: str | None) -> str:
    where = describe_place(held, code)
    if given is not None:
        return f"{path} holds {where}, not {given}: name the network that it holds"
    if held.kind == "hf":
        return f"{path} holds {held}, whose folder is not there: pass the folder's new place as `teacher_net` hf:FOLDER"
    is_module = held.kind == "module" and not _is_script(held)
    there = code is None or is_module or Path(code.file).is_file()
    moved = "" if there else f"; {code.file if code else ''} is not there any more, so pass the file's new place"
    return (
        f"{path} holds the network {where}, code of your own, which a checkpoint runs only where you name it: pass "
        f"`teacher_net` {where}{moved}"
    )


def identify(text: str) -> dict[str, str]:
    """Return what identifies the network of a run: its name as `student`, and the digest of its own code or config.

    The name of a file or folder stands without the path to it, which may change.

    Raises:
        UsageError: There is no such code.
    """
    spec = parse_spec(text)
    code = find_code(spec)
    if code is None:
        return {"student": text}
    member = Path(spec.member).name if spec.kind == "hf" else spec.member
    place = Path(spec.place).name if spec.kind == "file" else spec.place
    return {"student": str(NetSpec(spec.kind, place, member, spec.arguments)), "student_code": code.sha256}
