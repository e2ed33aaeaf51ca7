"""Settings of float32 arithmetic inside and after a block, for every way in which a program may have changed them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kdfast.ops.float32 import full_float32

BACKENDS: Any = torch.backends  # PyTorch declares no types for its modules
READERS: dict[str, Callable[[], Any]] = {
    "cudnn.allow_tf32": lambda: BACKENDS.cudnn.allow_tf32,
    "cuda.matmul.allow_tf32": lambda: BACKENDS.cuda.matmul.allow_tf32,
    "matmul precision": torch.get_float32_matmul_precision,
}
if hasattr(BACKENDS.cudnn, "conv"):  # torch 2.9
    for backend in ("cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn.conv", "mkldnn.rnn", "mkldnn.matmul"):
        names = backend.split(".")
        READERS[backend] = lambda names=names: getattr(getattr(BACKENDS, names[0]), names[1]).fp32_precision
REDUCED = (True, "high", "medium", "tf32", "bf16")

needs_operators = pytest.mark.skipif(not hasattr(BACKENDS.cudnn, "conv"), reason="needs torch 2.9")
CHANGES = {
    "the defaults": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cuBLAS": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "no cuDNN": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
}
OPERATOR_CHANGES = {
    "matmul": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "conv": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    "all reduced": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "all full": lambda: setattr(BACKENDS, "fp32_precision", "ieee"),
}


def settings() -> dict[str, Any]:
    """Read every setting; "contradiction" where torch refuses because the two interfaces disagree."""
    found: dict[str, Any] = {}
    for name, read in READERS.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "contradiction"
    return found


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    yield
    BACKENDS.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    if hasattr(BACKENDS.cudnn, "conv"):
        BACKENDS.fp32_precision = "none"
        for operator in (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn):
            operator.fp32_precision = "none"


def check(change: Callable[[], None]) -> None:
    change()
    before = settings()
    with full_float32():
        inside = settings()
        with full_float32():
            pass
        assert settings() == inside, "the inner block restores nothing"
    assert not [name for name, value in inside.items() if value in REDUCED]
    added = {name for name, value in inside.items() if value == "contradiction" and before[name] != "contradiction"}
    assert not added, "the block contradicts neither interface"
    assert settings() == before


@pytest.mark.parametrize("name", CHANGES)
def test_a_block_forbids_reduced_precision_and_restores_it(name: str) -> None:
    check(CHANGES[name])


@needs_operators
@pytest.mark.parametrize("name", OPERATOR_CHANGES)
def test_the_same_for_settings_by_operator(name: str) -> None:
    check(OPERATOR_CHANGES[name])


@needs_operators
def test_a_setting_inherited_before_is_inherited_after() -> None:
    with full_float32():
        pass
    BACKENDS.fp32_precision = "tf32"
    assert BACKENDS.cuda.matmul.fp32_precision == "tf32"


def test_the_last_of_overlapping_blocks_restores() -> None:
    before = settings()
    first, second = full_float32(), full_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings()["cudnn.allow_tf32"] is False
    second.__exit__(None, None, None)
    assert settings() == before


def test_an_error_in_the_block_restores() -> None:
    before = settings()
    with pytest.raises(ValueError, match="x"), full_float32():
        raise ValueError("x")
    assert settings() == before
