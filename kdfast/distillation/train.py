"""The training loop, from the last checkpoint in the run's folder to its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kdfast.distillation.cuda_graph import EXCLUSIVE
from kdfast.distillation.folder import MetricsFile, RunFolder
from kdfast.distillation.plan import Plan
from kdfast.distillation.trainer import Trainer
from kdfast.distributed.ending import notice_lost_process
from kdfast.errors import Interrupted, OutputError
from kdfast.files.interrupt import StopRequest
from kdfast.nets.checkpoint import save_model
from kdfast.progress import Progress
from kdfast.teacher.evaluate import evaluate, evaluate_in_detail
from kdfast.trackers import Tracker

# Steps between two looks at whether several processes shall stop or save: each is a reduction that waits.
STOP_CHECK_STEPS = 20


@dataclass(frozen=True)
class Monitoring:
    """Logging, evaluation, checkpoints and callbacks of a run; none of them changes the weights.

    Attributes:
        log_every: Steps between two rows of metrics.jsonl; the last step of an epoch or of the run is always logged.
        eval_every: Epochs between two evaluations on the test split, for curves only; 0: only at the end of the run.
        checkpoint_seconds: Seconds between two checkpoints.
        trackers: Get the values of every logged step that metrics.jsonl does not hold yet.
        progress: Called with (steps done, steps in total, note) for every logged step.
        say: Called with a line about what happened, such as where the run resumes.
        keep_checkpoints: Keep the checkpoints of the finished run.
        on_epoch_end: Called with the trainer after the last step of each whole epoch, before any checkpoint that
            includes that step. After a resume from an older checkpoint it is called for the same epochs again.
    """

    log_every: int = 50
    eval_every: int = 0
    checkpoint_seconds: float = 30.0
    trackers: Sequence[Tracker] = ()
    progress: Progress | None = None
    say: Callable[[str], None] | None = None
    keep_checkpoints: bool = False
    on_epoch_end: Callable[[Trainer], None] | None = None


def train(
    plan: Plan,
    folder: RunFolder,
    monitoring: Monitoring | None = None,
    make_trainer: Callable[[Plan], Trainer] = Trainer,
) -> dict[str, Any]:
    """Train to the end of the plan, resuming from the folder's last checkpoint.

    Args:
        plan: The plan of the run.
        folder: The run's folder, entered.
        monitoring: Logging, evaluation, checkpoints and callbacks.
        make_trainer: Returns a trainer of the plan, before its first step.

    Returns:
        The content of result.json; an empty dict in processes other than the main one. The result of a finished run is
        returned without training again.

    Raises:
        DivergedError: If the loss is not finite; the last good checkpoint is kept.
        Interrupted: After SIGTERM or Ctrl-C, with the state saved.
        OutputError: If the folder cannot be written, or is not the same for all processes.
    """
    monitoring = monitoring or Monitoring()
    plan.distributed.barrier()  # the main process has claimed the folder
    finished = folder.read_result()
    _check_same(plan, folder, int(finished is not None))
    if finished is not None:
        if folder.read_state() != "finished":  # a kill after the result was written
            _end(folder, monitoring, finished["steps"])
        return finished
    with EXCLUSIVE:
        trainer = make_trainer(plan)
    saved = folder.load_checkpoint()
    if saved is not None:
        with EXCLUSIVE:
            trainer.load_state(saved)
    _check_same(plan, folder, trainer.step)
    loop = _TrainingLoop(trainer, folder, monitoring)
    if saved is not None and monitoring.say is not None and folder.writes:
        monitoring.say(f"resuming at step {trainer.step} of {trainer.total_steps}")
    try:
        with StopRequest() as stop, trainer.stream(), notice_lost_process():
            loop.run(stop)
        with EXCLUSIVE:
            return loop.finish()
    except Exception as error:
        state = "interrupted" if isinstance(error, Interrupted) else "failed"
        folder.write_status(state, **loop.position(), reason=str(error))
        raise
    finally:
        trainer.close()
        if loop.metrics is not None:
            loop.metrics.close()


def _check_same(plan: Plan, folder: RunFolder, found: int) -> None:
    """Raise OutputError if the processes found different states of the run, which their gradients would mix."""
    if plan.distributed.world_size == 1:
        return
    if len(set(plan.distributed.gather(torch.tensor([found], device=plan.device)).tolist())) > 1:
        raise OutputError(
            f"the processes find different states of the run in {folder.path}: choose an `out` that all machines see"
        )


class _TrainingLoop:
    """Runs a trainer and writes its folder."""

    def __init__(self, trainer: Trainer, folder: RunFolder, monitoring: Monitoring) -> None:
        self.trainer, self.folder, self.monitoring = trainer, folder, monitoring
        self.metrics = MetricsFile(folder.path / "metrics.jsonl") if folder.writes else None
        self.saved_at = time.monotonic()
        self.logged = trainer.step, trainer.train_seconds
        self.accuracy: float | None = None  # of the last evaluation

    def position(self) -> dict[str, int]:
        return {"step": self.trainer.step, "steps": self.trainer.total_steps}

    def run(self, stop: StopRequest) -> None:
        """Run all remaining steps. `train_seconds` excludes logging and saving."""
        trainer, monitoring = self.trainer, self.monitoring
        self.folder.write_status("running", **self.position())
        while trainer.step < trainer.total_steps:
            batches = trainer.batches.epoch(trainer.epoch, trainer.step % trainer.batches.per_epoch)
            clock = time.perf_counter()
            try:
                for batch in batches:
                    trainer.train_step(batch)
                    epoch_ended = trainer.step % trainer.batches.per_epoch == 0
                    ended = trainer.step == trainer.total_steps
                    must_log = epoch_ended or ended or trainer.step % monitoring.log_every == 0
                    must_stop = self.stop_requested(stop, wait=must_log)
                    must_save = must_stop or self.save_due(wait=must_log)
                    if not (must_log or must_save):
                        continue
                    trainer.wait()
                    trainer.train_seconds += time.perf_counter() - clock  # not the wait for other runs, which follows
                    with EXCLUSIVE:
                        trainer.check_finite()
                        if must_log:
                            self.log(epoch_ended)
                        if epoch_ended and monitoring.on_epoch_end is not None:
                            monitoring.on_epoch_end(trainer)
                        if must_save:
                            self.save()
                    if must_stop:
                        raise self.interruption(stop)
                    if ended:
                        break
                    clock = time.perf_counter()
            finally:
                batches.close()
        with EXCLUSIVE:
            trainer.check_finite()
            self.save()
        # A signal during the last log and save must still stop the commands that follow this one.
        if self.stop_requested(stop, wait=True):
            raise self.interruption(stop)

    def stop_requested(self, stop: StopRequest, *, wait: bool) -> bool:
        """Return whether any process of the run was asked to stop; always False at most steps of several processes.

        Args:
            stop: The request to this process.
            wait: Look at this step, whatever its number; the same in every process.
        """
        return self._any_process(bool(stop.signal_name), wait)

    def save_due(self, *, wait: bool) -> bool:
        """Return whether it is time for a checkpoint by the clock of the main process; likewise."""
        due = time.monotonic() - self.saved_at > self.monitoring.checkpoint_seconds
        return self._any_process(due and self.folder.writes, wait)

    def _any_process(self, flag: bool, wait: bool) -> bool:
        distributed = self.trainer.plan.distributed
        if distributed.world_size > 1 and not wait and self.trainer.step % STOP_CHECK_STEPS:
            return False
        return distributed.any(flag, self.trainer.plan.device)

    def interruption(self, stop: StopRequest) -> Interrupted:
        return Interrupted(
            f"stopped by {stop.signal_name or 'another process'} after step {self.trainer.step} of "
            f"{self.trainer.total_steps}: run the same command again to resume"
        )

    def save(self) -> None:
        self.trainer.share_loss()
        self.folder.save_checkpoint(self.trainer.state(), self.trainer.step)
        self.folder.write_status("running", **self.position())
        self.saved_at = time.monotonic()

    def log(self, epoch_ended: bool) -> None:
        trainer, monitoring, plan = self.trainer, self.monitoring, self.trainer.plan
        row = trainer.take_metrics()
        if self.metrics is None:
            return
        if epoch_ended and monitoring.eval_every and (row["epoch"] + 1) % monitoring.eval_every == 0:
            scores = evaluate(trainer.model(), plan.source.test, device=plan.device, view_spec=plan.source.view_spec)
            row |= {"test_top1": scores["top1"], "test_loss": scores["loss"]}
            self.accuracy = scores["top1"]
        is_new = row["step"] > self.metrics.last_step
        self.metrics.append(row)
        speed = self.images_per_second()
        if is_new:
            self.track(row["step"], {**row, "images_per_second": speed})
        if monitoring.progress is not None:
            known = "" if self.accuracy is None else f" top-1 {self.accuracy:.2f}"
            note = f"epoch {row['epoch'] + 1}/{plan.config.epochs} loss {row['loss']:.3f}{known} {speed:.0f} images/s"
            monitoring.progress(row["step"], trainer.total_steps, note)

    def track(self, step: int, values: Mapping[str, Any]) -> None:
        for tracker in self.monitoring.trackers:
            tracker.log(step, {name: value for name, value in values.items() if name != "step"})

    def images_per_second(self) -> float:
        """Return the images per second of training since the last call, a step having as many as an epoch's average."""
        trainer, (step, seconds) = self.trainer, self.logged
        self.logged = trainer.step, trainer.train_seconds
        images = (trainer.step - step) * len(trainer.plan.ids) / trainer.batches.per_epoch
        passed = trainer.train_seconds - seconds
        return images / passed if passed > 0 else 0.0

    def finish(self) -> dict[str, Any]:
        """Evaluate, save the student, and write the result last, because it marks the run as finished."""
        trainer, plan = self.trainer, self.trainer.plan
        if not self.folder.writes:
            return {}
        started = time.perf_counter()
        model = trainer.model()
        scores = evaluate_in_detail(
            model,
            plan.source.test,
            teacher=plan.teacher,
            device=plan.device,
            view_spec=plan.source.view_spec,
        )
        model.metadata.update({"test_top1": scores["top1"], "test_top5": scores["top5"]})
        save_model(self.folder.path / "student.pt", model)
        images = plan.images
        stage_seconds = {"train": trainer.train_seconds, "evaluate": time.perf_counter() - started}
        result: dict[str, Any] = {
            "test_top1": scores["top1"],
            "test_top5": scores["top5"],
            "test_loss": scores["loss"],
            **{name: scores[name] for name in ("per_class", "calibration", "agreement") if name in scores},
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
            "cost_seconds": plan.stage_seconds | stage_seconds,
        }
        self.track(trainer.step, {f"test_{name}": scores[name] for name in ("top1", "top5", "loss")})
        self.folder.write_result(result)
        _end(self.folder, self.monitoring, trainer.step)
        return result


def _end(folder: RunFolder, monitoring: Monitoring, steps: int) -> None:
    """Delete what a finished run does not need, and say in its status that it is finished."""
    if not monitoring.keep_checkpoints:
        folder.delete_checkpoints()
    folder.write_status("finished", step=steps, steps=steps)
