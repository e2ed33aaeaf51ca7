"""Several processes train the same student as one: one global order, a share of each batch, averaged gradients."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from kdfast.data.loaders import ResidentLoader
from kdfast.data.readers.registry import open_source
from kdfast.distillation.batches import Batches
from kdfast.distillation.folder import RunFolder
from kdfast.distillation.plan import Plan
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.train import Monitoring, _TrainingLoop
from kdfast.distillation.trainer import Trainer
from kdfast.distributed.group import Distributed
from kdfast.errors import UsageError
from kdfast.files.interrupt import StopRequest

IDS = np.arange(0, 150, dtype=np.int64)


def make_batches(rank: int, world_size: int) -> Batches:
    source = open_source("digits")
    return Batches(
        IDS, ResidentLoader(source.train), source.view_spec, n_views=9, view_seed=0, targets=None, batch_size=32,
        seed=1, distributed=Distributed(rank, world_size),
    )  # fmt: skip


@pytest.mark.parametrize("world_size", [2, 3])
def test_concatenated_shares_are_the_batches_of_one_process(world_size: int) -> None:
    alone = list(make_batches(0, 1).epoch(1, first=1))
    shares = [list(make_batches(rank, world_size).epoch(1, first=1)) for rank in range(world_size)]
    assert len(alone) == 4
    for step, batch in enumerate(alone):
        parts = [shares[rank][step] for rank in range(world_size)]
        assert torch.equal(torch.cat([p.ids for p in parts]), batch.ids)
        assert torch.equal(torch.cat([p.view_ids for p in parts]), batch.view_ids)
        assert make_batches(0, world_size).global_size(step + 1) == len(batch.ids)


def test_rejects_batches_with_fewer_samples_than_processes() -> None:
    Distributed(0, 2).check_batches(34, 32)
    with pytest.raises(UsageError, match="last batch of an epoch has 1 samples for 2 processes"):
        Distributed(0, 2).check_batches(33, 32)


def test_each_process_has_its_own_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = torch.device("cuda")
    assert Distributed(3, 4, local_rank=1).local_device(cuda) == torch.device("cuda", 1)
    assert Distributed().local_device(cuda) == cuda
    assert Distributed(1, 2, local_rank=1).local_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(UsageError, match="LOCAL_RANK is 2, but torch sees 2 CUDA devices"):
        Distributed(2, 4, local_rank=2).local_device(cuda)
    with pytest.raises(UsageError, match="`device` is cuda:0 for 2 processes: pass cuda"):
        Distributed(0, 2).local_device(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (
            torch.device("cuda", 1),
            [("set_device", torch.device("cuda", 1)), ("nccl", {"device_id": torch.device("cuda", 1)}), "destroy"],
        ),
        (torch.device("cpu"), [("gloo", {"timeout": timedelta(days=30)}), "pause", "destroy"]),
    ],
)
def test_process_group_selects_the_device_before_it_connects_and_pauses_for_gloo_alone(
    device: torch.device, expected: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: calls.append((backend, options)))
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl" if device.type == "cuda" else "gloo")
    monkeypatch.setattr(time, "sleep", lambda seconds: calls.append("pause"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroy"))
    with Distributed(1, 2, local_rank=1).process_group(device):
        pass
    assert calls == expected


@pytest.mark.slow
def test_two_gloo_processes_match_one(tmp_path: Path) -> None:
    np.save(tmp_path / "idx.npy", IDS)
    flags = ["distill", "--data", "digits", "--subset", str(tmp_path / "idx.npy"), "--student", "resnet8",
             "--alpha", "0", "--epochs", "4", "--batch-size", "32", "--lr", "0.05", "--device", "cpu"]  # fmt: skip
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdfast"]
    for name, start in (("one", [sys.executable, "-m", "kdfast"]), ("two", launcher), ("again", launcher)):
        done = subprocess.run(
            [*start, *flags, "--out", str(tmp_path / name)], capture_output=True, text=True, env=environ
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("top-1") == 1, "only the main process prints"
    results = {name: json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two", "again")}
    assert results["two"]["weights"] == results["again"]["weights"], "bit-equal for the same number of processes"
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    }
    assert [r["step"] for r in rows["one"]] == [r["step"] for r in rows["two"]]
    # Training amplifies rounding, so that the losses are only approximately equal.
    assert rows["two"][0]["loss"] == pytest.approx(rows["one"][0]["loss"], rel=1e-3)
    assert rows["two"][-1]["loss"] == pytest.approx(rows["one"][-1]["loss"], rel=0.1)
    assert rows["two"][-1]["loss"] < 0.9 * rows["two"][0]["loss"]


def test_processes_look_for_a_stop_every_twenty_steps_and_when_they_log(
    make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def any_process(self: Distributed, flag: bool, device: torch.device) -> bool:
        asked.append(trainer.step)
        return flag

    plan = make_plan(TeacherTargets())
    trainer = Trainer(plan)
    plan.distributed = Distributed(0, 2)
    monkeypatch.setattr(Distributed, "any", any_process)
    with RunFolder(tmp_path / "run", plan.identity) as folder:
        loop = _TrainingLoop(trainer, folder, Monitoring())
        stop = StopRequest()
        for trainer.step in range(1, 61):
            loop.stop_requested(stop, wait=trainer.step == 33)
        assert loop.metrics is not None
        loop.metrics.close()
    assert asked == [20, 33, 40, 60]


_GROUP_OF_TWO = """
import os, pathlib, sys
import torch
from kdfast.distributed.group import Distributed

ranks = Distributed.from_environment()
device = torch.device("cpu")


def train():
    with ranks.process_group(device):
        net = ranks.wrap(torch.nn.Linear(3, 2), device)
        net(torch.ones(4, 3)).sum().backward()
        ranks.barrier()


train()
names = {(task / "comm").read_text().strip() for task in pathlib.Path("/proc/self/task").iterdir()}
assert not [name for name in names if "gloo" in name], names
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the names of threads in /proc")
def test_no_thread_of_the_process_group_outlives_it(tmp_path: Path) -> None:
    script = tmp_path / "group.py"
    script.write_text(_GROUP_OF_TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


_TERMS_IN_TWO = """
import dataclasses
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
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model

ranks, device = Distributed.from_environment(), torch.device("cpu")
source = open_source("digits")
statistics = compute_normalization(source.train)
torch.manual_seed(0)
teacher = Model(build_net("resnet8", 10), "resnet8", 10, source.classes, statistics, {})
inputs = LoadedInputs(source, ResidentLoader(source.train), statistics, TeacherTargets(model=teacher))
config = RunConfig("resnet8", epochs=1, batch_size=31, alpha=0.5, lr=0.05, views=1, terms=(TermSetting("vid"),))
with ranks.process_group(device):
    trainer = Trainer(inputs.plan(config, np.arange(93), device=device, distributed=ranks))
    before = [p.clone() for p in trainer.terms.parameters()]
    for batch in trainer.batches.epoch(0, 0):
        trainer.train_step(batch)
    assert not any(torch.equal(p, b) for p, b in zip(trainer.terms.parameters(), before))
    parameters = [*trainer.terms.parameters(), *trainer.net.parameters()]
    flat = torch.cat([p.detach().flatten() for p in parameters])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert torch.equal(*both)
"""


@pytest.mark.slow
def test_two_processes_train_the_same_adapters(tmp_path: Path) -> None:
    script = tmp_path / "terms.py"
    script.write_text(_TERMS_IN_TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
