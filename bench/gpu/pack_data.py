"""Pack a tenth of CIFAR, its test split and a teacher into a folder that is small enough to carry to a GPU.

    PYTHONPATH=bench python -m gpu.pack_data --data cifar-100-python --teacher T.pt --out .gpu_data

The training images are those that `kdfast prune --seed 0` keeps: random, in proportion to the classes. T.pt is written
by `kdfast teacher train` or `kdfast teacher import`. bench/gpu.sh reads .gpu_data, or the folder in $DATA.

`--rest .gpu_rest` also writes the other training images, in files of at most 25 MiB, which may reach the GPU later:
the studies of bench/gpu.sh need all images.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpu.sheets import INFO, LABELS, LAYOUTS, TEACHER, digest, write_sheet, write_sheets
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Split
from kdfast.nets.checkpoint import load_model
from kdfast.pruning.rules.apply import select_subset


def main() -> None:
    """Write the folder and print its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path(".gpu_data"))
    parser.add_argument("--rest", type=Path, help="folder for the other training images")
    options = parser.parse_args()
    source, model = open_source(options.data), load_model(options.teacher)
    if source.kind not in LAYOUTS:
        raise SystemExit(f"{options.data} is {source.kind}: pass one of {', '.join(LAYOUTS)}")
    labels = source.train.labels
    ids = select_subset(np.zeros(len(labels)), labels, options.fraction, rule="random").ids
    splits = {
        "train": (source.train.read(ids), labels[ids]),
        "test": (source.test.read(np.arange(len(source.test))), source.test.labels),
    }
    hashes = {name: digest(*split) for name, split in splits.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (images, _) in splits.items():
        write_sheet(options.out / f"{name}.webp", images)
    np.savez(options.out / LABELS, ids=ids, **{name: split[1] for name, split in splits.items()})
    shutil.copyfile(options.teacher, options.out / TEACHER)
    info = {
        "kind": source.kind,
        "classes": source.classes,
        "fraction": options.fraction,
        "of": len(labels),
        "data": source.fingerprint,
        "teacher": {"net": model.name, "digest": model.digest, **model.metadata},
        "sha256": {**hashes, "whole": digest(source.train.read(np.arange(len(labels))), labels)},
    }
    (options.out / INFO).write_text(json.dumps(info, indent=1, default=str) + "\n")
    _print_sizes(options.out)
    if options.rest is not None:
        write_rest(options.rest, source.train, np.setdiff1d(np.arange(len(labels)), ids))
        _print_sizes(options.rest)


def write_rest(folder: Path, split: Split, ids: NDArray[np.int64]) -> None:
    """Write the other training images and their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    write_sheets(folder, split.read(ids))
    np.savez(folder / LABELS, ids=ids, rest=split.labels[ids])


def _print_sizes(folder: Path) -> None:
    sizes = {path: path.stat().st_size for path in sorted(folder.iterdir())}
    print("\n".join(f"{size / 2**20:7.2f} MiB  {path}" for path, size in sizes.items()))
    print(f"{sum(sizes.values()) / 2**20:7.2f} MiB")


if __name__ == "__main__":
    main()
