"""Data, teacher and cache of the parts that train: the packed ones, or random images where there are none."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gpu.results import ROOT, packed_folder
from gpu.sheets import INFO, LAYOUTS, TEACHER, is_whole, unpack, write_archive
from kdfast.data.readers.registry import open_source
from kdfast.data.views import Normalization
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model, load_model, save_model
from kdfast.teacher.build import build_cache

# Random data: training and test images, the teacher, and views of the cache.
_RANDOM = {"cuda": (5000, 1000, "resnet32"), "cpu": (128, 100, "resnet8")}
VIEWS = {"cuda": None, "cpu": 4}


@dataclass(frozen=True)
class TrainingData:
    """Paths, and what the data are.

    Attributes:
        data: Archive of the kept images and the test split.
        teacher: A teacher of its classes.
        cache: The teacher's cache, all views on a GPU, which `training_data` builds.
        fraction: Share of the whole training split that is there.
        packed: Whether the images are the packed ones; otherwise they are random numbers.
    """

    data: str
    teacher: str
    cache: str
    fraction: float
    packed: bool

    @property
    def name(self) -> str:
        """What a row says of its data."""
        return f"{self.fraction:g} of {Path(self.data).name}" if self.packed else "random images"


def whole_data(device: str) -> TrainingData | None:
    """Return all images and no cache, or None where they are not at hand; a CPU gets the random images.

    The other images are those of `gpu.pack_data --rest`, in `.gpu_rest` or $REST.
    """
    work = Path(os.environ["QUEUE_WORK"])
    if device == "cpu":
        return random_data(work / "random", device)
    rest = Path(os.environ.get("REST") or ROOT / ".gpu_rest")
    if not is_whole(rest) or not (packed_folder() / INFO).exists():
        return None
    return unpacked(packed_folder(), work / "whole", rest)


def training_data(device: str) -> TrainingData:
    """Return the data of a device, `cpu` or `cuda`, written to the folder for builds by the first call.

    A CPU, on which the queue only tests itself, gets random images.
    """
    work = Path(os.environ["QUEUE_WORK"])
    packed = packed_folder()
    use_packed = device == "cuda" and (packed / INFO).exists()
    found = unpacked(packed, work) if use_packed else random_data(work / "random", device)
    source, model = open_source(found.data), load_model(found.teacher)
    build_cache(source, model, found.cache, n_views=VIEWS[device], device=device)
    return found


def unpacked(packed: Path, work: Path, rest: Path | None = None) -> TrainingData:
    """Return the packed data, together with the rest where it is given; their archive is written to `work`."""
    info = json.loads((packed / INFO).read_text())
    folder = work / LAYOUTS[info["kind"]].folder
    if not folder.exists():
        unfinished = work / "unpacked" / folder.name
        unpack(packed, unfinished, rest)
        unfinished.rename(folder)
    fraction = 1.0 if rest is not None else float(info["fraction"])
    return TrainingData(str(folder), str(packed / TEACHER), str(work / "cache"), fraction, True)


def random_data(folder: Path, device: str) -> TrainingData:
    """Return random images with an untrained teacher."""
    train, test, net = _RANDOM[device]
    draw = np.random.default_rng(0)
    archive, teacher = folder / LAYOUTS["cifar100"].folder, folder / TEACHER
    if not teacher.exists():
        splits = [
            (draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 100)
            for count in (train, test)
        ]
        names = [f"class {number}" for number in range(100)]
        write_archive(archive, "cifar100", *splits, names)
        torch.manual_seed(0)
        norm = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        save_model(teacher, Model(build_net(net, 100).eval(), net, 100, tuple(names), norm))
    return TrainingData(str(archive), str(teacher), str(folder / "cache"), 0.1, False)
