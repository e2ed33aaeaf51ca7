"""Plan a flow: check it, measure this machine, and say how long each stage takes and what pruning saves."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch

from kdfast.data.holdout import hold_out
from kdfast.data.source import Source
from kdfast.distillation.inputs import check_student
from kdfast.dynamics.format import bits_per_sample
from kdfast.errors import UsageError
from kdfast.estimates import measure_cache, recorded_bytes
from kdfast.files.space import free_space
from kdfast.nets.checkpoint import Model
from kdfast.nets.fit import check_fit
from kdfast.nets.head import check_linear_head
from kdfast.nets.initial import build_started_net
from kdfast.planning.calibrate import Calibration
from kdfast.planning.rates import Rates
from kdfast.planning.request import (
    Amounts,
    CacheSettings,
    PlanRequest,
    complete_selection,
    differentiates,
    flattening_of,
    measure_amounts,
    needs_online_teacher,
)
from kdfast.planning.savings import paying_students
from kdfast.planning.stages import Flow, Sizes, Stage, pruned_flow, whole_flow
from kdfast.teacher.build import row_format

_STATES = 2  # checkpoints that a run keeps while it trains


@dataclass(frozen=True)
class FlowPlan:
    """What a flow takes on this machine.

    Attributes:
        amounts: The work.
        rates: The rates that were measured.
        pruned: Distilling on the kept samples.
        same_epochs: Distilling on all samples, for as many epochs.
        same_steps: Distilling on all samples, for as many steps.
        free: Free bytes of the disk.
        measured: Seconds that the measurements took.
    """

    amounts: Amounts
    rates: Rates
    pruned: Flow
    same_epochs: Flow
    same_steps: Flow
    free: int
    measured: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        flows = {"pruned": self.pruned, "same_epochs": self.same_epochs, "same_steps": self.same_steps}
        return {
            "amounts": dataclasses.asdict(self.amounts),
            "rates": dataclasses.asdict(self.rates),
            "flows": {name: _flow_facts(flow) for name, flow in flows.items()},
            "paying_students": {
                name: paying_students(self.pruned, flows[name]) for name in ("same_epochs", "same_steps")
            },
            "free_bytes": self.free,
            "measured_seconds": self.measured,
        }


def make_plan(request: PlanRequest, source: Source, model: Model | None, *, opening: float = 0.0) -> FlowPlan:
    """Plan a flow. Nothing is kept on disk.

    Args:
        request: The flow; its `device` is available.
        source: The data, augmented as the run shall.
        model: The teacher, or None if none is needed.
        opening: Seconds that opening the data took.

    Raises:
        UsageError: Options do not fit together or the data, or a teacher is needed and there is none.
        SubsetError, CheckpointError: As the stages raise them.
    """
    if request.jobs > 1 and request.device.type != "cpu":
        raise UsageError(f"`jobs` is {request.jobs}, and what jobs share a GPU is not measured: pass 1, or a CPU")
    if request.jobs > request.students:
        raise UsageError(f"`jobs` is {request.jobs}, more than `students`, {request.students}: pass at most as many")
    request = _complete(request, model)
    score_needs = request.selection.cache is not None or differentiates(request.selection) is not None
    if model is None and (request.config.needs_teacher or score_needs):
        raise UsageError("a stage needs the teacher: pass `teacher`, or `alpha` 0 and a method that needs none")
    if model is not None:
        check_fit(model, source, "`teacher`")
    held_out = _held_out(request, source, model)
    amounts = measure_amounts(request, source, model, held_out)
    check_student(request.config, amounts.kept, source, request.device)
    rows = None
    if model is not None:
        _check_cache(request.cache, model, source)
        rows = row_format(model, request.cache.dtype, request.cache.top_k, request.cache.kind)
    started = time.perf_counter()
    calibration = Calibration(request, source, model, amounts, rows)
    rates = calibration.measure(opening)
    sizes = _sizes(calibration)
    return FlowPlan(
        amounts,
        rates,
        pruned=pruned_flow(amounts, rates, sizes),
        same_epochs=whole_flow(amounts, rates, sizes, same_steps=False),
        same_steps=whole_flow(amounts, rates, sizes, same_steps=True),
        free=free_space(request.out),
        measured=time.perf_counter() - started,
    )


def _complete(request: PlanRequest, model: Model | None) -> PlanRequest:
    """Return the request with what follows from its parts."""
    selection = complete_selection(request)
    online = request.online or (request.config.needs_teacher and needs_online_teacher(request.config))
    recorded = request.recorded
    if selection.dynamics is not None and recorded is None:
        raise UsageError(f"{selection.method} needs recorded dynamics: pass the network to record, `dynamics_net`")
    return dataclasses.replace(request, selection=selection, online=online, recorded=recorded)


def _check_cache(settings: CacheSettings, model: Model, source: Source) -> None:
    """Check that the cache can be made, as `build_cache` does."""
    if settings.top_k is not None:
        if settings.kind == "features":
            raise UsageError("`top_k` chooses among logits, and `kind` is features, which give all of them: omit one")
        settings.top_k.check(model.classes)
    if settings.kind == "features":
        check_linear_head(model.net, model.name, source.view_spec.size)


def _held_out(request: PlanRequest, source: Source, model: Model | None) -> int:
    config = flattening_of(request.selection, model)
    if config is None:
        return 0
    return len(hold_out(source.train.labels, len(source.classes), share=config.held, seed=config.seed)[1])


def _sizes(calibration: Calibration) -> Sizes:
    request, source, rows, model = calibration.request, calibration.source, calibration.rows, calibration.model
    with torch.random.fork_rng(devices=[]):
        student = build_started_net(request.config.student, len(source.classes), request.config.init)
    recorded = 0
    if calibration.amounts.recorded_epochs and request.recorded is not None:
        bits = bits_per_sample(request.recording.top_k, len(source.classes), request.recording.record)
        recorded = recorded_bytes(
            request.recorded.student,
            source,
            bits=bits * calibration.amounts.recorded_epochs,
            feature_epochs=len(request.recording.selected_runs),
        )
    weights = _bytes(student)

    def cache(samples: int, views: int) -> int:
        if rows is None or model is None:
            return 0
        return measure_cache(model, source, samples=samples, n_views=views, rows=rows).total

    return Sizes(
        cache=cache,
        recorded=recorded,
        network=0 if model is None else _bytes(model.net),
        run=weights * (1 + 2 * _STATES),
    )


def _bytes(net: torch.nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in net.state_dict().values())


def _flow_facts(flow: Flow) -> dict[str, Any]:
    return {
        "stages": [_stage_facts(stage) for stage in (*flow.once, flow.each)],
        "students": flow.students,
        "jobs": flow.jobs,
        "seconds": flow.seconds,
        "bytes": flow.size,
    }


def _stage_facts(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "work": stage.work,
        "seconds": stage.seconds,
        "parts": dict(stage.parts),
        "bytes": stage.size,
    }
