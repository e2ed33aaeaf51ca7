"""Timing on a device, with a stand-in for CUDA: replays of a graph, or single calls where capture fails."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import harness


class FakeCuda:
    """A device on which every call takes 2 ms; `captures` says whether calls may be captured."""

    def __init__(self, captures):
        self.now, self.captures, self.capturing, self.captured = 0.0, captures, False, 0

    def call(self):
        if self.capturing and not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.capturing:
            self.captured += 1
        else:
            self.now += 2.0

    def replay(self):
        self.now += 2.0 * self.captured

    @contextlib.contextmanager
    def graph(self, _graph):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


@pytest.fixture
def fake(monkeypatch):
    def install(captures):
        cuda = FakeCuda(captures)

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.now

            def elapsed_time(self, other):
                return other.at - self.at

        class Stream:
            def wait_stream(self, _other):
                pass

        class Graph:
            def replay(self):
                cuda.replay()

        names = {
            "Event": Event, "Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph, "graph": cuda.graph,
            "stream": lambda _stream: contextlib.nullcontext(), "synchronize": lambda: None,
        }  # fmt: skip
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        return cuda

    return install


@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("calls", [1, 50])
def test_a_timing_is_seconds_a_call(fake, captures, calls):
    cuda = fake(captures)
    timing = harness.device_timing(cuda.call, "cuda", 7, calls=calls)
    assert timing.seconds == pytest.approx([0.002] * 7)
    assert timing.graph == captures
    assert cuda.captured == (calls if captures else 0)


def test_a_timing_on_a_cpu_is_no_graph():
    timing = harness.device_timing(lambda: sum(range(100)), "cpu", 3)
    assert len(timing.seconds) == 3
    assert 0 < timing.median < 0.1
    assert not timing.graph


def test_copy_bandwidth_counts_reads_and_writes(monkeypatch):
    copied = []
    monkeypatch.setattr(harness, "device_timing", lambda call, *_: copied.append(call()) or harness.Timing([0.5]))
    assert harness.copy_bandwidth(1 << 20) == (1 << 20) / 0.5
    assert 2 * copied[0].nbytes == 1 << 20
