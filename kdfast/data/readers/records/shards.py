"""Webdataset shards: .tar files in which the files of one sample share the name up to the first dot.

The images are read at their places in the archive, so nothing is unpacked.
"""

from __future__ import annotations

import functools
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdfast.data.readers.datasets import LABEL_KEYS
from kdfast.data.readers.folders.image_file import Encoded, is_image_name
from kdfast.data.readers.folders.image_split import ImageSplit
from kdfast.data.readers.folders.layout import TEST_NAMES, TRAIN_NAMES
from kdfast.data.readers.labels import find_classes, read_class_names
from kdfast.data.readers.records.splits import find_splits, named
from kdfast.data.readers.split import SplitRule, train_and_test
from kdfast.data.source import Source, default_view_spec
from kdfast.errors import DataError
from kdfast.files.inputs import MAX_IMAGE_BYTES, open_regular

_MAX_LABEL_BYTES = 1 << 16
_LABEL_ENDS = ("cls", "label", "cls.txt", "label.txt")
_WANTED = f"an image and its class (.{', .'.join(_LABEL_ENDS)}, or .json with {', '.join(LABEL_KEYS)})"

Place = tuple[str, str, int, int]  # archive, name, offset and size in bytes


def is_shards(path: Path) -> bool:
    """Return whether `path` is a .tar file, or a folder of such files."""
    return bool(find_splits(path, ".tar"))


def open_shards(path: Path, size: int | None, split: SplitRule | None = None) -> Source:
    """Open webdataset shards.

    Labels are whole numbers or names. A `classnames.txt` or `classes.txt` beside the shards names the classes.

    Args:
        path: A .tar file, or a folder of such files, named by split or in folders named by split.
        size: See `kdfast.data.readers.folders.folder.open_folder`.
        split: How to take the test split from the training images, where there is none.

    Returns:
        The source, samples in the order of the shards and of their content. Views below 64 pixels do not flip.

    Raises:
        DataError: A shard is damaged or compressed, no sample has an image and a class, or a label is no class.
        UsageError: `split` is given, and there is a test split.
    """
    files = find_splits(path, ".tar")
    names = named(files, TRAIN_NAMES)
    if not names:
        raise DataError(f"{path} has shards of {', '.join(files)}, none of train: add the training images")
    images, texts, notes = _index(files[names[0]])
    classes = find_classes(texts, read_class_names(path if path.is_dir() else path.parent), str(path))
    train = ImageSplit(_Images(images), classes.numbers(texts, str(path)), size, files[names[0]])
    test = None
    for name in named(files, TEST_NAMES)[:1]:
        places, found, more = _index(files[name])
        numbers = classes.numbers(found, f"{path} ({name})")
        test, notes = ImageSplit(_Images(places), numbers, size, files[name]), notes + more
    looked_for = f"shards or folders named {', '.join(TEST_NAMES)}"
    first, second, decided = train_and_test(train, test, split, str(path), looked_for)
    views = default_view_spec(train.shape, flip=False)
    return Source(str(path), "shards", classes.names, first, second, views, notes=notes + decided)


class _Images(Sequence[Encoded]):
    """Images at their places in archives."""

    def __init__(self, places: list[Place]) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        archive, name, _, _ = place = self._places[index]
        return Encoded(f"{archive} ({name})", functools.partial(_read, place, MAX_IMAGE_BYTES))


def _index(archives: list[str]) -> tuple[list[Place], list[str], tuple[str, ...]]:
    """Return the places of the images, the texts of their classes, and notes on what was skipped."""
    images, texts, skipped = [], [], 0
    for archive in archives:
        samples: dict[str, dict[str, Place]] = {}
        for name, offset, size in _members(archive):
            folder, base = os.path.split(name)
            stem, _, end = base.partition(".")
            if not stem:  # hidden, such as `._0.jpg`
                continue
            sample = samples.setdefault(os.path.join(folder, stem), {})
            if end.lower() in sample:
                raise DataError(f"{archive} holds {name} twice: write it again")
            sample[end.lower()] = (archive, name, offset, size)
        for sample in samples.values():
            image = next((place for end, place in sample.items() if is_image_name("." + end)), None)
            text = _text_of_class(sample)
            if image is None or text is None:
                skipped += 1
                continue
            images.append(image)
            texts.append(text)
    if not images:
        raise DataError(f"{archives[0]} has no sample with {_WANTED}: write the shards as webdataset does")
    note = f"{os.path.dirname(archives[0])}: skipped {skipped} sample{'s' * (skipped > 1)} without {_WANTED}"
    return images, texts, (note,) if skipped else ()


def _members(archive: str) -> list[tuple[str, int, int]]:
    """Return name, offset and size of the files in an archive."""
    try:
        with open_regular(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            found = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
            end = os.fstat(stream.fileno()).st_size
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        raise DataError(
            f"{archive} is damaged or a compressed archive ({error}): download or write it again"
        ) from error
    if found and max(offset + size for _, offset, size in found) > end:
        raise DataError(f"{archive} ends within a file: download or write it again")
    return found


def _text_of_class(sample: dict[str, Place]) -> str | None:
    place = next((sample[end] for end in _LABEL_ENDS if end in sample), None)
    try:
        if place is not None:
            return os.fsdecode(_read(place, _MAX_LABEL_BYTES)).strip() or None
        if "json" not in sample:
            return None
        fields = json.loads(_read(sample["json"], _MAX_LABEL_BYTES))
        found = [fields[key] for key in LABEL_KEYS if key in fields] if isinstance(fields, dict) else []
    except (OSError, ValueError) as error:
        raise DataError(f"{(place or sample['json'])[0]}: cannot read the class of a sample ({error})") from error
    return str(found[0]) if len(found) == 1 else None


def _read(place: Place, limit: int) -> bytes:
    archive, _, offset, size = place
    if size > limit:
        raise OSError(f"it has {size} bytes, the limit is {limit}")
    with open_regular(archive) as file:
        file.seek(offset)
        return file.read(size)
