"""Classify images: files, folders and arrays, prepared as the data of the training was."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdfast.data.readers.folders.image_file import is_image_name
from kdfast.data.readers.folders.image_split import ImageSplit
from kdfast.data.source import ArraySplit, Pixels, Split
from kdfast.data.views import ViewSpec, apply_views
from kdfast.deploy.trained import Trained
from kdfast.errors import DataError, UsageError
from kdfast.files.arrays import read_npy
from kdfast.ops.float32 import full_float32
from kdfast.progress import Progress
from kdfast.teacher.predictor import default_batch_size

_ARRAY = ".npy"


@dataclass(frozen=True)
class ImageItem:
    """An image to classify.

    Attributes:
        file: Its file.
        index: Its position in an array; None for an image file.
    """

    file: str
    index: int | None = None


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image.

    Attributes:
        item: The image.
        classes: Indices of the classes, the most probable first.
        probabilities: Their probabilities.
    """

    item: ImageItem
    classes: list[int]
    probabilities: list[float]


def predict(
    trained: Trained,
    paths: Sequence[Path],
    *,
    top: int = 1,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Iterator[Prediction]:
    """Classify images, in the order of the paths.

    Images of another size are scaled and cropped as `size` does for image folders: the shorter side to the side of the
    network's images, then the central square.

    Args:
        trained: The network.
        paths: Image files; folders, whose image files at any depth are taken in the order of their paths; and .npy
            files of uint8, (N, H, W, 3), (N, H, W, 1) or (N, H, W), of the network's size.
        top: Classes to return of each image, at least 1; at most all.
        device: Where to compute.
        progress: Called with (images done, images in total, note).

    Raises:
        UsageError: `top` is less than 1.
        DataError: A path has no image, or an image cannot be read or has the wrong size.
    """
    if top < 1:
        raise UsageError(f"`top` is {top}: pass at least 1")
    batches, total = list_batches(paths, trained.size, default_batch_size(torch.device(device)))
    done = 0
    for items, read in batches:
        probabilities = _probabilities(trained, read(), torch.device(device))
        found = probabilities.topk(min(top, trained.model.classes))
        done += len(items)
        if progress is not None:
            progress(done, total, "")
        for row, item in enumerate(items):
            yield Prediction(item, found.indices[row].tolist(), found.values[row].tolist())


@torch.inference_mode()
@full_float32()
def _probabilities(trained: Trained, images: Pixels, device: torch.device) -> torch.Tensor:
    """Return the probabilities (B, C) of uint8 images (B, H, W, 3), float64 on the CPU."""
    spec = ViewSpec(kind="shift", size=trained.size)
    views = torch.full((len(images),), spec.identity)
    inputs = apply_views(torch.from_numpy(images).to(device), views, spec, trained.model.normalization)
    logits: torch.Tensor = trained.model.net.to(device)(inputs)
    return logits.double().softmax(1).cpu()


def list_batches(
    paths: Sequence[Path], size: tuple[int, int], count: int
) -> tuple[list[tuple[list[ImageItem], Callable[[], Pixels]]], int]:
    """Return batches of at most `count` images with the functions that read them, and the number of images.

    Raises:
        DataError: A path has no image, or an array is unusable.
    """
    batches: list[tuple[list[ImageItem], Callable[[], Pixels]]] = []
    split: Split
    for path in paths:
        if path.suffix == _ARRAY and not path.is_dir():
            split = _open_array(path, size)
            items = [ImageItem(str(path), index) for index in range(len(split))]
        else:
            files = list_images(path)
            split = _open_files(files, size)
            items = [ImageItem(file) for file in files]
        for start in range(0, len(items), count):
            ids = np.arange(start, min(start + count, len(items)))
            batches.append((items[start : start + count], functools.partial(split.read, ids)))
    return batches, sum(len(items) for items, _ in batches)


def list_images(path: Path) -> list[str]:
    """Return an image file, or the image files below a folder, without hidden ones.

    Raises:
        DataError: There is nothing at the path, or a folder without image files.
    """
    if not path.exists():
        raise DataError(f"there is nothing at {path}: check the path")
    if not path.is_dir():
        return [str(path)]
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(folder, name) for name in names if is_image_name(name) and not name.startswith(".")]
    if not found:
        raise DataError(f"{path} has no image files: pass a folder with images, or image files")
    return sorted(found, key=lambda file: Path(file).parts)


def _open_files(files: list[str], size: tuple[int, int]) -> ImageSplit:
    labels = np.zeros(len(files), np.int64)
    if size[0] == size[1]:
        return ImageSplit(files, labels, size[0])
    split = ImageSplit(files, labels, None)
    if split.shape[:2] != size:
        raise _wrong_size(files[0], split.shape[:2], size)
    return split


def _open_array(path: Path, size: tuple[int, int]) -> ArraySplit:
    array = read_npy(path, error=DataError, advice="pass a uint8 array (N, H, W, 3), saved with np.save")
    if array.ndim == 3 and array.shape[-1] == 3 and array.shape[:2] == size:
        array = array[np.newaxis]  # one image
    split = ArraySplit(array, np.zeros(len(array), np.int64), str(path))
    if split.shape[:2] != size:
        raise _wrong_size(str(path), split.shape[:2], size)
    return split


def _wrong_size(file: str, found: tuple[int, ...], size: tuple[int, int]) -> DataError:
    return DataError(
        f"{file} has images of {found[1]}x{found[0]}, the network was trained on {size[1]}x{size[0]}: scale them first"
    )
