"""What the tests of this folder run in several processes. Arguments: names of functions, and a folder for results.

Each function returns arrays by name, which the main process saves to NAME.npz; alone, in one process, it returns what
they must be.
"""

import copy
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from kdfast.data.loaders import ResidentLoader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import compute_normalization
from kdfast.distillation.config import RunConfig
from kdfast.distillation.losses.settings import TermSetting
from kdfast.distillation.plan import LoadedInputs
from kdfast.distillation.record_dynamics import RecordingConfig, record_dynamics
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.trainer import Trainer
from kdfast.distributed.batch_norm import SynchronizedBatchNorms
from kdfast.distributed.group import Distributed
from kdfast.dynamics.reader import Dynamics
from kdfast.nets import NETS, build_net
from kdfast.nets.checkpoint import Model
from kdfast.ops.softmax_head import head_self_influence
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.compute import ScoreSources
from kdfast.pruning.scores.registry import compute_score
from kdfast.teacher.build import build_cache

CPU = torch.device("cpu")


class OwnBatchNorm(nn.Module):
    """A batch norm that is not derived from those of PyTorch."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.training)


class Smooth(nn.Module):
    """Batch norms of both kinds; no ReLU, at whose kink a rounding error changes a gradient by more than rounding."""

    def __init__(self, classes, *_, **__):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, stride=2, bias=False), OwnBatchNorm(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).tanh()
        return self.fc(self.bn2(self.conv2(x)).tanh().mean((2, 3)))


class Unused(Smooth):
    """A layer that the forward pass leaves out."""

    def __init__(self, classes, *_, **__):
        super().__init__(classes)
        self.head = nn.Linear(8, 3)


class Drawing(Smooth):
    """Draws random numbers in each training step."""

    draws: ClassVar[list[torch.Tensor]] = []

    def forward(self, x):
        if self.training:
            self.draws.append(torch.rand(3))
        return super().forward(x)


NETS["smooth"], NETS["unused"], NETS["drawing"] = Smooth, Unused, Drawing
PLACES = (("stage1", "conv1"), ("stage2", "conv2"), ("stage3", "bn2"), ("pooled", "fc@input"))
TAPS = tuple(sorted((f"{side}.{name}", place) for side in ("student", "teacher") for name, place in PLACES))


def make_inputs(*, teacher=True):
    source = open_source("digits")
    statistics = compute_normalization(source.train)
    torch.manual_seed(7)
    model = Model(build_net("smooth", 10), "smooth", 10, source.classes, statistics, {})
    targets = TeacherTargets(model=model) if teacher else TeacherTargets()
    return LoadedInputs(source, ResidentLoader(source.train), statistics, targets)


def train(ranks, config, steps, inputs=None):
    """Return the student's weights and statistics after some steps on 99 samples."""
    plan = (inputs or make_inputs()).plan(config, np.arange(99), device=CPU, distributed=ranks)
    trainer = Trainer(plan)
    while trainer.step < steps:
        for batch in trainer.batches.epoch(trainer.epoch):
            trainer.train_step(batch)
            if trainer.step == steps:
                break
    state = {name: x.double().numpy() for name, x in trainer.net.state_dict().items()}
    return state | {"loss": np.array(trainer.take_metrics()["loss"])}


CONFIG = RunConfig("smooth", epochs=13, batch_size=25, alpha=0.5, lr=0.05, views=1)


def distill(ranks):
    """50 steps on batches of 25 and 24, which 2 and 4 processes cannot divide evenly."""
    return train(ranks, CONFIG, 50)


def relate(ranks):
    """Terms that relate the samples of a batch, and one with a batch norm of its own."""
    terms = tuple(TermSetting(name) for name in ("pkt", "rkd", "sp", "dist", "fitnets"))
    taps = tuple((key, place) for key, place in TAPS if key.split(".")[1] in ("stage2", "stage3", "pooled", "stage1"))
    used = {tap for term in terms for tap in term.entry.taps}
    taps = tuple((key, place) for key, place in taps if key.split(".")[1] in used)
    return train(ranks, dataclasses.replace(CONFIG, terms=terms, taps=taps, lr=0.01), 4)


def mix(ranks):
    """Images mixed with their neighbors in the whole batch."""
    return train(ranks, dataclasses.replace(CONFIG, mixup=0.4, cutmix=1.0, label_smoothing=0.1), 8)


def average(ranks):
    """An average of the weights, a clipped gradient, AdamW, and a network with a layer that it does not use."""
    return train(ranks, dataclasses.replace(CONFIG, student="unused", optimizer="adamw", lr=1e-3, clip=0.5, ema=0.9), 8)


