"""Damage to files for test_fuzz.py: bytes, places, fields of JSON, headers of .npy, members of archives."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdfast.files import write_sealed
from kdfast.nets import checkpoint
from kdfast.pruning.score_file import ScoreFile

TRAP = "executed"  # the folder that a pickle makes if an unsafe loader reads it
DEEP, DIGITS = "@deep@", "@digits@"  # stand for text that json.dumps cannot write

VALUES: list[Any] = [
    None, True, 0, -1, 2**63, 10**30, -0.5, 1e308, float("nan"), float("inf"), "", "x", "../../x", "/dev/zero", "\0",
    "\x1b[31m", "☃", "a" * 20_000, [], [[]], [1, "a", None], {}, {"a": None}, DEEP, DIGITS,
]  # fmt: skip
YAML = [
    b"", b"[]", b"{a: 1}", b"[[[[[[[[[[1]]]]]]]]]]", b"&a 1", b"*a", b"!!python/object:os.system x", b".nan", b".inf",
    b"-1", b"1e400", b"2026-13-45", b"yes", b"null", b'"\\0"', b'"\\ud800"', b"\xff", b"'", b"9" * 5000, b"0x1F",
    b"a: b: c", b"\t1", b"'a" + b"a" * 60_000 + b"'", b'"\\x1b[31m"',
]  # fmt: skip
HEADERS: dict[str, list[Any]] = {
    "descr": ["|O", "<f8", "<f4", ">i8", "<i4", "|b1", "<U9", "|V8", "<c16", "<M8[s]", "zz", 3, [("a", "<i8")], ""],
    "shape": [(), (0,), (1,), (-1,), (10**12,), (2**62, 4), (3, 0), (1,) * 40, (1.5,), "3", None],
    "fortran_order": [True, 1, None, "no"],
}


class Bomb:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (TRAP,)


def damage(root: Path, path: Path, rng: random.Random) -> str:
    """Damage a file below `root` in place and return what was done."""
    by_suffix = {
        ".json": [change_json] * 4,
        ".jsonl": [change_json] * 4,
        ".npy": [change_npy] * 3,
        ".npz": [change_archive] * 2 + [change_scores] * 2,
        ".pt": [change_archive, change_model, change_model],
        ".yaml": [change_yaml] * 3,
        ".png": [change_image] * 2,
        ".jpg": [change_image] * 2,
    }
    change = rng.choice([change_bytes, change_bytes, change_place, *by_suffix.get(path.suffix, [])])
    if change is change_place:
        return f"{path.relative_to(root)}: {change_place(root, path, rng)}"
    before = path.read_bytes()
    done, after = change(before, path, rng)
    path.write_bytes(after)
    if sealed := rng.random() < 0.5:
        seal_again(root, path, before)
    return f"{path.relative_to(root)}: {change.__name__}, {done}{', sealed again' * sealed}"


def change_place(root: Path, path: Path, rng: random.Random) -> str:
    """Put something else in the place of a file: nothing, a folder, a link, a pipe, or another file."""
    kind = rng.choice(["missing", "folder", "full folder", "dangling link", "link", "device", "pipe", "other file"])
    other = rng.choice(sorted(p for p in root.rglob("*") if p.is_file() and p != path and p.stat().st_size < 1 << 20))
    copy = other.read_bytes()
    path.unlink()
    if kind in ("folder", "full folder"):
        path.mkdir()
        if kind == "full folder":
            (path / "notes.txt").write_text("mine")
    elif kind in ("dangling link", "link", "device"):
        path.symlink_to({"dangling link": "nowhere", "link": other, "device": "/dev/full"}[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "other file":
        path.write_bytes(copy)
    return f"{kind}" + (f" {other.relative_to(root)}" if kind in ("link", "other file") else "")


def change_bytes(data: bytes, path: Path, rng: random.Random) -> tuple[str, bytes]:
    """Cut, flip, clear or repeat bytes."""
    content, kind = bytearray(data), rng.choice(["cut", "flip", "flips", "zeros", "empty", "longer", "twice", "block"])
    at = rng.randrange(len(data)) if data else 0
    if kind == "cut":
        del content[at:]
    elif kind in ("flip", "flips") and data:
        for _ in range(1 if kind == "flip" else 20):
            content[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif kind == "block":
        del content[at : at + rng.randrange(1, 100)]
    elif kind == "longer":
        content += rng.randbytes(50)
    else:
        content = bytearray() if kind == "empty" else content * 2
    return f"{kind} at {at}", bytes(content)


def change_json(data: bytes, path: Path, rng: random.Random) -> tuple[str, bytes]:
    """Change a field of a JSON file, or of a line of a .jsonl file."""
    if path.suffix == ".json":
        done, value = change_tree(json.loads(data), rng)
        return done, _to_json(value)
    lines = data.splitlines() or [b"{}"]
    number = rng.randrange(len(lines))
    kind = rng.choice(["field", "field", "field", "field", "twice", "binary", "no line end"])
    done = f"line {number}: {kind}"
    if kind == "field":
        done, value = change_tree(json.loads(lines[number]), rng)
        lines[number] = _to_json(value)
    elif kind == "twice":
        lines.insert(number, lines[number])
    elif kind == "binary":
        lines[number] = b"\xff\xfe" + lines[number]
    return done, b"\n".join(lines) + (b"" if kind == "no line end" else b"\n")


def change_yaml(data: bytes, path: Path, rng: random.Random) -> tuple[str, bytes]:
    """Change the value of an option in a configuration file, or its form."""
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    key = lines[number].split(b":")[0]
    value = rng.choice(YAML)
    lines[number] = rng.choice([key + b": " + value] * 5 + [value, key, b"? " + key, b"- " + key, value + b": 1"])
    return f"line {number}: {lines[number][:60]!r}", b"\n".join(lines) + b"\n"


def change_npy(data: bytes, path: Path, rng: random.Random) -> tuple[str, bytes]:
    """Change the header of an .npy file, or its values."""
    array = np.load(io.BytesIO(data))
    if rng.random() < 0.6:
        header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
        key = rng.choice(list(header))
        header[key] = rng.choice(HEADERS[key])
        if rng.random() < 0.1:
            del header[key]
        text = (rng.choice([repr(header)] * 9 + ["(" * 5000, "{", "[1]", "\0"]) + "\n").encode()
        size = rng.choice([len(text)] * 9 + [0, 65535])
        return f"header {header}", b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + text + array.tobytes()
    return change_array(array, rng)


def change_array(array: np.ndarray, rng: random.Random) -> tuple[str, bytes]:
    """Change values, the type or the shape of an array, and return it as an .npy file."""
    flat = array.reshape(-1).copy()
    kind = rng.choice(["nan", "huge", "negative", "float", "bool", "shorter", "longer", "deeper", "object", "none"])
    if kind in ("nan", "huge", "negative") and len(flat) and flat.dtype.kind in "biuf":
        value = {"nan": np.nan, "huge": 2.0**62, "negative": -3}[kind]
        flat = flat.astype(np.float64) if kind == "nan" and flat.dtype.kind not in "f" else flat
        with np.errstate(all="ignore"):
            flat[rng.randrange(len(flat))] = np.asarray(value).astype(flat.dtype)
    array = flat.reshape(array.shape)
    changed = {
        "float": lambda: array * 1.0,
        "bool": lambda: array != array[0],
        "shorter": lambda: array[:-1],
        "longer": lambda: np.concatenate([array, array]),
        "deeper": lambda: array[None],
        "object": lambda: np.array([Bomb()], dtype=object),
        "none": lambda: array[:0],
    }
    out = io.BytesIO()
    np.save(out, changed[kind]() if kind in changed and array.ndim else array, allow_pickle=True)
    return f"values: {kind}", out.getvalue()


def change_archive(data: bytes, path: Path, rng: random.Random) -> tuple[str, bytes]:
    """Change a member of a zip archive: an .npz file or a file of torch.save."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    kind = rng.choice(["content"] * 4 + ["gone", "renamed", "twice", "added", "pickle", "encrypted", "method", "large"])
    if kind == "content":
        change = change_npy if name.endswith(".npy") and members[name][:6] == b"\x93NUMPY" else change_bytes
        done, members[name] = change(members[name], path, rng)
        return f"{name}: {done}", _zip(members)
    if kind == "renamed":
        members[rng.choice(["../x", "/x", "", "x.npy", name + "x", "a/" + name])] = members.pop(name)
    elif kind == "pickle":
        members[name] = pickle.dumps(Bomb(), protocol=2)
    elif kind == "gone":
        del members[name]
    elif kind == "added":
        members["more.npy"] = b"more"
    packed = bytearray(_zip(members, again=name if kind == "twice" else None))
    if kind in ("encrypted", "method", "large"):
        # Offset of the field in a local and in a central header, and its bytes.
        local, central, field = {
            "encrypted": (6, 8, b"\x01"), "method": (8, 10, b"\x63"), "large": (22, 24, b"\xff\xff\xff\x7f"),
        }[kind]  # fmt: skip
        for start, offset in ((b"PK\3\4", local), (b"PK\1\2", central)):
            at = packed.find(start) + offset
            packed[at : at + len(field)] = field
    return f"{name}: {kind}", bytes(packed)


