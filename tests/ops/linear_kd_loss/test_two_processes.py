"""`linear_kd_loss` in two gloo processes: classes split over them, DDP and FSDP2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdfast
from kdfast.errors import ShapeError

PROGRAM = Path(__file__).with_name("two_processes.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_match_one(tmp_path):
    command = [sys.executable, "-W", "ignore", str(PROGRAM)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "ranks")], **pipes) for rank in range(2)]
    for rank in ranks:
        out, err = rank.communicate(timeout=300)
        assert rank.returncode == 0, err[-3000:]
        assert "equal" in out


@pytest.fixture
def one_process(tmp_path):
    """The default group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'one'}", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_what_a_group_cannot_split_is_refused(one_process):
    hidden, weight, labels = torch.randn(4, 3), torch.randn(6, 3), torch.zeros(4, dtype=torch.int64)
    teacher = torch.randn(4, 6)
    for arguments, options, message in (
        ((labels, kdfast.topk_teacher(teacher, 2, 4.0)), {}, "TopKTeacher"),
        ((teacher.softmax(1), teacher), {}, "probabilities"),
        ((labels, teacher), {"class_weights": torch.ones(6)}, "`class_weights` cannot be split"),
    ):
        with pytest.raises(ShapeError, match=message):
            kdfast.linear_kd_loss(hidden, weight, *arguments, group=one_process, **options)
    whole = kdfast.linear_kd_loss(hidden, weight, labels, teacher)
    torch.testing.assert_close(kdfast.linear_kd_loss(hidden, weight, labels, teacher, group=one_process), whole)
