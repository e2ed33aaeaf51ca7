"""Train one network per seed and record per-sample outputs after each epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.source import Source
from kdfast.data.stateless_random import Purpose, hash64, permutation_element
from kdfast.distillation.batches import Batch
from kdfast.distillation.config import RunConfig, check_integer
from kdfast.distillation.cuda_graph import EXCLUSIVE
from kdfast.distillation.folder import RunFolder
from kdfast.distillation.inputs import check_student
from kdfast.distillation.plan import LoadedInputs, Plan
from kdfast.distillation.train import Monitoring, train
from kdfast.distillation.trainer import Trainer
from kdfast.distributed.group import Distributed
from kdfast.dynamics.batches import BatchCorrectness
from kdfast.dynamics.format import check_when, run_folder
from kdfast.dynamics.plan import check_top_k
from kdfast.dynamics.recorder import DynamicsRecorder
from kdfast.errors import CheckpointError, UsageError
from kdfast.files import refuse_links
from kdfast.progress import Progress
from kdfast.teacher.predictor import Precision, Predictor, default_batch_size

_MAX_CYCLE = 20  # `keep` is rounded to a fraction with at most this denominator
TRAINING_FOLDER = "training"
_BLOCK = 4096  # images decoded at a time while recording


@dataclass(frozen=True)
class RecordingConfig:
    """Settings of a recording.

    Attributes:
        runs: Number of training runs; run r has the seed `config.seed + r`.
        only: Train this run alone, so that processes or machines can share the runs; None: all, one after another.
        keep: Fraction of the samples that each run trains on, in (0, 1]; see `draw_training_mask`.
        record_every: Epochs between two recordings; must divide the number of epochs. Readers of the dynamics count
            recorded epochs only.
        features_every: Recorded epochs between two that keep features; 0: none but the last, which always keeps them.
        top_k: Classes to keep of each prediction, the most probable ones with their probabilities; 0: none.
        record: When correctness is recorded: `epoch`, after each recorded epoch; or `batch`, also in the training
            batches of each recorded epoch, before the step and with their augmentation.

    Raises:
        UsageError: If a value is out of range.
    """

    runs: int = 1
    only: int | None = None
    keep: float = 1.0
    record_every: int = 1
    features_every: int = 0
    top_k: int = 0
    record: str = "epoch"

    def __post_init__(self) -> None:
        for name, least in (("runs", 1), ("record_every", 1), ("features_every", 0), ("top_k", 0)):
            check_integer(name, getattr(self, name), least)
        check_when("record", self.record)
        if not 0 < self.keep <= 1:
            raise UsageError(f"`keep` is {self.keep}: pass a number in (0, 1]")
        if self.only is not None and not 0 <= self.only < self.runs:
            raise UsageError(f"`only` is {self.only} with {self.runs} runs: pass 0 to {self.runs - 1}")

    @property
    def selected_runs(self) -> list[int]:
        """Indices of the runs to train."""
        return list(range(self.runs)) if self.only is None else [self.only]


def draw_training_mask(n: int, keep: float, seed: int, run: int) -> npt.NDArray[np.bool_]:
    """Select the samples that a run trains on: each with probability `keep`, independently of the other samples.

    The runs are balanced rather than independent: with keep = a / b in lowest terms (b at most 20; other fractions are
    rounded to the nearest such fraction), every sample is in exactly a of the runs 0 to b - 1, of the runs b to 2b - 1,
    and so on. Few runs therefore suffice to train both with and without every sample. A run's mask does not depend on
    how many runs follow.

    Args:
        n: Number of samples, N.
        keep: The fraction, in (0, 1].
        seed: Seed of the selection.
        run: Index of the run, from 0.

    Returns:
        bool (N,).
    """
    fraction = Fraction(str(keep)).limit_denominator(_MAX_CYCLE)
    cycle, position = divmod(run, fraction.denominator)
    keys = hash64(Purpose.KEEP, seed, cycle, np.arange(n, dtype=np.int64))
    return permutation_element(np.full(n, position), fraction.denominator, keys) < fraction.numerator


def check_recording(
    config: RunConfig, recording: RecordingConfig, source: Source, distributed: Distributed | None = None
) -> None:
    """Check that runs can be recorded, before anything is written or deleted.

    Args:
        config: Settings of the training.
        recording: Settings of the recording.
        source: The data.
        distributed: This process among those that train; None for a single one.

    Raises:
        UsageError: If the settings do not fit each other or the data.
    """
    if config.steps is not None:
        raise UsageError(f"`steps` is {config.steps}, and a recording has whole epochs: pass `epochs`")
    if config.epochs % recording.record_every:
        raise UsageError(
            f"`record_every` is {recording.record_every}, which does not divide {config.epochs} `epochs`: change one"
        )
    check_top_k(recording.top_k, len(source.classes))
    for run in recording.selected_runs:
        kept = int(draw_training_mask(len(source.train), recording.keep, config.seed, run).sum())
        if kept < config.batch_size:
            raise UsageError(f"run {run} trains on {kept} samples, fewer than one batch: raise `keep`")
        (distributed or Distributed()).check_batches(kept, config.batch_size)


def record_dynamics(
    inputs: LoadedInputs,
    config: RunConfig,
    recording: RecordingConfig,
    out: Path,
    *,
    device: torch.device,
    distributed: Distributed | None = None,
    checkpoint_seconds: float = 30.0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train and record every run that is not recorded yet; after an interruption, the same call resumes.

    Several processes share every batch and the passes that record; the main one writes.

    Args:
        inputs: The data, without a teacher.
        config: Settings of the training.
        recording: Settings of the recording.
        out: Folder of the dynamics.
        device: Where to train.
        distributed: This process among those that train, with its group entered; None for a single one.
        checkpoint_seconds: Seconds between two checkpoints of the training.
        progress: Called with (steps done, steps in total, note) over all runs.

    Returns:
        The results of the trained runs, in order; each is empty in processes other than the main one.

    Raises:
        UsageError: If settings do not fit the data or the content of the folder.
        DivergedError: If a training diverged.
        Interrupted: After SIGTERM or Ctrl-C, with the state saved.
        OutputError: If the folder cannot be written.
    """
    ranks = distributed or Distributed()
    check_recording(config, recording, inputs.source, ranks)
    results = []
    for run in recording.selected_runs:
        mask = draw_training_mask(len(inputs.source.train), recording.keep, config.seed, run)
        ids = np.flatnonzero(mask).astype(np.int64)
        run_config = dataclasses.replace(config, seed=config.seed + run)
        with EXCLUSIVE:
            check_student(run_config, len(ids), inputs.source, device)
            plan = inputs.plan(run_config, ids, device=device, distributed=ranks)
        opened = _open_recorder(plan, config, recording, out, run, mask) if ranks.is_main else contextlib.nullcontext()
        with opened as recorder:
            monitoring = Monitoring(
                checkpoint_seconds=checkpoint_seconds,
                progress=None if progress is None else _overall_progress(progress, recording, run),
                on_epoch_end=_epoch_end_callback(recorder, recording.record_every),
            )
            folder = refuse_links(out, run_folder(run), TRAINING_FOLDER)
            results.append(_train_run(plan, folder, monitoring, _trainer_of(plan, recorder, recording.record)))
    return results