def draw(ranks):
    """Random numbers of the network, other ones in each process; and the mean loss across a saved state."""
    config = dataclasses.replace(CONFIG, student="drawing", alpha=0.0)
    trainer, again = (Trainer(make_inputs().plan(config, np.arange(99), device=CPU, distributed=ranks)) for _ in "ab")
    batches = trainer.batches.epoch(0)
    trainer.train_step(next(batches))
    trainer.share_loss()
    again.load_state(copy.deepcopy(trainer.state()))
    Drawing.draws.clear()
    trainer.train_step(next(batches))
    batches.close()
    for batch in again.batches.epoch(0, 1):
        again.train_step(batch)
        break
    first, resumed = Drawing.draws
    assert torch.equal(first, resumed) or ranks.world_size == 1
    whole = ranks.gather(first)
    assert len(whole.unique()) == 3 * ranks.world_size
    losses = [x.take_metrics()["loss"] for x in (trainer, again)]
    return {"loss": np.array(losses), "rows": ranks.gather(torch.tensor(losses[1:])).unique().numpy()}


def normalize(ranks):
    """Batch norms of several shapes in float64, with gradients of the input; 7 samples."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(216, 5), nn.Tanh(),
        nn.BatchNorm1d(5, affine=False, momentum=None),
    ).double()  # fmt: skip
    for p in net[1].parameters():
        nn.init.uniform_(p, 0.5, 2)
    x, weights = torch.randn(7, 3, 8, 8, dtype=torch.float64) * 3 + 5, torch.randn(7, 5, dtype=torch.float64)
    own = torch.from_numpy(ranks.share(np.arange(7)))
    inputs = x[own].requires_grad_()
    with SynchronizedBatchNorms() if ranks.world_size > 1 else torch.enable_grad():
        out = net(inputs)
    (out * weights[own]).sum().backward()
    found = {"out": ranks.gather(out.detach()), "input": ranks.gather(inputs.grad)}
    found |= {name: ranks.sum(p.grad) for name, p in net.named_parameters()}
    return {name: x.numpy() for name, x in (found | dict(net.named_buffers())).items()}


def gather(ranks):
    """The gradient of what is computed from the rows of all processes."""
    rows = torch.arange(10, dtype=torch.float64).reshape(5, 2) + 1
    own = rows[torch.from_numpy(ranks.share(np.arange(5)))].requires_grad_()
    whole = ranks.gather(own)
    value = (whole.prod(0).log() * whole.sum(0)).sum()
    value.backward()
    return {"value": value.detach().numpy(), "grad": ranks.gather(own.grad / ranks.world_size).numpy()}


def record(ranks):
    """Dynamics of a network that does not change but for the statistics of its batch norms."""
    config = RunConfig("smooth", epochs=2, batch_size=61, lr=0.0, views=2)
    out, recording = FOLDER / f"dynamics-{ranks.world_size}", RecordingConfig(record="batch", top_k=2)
    record_dynamics(make_inputs(teacher=False), config, recording, out, device=CPU, distributed=ranks)
    if not ranks.is_main:
        return {}
    found = Dynamics.open(out)
    return {
        "el2n": found.el2n(0), "margin": found.margin(0), "features": found.features(0, 1),
        "correct": found.correct(0), "batches": found.correct(0, when="batch"),
    }  # fmt: skip


def score(ranks):
    """Scores that run a network on the images, and those of its last layer's Hessian."""
    inputs = make_inputs()
    source, model = inputs.source, inputs.teacher.model
    sources = ScoreSources(source, network=model)
    options = {"fvm": ("influence-fvm", {}), "grand": ("grand", {"network": "full"})}
    found = {
        key: sources.score(name, seed=0, options=given, distributed=ranks).scores
        for key, (name, given) in options.items()
    }
    torch.manual_seed(2)
    features = torch.randn(len(source.train), 6).double().numpy()
    logits = features @ np.random.default_rng(0).normal(size=(6, 10))
    for method in ("auto", "kronecker"):
        part = ranks.share(np.arange(len(features)))
        effects = head_self_influence(
            features[part], logits[part], source.train.labels[part], l2=0.1, method=method,
            reduce=None if ranks.world_size == 1 else ranks.sum,
        )  # fmt: skip
        found[method] = ranks.gather(effects).numpy()
    order = np.argsort(source.train.labels, kind="stable")  # a process may have samples of one class
    values = {"features": features[order].astype(np.float32), "logits": logits[order].astype(np.float32)}
    given = ScoreInputs(source.train.labels[order], 0, **values, options={"kind": "self"}, distributed=ranks)
    return found | {"influence": compute_score("influence", given).values}


def cache(ranks):
    """The bytes of a cache of several shards."""
    inputs, folder = make_inputs(), FOLDER / "cache"
    build_cache(
        inputs.source, inputs.teacher.model, folder, ids=np.arange(100), n_views=3, rank=ranks.rank,
        world=ranks.world_size, shard_bytes=1000,
    )  # fmt: skip
    ranks.barrier()
    files = [file for file in folder.iterdir() if file.is_file() and file.name != "timing.json"]
    assert len(files) > 8
    return {file.name: np.frombuffer(file.read_bytes(), np.uint8) for file in files if file.name[0] != "."}


FOLDER = Path()


def main():
    """Run the functions that the arguments name."""
    global FOLDER
    names, FOLDER = sys.argv[1].split(","), Path(sys.argv[2])
    warnings.simplefilter("ignore")
    processes = Distributed.from_environment()
    with processes.process_group(CPU):
        for name in names:
            arrays = globals()[name](processes)
            if processes.is_main:
                np.savez(FOLDER / f"{name}.npz", **arrays)
