"""A stand-in for Triton's CUDA driver that compiles and records launches, but launches nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

__all__ = ["PROCESSORS", "Launch", "recorded_launches"]

PROCESSORS = {80: 108, 90: 132}
"""Streaming multiprocessors of an A100 (sm_80) and of an H100 or H200 (sm_90)."""
SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes that one block may use


@dataclass(frozen=True)
class Launch:
    """One launch that was asked for.

    Attributes:
        kernel: Name of the Triton function.
        arch: Compute capability, 80 or 90.
        grid: Blocks along each axis; clusters of ``ctas`` blocks if that is more than 1.
        warps: Warps of a block.
        ctas: Blocks of a cluster.
        shared: Shared memory of a block in bytes.
        arguments: Value of each argument, with constants and the values that Triton specialized on.
        types: Triton's type of each argument; "constexpr" for those that the machine code does not take.
        ptx: PTX source.
        cubin: Machine code.
    """

    kernel: str
    arch: int
    grid: tuple[int, int, int]
    warps: int
    ctas: int
    shared: int
    arguments: dict[str, Any]
    types: dict[str, Any]
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)


@contextlib.contextmanager
def recorded_launches(arch: int) -> Iterator[list[Launch]]:
    """Record the Triton launches of a block of code, made for a compute capability, instead of running them.

    The tensors may be meta tensors: their contents are never read, and their addresses count as aligned to 16 bytes.
    What Triton compiles is forgotten at the end, so that a real launch of the same kernel compiles it again.

    Args:
        arch: 80 or 90.

    Yields:
        The list that grows with each launch.

    Raises:
        RuntimeError: If Triton's interpreter replaced its compiler, which TRITON_INTERPRET=1 does at import.
    """
    from triton import knobs

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 replaces Triton's compiler: unset it to compile kernels")
    before = dict(vars(driver))  # the names of its fields differ between Triton's versions
    stand_in = _Driver(arch)
    driver.set_active(stand_in)
    try:
        yield stand_in.launches
    finally:
        vars(driver).update(before)
        for kernel in stand_in.kernels:
            kernel.device_caches.pop(stand_in.device, None)


class _Driver(DriverBase):  # type: ignore[misc]
    """The methods that Triton calls to compile and launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        # Triton keeps compiled kernels by device; this one is no index of a real device.
        self.device = f"sm_{arch} without a device"
        self.launches: list[Launch] = []
        self.kernels: list[Any] = []
        self.utils = self

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing can be timed without a device")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY[self.arch],
            "multiprocessor_count": PROCESSORS[self.arch],
            "max_num_regs": 65_536,
            "warpSize": 32,
        }

    def load_binary(self, name: str, cubin: bytes, shared: int, device: Any) -> tuple[None, bytes, int, int, int]:
        """Return no module, so that none is unloaded, the machine code as the function, and the threads of a block."""
        return None, cubin, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return a function that records a launch; its arguments are those of Triton's launchers."""

        def record(x: int, y: int, z: int, stream: int, cubin: bytes, *rest: Any) -> None:
            kernel = source.fn
            self.kernels.append(kernel)
            compiled = kernel.device_caches[self.device][0].values()
            ptx = next(k.asm["ptx"] for k in compiled if k.asm["cubin"] is cubin)
            arguments = dict(zip(kernel.arg_names, rest[-len(kernel.arg_names) :], strict=True))
            self.launches.append(
                Launch(
                    kernel.__name__, self.arch, (x, y, z), metadata.num_warps, metadata.num_ctas, metadata.shared,
                    arguments, dict(source.signature), ptx, cubin,
                )
            )  # fmt: skip

        return record
