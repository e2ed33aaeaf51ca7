"""Steps replayed as CUDA graphs. Without a GPU, recorded operators stand in for a graph.

As in a CUDA graph, a replay reads and writes the recorded tensors, and values that Python computed stay as they were.
Only PyTorch's own operators are recorded, so that the steps run on the reference backend.
"""

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kdfast.data.loaders import ResidentLoader
from kdfast.data.source import Source, compute_normalization
from kdfast.data.views import ViewSpec
from kdfast.distillation import cuda_graph
from kdfast.distillation.batches import Batch
from kdfast.distillation.config import Execution, RunConfig
from kdfast.distillation.cuda_graph import CapturedStep
from kdfast.distillation.folder import RunFolder
from kdfast.distillation.plan import LoadedInputs, Plan
from kdfast.distillation.recipe import optimizer
from kdfast.distillation.record_dynamics import BatchRecordingTrainer
from kdfast.distillation.targets import CachedTargets, TeacherTargets
from kdfast.distillation.train import train
from kdfast.distillation.trainer import Trainer
from kdfast.dynamics.batches import BatchCorrectness
from kdfast.nets.checkpoint import Model
from kdfast.teacher.cache import TeacherCache

CPU = torch.device("cpu")
READS_VALUES = "aten._local_scalar_dense"


class RecordedGraph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # On a CPU, the range of indices is checked; nothing else may be read.
        if str(func).startswith(READS_VALUES) and args[0].is_floating_point():
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **kwargs)
        # Detached: the same memory without the graph of autograd.
        recorded = tree_map_only(Tensor, Tensor.detach, (args, kwargs, tensors(out)))
        self.calls.append((func, *recorded))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """Run the recorded operators again, below autograd, which recorded its own operators."""
        for func, args, kwargs, outputs in self.calls:
            again = tensors(func(*args, **kwargs))
            for output, new in zip(outputs, again, strict=True):
                if output.data_ptr() != new.data_ptr():
                    output.copy_(new)


class Emulation:
    """Replaces the parts of `torch.cuda` that capture a step.

    Args:
        state: Returns the tensors that a step changes; capturing must leave them as they were.
    """

    def __init__(self, state: Callable[[], list[Tensor]]) -> None:
        self.state = state
        self.graphs: list[RecordedGraph] = []
        self.trainers: list[Trainer] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Patch `torch.cuda`."""
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextlib.contextmanager
    def graph(self, graph: RecordedGraph, **options: Any) -> Iterator[None]:
        """Record a block, then undo what it changed."""
        before = [tensor.clone() for tensor in self.state()]
        try:
            with graph:
                yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(self.state(), before, strict=True):
                    tensor.copy_(value)
        self.graphs.append(graph)


class Stream:
    """A stream of a device without streams."""

    device = None

    def wait_stream(self, other: object) -> None:
        """Wait for nothing."""

    def synchronize(self) -> None:
        """Wait for nothing."""


def tensors(values: Any) -> list[Tensor]:
    """Return the tensors in nested values."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def run(plan: Plan, steps: int | None = None) -> Trainer:
    trainer = Trainer(plan)
    with trainer.stream():
        take_steps(trainer, steps or trainer.total_steps)
    return trainer


def take_steps(trainer: Trainer, stop: int) -> None:
    while trainer.step < stop:
        for batch in trainer.batches.epoch(trainer.epoch, trainer.step % trainer.batches.per_epoch):
            trainer.train_step(batch)
            if trainer.step == stop:
                break


def changed_by_steps(trainer: Trainer) -> list[Tensor]:
    buffers = [state["momentum_buffer"] for state in trainer.optimizer.inner.state.values()]
    counters = [trainer.loss_sum, trainer._step_on_device, trainer._bad_step, trainer.optimizer._rate]
    return [*trainer.net.state_dict().values(), *buffers, *[c for c in counters if c is not None]]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Emulation:
    """Let runs on the CPU capture their steps."""
    create = Trainer.__init__

    def remember(self: Trainer, plan: Plan) -> None:
        emulation.trainers[:] = [self]
        create(self, plan)

    emulation = Emulation(lambda: changed_by_steps(emulation.trainers[0]))
    emulation.install(monkeypatch)
    monkeypatch.setenv("KDFAST_BACKEND", "reference")
    monkeypatch.setattr(Trainer, "__init__", remember)
    monkeypatch.setattr(Plan, "can_capture", lambda self: self.execution.cuda_graph)
    monkeypatch.setattr(optimizer, "runs_on_device", lambda device: True)
    return emulation


def assert_same_state(a: Trainer, b: Trainer) -> None:
    assert a.step == b.step
    for one, other in zip(changed_by_steps(a), changed_by_steps(b), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["labels", "windows", "resident", "online"])
