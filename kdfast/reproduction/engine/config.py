"""What a call of `kdfast reproduce` asks for; it is pickled for the processes of `--jobs`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kdfast.data.views import Normalization
from kdfast.distillation.config import RunConfig
from kdfast.reproduction.cells import Cell
from kdfast.reproduction.selection import compressed_epochs
from kdfast.reproduction.study import Study


@dataclass(frozen=True)
class ReproductionConfig:
    """Settings of a reproduction.

    Attributes:
        study: The study.
        cells: Those of its cells to run, in their order.
        seeds: Seeds; each seeds the subset, the initial weights, the order and the views of a cell.
        data: Source of data, see `kdfast.data.readers.registry`.
        out: Folder of artefacts and rows, which several studies, processes and machines may share.
        dataset: Name of the data among the published values; None: `Source.kind`.
        epochs: Epochs of the students in place of the recipe's; see `kdfast.reproduction.selection.compress`.
        teachers: Files of teachers trained on all data, by network.
        normalization: Input statistics of teachers whose file does not hold them; None: they must.
        dynamics: Folder of recorded training dynamics, in place of those that are recorded here.
        precision: `fp32`, `bf16` or `fp16`, of all training; teachers' outputs are cached in bfloat16 with `bf16`.
        loader: `auto`, `ffcv` or `resident`.
        size: Side in pixels of the stored images, for folders of larger images.
        order: Order of the samples of image folders.
        split: The test split of data that has none.
        device: Device, see `kdfast.device.resolve_device`.
    """

    study: Study
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    data: str
    out: Path
    dataset: str | None = None
    epochs: int | None = None
    teachers: dict[str, str] = field(default_factory=dict)
    normalization: Normalization | None = None
    dynamics: str | None = None
    precision: str = "fp32"
    loader: str = "auto"
    size: int | None = None
    order: str = "path"
    split: str | None = None
    device: str = "cpu"

    def run_config(self, cell: Cell, seed: int, samples: int) -> RunConfig:
        """Return the training of a cell's student; `samples` is the size of the training split."""
        epochs = compressed_epochs(self.study, cell, self.epochs, samples)
        return cell.run_config(epochs=epochs, seed=seed, precision=self.precision)
