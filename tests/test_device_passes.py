"""Passes on a GPU, as far as a CPU shows: tensors on one device, few waits, and float32 without TF32.

Each pass computes the same on the CPU and on the stand-in device of `stand_in_device.py`, which rejects what CUDA would
reject.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast.data.holdout import SplitPart
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source, compute_normalization
from kdfast.nets import build_net
from kdfast.nets.average import compute_statistics
from kdfast.nets.checkpoint import Model
from kdfast.pruning.if_beta.estimators import ScoreFunction
from kdfast.pruning.if_beta.learner import IFBeta
from kdfast.pruning.if_beta.proxy import Linear, ProxyTrainingConfig
from kdfast.pruning.if_beta.search import Schedule
from kdfast.pruning.if_beta.selector.costs import distillation_seconds
from kdfast.pruning.if_beta.stages import TwoStages
from kdfast.pruning.rules.d2_graph import nearest_neighbors
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.registry import compute_score
from kdfast.teacher import evaluate as evaluation
from kdfast.teacher.flatten import FlattenConfig
from kdfast.teacher.flatten.flattener import Flattener
from kdfast.teacher.predictor import Predictor

spec = importlib.util.spec_from_file_location("stand_in_device", Path(__file__).with_name("stand_in_device.py"))
assert spec is not None
assert spec.loader is not None
stand_in = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stand_in)

pytestmark = pytest.mark.usefixtures("no_poison")


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source("digits")


def model_of(source: Source) -> Model:
    torch.manual_seed(0)
    statistics = compute_normalization(source.train)
    return Model(build_net("resnet8", 10), "resnet8", 10, source.classes, statistics, {})


@torch.no_grad()
def evaluate(source: Source, device: str) -> list[Any]:
    # Without inference mode, in which the stand-in's tensors cannot exist.
    model, place = model_of(source), torch.device(device)
    model.net.to(place).eval()
    sums = evaluation._Sums(model.classes, place)
    evaluation._predict.__wrapped__([model], source.test, source.view_spec, place, 200, sums)  # type: ignore[attr-defined]
    found = sums.result(with_agreement=False)
    return [found["top1"], found["top5"], found["loss"]]


def predict(source: Source, device: str) -> list[Any]:
    predictor = Predictor(model_of(source), source.view_spec, torch.device(device), 64)
    ids = np.arange(150, dtype=np.int64)
    images = torch.from_numpy(source.train.read(ids)).to(device)
    views = np.tile(np.arange(3, dtype=np.int64), (len(ids), 1))
    identity = Predictor.predict_identity.__wrapped__(predictor, images, ids)  # type: ignore[attr-defined]
    return [*identity, Predictor.predict_views.__wrapped__(predictor, images, views, ids, "float32")]  # type: ignore[attr-defined]


def grad_norms(source: Source, device: str) -> list[Any]:
    net = model_of(source).net.eval().to(device)
    x, labels, teacher = torch.randn(7, 3, 8, 8).to(device), torch.arange(7).to(device), torch.randn(7, 10).to(device)
    return [
        kdfast.grad_norms(net, x, labels),
        kdfast.grad_norms(net, x, labels, loss="kd", teacher=teacher, method="gram"),
    ]


def softmax_head(source: Source, device: str) -> list[Any]:
    h, z, v = (torch.randn(*shape).to(device) for shape in ((60, 6), (60, 4), (2, 4, 7)))
    y = (torch.arange(60) % 4).to(device)
    held = h[:5], z[:5], y[:5]
    return [
        kdfast.head_grad_norms(z, y, h),
        kdfast.head_hvp(h, z, v, l2=0.1),
        kdfast.head_solve(h, z, v, l2=0.1),
        kdfast.head_newton(h, y, l2=1.0, method="cg"),
        kdfast.head_newton(h, y, l2=0.1, method="cholesky"),
        kdfast.head_influence(h, z, y, *held, l2=0.1),
        kdfast.head_self_influence(h, z, y, l2=0.1),
        kdfast.head_leave_one_out(h, z, y, torch.arange(5).to(device), l2=0.1)[0],
    ]


def nearest(source: Source, device: str) -> list[Any]:
    points = np.random.default_rng(0).standard_normal((400, 6)).astype(np.float32)
    return list(nearest_neighbors(points, 5, device=device))


def scores(source: Source, device: str) -> list[Any]:
    labels, random = source.train.labels, np.random.default_rng(0)
    logits, features = (random.standard_normal((len(labels), width)).astype(np.float32) for width in (10, 12))
    inputs = {"labels": labels, "seed": 0, "logits": logits, "features": features, "device": device, "source": source}
    runs: list[tuple[str, dict[str, Any]]] = [
        ("influence", {"kind": "self"}),
        ("influence", {"polish": "no"}),
        ("moderate", {}),
    ]
    runs += [("influence", {"alpha": 0.5}), ("grand", {"network": "full"}), ("influence-fvm", {})]
    network = model_of(source)
    network.metadata = {"flattened": {"sharpness": "none", "teacher": network.digest}}
    return [compute_score(name, ScoreInputs(**inputs, options=o, network=network)).values for name, o in runs]


IF_BETA = IFBeta(budget=ProxyTrainingConfig(steps=5), schedule=Schedule(steps=2), candidates=2)
PUBLISHED = IFBeta(
    proxy=Linear(),
    reward="ce",
    estimator=ScoreFunction(4),
    budget=ProxyTrainingConfig(steps=None, batch_size=16),
    schedule=TwoStages(mu_step=0.5, steps=2, repeats=2),
)


def search(score: str, learner: IFBeta = IF_BETA) -> Callable[[Source, str], list[Any]]:
    def run(source: Source, device: str) -> list[Any]:
        features, logits, labels = torch.randn(200, 8), torch.randn(200, 4), np.arange(200, dtype=np.int64) % 4
        result = replace(learner, score=score).fit(logits, features, labels, 0.3, device=device)
        return [result.ids, result.scores, result.path, result.rewards]

    return run


def flatten(source: Source, device: str) -> list[Any]:
    model, ids = model_of(source), np.arange(60, dtype=np.int64)
    model.net.to(device)
    flattener = Flattener(model, SplitPart(source.train, ids), ids, source.view_spec, FlattenConfig(batch_size=25))
    for _ in range(4):
        flattener.take_step()
    return [flattener.take_loss(), *model.net.parameters()]


@torch.no_grad()
def average(source: Source, device: str) -> list[Any]:
    model = model_of(source)
    model.net.to(device)
    compute_statistics.__wrapped__(model, source.train, source.view_spec, 0, torch.device(device), None)  # type: ignore[attr-defined]
    return [*model.net.buffers()]


PASSES: dict[str, Callable[[Source, str], list[Any]]] = {
    "evaluate": evaluate,
    "predict": predict,
    "flatten": flatten,
    "average": average,
    "grad_norms": grad_norms,
    "softmax head": softmax_head,
    "nearest neighbors": nearest,
    "scores": scores,
    "IF-Beta by self-influence": search("self"),
    "IF-Beta by removal": search("removal"),
    "IF-Beta by residual": search("residual"),
    "IF-Beta by cross-fit": search("crossfit"),
    "IF-Beta as published": search("self", PUBLISHED),
}


def curvature(source: Source, device: str) -> list[Any]:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 3))
    x, labels = torch.randn(4, 3, 8, 8), torch.arange(4) % 3
    operator = kdfast.NetworkCurvature(net, x, labels, l2=0.1)
    v = torch.randn(1, operator.size)
    return [kdfast.network_hvp(net, x, labels, v), operator(v), operator.gradient(), operator.solve(v).x]


def cost(source: Source, device: str) -> list[Any]:
    return [distillation_seconds(100, 10, (8, 8), device)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_keeps_its_tensors_on_one_device(name: str, source: Source) -> None:
    expected = [x.detach() if isinstance(x, torch.Tensor) else x for x in PASSES[name](source, "cpu")]
    torch.manual_seed(0)
    with stand_in.StandInDevice():
        found = PASSES[name](source, stand_in.DEVICE.type)
        found = [x.detach().cpu() if isinstance(x, torch.Tensor) else x for x in found]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)


def test_waits_for_the_device_do_not_grow_with_the_batches_or_steps(source: Source) -> None:
    def reads(steps: int) -> int:
        features, logits, labels = torch.randn(200, 8), torch.randn(200, 4), np.arange(200, dtype=np.int64) % 4
        learner = IFBeta(score="residual", budget=ProxyTrainingConfig(steps=steps), schedule=Schedule(steps=2))
        with stand_in.StandInDevice() as device:
            learner.fit(logits, features, labels, 0.3, device=stand_in.DEVICE)
        return len(device.reads)

    assert reads(3) == reads(9) == 4, "one for the score, one per step of the search, one for the final comparison"
    with stand_in.StandInDevice() as device:
        evaluate(source, stand_in.DEVICE.type)
    assert len(device.reads) == 5, "the counts by class, the top 5, the loss, the calibration error, the confidence"
    with stand_in.StandInDevice() as device:
        flatten(source, stand_in.DEVICE.type)
    assert len(device.reads) == 2, "the loss of all steps, and whether the weights are finite"


PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward", "mkldnn_convolution"}


class PrecisionRecorder(TorchDispatchMode):
    """Records the settings under which each float32 product or convolution runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, bool]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        float32 = [a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.float32]
        if float32 and func.overloadpacket.__name__ in PRODUCTS:
            self.seen.add((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _tf32_allowed() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("_tf32_allowed")
@pytest.mark.parametrize("name", [*PASSES, "curvature", "cost"])
def test_float32_passes_forbid_tf32(name: str, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDFAST_BACKEND", "reference")  # compiled kernels have no TF32 and hide their products
    run = {**PASSES, "curvature": curvature, "cost": cost}[name]
    with PrecisionRecorder() as recorder:
        run(source, "cpu")
    assert recorder.seen == {("highest", False)}
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
