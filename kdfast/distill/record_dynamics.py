"""Train networks in order to watch them: one run a seed, what each says of every sample recorded after every epoch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdfast.data.source import Source
from kdfast.data.stateless_random import Purpose, hash64, shuffled_at
from kdfast.distill.config import RunConfig
from kdfast.distill.distributed import Ranks
from kdfast.distill.folder import RunFolder
from kdfast.distill.plan import Opened, Plan, assemble, check_student
from kdfast.distill.train import Advance, Watch, train
from kdfast.distill.trainer import Trainer
from kdfast.dynamics.recorder import DynamicsRecorder
from kdfast.errors import UsageError
from kdfast.teacher.forward import Forward, Precision, default_batch

# Shares are made exact over this many runs at most.
_LONGEST_CYCLE = 20
_TRAINING = "training"
_BLOCK = 4096  # images decoded at a time while recording


@dataclass(frozen=True)
class Recording:
    """What to record.

    Attributes:
        runs: Training runs; run r has the seed `config.seed + r`.
        only: Train this run alone, so that processes or machines can share the runs; None: all, one after another.
        keep: Share of the samples that each run trains on, in (0, 1]; see `kept_mask`.
        record_every: Record after every so many epochs of training, which must divide their number. Everything that
            reads dynamics counts the recorded epochs alone.
        features_every: Keep features after every so many recorded epochs; after the last one they are always kept.
    """

    runs: int = 1
    only: int | None = None
    keep: float = 1.0
    record_every: int = 1
    features_every: int = 0

    def __post_init__(self) -> None:
        if self.runs < 1 or not 0 < self.keep <= 1 or self.record_every < 1 or self.features_every < 0:
            raise UsageError(
                f"--runs {self.runs}, --keep {self.keep}, --record-every {self.record_every}, --features-every "
                f"{self.features_every}: needed: a run or more, a share in (0, 1], and epochs not negative"
            )
        if self.only is not None and not 0 <= self.only < self.runs:
            raise UsageError(f"--only {self.only} of {self.runs} runs: needed: 0 to {self.runs - 1}")


def kept_mask(n: int, keep: float, seed: int, run: int) -> npt.NDArray[np.bool_]:
    """Which samples a run trains on: each with probability `keep`, independently of the other samples.

    Over runs the draws are not independent but even: with keep = a / b in lowest terms (b at most 20; other shares are
    rounded to one), every sample is in exactly a of the runs 0 to b - 1, of the runs b to 2b - 1, and so on. A few
    runs then see every sample inside and outside. The first runs do not depend on how many follow.

    Args:
        n: Number of samples, N.
        keep: The share, in (0, 1].
        seed: Seed of the draws.
        run: Which run, from 0.

    Returns:
        bool (N,).
    """
    share = Fraction(str(keep)).limit_denominator(_LONGEST_CYCLE)
    cycle, position = divmod(run, share.denominator)
    keys = hash64(Purpose.KEEP, seed, cycle, np.arange(n, dtype=np.int64))
    return shuffled_at(np.full(n, position), share.denominator, keys) < share.numerator


def record(
    opened: Opened,
    config: RunConfig,
    recording: Recording,
    out: Path,
    *,
    device: torch.device,
    checkpoint_seconds: float = 30.0,
    advance: Advance | None = None,
) -> list[dict[str, Any]]:
    """Train and record every run that is not recorded yet; interrupted, the same call goes on.

    Args:
        opened: The data; without a teacher.
        config: The training.
        recording: What to record.
        out: The folder of the dynamics.
        device: Where to train.
        checkpoint_seconds: Time between two checkpoints of the training.
        advance: Told (steps done, steps in all, a line about the state) over all runs.

    Returns:
        The results of the trained runs, in order.

    Raises:
        UsageError: Settings do not fit the data or what the folder holds.
        DivergedError: If a training diverged.
        Interrupted: After SIGTERM or Ctrl-C, with the state saved.
        OutputError: If the folder cannot be written.
    """
    if config.epochs % recording.record_every:
        raise UsageError(
            f"--record-every {recording.record_every} does not divide --epochs {config.epochs}; change one"
        )
    results = []
    for run in range(recording.runs) if recording.only is None else [recording.only]:
        mask = kept_mask(len(opened.source.train), recording.keep, config.seed, run)
        ids = np.flatnonzero(mask).astype(np.int64)
        own = dataclasses.replace(config, seed=config.seed + run)
        if len(ids) < own.batch_size:
            raise UsageError(f"run {run} trains on {len(ids)} samples, less than a batch; raise --keep")
        check_student(own, len(ids), opened.source, Ranks())
        plan = assemble(opened, own, ids, device=device)
        with _recorder(opened.source, plan, config, recording, out, run, mask) as recorder:
            watch = Watch(
                checkpoint_seconds=checkpoint_seconds,
                advance=None if advance is None else _share(advance, recording, run),
                at_epoch_end=_recording_hook(recorder, recording.record_every),
            )
            results.append(_one_run(plan, recorder.folder / _TRAINING, watch))
    return results


def _recorder(
    source: Source,
    plan: Plan,
    config: RunConfig,
    recording: Recording,
    out: Path,
    run: int,
    mask: npt.NDArray[np.bool_],
) -> DynamicsRecorder:
    epochs, every = config.epochs // recording.record_every, recording.features_every
    facts = {
        "training": {**config.to_dict(), "view_seed": plan.config.view_seed, "views": plan.config.views},
        "keep": recording.keep,
        "record_every": recording.record_every,
        "augmentation": source.views.to_dict(),
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
        facts=json.loads(json.dumps(facts)),
    )


def _recording_hook(recorder: DynamicsRecorder, every: int) -> Callable[[Trainer], None]:
    """What the trainer calls at the end of an epoch."""

    def at_epoch_end(trainer: Trainer) -> None:
        if recorder.finished or trainer.epoch % every:
            return  # finished: recorded before a kill that came between the last epoch and its checkpoint
        ended = trainer.epoch // every - 1
        if recorder.epoch > ended:
            recorder.rewind(ended)
        _record_epoch(trainer, recorder)

    return at_epoch_end


def _one_run(plan: Plan, path: Path, watch: Watch) -> dict[str, Any]:
    """Train one run to its end, from wherever its folder stands."""
    with RunFolder(path, plan.identity, facts=plan.facts) as folder:
        result = train(plan, folder, watch)
        # A finished run needs no checkpoints, and there may be many runs.
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
    return result


def _record_epoch(trainer: Trainer, recorder: DynamicsRecorder) -> None:
    """One pass over all samples as they are, without augmentation, in the arithmetic that trains."""
    plan = trainer.plan
    source, precision = plan.source, _precision(plan.config.precision)
    forward = Forward(trainer.model(), source.views, plan.device, default_batch(plan.device))
    n = len(source.train)
    for start in range(0, n, _BLOCK):
        ids = np.arange(start, min(start + _BLOCK, n), dtype=np.int64)
        images = torch.from_numpy(source.train.read(ids)).to(plan.device)
        recorder.update(ids, *forward.identity(images, ids, precision))
    recorder.end_epoch()


def _precision(training: str) -> Precision:
    return "bfloat16" if training == "bf16" else "float32"


def _share(advance: Advance, recording: Recording, run: int) -> Advance:
    """The progress of one run as part of that of all."""
    before, runs = (run, recording.runs) if recording.only is None else (0, 1)
    return lambda done, total, note: advance(before * total + done, runs * total, f"run {run} {note}")
