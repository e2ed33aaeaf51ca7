"""The native kernels finish with the same bits in a process forked from a multithreaded parent."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

PARENT = """
import faulthandler, os, sys
import torch
import kdfast

torch.set_num_threads(2)
torch.manual_seed(0)
z, t, y = torch.randn(256, 2000), torch.randn(256, 2000), torch.randint(0, 2000, (256,))

def loss_and_grad():
    x = z.detach().requires_grad_()
    loss = kdfast.kd_loss(x, y, t)
    (2 * loss).backward()
    return loss.detach().numpy().tobytes() + x.grad.numpy().tobytes()

"""
FORKS = """
before = loss_and_grad()
for _ in range(2):
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(60, exit=True)
        os._exit(0 if torch.get_num_threads() == 2 and loss_and_grad() == before else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert loss_and_grad() == before
"""
WORKERS = """
class LossDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.frombuffer(bytearray(loss_and_grad()), dtype=torch.float32)

if __name__ == "__main__":
    faulthandler.dump_traceback_later(120, exit=True)
    before = torch.frombuffer(bytearray(loss_and_grad()), dtype=torch.float32)
    loader = torch.utils.data.DataLoader(LossDataset(), num_workers=2, batch_size=None, multiprocessing_context="fork")
    assert all(torch.equal(found, before) for found in loader)
"""


@pytest.mark.parametrize("child", ["os.fork", "DataLoader"])
def test_forked_child_computes_the_same_bits(child):
    program = PARENT + (FORKS if child == "os.fork" else WORKERS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
