"""Triton's interpreter with every NumPy: import this before the first kernel runs.

Triton 3.6 reads the bounds of a kernel's loop by `int()` of an array of one element, which NumPy 2.5 rejects. Triton
3.9 reads them correctly.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

patch_tensor = interpreter._patch_lang_tensor


def patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
    """Patch Triton's tensor class as the interpreter does, which undoes it after the kernel, but read integers so."""
    patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: self.handle.data.item()


interpreter._patch_lang_tensor = patch_tensor_and_index
