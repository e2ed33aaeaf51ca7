"""Triton's interpreter with every NumPy, and faster: import this before the first kernel runs.

Triton 3.6 reads the bounds of a kernel's loop by `int()` of an array of one element, which NumPy 2.5 rejects. Triton
3.9 reads them correctly.

Triton patches its language for each kernel, and anew for each call of a function in it, which takes up to half
of the time. Here a kernel patches what its functions need, too.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

patch_language, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
BOTH = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


def patch_for_a_kernel(kernel: Any) -> Any:
    """Patch the language where kernels see it, and its core, where the functions of its standard library do."""
    return patch_language(BOTH)


def patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
    """Patch Triton's tensor class as the interpreter does, which undoes it after the kernel, but read integers so."""
    patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: self.handle.data.item()


def call_in_a_kernel(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of a kernel, which has patched the language."""
    return function.rewrite()(*args, **kwargs)


interpreter._patch_lang = patch_for_a_kernel
interpreter._patch_lang_tensor = patch_tensor_and_index
interpreter.InterpretedFunction.__call__ = call_in_a_kernel