class BatchRecordingTrainer(Trainer):
    """Records whether the student is right about the samples of each batch, without waiting for the device.

    Args:
        plan: The plan of the run.
        batches: What the batches are added to; part of the checkpoints, as they are taken within epochs too.
    """

    def __init__(self, plan: Plan, batches: BatchCorrectness) -> None:
        super().__init__(plan)
        self.recorded = batches
        several = plan.distributed.world_size > 1
        # Of several processes, each adds its own batches here, until all of them take over each other's.
        self._own = BatchCorrectness(plan.source.train.labels, plan.device) if several else batches

    def compute_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, and record whether its logits are right."""
        self._own.add(batch.ids, logits)
        return super().compute_loss(logits, batch)

    def share_batches(self) -> None:
        """Let every process have what all of them have recorded."""
        if self._own is not self.recorded:
            self.recorded.merge(**{name: self.plan.distributed.union(x) for name, x in self._own.state().items()})
            self._own.reset()

    def state(self) -> dict[str, Any]:
        """Return the state, with what the batches of this epoch have recorded; called by all processes together."""
        self.share_batches()
        return {**super().state(), "batches": self.recorded.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a saved state, before the first step.

        Raises:
            CheckpointError: If it is not a state of this run, or not one of a recording of batches.
        """
        super().load_state(state)
        try:
            self.recorded.load_state(state["batches"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint holds no correctness in batches ({error}): choose another `out`"
            ) from error


def _trainer_of(plan: Plan, recorder: DynamicsRecorder | None, record: str) -> Callable[[Plan], Trainer]:
    if record != "batch":
        return Trainer
    if recorder is None:
        batches = BatchCorrectness(plan.source.train.labels, plan.device)
    else:
        batches = recorder.batches_on(plan.device)
    return functools.partial(BatchRecordingTrainer, batches=batches)


def _open_recorder(
    plan: Plan,
    config: RunConfig,
    recording: RecordingConfig,
    out: Path,
    run: int,
    mask: npt.NDArray[np.bool_],
) -> DynamicsRecorder:
    source = plan.source
    epochs, every = config.epochs // recording.record_every, recording.features_every
    facts = {
        "training": {**config.to_dict(), "view_seed": plan.config.view_seed, "views": plan.config.views},
        "keep": recording.keep,
        "record_every": recording.record_every,
        "augmentation": source.view_spec.to_dict(),
        "normalization": dataclasses.asdict(plan.normalization),
    }
    return DynamicsRecorder(
        out,
        len(source.train),
        source.train.labels,
        epochs=epochs,
        run=run,
        runs=recording.runs,
        mask=mask,
        fingerprint=source.fingerprint,
        feature_epochs=[e for e in range(epochs) if e == epochs - 1 or (every and (e + 1) % every == 0)],
        facts=facts,
        top_k=recording.top_k,
        classes=len(source.classes),
        record=recording.record,
    )


def _epoch_end_callback(recorder: DynamicsRecorder | None, every: int) -> Callable[[Trainer], None]:
    def on_epoch_end(trainer: Trainer) -> None:
        plan = trainer.plan
        if isinstance(trainer, BatchRecordingTrainer):
            trainer.share_batches()
        # A run killed between its last recording and its next checkpoint repeats epochs that are already recorded.
        wanted = recorder is not None and not recorder.finished
        if trainer.epoch % every or not plan.distributed.any(wanted, plan.device):
            return
        if recorder is not None:
            ended = trainer.epoch // every - 1
            if recorder.epoch > ended:
                recorder.rewind(ended)
        _record_epoch(trainer, recorder)
        if recorder is None and isinstance(trainer, BatchRecordingTrainer):
            trainer.recorded.reset()  # as the recorder does in the main process

    return on_epoch_end


def _train_run(
    plan: Plan, path: Path, monitoring: Monitoring, make_trainer: Callable[[Plan], Trainer]
) -> dict[str, Any]:
    """Train one run to its end, resuming from its last checkpoint."""
    writes = plan.distributed.is_main
    with RunFolder(path, plan.identity, metadata=plan.metadata, writes=writes) as folder:
        result = train(plan, folder, monitoring, make_trainer)
        folder.delete_checkpoints()  # if a process was killed when the run had just finished
    return result


def _record_epoch(trainer: Trainer, recorder: DynamicsRecorder | None) -> None:
    """Record the outputs for all samples, without augmentation, in the precision of the training."""
    plan = trainer.plan
    source, ranks = plan.source, plan.distributed
    precision: Precision = "bfloat16" if plan.config.precision == "bf16" else "float32"
    predictor = Predictor(trainer.model(), source.view_spec, plan.device, default_batch_size(plan.device))
    n, block = len(source.train), _BLOCK * ranks.world_size
    for start in range(0, n, block):
        ids = np.arange(start, min(start + block, n), dtype=np.int64)
        own = ranks.share(ids)
        read = own if len(own) else ids[:1]  # the last block may have fewer samples than there are processes
        images = torch.from_numpy(source.train.read(read)).to(plan.device)
        parts = (part[: len(own)] for part in predictor.predict_identity(images, read, precision))
        outputs = [ranks.gather(part.to(plan.device)).cpu() if ranks.world_size > 1 else part for part in parts]
        if recorder is not None:
            recorder.update(ids, *outputs)
    if recorder is not None:
        recorder.end_epoch()


def _overall_progress(progress: Progress, recording: RecordingConfig, run: int) -> Progress:
    """Convert the progress of one run to the progress of all selected runs."""
    before, runs = recording.selected_runs.index(run), len(recording.selected_runs)
    return lambda done, total, note: progress(before * total + done, runs * total, f"run {run} {note}")
