"""The training loop: from wherever the run's folder stands to its result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kdfast.distill.folder import MetricsFile, RunFolder
from kdfast.distill.interrupt import StopRequest
from kdfast.distill.plan import Plan
from kdfast.distill.trainer import Trainer
from kdfast.errors import Interrupted
from kdfast.nets.checkpoint import save_model
from kdfast.teacher.evaluate import evaluate

Advance = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Watch:
    """How a run is watched; none of it changes the weights.

    Attributes:
        log_every: Steps between two rows of metrics.jsonl; the end of an epoch always has one.
        eval_every: Epochs between two evaluations on the test split, for curves only; 0: at the end alone.
        checkpoint_seconds: Time between two checkpoints.
        writer: A TensorBoard SummaryWriter, or None.
        advance: Told (steps done, steps in all, a line about the state).
        at_epoch_end: Given the trainer after the last step of each epoch, before any checkpoint that holds that step.
            After a resume from an older checkpoint it is given the same epochs again.
    """

    log_every: int = 50
    eval_every: int = 0
    checkpoint_seconds: float = 30.0
    writer: Any = None
    advance: Advance | None = None
    at_epoch_end: Callable[[Trainer], None] | None = None


def train(plan: Plan, folder: RunFolder, watch: Watch | None = None) -> dict[str, Any]:
    """Run the plan to its end, from wherever its folder stands.

    Args:
        plan: What to train on what.
        folder: The run's folder, entered.
        watch: Logging, evaluation and checkpoint intervals.

    Returns:
        The content of result.json; in processes other than the main one of a run, nothing. A finished run returns it
        without training again.

    Raises:
        DivergedError: If the loss is not finite; the last good checkpoint is kept.
        Interrupted: After SIGTERM or Ctrl-C, with the state saved.
        OutputError: If the folder cannot be written.
    """
    finished = folder.read_result()
    if finished is not None:
        return finished
    trainer = Trainer(plan)
    plan.ranks.barrier()
    saved = folder.load_checkpoint()
    if saved is not None:
        trainer.load_state(saved)
    run = _Run(trainer, folder, watch or Watch())
    try:
        with StopRequest() as stop:
            run.steps(stop)
        return run.finish()
    except Exception as error:
        folder.write_status(
            "interrupted" if isinstance(error, Interrupted) else "failed", **run.position(), reason=str(error)
        )
        raise
    finally:
        if run.metrics is not None:
            run.metrics.close()


class _Run:
    """A trainer, its folder and its clock."""

    def __init__(self, trainer: Trainer, folder: RunFolder, watch: Watch) -> None:
        self.trainer, self.folder, self.watch = trainer, folder, watch
        self.metrics = MetricsFile(folder.path / "metrics.jsonl") if folder.writes else None
        self.saved_at = time.monotonic()

    def position(self) -> dict[str, int]:
        return {"step": self.trainer.step, "steps": self.trainer.total_steps}

    def steps(self, stop: StopRequest) -> None:
        """All remaining steps. The clock runs while training and stands while logging and saving."""
        trainer = self.trainer
        self.folder.write_status("running", **self.position())
        while trainer.step < trainer.total_steps:
            batches = trainer.batches.epoch(trainer.epoch, trainer.step % trainer.batches.per_epoch)
            clock = time.perf_counter()
            try:
                for batch in batches:
                    trainer.train_step(batch)
                    epoch_ended = trainer.step % trainer.batches.per_epoch == 0
                    logs = epoch_ended or trainer.step % self.watch.log_every == 0
                    stops = self.stops(stop)
                    saves = stops or time.monotonic() - self.saved_at > self.watch.checkpoint_seconds
                    if not (logs or saves):
                        continue
                    trainer.check_finite()
                    trainer.train_seconds += time.perf_counter() - clock
                    if logs:
                        self.log(epoch_ended)
                    if epoch_ended and self.watch.at_epoch_end is not None:
                        self.watch.at_epoch_end(trainer)
                    if saves:
                        self.save()
                    if stops:
                        raise self.interrupted(stop)
                    clock = time.perf_counter()
            finally:
                batches.close()
        trainer.check_finite()
        self.save()
        # While the last step was logged and saved; what comes after this command must not start.
        if self.stops(stop):
            raise self.interrupted(stop)

    def stops(self, stop: StopRequest) -> bool:
        """Whether any process of the run was asked to stop."""
        return self.trainer.plan.ranks.any(bool(stop.signal_name), self.trainer.plan.device)

    def interrupted(self, stop: StopRequest) -> Interrupted:
        return Interrupted(
            f"stopped by {stop.signal_name or 'another process'} after step {self.trainer.step} of "
            f"{self.trainer.total_steps}; the same command goes on from there"
        )

    def save(self) -> None:
        self.folder.save_checkpoint(self.trainer.state(), self.trainer.step)
        self.folder.write_status("running", **self.position())
        self.saved_at = time.monotonic()

    def log(self, epoch_ended: bool) -> None:
        trainer, watch = self.trainer, self.watch
        row = trainer.take_metrics()
        if self.metrics is None:
            return
        if epoch_ended and watch.eval_every and (row["epoch"] + 1) % watch.eval_every == 0:
            scores = evaluate(
                trainer.model(), trainer.plan.source.test, device=trainer.plan.device, views=trainer.plan.source.views
            )
            row |= {"test_top1": scores["top1"], "test_loss": scores["loss"]}
        self.metrics.append(row)
        if watch.writer is not None:
            for name in sorted(row.keys() - {"step", "epoch"}):
                watch.writer.add_scalar(name, row[name], row["step"])
        if watch.advance is not None:
            epochs = trainer.plan.config.epochs
            watch.advance(row["step"], trainer.total_steps, f"epoch {row['epoch'] + 1}/{epochs} loss {row['loss']:.3f}")

    def finish(self) -> dict[str, Any]:
        """Evaluate, save the student, and write the result last: from then on the run counts as finished."""
        trainer, plan = self.trainer, self.trainer.plan
        if not self.folder.writes:
            return {}
        started = time.perf_counter()
        model = trainer.model()
        scores = evaluate(model, plan.source.test, device=plan.device, views=plan.source.views)
        model.metadata.update({"test_top1": scores["top1"], "test_top5": scores["top5"]})
        save_model(self.folder.path / "student.pt", model)
        images = plan.config.epochs * len(plan.ids)
        costs = {"train": trainer.train_seconds, "evaluate": time.perf_counter() - started}
        result = {
            "test_top1": scores["top1"],
            "test_top5": scores["top5"],
            "test_loss": scores["loss"],
            "steps": trainer.step,
            "images": images,
            "seconds": trainer.train_seconds,
            "images_per_second": images / trainer.train_seconds,
            "kept": len(plan.ids),
            "alpha": plan.config.alpha,
            "views": plan.config.views,
            "loader": plan.loader.name,
            "targets": None if plan.targets is None else plan.targets.name,
            "weights": model.digest,
            "cost_seconds": plan.costs | costs,
        }
        self.folder.write_result(result)
        self.folder.write_status("finished", **self.position())
        return result