def test_replayed_steps_equal_plain_steps(
    make_plan: Callable[..., Plan],
    teacher: Model,
    cache: TeacherCache,
    kind: str,
    emulated: Emulation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = TeacherTargets(cache=cache if kind in ("windows", "resident") else None)
    if kind == "online":
        targets = TeacherTargets(model=teacher)
    plan = make_plan(targets, alpha=0.0 if kind == "labels" else 0.7)
    if kind == "resident":
        plan.targets = CachedTargets(cache, plan.ids, plan.config.views, plan.config.view_seed or 0, CPU, resident=True)
    replayed = run(plan)
    assert len(emulated.graphs) == 2, "one graph for full batches and one for the last, smaller batch"
    plan.execution = Execution(cuda_graph=False)
    assert_same_state(replayed, run(plan))
    assert len(emulated.graphs) == 2


def test_replayed_steps_of_crops_equal_plain_steps(source: Source, emulated: Emulation) -> None:
    source = dataclasses.replace(source, view_spec=ViewSpec("crop", (8, 8), flip=True, crops=6))
    inputs = LoadedInputs(source, ResidentLoader(source.train), compute_normalization(source.train), TeacherTargets())
    config = RunConfig("resnet8", epochs=4, batch_size=32, lr=0.1, schedule="cosine")
    plan = inputs.plan(config, np.arange(0, 303, 3, dtype=np.int64), device=CPU)
    replayed = run(plan)
    assert len(emulated.graphs) == 2
    plan.execution = Execution(cuda_graph=False)
    assert_same_state(replayed, run(plan))


def test_resumed_run_captures_again_and_ends_alike(
    make_plan: Callable[..., Plan], cache: TeacherCache, emulated: Emulation
) -> None:
    plan = make_plan(TeacherTargets(cache=cache), alpha=0.7)
    first = run(plan, steps=7)
    resumed = Trainer(plan)
    resumed.load_state(first.state())
    with resumed.stream():
        take_steps(resumed, resumed.total_steps)
    assert_same_state(resumed, run(plan))


def test_replayed_steps_record_correctness_as_plain_steps_do(
    make_plan: Callable[..., Plan], emulated: Emulation
) -> None:
    plan = make_plan(TeacherTargets())

    def recorded() -> tuple[Any, Any]:
        batches = BatchCorrectness(plan.source.train.labels, CPU)
        trainer = BatchRecordingTrainer(plan, batches)
        take_steps(trainer, trainer.total_steps)
        return batches.read()

    replayed = recorded()
    assert len(emulated.graphs) == 2
    plan.execution = Execution(cuda_graph=False)
    for one, other in zip(replayed, recorded(), strict=True):
        assert (one == other).all()
    assert replayed[1].sum() == len(plan.ids)
    assert 0.1 < replayed[0].sum() / len(plan.ids) < 0.9


def test_step_that_reads_a_value_runs_uncaptured(make_plan: Callable[..., Plan], emulated: Emulation) -> None:
    class Reading(Trainer):
        def compute_loss(self, logits: Tensor, batch: Batch) -> Tensor:
            loss = super().compute_loss(logits, batch)
            assert float(loss.detach()) > 0
            return loss

    plan = make_plan(TeacherTargets())
    trainer = Reading(plan)
    with pytest.warns(RuntimeWarning, match="cannot be a CUDA graph, so it is slower: operation not permitted"):
        take_steps(trainer, trainer.total_steps)
    assert not emulated.graphs
    plan.execution = Execution(cuda_graph=False)
    assert_same_state(trainer, run(plan))


def test_batch_size_is_captured_after_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    emulation = Emulation(list)
    emulation.install(monkeypatch)
    python_calls, places = [], set()

    def step(batch: Batch) -> None:
        python_calls.append(len(batch.ids))
        places.add((len(batch.ids), batch.index.data_ptr(), batch.images.data_ptr()))

    captured = CapturedStep(CPU)
    for size in (4, 4, 2, 4, 4, 2, 2, 4):
        index = torch.zeros((2, size), dtype=torch.int64)
        captured(Batch(index, torch.zeros((size, 1, 1, 3), dtype=torch.uint8), False, None, index), step)
    assert python_calls == [4, 4, 2, 4, 2, 2], "the third call of a size records it, later calls replay it"
    assert len(places) == 2, "the memory of a batch size is the same from its first step on"
    assert cuda_graph.WARMUP_STEPS == 2


def test_train_takes_its_steps_in_their_stream(
    make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[bool] = []
    depth = [0]

    @contextlib.contextmanager
    def stream(self: Trainer) -> Iterator[None]:
        depth[0] += 1
        yield
        depth[0] -= 1

    take_step = Trainer.train_step

    def watched(self: Trainer, batch: Batch) -> None:
        inside.append(depth[0] == 1)
        take_step(self, batch)

    monkeypatch.setattr(Trainer, "stream", stream)
    monkeypatch.setattr(Trainer, "train_step", watched)
    plan = make_plan(TeacherTargets())
    with RunFolder(tmp_path / "run", plan.identity) as folder:
        train(plan, folder)
    assert inside == [True] * 16


def test_trainer_with_graphs_is_freed_at_once(make_plan: Callable[..., Plan], emulated: Emulation) -> None:
    trainer = run(make_plan(TeacherTargets()))
    assert len(emulated.graphs) == 2
    emulated.state = list
    gone = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        emulated.trainers.clear()
        assert gone() is None
    finally:
        gc.enable()


def test_plans_without_a_gpu_capture_nothing(make_plan: Callable[..., Plan]) -> None:
    assert not make_plan(TeacherTargets()).can_capture()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["labels", "resident", "online"])
def test_captured_steps_on_a_gpu_equal_plain_steps(
    make_plan: Callable[..., Plan],
    teacher: Model,
    cache: TeacherCache,
    kind: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    targets = TeacherTargets(cache=cache if kind == "resident" else None, model=teacher if kind == "online" else None)
    plan = make_plan(targets, "cuda", alpha=0.0 if kind == "labels" else 0.7, precision=precision)
    captured = Trainer(plan)
    assert captured._captured is not None
    with captured.stream():
        take_steps(captured, 12)  # both batch sizes are captured by then
        torch.cuda.set_sync_debug_mode("error")
        try:
            take_steps(captured, captured.total_steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    plan.execution = Execution(cuda_graph=False)
    assert_same_state(captured, run(plan))
