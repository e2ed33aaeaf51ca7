"""Sources in a folder of `train.beton` and `test.beton`, and the conversion of any source to one.

Beside the two files, `data.json` records what was written, see `kdfast.data.ffcv.record`. During a conversion it lists
no files, and the folder cannot be opened.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.data.ffcv.read import BetonSplit, load_ffcv
from kdfast.data.ffcv.record import (
    CHECKED,
    PARTS,
    RECORD,
    UNSEALED,
    check_files,
    file_marks,
    has_record,
    read_record,
    seal_older,
    write_record,
)
from kdfast.data.readers.folders.layout import TEST_NAMES, TRAIN_NAMES, find_folders
from kdfast.data.source import DataDigest, Pixels, Source, Split, default_view_spec, id_blocks, infer_class_names
from kdfast.data.views import ViewSpec
from kdfast.errors import DataError, OutputError, UsageError
from kdfast.files import FolderLock, atomic_path, check_writable, delete_own, sha256_file, visible_entries
from kdfast.progress import Progress

_MIN_PAGE = 8 << 20
# JPEG of this quality changes the mean color by a few gray levels; a missing image differs far more.
_MIN_QUALITY = 50
_MEAN_TOLERANCE = 16.0


def is_ffcv_folder(path: Path) -> bool:
    """Return whether `path` is a folder with one of the two .beton files or the record of a conversion."""
    if not path.is_dir():
        return False
    if any((path / f"{part}.beton").is_file() for part in PARTS):
        return True
    return has_record(path)


def open_ffcv_folder(path: Path) -> Source:
    """Open a folder of `train.beton` and `test.beton`.

    In a folder without `data.json`, which other tools wrote, the classes are named `0`, `1`, ... and views below 64
    pixels do not flip.

    Raises:
        BackendUnavailable: FFCV is not installed.
        DataError: A file is missing, damaged or changed, or the conversion was interrupted.
    """
    record = read_record(path)
    if record is not None and not record["files"]:
        raise DataError(f"the conversion to {path} was interrupted: run the same kdfast data convert again")
    missing = [f"{part}.beton" for part in PARTS if not (path / f"{part}.beton").is_file()]
    if missing:
        raise DataError(f"{path} lacks {' and '.join(missing)}: run kdfast data convert again")
    train, test = (BetonSplit(path / f"{part}.beton") for part in PARTS)
    if record is None:
        classes = infer_class_names(train.labels, str(path))
        spec = default_view_spec(train.shape, flip=False)
        flips = "" if spec.flip else ", and views do not flip"
        note = f"{path} has no {RECORD}: its files are not verified, its classes are numbers{flips}"
        return Source(str(path), "beton", classes, train, test, spec, notes=(note,))
    if record["format"] == UNSEALED:
        record = seal_older(path, record, train)
    else:
        check_files(path, record)
    return Source(
        path=str(path),
        kind="beton",
        classes=tuple(record["classes"]),
        train=train,
        test=test,
        # The files hold images, not views, which are those of the current version.
        view_spec=ViewSpec.from_dict({**record["views"], "version": 0}),
        recorded=record["fingerprint"],
    )


def convert(
    source: Source,
    out: str | os.PathLike[str],
    *,
    jpeg_quality: int | None = None,
    progress: Progress | None = None,
) -> Source:
    """Write a source as .beton files and verify every sample.

    The files are renamed to their final names after verification: equal pixels and labels without compression; with
    JPEG, equal labels and a mean color of each image within 16 gray levels. After an interruption, the same call
    completes the conversion; if it is complete, the call does nothing. A raw file has the fingerprint of its source. A
    JPEG file is a different data set, with the fingerprint of its decoded pixels.

    Args:
        source: The source to convert.
        out: The folder to write; created if missing.
        jpeg_quality: None keeps the pixels; 50 to 100 compresses, for large images.
        progress: Called with (images done, total, "writing" or "reading back"); each image counts once for each.

    Returns:
        The converted source, opened.

    Raises:
        BackendUnavailable: FFCV is not installed.
        DataError: A sample cannot be read, or differs after the conversion.
        OutputError: `out` cannot be written, is in use, is part of the source or holds other files (not changed).
        UsageError: `jpeg_quality` is out of range.
    """
    if jpeg_quality is not None and not _MIN_QUALITY <= jpeg_quality <= 100:
        raise UsageError(f"`jpeg_quality` is {jpeg_quality}: must be {_MIN_QUALITY} to 100")
    check_out_folder(Path(out), source)
    folder = check_writable(out)
    with FolderLock(folder):
        if not _is_complete(folder, source, jpeg_quality):
            _convert(source, folder, jpeg_quality, progress)
        return open_ffcv_folder(folder)


def write_beton(
    split: Split,
    path: str | os.PathLike[str],
    *,
    jpeg_quality: int | None = None,
    on_block: Callable[[Pixels], None] | None = None,
) -> None:
    """Write a split as a .beton file, in this process.

    FFCV's own writer passes the samples to worker processes and waits forever if one dies. Here an exception while
    reading or writing is raised. The file is incomplete until this returns: write to a temporary path and rename it.

    Args:
        split: The split to write.
        path: The file; an existing one is overwritten.
        jpeg_quality: None stores the pixels, 1 to 100 a JPEG of each image.
        on_block: Called with each block of source pixels, uint8 `(n, H, W, 3)`, in index order.

    Raises:
        BackendUnavailable: FFCV is not installed.
        OSError: The file cannot be written.
    """
    ffcv = load_ffcv()
    height, width, _ = split.shape
    mode = {"write_mode": "raw"} if jpeg_quality is None else {"write_mode": "jpg", "jpeg_quality": jpeg_quality}
    fields = {"image": ffcv.fields.RGBImageField(**mode), "label": ffcv.fields.IntField()}
    # A JPEG of noise can be larger than its pixels.
    page = max(_MIN_PAGE, 1 << (height * width * 6 - 1).bit_length())
    writer = ffcv.writer.DatasetWriter(str(path), fields, page_size=page, num_workers=1)
    writer.num_samples = len(split)
    writer.prepare()
    metadata = np.frombuffer(writer.metadata_sm.buf, writer.metadata_type)
    try:
        allocator = ffcv.memory_allocator.MemoryAllocator(writer.fname, writer.data_region_start, page)
        with allocator:
            for ids in id_blocks(split):
                pixels = split.read(ids)
                if on_block:
                    on_block(pixels)
                for index, image, label in zip(ids.tolist(), pixels, split.labels[ids].tolist(), strict=True):
                    ffcv.writer.handle_sample((image, label), index, metadata.dtype.names, metadata, allocator, fields)
        writer.finalize(allocator.allocations)
    except BaseException as error:
        # The shared memory cannot be closed while the array refers to it, which these frames do.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        del metadata
        writer.metadata_sm.unlink()
        writer.metadata_sm.close()


def check_out_folder(folder: Path, source: Source) -> None:
    """Raise OutputError if the folder is part of the source, or holds files and no record of a conversion."""
    resolved = folder.resolve()
    if source.kind in ("folder", "classes"):
        root = Path(source.path)
        trees = find_folders(root, TRAIN_NAMES + TEST_NAMES) if source.kind == "folder" else [root]
        if any(resolved.is_relative_to(tree.resolve()) for tree in trees):
            raise OutputError(f"{folder} is among the images of {source.path}: use another folder")
    if source.kind == "beton" and resolved == Path(source.path).resolve():
        raise OutputError(f"{folder} is the source itself: use another folder")
    entries = visible_entries(folder)
    if entries and not has_record(folder):
        found = ", ".join(f"{part}.beton" for part in PARTS if f"{part}.beton" in entries) or entries[0]
        raise OutputError(f"{folder} holds {found}, which kdfast data convert did not write: use another folder")


def delete_conversion(folder: Path, source: Source) -> None:
    """Delete a conversion in a folder, complete or not; files that are not part of it stay.

    Raises:
        OutputError: The folder is part of the source, holds something else, or another process uses it.
    """
    check_out_folder(folder, source)
    delete_own(folder, [RECORD, CHECKED, *(f"{part}.beton" for part in PARTS)])


def _is_complete(folder: Path, source: Source, quality: int | None) -> bool:
    """Return whether `folder` holds this conversion; raise OutputError if it holds another one."""
    try:
        record = read_record(folder)
    except DataError as error:
        raise OutputError(f"{error}, to another folder") from error
    if record is None or not record["files"]:
        return False
    same = record["origin"] == source.fingerprint and record["jpeg_quality"] == quality
    if not same:
        raise OutputError(f"{folder} holds another data set, or this one in another encoding: use another folder")
    if record["format"] == UNSEALED:
        return bool(record["files"] == file_marks(folder))
    try:
        check_files(folder, record)
    except DataError:
        return False  # a changed file is written again
    return True


def _convert(source: Source, folder: Path, quality: int | None, progress: Progress | None) -> None:
    record: dict[str, Any] = {
        "classes": list(source.classes),
        "views": source.view_spec.to_dict(),
        "jpeg_quality": quality,
        "origin": None,
        "fingerprint": None,
    }
    write_record(folder, record, {})
    classes = len(source.classes)
    done, total = 0, 2 * (len(source.train) + len(source.test))

    def advance(images: int, note: str) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(done, total, note)

    with contextlib.ExitStack() as stack:
        # Both temporary files are renamed after both are verified, when the stack unwinds without an exception.
        test = stack.enter_context(atomic_path(folder / "test.beton"))
        train = stack.enter_context(atomic_path(folder / "train.beton"))
        _write_verified(source.test, test, classes, quality, advance)
        record["origin"], record["fingerprint"] = _write_verified(source.train, train, classes, quality, advance)
        digests = {"train.beton": sha256_file(train), "test.beton": sha256_file(test)}
    write_record(folder, record, digests)


def _write_verified(
    split: Split, path: Path, classes: int, quality: int | None, advance: Callable[[int, str], None]
) -> tuple[str, str]:
    """Write one file and read it back.

    Returns:
        Fingerprints of the split and of the decoded file.
    """
    original = DataDigest(len(split), classes, split.shape)
    means: list[np.ndarray[Any, np.dtype[np.float64]]] = []

    def record_block(pixels: Pixels) -> None:
        original.update(pixels)
        means.append(pixels.mean((1, 2)))
        advance(len(pixels), "writing")

    write_beton(split, path, jpeg_quality=quality, on_block=record_block)
    written = BetonSplit(path)
    decoded = DataDigest(len(written), classes, written.shape)
    worst = 0.0
    for ids, expected in zip(id_blocks(written), means, strict=True):
        pixels = written.read(ids)
        decoded.update(pixels)
        worst = max(worst, float(np.abs(pixels.mean((1, 2)) - expected).max()))
        advance(len(pixels), "reading back")
    origin, result = original.finish(split.labels), decoded.finish(written.labels)
    verified = worst <= _MEAN_TOLERANCE and np.array_equal(split.labels, written.labels)
    if not verified or (quality is None and origin != result):
        raise DataError(f"{path.name} does not read back as written: check the disk and convert again")
    return origin, result
