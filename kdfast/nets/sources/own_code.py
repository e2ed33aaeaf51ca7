"""Networks from a user's own code: a class or function of a file, or of an importable module.

Importing a file runs it. A user who names code wants that; a checkpoint that names code must not bring it about. So
every name that is built is remembered, and a checkpoint is only opened with code that was named in this process.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from kdfast.errors import UsageError, did_you_mean
from kdfast.nets.sources.spec import NetSpec, parse_spec

# Names of the parameter that takes the number of classes, in the order of preference.
_CLASSES = ("num_classes", "classes", "n_classes", "nclasses", "num_class", "class_num", "num_labels", "n_class")
_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_ONLY)

_NAMED: dict[str, NetSpec] = {}  # in the order of their latest mention
_MODULES: dict[str, ModuleType] = {}  # by the digest of the file and its path
_LOADED: dict[str, Code] = {}  # by the path of the file: what was run, even if the file has changed since


class CodeError(UsageError):
    """The code of a network cannot be imported, or does not build a network."""


@dataclass(frozen=True)
class Code:
    """The file that holds a network's code, or its configuration.

    Attributes:
        file: Absolute path.
        sha256: Digest of its bytes, hexadecimal.
    """

    file: str
    sha256: str


def name_code(text: str) -> None:
    """Allow checkpoints that hold this network to run its code, as building it does.

    Raises:
        UsageError: The text names no code of the user, so there is nothing to allow.
    """
    spec = parse_spec(text)
    if not spec.runs_own_code and spec.kind != "hf":
        raise UsageError(
            f"`teacher_net` is {text!r}, which is no code of your own: omit it, a checkpoint says itself which such "
            "network it holds"
        )
    remember(spec)


def remember(spec: NetSpec) -> None:
    """Count the code of a network as named by the user."""
    _NAMED.pop(str(spec), None)
    _NAMED[str(spec)] = spec


def named_specs() -> list[NetSpec]:
    """Return the networks that were named in this process, the latest first."""
    return list(reversed(_NAMED.values()))


def build_own_net(spec: NetSpec, classes: int) -> nn.Module:
    """Import the code of a network and build it.

    Args:
        spec: A file or module with a class or function.
        classes: Passed as the parameter of a usual name such as `num_classes`, or else as the first parameter without a
            default; a class or function without either is called without it.

    Raises:
        CodeError: The code cannot be imported, has no such member, or does not return a network.
    """
    remember(spec)
    module = _import_file(spec) if spec.kind == "file" else _import_module(spec)
    factory = getattr(module, spec.member, None)
    if factory is None:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise CodeError(
            f"{spec.place} has no {spec.member!r}: {did_you_mean(spec.member, names)}choose one of its names"
        )
    if isinstance(factory, nn.Module) or not callable(factory):
        raise CodeError(
            f"{spec.target} is a {type(factory).__name__}: name a class or a function that returns a network"
        )
    try:
        net = _call(factory, classes, spec.arguments)
    except (Exception, SystemExit) as error:  # any code may run in it
        raise CodeError(
            f"{spec} cannot be built for {classes} classes ({_describe(error)}): mend it, or pass its arguments with "
            "`net_arg`"
        ) from error
    if not isinstance(net, nn.Module):
        raise CodeError(f"{spec.target} returns a {type(net).__name__}, not an nn.Module: return the network")
    return net


def find_code(spec: NetSpec) -> Code | None:
    """Return the file of a network's own code and its digest; None for the networks of kdfast and of libraries.

    Raises:
        CodeError: The file is not there.
    """
    if spec.kind == "file":
        loaded = _LOADED.get(str(Path(spec.place).expanduser().resolve()))
        return _code_of(_existing(spec)) if loaded is None else loaded
    if spec.kind == "hf":
        config = Path(spec.member) / "config.json"
        return _code_of(config) if config.is_file() else None
    if spec.kind == "module":
        source = getattr(_import_module(spec), "__file__", None)
        return _code_of(Path(source)) if source and Path(source).is_file() else None
    return None


def _code_of(file: Path) -> Code:
    return Code(str(file.resolve()), hashlib.sha256(file.read_bytes()).hexdigest())


def _call(factory: Callable[..., Any], classes: int, arguments: Mapping[str, Any]) -> Any:
    if any(name in arguments for name in _CLASSES):
        return factory(**arguments)
    try:
        parameters = [p for p in inspect.signature(factory).parameters.values() if p.name not in arguments]
    except (TypeError, ValueError):  # a builtin without a signature
        return factory(classes, **arguments)
    names = [p.name for p in parameters if p.kind in _KINDS and p.kind is not p.POSITIONAL_ONLY]
    for name in _CLASSES:
        if name in names:
            return factory(**{name: classes}, **arguments)
    if any(p.default is p.empty and p.kind in _KINDS for p in parameters):
        return factory(classes, **arguments)
    return factory(**arguments)


def _existing(spec: NetSpec) -> Path:
    file = Path(spec.place).expanduser()
    if not file.is_file():
        raise CodeError(
            f"{spec.target}: there is no file {spec.place}: pass the path of the file that has {spec.member}"
        )
    return file


def _import_file(spec: NetSpec) -> ModuleType:
    """Run a file, once for each content of it, with the modules beside it importable; write no bytecode."""
    file = _existing(spec).resolve()
    source = file.read_bytes()
    code = Code(str(file), hashlib.sha256(source).hexdigest())
    key = f"{code.sha256}-{file}"
    if key not in _MODULES:
        _MODULES[key] = _run_file(spec, file, source, f"_kdfast_net_{code.sha256[:16]}")
    _LOADED[str(file)] = code
    return _MODULES[key]


def _run_file(spec: NetSpec, file: Path, source: bytes, name: str) -> ModuleType:
    module, folder = ModuleType(name), str(file.parent)
    module.__file__ = str(file)
    _forget_namesakes(file.parent)
    before = list(sys.path)
    sys.path.insert(0, folder)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(source, file, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # any code may run in it
        del sys.modules[name]
        raise _not_importable(spec, error) from error
    finally:
        # For imports inside functions, it stays behind everything installed.
        sys.path[:] = before if folder in before else [*before, folder]
    return module


def _forget_namesakes(folder: Path) -> None:
    """Forget modules beside other files of the user with names of modules beside this one, which would hide them."""
    others = {Path(file).parent for file in _LOADED} - {folder}
    for top in {name.partition(".")[0] for name in sys.modules}:
        if not (folder / f"{top}.py").is_file() and not (folder / top).is_dir():
            continue
        if _folder_of(sys.modules.get(top)) in others:
            for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
                del sys.modules[name]


def _folder_of(module: ModuleType | None) -> Path | None:
    """Return the folder that has a module's file, or a package's folder."""
    places = list(getattr(module, "__path__", ())) or [getattr(module, "__file__", None)]
    return Path(places[0]).resolve().parent if places[0] else None


def _import_module(spec: NetSpec) -> ModuleType:
    """Import a module, also from the current folder."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(spec.place)
    except ModuleNotFoundError as error:
        if error.name is not None and (spec.place == error.name or spec.place.startswith(f"{error.name}.")):
            raise CodeError(
                f"no network is named {spec.target!r}, and there is no module {spec.place}: install its package, run "
                "kdfast in the folder that has it, or pass a name of kdfast, torchvision:NAME, timm:NAME, hf:FOLDER or "
                "FILE.py:NAME"
            ) from error
        raise _not_importable(spec, error) from error
    except (Exception, SystemExit) as error:  # any code may run in it
        raise _not_importable(spec, error) from error


def _not_importable(spec: NetSpec, error: BaseException) -> CodeError:
    return CodeError(f"{spec.place} cannot be imported ({_describe(error)}): mend it, or install what it needs")


def _describe(error: BaseException) -> str:
    text = (str(error).strip() or "no message").splitlines()[0][:200]
    return f"{type(error).__name__}: {text}"
