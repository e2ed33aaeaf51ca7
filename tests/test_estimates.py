"""Estimates before long work."""

import pytest
import torch

from kdfast.data.sources import open_source
from kdfast.estimates import estimate_training

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, classes)

    def forward(self, images):
        out = self.conv(images)
        with open({log!r}, "a") as log:
            log.write(f"{{out.dtype}} {{images.is_contiguous(memory_format=torch.channels_last)}}\\n")
        return self.fc(out.mean((2, 3)))
"""


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_training_is_timed_in_the_precision_and_layout_of_the_run(tmp_path, precision, dtype):
    log = tmp_path / "log"
    (tmp_path / "net.py").write_text(NET.format(log=str(log)))
    seconds = estimate_training(
        f"{tmp_path}/net.py:Net",
        open_source("digits"),
        torch.device("cpu"),
        precision=precision,
        steps=20,
        batch_size=8,
        forwards=8,
    )
    assert seconds is not None
    assert seconds > 0
    assert set(log.read_text().splitlines()) == {f"{dtype} True"}
