"""Copies from the CPU to a GPU that the CPU does not wait for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return `x`, a CPU tensor, on the device; on a GPU without waiting for the copy.

    The copy runs in the current stream, so that later work of that stream sees it.
    """
    if device.type != "cuda":
        return x.to(device)
    # Only copies from pinned memory are asynchronous.
    return x.pin_memory().to(device, non_blocking=True)


@dataclass
class _Buffer:
    """Memory for one batch on both sides.

    Attributes:
        pinned: On the CPU.
        device: On the GPU.
        copied: Recorded when the GPU has its copy.
        used: Recorded when the work on the copy has been done; None before the first.
    """

    pinned: Tensor
    device: Tensor
    copied: torch.cuda.Event
    used: torch.cuda.Event | None = None


class Transfer:
    """Copy batch after batch to a device, the next one while the GPU works on the last.

    A copy has its own stream. There are two buffers: one is filled while the other is read. On a CPU the batch is
    returned as it is.

    Args:
        device: Where the batches go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: list[_Buffer] = []
        self._count = 0

    def __call__(self, batch: Tensor) -> Tensor:
        """Start to copy a batch.

        Args:
            batch: On the CPU, at most as long as the first one and otherwise of its shape. It may be overwritten when
                the call returns.

        Returns:
            The batch on the device, for work in the stream that is current now; valid until the next call.
        """
        if self._stream is None:
            return batch.to(self._device)
        current = torch.cuda.current_stream(self._device)
        if self._count > 0:
            last = self._buffers[(self._count - 1) % 2]
            last.used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            last.used.record(current)
        if len(self._buffers) < 2:
            device = torch.empty_like(batch, device=self._device)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._buffers.append(_Buffer(torch.empty_like(batch).pin_memory(), device, copied))
        buffer = self._buffers[self._count % 2]
        self._count += 1
        buffer.copied.synchronize()
        pinned, device = buffer.pinned[: len(batch)], buffer.device[: len(batch)]
        pinned.copy_(batch)
        with torch.cuda.stream(self._stream):
            # New memory may still be read by work that its last owner left in the current stream.
            self._stream.wait_event(buffer.used) if buffer.used else self._stream.wait_stream(current)
            device.copy_(pinned, non_blocking=True)
            buffer.copied.record(self._stream)
        current.wait_event(buffer.copied)
        return device
