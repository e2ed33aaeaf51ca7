"""Copies to a GPU: two buffers, neither of which is overwritten before the work on it is done."""

import contextlib

import pytest
import torch
from torch import Tensor

from kdfast.data.transfer import Transfer, to_device

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)


class Event:
    """Stands in for a CUDA event and writes what happens to it into a log."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.name = f"event {sum(entry.startswith('new') for entry in log)}"
        log.append(f"new {self.name}")

    def record(self, stream: "Stream") -> None:
        self.log.append(f"{stream.name} records {self.name}")

    def synchronize(self) -> None:
        self.log.append(f"CPU waits for {self.name}")


class Stream:
    """Stands in for a CUDA stream."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits for {event.name}")

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for all of {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    entries: list[str] = []
    steps = Stream("steps", entries)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(entries))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: steps)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    return entries


def test_copy_waits_for_the_work_on_its_buffer(log: list[str]) -> None:
    transfer = Transfer(torch.device("cpu"))
    transfer._stream = Stream("copies", log)  # type: ignore[assignment]
    batches = [torch.full((4, 2), number, dtype=torch.uint8) for number in range(4)]
    given = [transfer(batch) for batch in batches[:2]]
    assert given[0].data_ptr() != given[1].data_ptr()
    log.clear()
    third = transfer(batches[2])
    assert third.data_ptr() == given[0].data_ptr()
    assert (third == 2).all()
    # Event 0 is the first copy; events 1 and 3 end the work on the first and the second batch.
    work_on_second = log[0].removeprefix("new ")
    assert log == [
        f"new {work_on_second}", f"steps records {work_on_second}", "CPU waits for event 0", "copies waits for event 1",
        "copies records event 0", "steps waits for event 0",
    ]  # fmt: skip


def test_smaller_last_batch_uses_a_part_of_the_buffer(log: list[str]) -> None:
    transfer = Transfer(torch.device("cpu"))
    transfer._stream = Stream("copies", log)  # type: ignore[assignment]
    for size in (4, 4, 3):
        batch = torch.full((size, 2), size, dtype=torch.uint8)
        assert torch.equal(transfer(batch), batch)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_batches_arrive(device: str) -> None:
    place = torch.device(device)
    transfer, host = Transfer(place), torch.empty((500, 300), dtype=torch.uint8)
    for number in range(9):
        batch = host[: 500 - number]
        batch.fill_(number)  # as a loader reuses its memory
        copy = transfer(batch)
        assert copy.device.type == device
        assert copy.shape == batch.shape
        assert (copy == number).all()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_tensor_arrives(device: str) -> None:
    x = torch.arange(1000)
    copy = to_device(x, torch.device(device))
    assert copy.device.type == device
    assert torch.equal(copy.cpu(), x)
