"""Random resized crops of a batch: kdfast's operator, and a loop over the images with PyTorch's resize.

    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
    OMP_NUM_THREADS=2 python bench/bench_crops.py [--threads 1 2] [--size 224] [--device cuda] [--rounds 9]

A batch of images of 256 x 256 pixels is cut to boxes as training draws them (8% to 100% of the area), resized, mirrored
and normalized. Both implementations alternate; each row is the median over the rounds, in CPU seconds of the process
divided by the threads with --cpu-time, for a machine that others use too, else in seconds. The loop keeps floating
point where the operator rounds to gray levels, so that their results may differ by one level, which is checked first.
The two settings keep freed memory in the process; else new pages for a result can take longer than the crops.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import table, write_results
from torch import Tensor

from kdfast.data.views import Normalization, ViewSpec, view_boxes
from kdfast.ops import native
from kdfast.ops.views import crop_views

NORM = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ISAS = ("default", "x86-64-v3", "x86-64-v4")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDE = 256


def loop(images: Tensor, boxes: Tensor, affine: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Normalize, resize and mirror image by image."""
    out = torch.empty((len(images), *size, 3), dtype=dtype, device=images.device).permute(0, 3, 1, 2)
    for i, (top, left, tall, wide, flip) in enumerate(boxes.tolist()):
        piece = images[i : i + 1, top : top + tall, left : left + wide].to(affine.dtype) * affine[0] + affine[1]
        piece = F.interpolate(piece.permute(0, 3, 1, 2), size=size, mode="bilinear", antialias=True)
        out[i] = (piece.flip(3) if flip else piece)[0]
    return out


def measure(calls: dict[str, Any], rounds: int, clock: Any, wait: Any) -> dict[str, float]:
    """Return the median seconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            wait()
            times[name].append(clock() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="measure the CPU time of the process")
    arguments = parser.parse_args()
    device, size, batch = torch.device(arguments.device), (arguments.size, arguments.size), arguments.batch
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    ids = np.arange(batch, dtype=np.int64)
    boxes = view_boxes(ViewSpec("crop", size, flip=True, crops=128), ids, ids + 1, (SIDE, SIDE)).to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator).to(device)
    affine = NORM.affine().to(device)
    level = float(affine[0].max()) * 1.01
    difference = (crop_views(images, boxes, affine, size=size) - loop(images, boxes, affine, size, torch.float32)).abs()
    assert difference.max() <= level, difference.max()
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        clock = (lambda t=threads: time.process_time() / t) if arguments.cpu_time else time.perf_counter
        for name, dtype in DTYPES.items():
            calls = {"loop": lambda d=dtype: loop(images, boxes, affine, size, d)}
            for limit, isa in enumerate(ISAS[: ISAS.index(native.isa()) + 1] if device.type == "cpu" else ()):
                calls[isa] = lambda d=dtype, i=limit: native.crop_views(
                    images, None, boxes, affine, size, d, isa_limit=i
                )
            if device.type == "cuda":
                calls["triton"] = lambda d=dtype: crop_views(images, boxes, affine, size=size, dtype=d)
            found = measure(calls, arguments.rounds, clock, wait)
            for what, seconds in found.items():
                rows.append(
                    {
                        "threads": threads,
                        "dtype": name,
                        "what": what,
                        "us_per_image": round(seconds / batch * 1e6, 1),
                        "times_faster": round(found["loop"] / seconds, 1),
                    }
                )
    print(table(rows))
    name = "crops" if device.type == "cpu" else f"crops_{device.type}"
    clock_name = "CPU time" if arguments.cpu_time else "wall time"
    print(write_results(name, rows, size=arguments.size, batch=batch, rounds=arguments.rounds, clock=clock_name))


if __name__ == "__main__":
    main()
