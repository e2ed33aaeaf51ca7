"""Images per second of the loaders, compared with PyTorch's DataLoader and with FFCV's own augmentation.

    python bench/bench_loaders.py --data PATH-TO-CIFAR-10

(a) one epoch of the ffcv loader over a subset, decoding only, after compilation;
(b) ffcv loader + views to a normalized float batch, compared with PyTorch's DataLoader over PIL images with the same
    pad, crop, flip and normalization;
(c) resident loader + views, compared with FFCV's own flip + translate + normalize pipeline.

The output of every pipeline is checked first: each image must be one of the 162 views of its original. The two sides of
a ratio are timed in turn, so that other load on the machine affects both; the ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from harness import machine
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdfast.data.ffcv.read import BetonLoader, load_ffcv, worker_count
from kdfast.data.ffcv.write import convert
from kdfast.data.loaders import ResidentLoader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source, compute_normalization
from kdfast.data.views import Normalization, apply_views, draw_view_indices

BATCH = 256
KEEP = 0.5
WORKERS = 2
TARGETS = {"ffcv decode only, images/s": 300_000, "ffcv + views / DataLoader": 10, "resident + views / FFCV": 3}

Epoch = Callable[[], Iterator[Tensor]]


class PilImages(Dataset):
    """The usual training set: PIL images, augmented and normalized one at a time."""

    def __init__(self, images: np.ndarray, norm: Normalization) -> None:
        self.images = images
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (norm.mean, norm.std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        padded = ImageOps.expand(Image.fromarray(self.images[index]), 4)
        left, top = torch.randint(0, 9, (2,)).tolist()
        image = padded.crop((left, top, left + 32, top + 32))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        return tensor.sub_(self.mean).div_(self.std)


def with_views(loader: ResidentLoader | BetonLoader, source: Source, ids: np.ndarray, norm: Normalization) -> Epoch:
    """Return an epoch of kdfast: decoded batches, then the views drawn for them."""

    def epoch() -> Iterator[Tensor]:
        views = draw_view_indices(0, 0, ids, source.view_spec.count)
        for start, batch in zip(range(0, len(ids), BATCH), loader.batches(ids, BATCH), strict=True):
            yield apply_views(batch, views[start : start + BATCH], source.view_spec, norm)

    return epoch


def ffcv_pipeline(path: Path, ids: np.ndarray, norm: Normalization) -> Epoch:
    """Return an epoch of FFCV's own pipeline: flip, translate and normalize, compiled together with the decoding."""
    ffcv = load_ffcv()
    mean, std = (np.array(values) * 255 for values in (norm.mean, norm.std))
    loader = ffcv.Loader(
        str(path),
        batch_size=BATCH,
        num_workers=worker_count(WORKERS),
        os_cache=True,
        indices=ids,
        drop_last=False,
        order=ffcv.loader.OrderOption.SEQUENTIAL,
        pipelines={
            "image": [
                ffcv.fields.rgb_image.SimpleRGBImageDecoder(),
                ffcv.transforms.RandomHorizontalFlip(),
                ffcv.transforms.RandomTranslate(padding=4),
                ffcv.transforms.NormalizeImage(mean, std, np.float32),
                ffcv.transforms.ToTensor(),
                ffcv.transforms.ToTorchImage(),
            ],
            "label": None,
        },
    )
    return lambda: (batch for (batch,) in loader)


def check(epoch: Epoch, source: Source, ids: np.ndarray, norm: Normalization, what: str) -> None:
    """Check that each of the first images is a view of its original; also compiles the pipeline."""
    batches = [batch[:8].clone() for batch in epoch()]
    every = torch.arange(source.view_spec.count)
    for index, image in enumerate(batches[0]):
        original = torch.from_numpy(source.train.read(ids[index : index + 1])).expand(len(every), -1, -1, -1)
        gaps = (apply_views(original.contiguous(), every, source.view_spec, norm) - image).abs().amax((1, 2, 3))
        if gaps.min() > 1e-4:
            raise SystemExit(f"{what}: image {index} of the first batch is no view of sample {ids[index]}")


def rate(epoch: Epoch, count: int) -> tuple[float, float]:
    """Return the images per second of one epoch, by wall-clock time and by CPU time of this process."""
    start, used = time.perf_counter(), time.process_time()
    seen = sum(len(batch) for batch in epoch())
    seconds, used = time.perf_counter() - start, time.process_time() - used
    if seen != count:
        raise SystemExit(f"an epoch of {count} images gave {seen}")
    return count / seconds, count / used


def compare(ours: Epoch, theirs: Epoch, count: int, rounds: int) -> dict[str, object]:
    """Return the rates of both sides, measured in turn, and the median ratio over the rounds with its range.

    The ratio of CPU times is nearly independent of other load on the machine, but excludes the worker processes of a
    DataLoader.
    """
    pairs = [(rate(ours, count), rate(theirs, count)) for _ in range(rounds)]
    ratios = sorted(one[0] / two[0] for one, two in pairs)
    return {
        "ours": round(statistics.median(one[0] for one, _ in pairs)),
        "theirs": round(statistics.median(two[0] for _, two in pairs)),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(ratios[0], 2), round(ratios[-1], 2)],
        "processor_time_ratio": round(statistics.median(one[1] / two[1] for one, two in pairs), 2),
        "rounds": rounds,
    }


def measure(source: Source, folder: Path, rounds: int) -> dict[str, object]:
    """Run the three comparisons in the order of the module docstring."""
    norm = compute_normalization(source.train)
    ids = np.random.default_rng(0).permutation(len(source.train))[: int(KEEP * len(source.train))].astype(np.int64)
    # Create the DataLoader first: its workers must be forked before FFCV starts threads.
    pil = DataLoader(
        PilImages(source.train.read(ids), norm), BATCH, num_workers=WORKERS, persistent_workers=True, shuffle=False
    )
    check(lambda: iter(pil), source, ids, norm, "DataLoader")
    betons = convert(source, folder)
    loader = BetonLoader(betons.train, workers=WORKERS)
    streamed = with_views(loader, source, ids, norm)
    resident = with_views(ResidentLoader(source.train), source, ids, norm)
    own = ffcv_pipeline(folder / "train.beton", ids, norm)
    for epoch, what in ((streamed, "ffcv + views"), (resident, "resident + views"), (own, "FFCV's own pipeline")):
        check(epoch, source, ids, norm, what)
    decode = [rate(lambda: loader.batches(ids, BATCH), len(ids))[0] for _ in range(3 * rounds)]
    against_torch = compare(streamed, lambda: iter(pil), len(ids), rounds)
    del against_torch["processor_time_ratio"]
    return {
        "ffcv decode only, images/s": {"median": round(statistics.median(decode)), "best": round(max(decode))},
        "ffcv compile, seconds": round(loader.compile_seconds, 2),
        "ffcv + views / DataLoader": against_torch,
        "resident + views / FFCV": compare(resident, own, len(ids), 2 * rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the loaders on CIFAR-10.")
    parser.add_argument("--data", required=True, help="CIFAR-10, in any form that kdfast reads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loaders.json")
    options = parser.parse_args()
    source = open_source(options.data)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(source, Path(folder), options.rounds)
    setting = {"data": source.kind, "kept": KEEP, "batch": BATCH, "workers": WORKERS}
    result = {"machine": machine(), "setting": setting, "targets": TARGETS, "figures": figures}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
