"""One training run in memory: network, optimizer and position, saved and restored after any step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.data.stateless_random import Purpose, hash64
from kdfast.data.views import apply_views
from kdfast.device import autocast, network_dtype
from kdfast.distillation.batches import Batch
from kdfast.distillation.cuda_graph import EXCLUSIVE, CapturedStep
from kdfast.distillation.losses.base import BatchSamples, Outputs
from kdfast.distillation.losses.plan import collect_samples
from kdfast.distillation.losses.total import LossTerms
from kdfast.distillation.plan import Plan
from kdfast.distillation.recipe.average import WeightAverage
from kdfast.distillation.recipe.mixing import mix_images, partner_labels
from kdfast.distillation.recipe.optimizer import ScheduledOptimizer, compute_learning_rate
from kdfast.distillation.targets import CachedFeatures, CachedTargets, OnlineTargets
from kdfast.distributed.batch_norm import SynchronizedBatchNorms
from kdfast.errors import CheckpointError, DivergedError
from kdfast.files import schemas
from kdfast.files.validate import check_type
from kdfast.nets.checkpoint import Model
from kdfast.nets.initial import build_started_net
from kdfast.nets.taps import TapRecorder
from kdfast.ops.float32 import full_float32
from kdfast.ops.kd_loss import kd_loss


class Trainer:
    """Trains a student step by step.

    The weights after any step depend on the plan alone, not on interruptions: everything random is a function of
    (seed, epoch, sample), and the saved state holds the rest.

    Args:
        plan: The plan of the run.
    """

    def __init__(self, plan: Plan) -> None:
        config, device = plan.config, plan.device
        self.plan = plan
        self.batches = plan.batches()
        self.total_steps = plan.steps
        warmup_steps = round(config.warmup_epochs * self.batches.per_epoch)
        torch.manual_seed(config.seed)
        self.net = build_started_net(config.student, len(plan.source.classes), config.init)
        self.net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Initialized after the student, whose weights do not depend on the terms.
        samples = collect_samples(plan.source, plan.ids, config.seed)
        self.terms = LossTerms(config.terms, plan.terms.shapes, samples).to(device)
        self._taps = TapRecorder(self.net, plan.terms.student)
        self._cached_features = (
            CachedFeatures(plan.targets.cache, plan.ids, device)
            if isinstance(plan.targets, CachedTargets) and plan.terms.student
            else None
        )
        # Batch norms take the whole batch, of which a process has a part.
        self._batch_norms: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext()
            if plan.distributed.world_size == 1
            else SynchronizedBatchNorms(compiled=plan.execution.compile)
        )
        network = plan.distributed.wrap(self.net, device, static=not config.initial_phase)
        # Compiled anew for the smaller last batch of an epoch: code for any size would be slower.
        self._forward = torch.compile(network, dynamic=False) if plan.execution.compile else network
        groups: list[dict[str, Any]] = [{"params": list(self.net.parameters())}, *self.terms.parameter_groups()]
        self.optimizer = ScheduledOptimizer(
            groups,
            partial(compute_learning_rate, config.lr, config.schedule, total=self.total_steps, warmup=warmup_steps),
            self.total_steps,
            kind=config.optimizer,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            device=device,
        )
        self._average = WeightAverage(self.net, config.ema) if config.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.labels = torch.from_numpy(plan.source.train.labels).to(device)
        self.step = 0
        self.train_seconds = 0.0
        self.loss_sum = torch.zeros((), device=device, dtype=torch.float64)
        self.loss_steps = 0
        # What a step on a GPU changes is on the GPU, and changed in place: a CUDA graph remembers addresses.
        self._step_on_device = torch.zeros((), device=device, dtype=torch.int64)
        self._bad_step = torch.full((), -1, device=device, dtype=torch.int64)
        self._captured = CapturedStep(device) if plan.can_capture() else None

    @property
    def epoch(self) -> int:
        """Epoch of the next step."""
        return self.step // self.batches.per_epoch

    def state(self) -> dict[str, Any]:
        """Return everything that the remaining steps depend on, as tensors and plain values."""
        cuda = self.plan.device.type == "cuda"
        return {
            "step": self.step,
            "train_seconds": self.train_seconds,
            "net": self.net.state_dict(),
            "terms": self.terms.state_dict(),
            "optimizer": self.optimizer.inner.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum,
            "loss_steps": self.loss_steps,
            **({} if self._average is None else {"average": self._average.net.state_dict()}),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.plan.device) if cuda else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a saved state, before the first step.

        Raises:
            CheckpointError: If it is not a state of this run.
        """
        advice = "choose another `out`"
        check_type(state, schemas.TrainingState, "the checkpoint", error=CheckpointError, advice=advice)
        if not state["loss_steps"] <= state["step"] <= self.total_steps:
            raise CheckpointError(
                f"the checkpoint is of step {state['step']}, with a loss over {state['loss_steps']}, and this run has "
                f"{self.total_steps} steps: {advice}"
            )
        try:
            self.net.load_state_dict(state["net"])
            self.terms.load_state_dict(state.get("terms", {}))
            self.optimizer.load_state_dict(state["optimizer"])
            if self._average is not None:
                self._average.net.load_state_dict(state["average"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.train_seconds = state["step"], state["train_seconds"]
            self._step_on_device.fill_(self.step)
            self.loss_sum.copy_(state["loss_sum"])
            self.loss_steps = state["loss_steps"]
            torch.set_rng_state(state["rng"])
            if state["cuda_rng"] is not None and self.plan.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.plan.device)
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"the checkpoint does not fit this run ({error}): {advice}") from error

    def stream(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which all steps must run, and everything else that uses the network meanwhile."""
        return contextlib.nullcontext() if self._captured is None else self._captured.stream()

    def wait(self) -> None:
        """Wait until the steps on a GPU are done, so that whatever follows does not."""
        if self._captured is not None:
            self._captured.wait()

    def close(self) -> None:
        """Free what the steps need on a GPU; no step may follow."""
        if self._captured is not None:
            self._captured.close()

    @property
    def in_initial_phase(self) -> bool:
        """Whether only the terms with a phase of their own train at the next step."""
        return self.step < self.plan.config.initial_phase * self.batches.per_epoch

    def train_step(self, batch: Batch) -> None:
        """Take one step. On a GPU, return before it is done."""
        if self._captured is None or self.in_initial_phase:
            with EXCLUSIVE:
                self._take_step(batch)
        else:
            self._captured(batch, self._take_step)
        self.loss_steps += 1
        self.step += 1

    def _take_step(self, batch: Batch) -> None:
        with full_float32() if self.plan.config.precision == "fp32" else contextlib.nullcontext():
            self._update(batch)

    def _update(self, batch: Batch) -> None:
        plan, config = self.plan, self.plan.config
        self._seed_process()
        self.optimizer.set_rate(self.step, self._step_on_device)
        spec = plan.source.view_spec
        ids, view_ids = batch.view_arguments(spec)
        inputs = apply_views(
            batch.images, view_ids, spec, plan.normalization,
            sample_ids=ids, rows=batch.image_rows, boxes=batch.boxes,
            dtype=network_dtype(config.precision),
        )  # fmt: skip
        if batch.mixing is not None:
            inputs = mix_images(inputs, batch.mixing)[batch.leading :]
        with autocast(plan.device, config.precision), self._taps, self._batch_norms:
            logits = self._network()(inputs)
        teacher_taps: dict[str, Tensor] = {}
        if isinstance(plan.targets, OnlineTargets):
            teacher = plan.targets.compute(batch.images, batch.image_rows, view_ids, ids, batch.boxes, batch.mixing)
            batch = dataclasses.replace(batch, teacher=teacher.logits[batch.leading :], index=batch.index[:2])
            teacher_taps = {name: tap[batch.leading :] for name, tap in teacher.taps.items()}
        loss = self.compute_loss(logits, batch)
        if config.terms:
            loss = self._add_terms(loss, logits, batch, teacher_taps)
        if plan.distributed.world_size > 1:
            # Gradients are averaged over processes whose shares of a batch may differ by one sample.
            loss = loss * (len(batch.ids) * plan.distributed.world_size / self.batches.global_size(self.step))
        self.optimizer.inner.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._average_over_processes()
        if config.clip:
            self.scaler.unscale_(self.optimizer.inner)
            torch.nn.utils.clip_grad_norm_(self.optimizer.parameters(), config.clip)
        self.scaler.step(self.optimizer.inner)
        self.scaler.update()
        if self._average is not None:
            self._average.update(self._step_on_device)
        self._count_step(loss.detach())

    def _seed_process(self) -> None:
        """Let the network draw other random numbers in each process, and the same ones after a resume."""
        if self.plan.distributed.world_size > 1:
            words = (Purpose.NETWORK, self.plan.config.seed, self.step, self.plan.distributed.rank)
            torch.manual_seed(int(hash64(*words)[0]))

    def _network(self) -> Callable[[Tensor], Tensor]:
        """Return the network to call: not the wrapped one while a part of it may get no gradient, which that needs."""
        several = self.plan.distributed.world_size > 1
        return self.net if several and self.in_initial_phase else self._forward

    def _average_over_processes(self) -> None:
        """Average the gradients that the wrapped network does not."""
        if self.plan.distributed.world_size == 1:
            return
        mean = self.plan.distributed.mean
        for part in (self.terms, *((self.net,) if self.in_initial_phase else ())):
            for parameter in part.parameters():
                if parameter.grad is not None:
                    mean(parameter.grad)

    def compute_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of a batch without terms: distillation with a teacher, else cross-entropy in float32.

        Of mixed images, it is the loss with the labels mixed likewise; the teacher has seen the mixed images.
        """
        labels = self.labels[batch.ids]
        loss = self._labeled_loss(logits, labels, batch)
        if batch.mixing is None:
            return loss
        partners = partner_labels(self.labels[batch.index[0]])[batch.leading :]
        return torch.lerp(self._labeled_loss(logits, partners, batch), loss, batch.mixing[0])

    def _labeled_loss(self, logits: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        config = self.plan.config
        total = 1.0 if config.ce is None else config.ce + config.alpha
        if batch.teacher is None or total == 0:
            return total * F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
        loss = kd_loss(
            logits,
            labels,
            batch.teacher,
            batch.teacher_rows,
            alpha=config.alpha / total,
            temperature=config.temperature,
            label_smoothing=config.label_smoothing,
        )
        return loss if total == 1 else total * loss

    def _add_terms(self, loss: Tensor, logits: Tensor, batch: Batch, teacher_taps: dict[str, Tensor]) -> Tensor:
        """Return the loss with the terms, in float32; in the initial phase, the terms of that phase alone."""
        assert batch.teacher is not None, "terms need a teacher"
        rows = batch.teacher_rows
        teacher = batch.teacher if rows is None else batch.teacher.index_select(0, rows)
        if self._cached_features is not None:
            teacher_taps = self._cached_features.take(batch.ids)
        with self._batch_norms:
            terms: Tensor = self.terms(
                Outputs(logits, self._taps.take()).in_float32(),
                Outputs(teacher, teacher_taps).in_float32(),
                self.labels[batch.ids],
                BatchSamples(batch.ids, self._step_on_device, self.plan.distributed.gather),
                initial=self.in_initial_phase,
            )
        return terms if self.in_initial_phase else loss + self._terms_weight() * terms

    def _terms_weight(self) -> Tensor | float:
        """Return the factor of all terms at this step, from a number on the device."""
        config, per_epoch = self.plan.config, self.batches.per_epoch
        warmup = config.terms_warmup_epochs * per_epoch
        if not warmup:
            return 1.0
        done = self._step_on_device - config.initial_phase * per_epoch
        return ((done + 1) / warmup).clamp(max=1.0).float()

    def _count_step(self, loss: Tensor) -> None:
        """Add up the loss and record the first step whose loss is not finite, without synchronizing the device."""
        first_bad = (self._bad_step < 0) & ~torch.isfinite(loss)
        self._bad_step.copy_(torch.where(first_bad, self._step_on_device, self._bad_step))
        self._step_on_device += 1
        self.loss_sum += loss

    def check_finite(self) -> None:
        """Raise if a loss or a weight is not finite. Synchronizes the device.

        Raises:
            DivergedError: Names the first such step.
        """
        state = [*self.net.state_dict().values(), *self.terms.state_dict().values()]
        values = [v for v in state if v.is_floating_point()]
        # The norm is not finite if a value is not, and takes a few launches for all tensors together.
        largest = torch.nn.utils.get_total_norm(values, norm_type=float("inf"))
        bad, weights_are_finite = torch.stack([self._bad_step.double(), torch.isfinite(largest).double()]).tolist()
        if bad < 0 and weights_are_finite:
            return
        bad, what = (int(bad), "loss is") if bad >= 0 else (self.step - 1, "weights are")
        raise DivergedError(
            f"the {what} not finite at step {bad} (epoch {bad // self.batches.per_epoch}): lower `lr`, add "
            "`warmup_epochs`, or check the data and the teacher. The files of this run are kept; the corrected run "
            "replaces them if they hold no checkpoint and no recorded epoch, else it needs another `out`"
        )

    def share_loss(self) -> Tensor:
        """Return the sum of the losses since the last metrics, which from now on is the same in all processes."""
        return self.plan.distributed.mean(self.loss_sum)

    def take_metrics(self) -> dict[str, Any]:
        """Return a row for metrics.jsonl with the mean loss since the last call, and reset the mean."""
        total = self.share_loss()
        row = {
            "step": self.step,
            "epoch": (self.step - 1) // self.batches.per_epoch,
            "loss": float(total) / max(self.loss_steps, 1),
            "lr": self.optimizer.rate(self.step - 1),
            "train_seconds": round(self.train_seconds, 3),
        }
        self.loss_sum.zero_()
        self.loss_steps = 0
        return row

    def model(self) -> Model:
        """Return the student in its current state: with averaged weights, if the run averages them."""
        source = self.plan.source
        return Model(
            net=self.net if self._average is None else self._average.net,
            name=self.plan.config.student,
            classes=len(source.classes),
            class_names=source.classes,
            normalization=self.plan.normalization,
            metadata={
                "data": source.fingerprint,
                "input_size": list(source.view_spec.size),
                "steps": self.step,
                "config": self.plan.config.to_dict(),
            },
        )
