"""A training step on a GPU waits for nothing and copies nothing from the CPU. Meta tensors show it without a GPU."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdfast.data.views import apply as views_module
from kdfast.data.views import view_table
from kdfast.distillation import targets as targets_module
from kdfast.distillation.batches import Batch
from kdfast.distillation.config import Execution
from kdfast.distillation.plan import Plan
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.trainer import Trainer
from kdfast.nets.checkpoint import Model
from kdfast.ops import backends
from kdfast.teacher.cache import TeacherCache


def tensors(values: Any) -> list[torch.Tensor]:
    """Return the tensors in nested values."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class StepCost(TorchDispatchMode):
    """Counts operators, and lists those that copy from the CPU to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count[name] += 1
        if name.startswith("aten._fused_sgd_"):
            return None  # has no implementation for meta tensors
        out = func(*args, **(kwargs or {}))
        # A scalar on the CPU is an argument of a kernel, unless the operator copies it.
        if any(t.is_meta for t in tensors(out)):
            given = [t for t in tensors((args, kwargs)) if t.device.type == "cpu"]
            self.copies += [name for t in given if t.dim() > 0 or "copy" in name]
        return out


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let meta tensors stand for those of a GPU; reading a value of one raises an error."""
    monkeypatch.setattr(targets_module, "fits_in_memory", lambda size, device: True)
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    # Caches of their own, which other tests on meta tensors must not see.
    monkeypatch.setattr(views_module, "_affine", functools.cache(views_module._affine.__wrapped__))
    monkeypatch.setattr(backends, "_resolve", functools.cache(backends._resolve.__wrapped__))
    for op in ("kd_loss", "views"):
        monkeypatch.setitem(backends.TABLE, (op, "meta"), ("triton",))


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_step_on_a_device_waits_for_nothing_and_copies_nothing(
    make_plan: Callable[..., Plan], cache: TeacherCache, alpha: float
) -> None:
    targets = TeacherTargets(cache=cache) if alpha else TeacherTargets()
    trainer = Trainer(make_plan(targets, "meta", alpha=alpha))
    trainer.optimizer.inner._need_device_dtype_check_for_fused = False
    for number, batch in enumerate(trainer.batches.epoch(0)):
        cost = StepCost()
        with cost:
            trainer.train_step(batch)
        assert len(cost.copies) <= (1 if number == 0 else 0), "only the first step copies the normalization"
        assert cost.count["kdfast.gather_views.default"] == 1
        assert cost.count["kdfast.kd_loss.default"] == (1 if alpha else 0)
        assert cost.count["aten._fused_sgd_.tensor_lr"] == 1
    assert trainer.step == 4


@pytest.mark.usefixtures("on_meta")
def test_no_recipe_waits_or_copies(make_plan: Callable[..., Plan]) -> None:
    recipe = {"optimizer": "nesterov", "label_smoothing": 0.1, "ema": 0.9, "clip": 1.0, "mixup": 0.2, "cutmix": 1.0}
    trainer = Trainer(make_plan(TeacherTargets(), "meta", alpha=0.0, **recipe))
    trainer.optimizer.inner._need_device_dtype_check_for_fused = False
    for number, batch in enumerate(trainer.batches.epoch(0)):
        cost = StepCost()
        with cost:
            trainer.train_step(batch)
        assert len(cost.copies) <= (1 if number == 0 else 0), "only the first step copies the normalization"
        assert cost.count["aten._fused_sgd_.tensor_lr"] == 1
    assert trainer.step == 4


def test_cost_of_a_synchronization_and_of_a_copy() -> None:
    with StepCost(), pytest.raises(RuntimeError, match="meta"):
        torch.ones(2, device="meta").sum().item()
    cost = StepCost()
    with cost:
        torch.ones(2).to("meta")
        torch.ones(2, device="meta") * torch.tensor(2.0)
    assert cost.copies == ["aten._to_copy.default"]


@pytest.mark.parametrize(("precision", "forbidden"), [("fp32", True), ("bf16", False)])
def test_training_in_float32_forbids_tf32(make_plan: Callable[..., Plan], precision: str, forbidden: bool) -> None:
    allowed = []

    class Looking(Trainer):
        def compute_loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
            allowed.append(torch.backends.cudnn.allow_tf32)
            return super().compute_loss(logits, batch)

    trainer = Looking(make_plan(TeacherTargets(), precision=precision))
    trainer.train_step(next(trainer.batches.epoch(0)))
    assert allowed == [not forbidden]
    assert torch.backends.cudnn.allow_tf32


def test_online_teacher_computes_in_float32(make_plan: Callable[..., Plan], teacher: Model) -> None:
    plan = make_plan(TeacherTargets(model=teacher), alpha=0.5, precision="bf16")
    allowed = []
    teacher.net.register_forward_hook(lambda *_: allowed.append(torch.backends.cudnn.allow_tf32))
    trainer = Trainer(plan)
    trainer.train_step(next(trainer.batches.epoch(0)))
    assert allowed == [False]


def test_trains_on_all_classes_of_a_cache_that_omits_some(make_plan: Callable[..., Plan], cache: TeacherCache) -> None:
    plan = make_plan(TeacherTargets(cache=cache), alpha=1.0, temperature=4.0)
    trainer = Trainer(plan)
    batch = next(trainer.batches.epoch(0))
    logits = 5 * torch.randn(len(batch.ids), 10)
    ids, views = (row.numpy() for row in batch.index)
    table = view_table(plan.source.view_spec, cache.view_seed, ids, cache.n_views)
    columns = np.argmax(table == views[:, None], 1)
    look_up = cache.lookup if cache.top_k is None else cache.lookup_filled
    p, q = ((x / 4.0).log_softmax(1) for x in (look_up(ids, columns).float(), logits))
    expected = 16 * (p.exp() * (p - q)).sum(1).mean()
    assert trainer.compute_loss(logits, batch).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
def test_compiled_network_trains_alike(make_plan: Callable[..., Plan], cache: TeacherCache) -> None:
    losses = {}
    for compiled in (False, True):
        plan = make_plan(TeacherTargets(cache=cache), alpha=0.7)
        plan.execution = Execution(compile=compiled)
        trainer = Trainer(plan)
        for batch in trainer.batches.epoch(0):  # the last one is smaller
            trainer.train_step(batch)
        trainer.check_finite()
        losses[compiled] = trainer.take_metrics()["loss"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
