"""Terms that train alone first, and memory banks, in two processes: the run of one process, but for rounding."""

import subprocess
import sys
from pathlib import Path

import pytest

_COMMON = """
import copy
import dataclasses
import warnings
import numpy as np
import torch
import torch.distributed as dist
from kdfast.data.loaders import ResidentLoader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import compute_normalization
from kdfast.distillation.config import RunConfig
from kdfast.distributed.group import Distributed
from kdfast.distillation.losses.settings import TermSetting
from kdfast.distillation.plan import LoadedInputs
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.trainer import Trainer
from kdfast.nets import NETS, build_net
from kdfast.nets.checkpoint import Model

warnings.simplefilter("ignore")
ranks, device = Distributed.from_environment(), torch.device("cpu")
source = open_source("digits")
statistics = compute_normalization(source.train)


def make_inputs(name):
    torch.manual_seed(7)
    teacher = Model(build_net(name, 10), name, 10, source.classes, statistics, {})
    return LoadedInputs(source, ResidentLoader(source.train), statistics, TeacherTargets(model=teacher))


def make_trainer(inputs, config, distributed):
    return Trainer(inputs.plan(config, np.arange(93), device=device, distributed=distributed))


def run(trainer, until):
    while trainer.step < until:
        for batch in trainer.batches.epoch(trainer.epoch, trainer.step % trainer.batches.per_epoch):
            trainer.train_step(batch)
            if trainer.step == until:
                break
    return trainer


def state(trainer):
    return {**{f"net.{k}": v for k, v in trainer.net.state_dict().items()}, **trainer.terms.state_dict()}


config = RunConfig("resnet8", epochs=2, batch_size=31, alpha=0.5, lr=0.05, views=1)
"""

_AS_ONE_PROCESS = """
class Plain(torch.nn.Module):
    # Without ReLU, at whose kink a rounding error can change a gradient by more than rounding.
    def __init__(self, classes, *_, **__):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.conv2 = torch.nn.Conv2d(4, 6, 3, padding=1)
        self.fc = torch.nn.Linear(6, classes)

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x).tanh()).tanh().mean((2, 3)))


NETS["plain"] = Plain
places = (("stem", "conv1"), ("stage1", "conv1"), ("stage2", "conv2"), ("stage3", "conv2"), ("pooled", "fc@input"))
taps = tuple((f"{side}.{name}", place) for side in ("student", "teacher") for name, place in places)
terms = (TermSetting("fsp", 100.0), TermSetting("crd", 1.0, (("dim", 8.0), ("negatives", 40.0))))
config = dataclasses.replace(config, student="plain", terms=terms, initial_epochs=1, taps=tuple(sorted(taps)))
inputs = make_inputs("plain")
with ranks.process_group(device):
    two = make_trainer(inputs, config, ranks)
    before = {k: v.clone() for k, v in state(two).items()}
    run(two, 3)
    assert torch.equal(before["net.fc.weight"], two.net.fc.weight)
    assert not torch.equal(before["net.conv1.weight"], two.net.conv1.weight)
    run(two, two.total_steps)
one = run(make_trainer(inputs, config, Distributed()), two.total_steps)
ours = state(two)
for name, expected in state(one).items():
    torch.testing.assert_close(ours[name], expected, rtol=2e-4, atol=2e-6, msg=lambda text: f"{name}: {text}")
assert torch.isclose(two.terms.terms["crd"].student_bank.norm(), torch.tensor(93.0).sqrt())
"""

_SAME_IN_BOTH = """
terms = (TermSetting("ab"), TermSetting("ft"), TermSetting("crd"))
config = dataclasses.replace(config, terms=terms, initial_epochs=1)
inputs = make_inputs("resnet8")
with ranks.process_group(device):
    whole = make_trainer(inputs, config, ranks)
    run(whole, 2)
    kept = [copy.deepcopy(whole.state()) if ranks.is_main else None]
    dist.broadcast_object_list(kept)
    run(whole, whole.total_steps)
    flat = torch.cat([x.double().flatten() for x in (*whole.net.parameters(), *whole.terms.state_dict().values())])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert torch.equal(*both), "the processes hold the same weights, statistics and banks"
    resumed = make_trainer(inputs, config, ranks)
    resumed.load_state(kept[0])
    run(resumed, resumed.total_steps)
if ranks.is_main:
    ours = state(resumed)
    assert all(torch.equal(ours[name], x) for name, x in state(whole).items()), "resumed with the same bits"
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [_AS_ONE_PROCESS, _SAME_IN_BOTH], ids=["as one process", "the same in both"])
def test_two_processes(script: str, tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(_COMMON + script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