def change_scores(data: bytes, path: Path, rng: random.Random) -> tuple[str, bytes]:
    """Change the description in a score file."""
    with np.load(io.BytesIO(data)) as archive:
        arrays = dict(archive)
    if "about" not in arrays:
        return change_archive(data, path, rng)
    done, about = change_tree(json.loads(str(arrays["about"])), rng)
    out = io.BytesIO()
    np.savez(out, **{**arrays, "about": np.array(_to_json(about).decode())})
    return done, out.getvalue()


def change_model(data: bytes, path: Path, rng: random.Random) -> tuple[str, bytes]:
    """Change a field or a tensor of a file of torch.save."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    done, content = change_tree(content, rng)
    out = io.BytesIO()
    torch.save(content, out)
    return done, out.getvalue()


def change_image(data: bytes, path: Path, rng: random.Random) -> tuple[str, bytes]:
    """Store an image of another mode, size or format under the same name."""
    mode = rng.choice(["1", "L", "LA", "P", "RGBA", "I", "I;16", "F", "CMYK", "RGB"])
    side = rng.choice([8, 8, 8, 1, 9, 3000])
    form = {"CMYK": "TIFF", "F": "TIFF"}.get(
        mode, rng.choice(["PNG", "PNG", "TIFF", "BMP" if mode == "RGB" else "PNG"])
    )
    out = io.BytesIO()
    Image.new(mode, (side, 8)).save(out, form)
    return f"{form} {mode} {side} x 8", out.getvalue()


def change_tree(tree: Any, rng: random.Random) -> tuple[str, Any]:
    """Change a value somewhere in nested dicts and lists; return the change and the new tree."""
    places: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo:
        node = todo.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            todo.append(node[key])
    if not places or rng.random() < 0.04:
        return "the whole", rng.choice(VALUES)
    # Most values are deep in long lists or in the weights; half of the changes are near the top.
    node, key = rng.choice(places if rng.random() < 0.5 else places[: len(tree)])
    kind = rng.choice(["gone", "other", "other", "other", "near", "near", "renamed"])
    if kind == "gone":
        del node[key]
    elif kind == "renamed" and isinstance(node, dict):
        node[rng.choice(["☃", "", "../x", "a" * 5000])] = node.pop(key)
    else:
        node[key] = _near(node[key], rng) if kind == "near" else rng.choice(VALUES)
        kind += f" {node[key]!r}"
    return f"{str(key)[:40]}: {kind[:80]}", tree


def _near(value: Any, rng: random.Random) -> Any:
    """Return another value of the same type."""
    if isinstance(value, torch.Tensor):
        changes: list[Callable[[], Any]] = [
            lambda: value.double(), lambda: value.long(), lambda: value.reshape(-1)[:1], lambda: value[None],
            lambda: value * float("nan"), lambda: value * 0, lambda: value.to("meta"), lambda: value.to_sparse(),
            lambda: value.expand(2, *value.shape),
        ]  # fmt: skip
        return rng.choice(changes)()
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return rng.choice([value + 1, value - 1, -value - 1, value * 1000 + 7, value + 0.5, str(value)])
    if isinstance(value, str):
        return rng.choice([value[:-1], value + "x", value.upper(), value[::-1], value + "\n", value * 2])
    if isinstance(value, list):
        return rng.choice([value[:-1], value + value, value[::-1], [*value, None], [value]])
    return rng.choice([{**value, "more": 1}, [value], dict(list(value.items())[:-1])])


def seal_again(root: Path, path: Path, before: bytes) -> None:
    """Make the digests of a changed file right, where that is possible, so that checks of its content are reached."""
    with contextlib.suppress(Exception):  # a damaged file cannot be read
        if path.suffix == ".json":
            fields = json.loads(path.read_bytes())
            if fields.pop("sha256_of_the_rest", None) is not None:
                write_sealed(path, fields)
        elif path.suffix == ".pt":
            content = torch.load(path, weights_only=True)
            if "digest" in content:
                content["digest"] = checkpoint.digest_of(content["state_dict"])
                content["seal"] = checkpoint._seal(content)
                torch.save(content, path)
        elif path.suffix == ".npz":
            with np.load(path) as archive:
                arrays = dict(archive)
            about = json.loads(str(arrays["about"]))
            facts = (about[key] for key in ("method", "data"))
            content = ScoreFile(arrays["scores"], *facts, parameters=about["parameters"], sources=about["sources"])
            text = np.array(json.dumps({**about, "digest": content.digest}))
            np.savez(path, **{**arrays, "about": text})
    old, new = (hashlib.sha256(content).hexdigest().encode() for content in (before, path.read_bytes()))
    for other in root.rglob("*.json"):
        if old in (content := other.read_bytes()):
            other.write_bytes(content.replace(old, new))


def copy_tree(source: Path, target: Path, names: list[str]) -> None:
    """Copy some entries of a folder, with their times."""
    target.mkdir()
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, symlinks=True)
        else:
            shutil.copy2(source / name, target / name)


def _to_json(value: Any) -> bytes:
    text = json.dumps(value)
    deep, digits = "[" * 100_000 + "]" * 100_000, "7" * 5000
    return text.replace(f'"{DEEP}"', deep).replace(f'"{DIGITS}"', digits).encode()


def _zip(members: dict[str, bytes], again: str | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
        if again is not None:
            archive.writestr(zipfile.ZipInfo(again), b"again")
    return out.getvalue()
