"""Which way to the norm of a per-sample gradient: the one place where that is decided.

A layer's weight gradient for one sample is `G = sum_t b_t a_t^T`, with `T` positions, inputs `a_t` of length `d` and
output gradients `b_t` of length `p` (a convolution: of one group, `d` counting the kernel's offsets). Three ways to
`||G||^2`, and the multiply-adds that each takes:

- ``direct``: form `G` and square it, `T d p`;
- ``gram``: `<A A^T, B B^T>`, `T^2 (d + p)`;
- ``pixel``: the same for a convolution, where `A A^T` is a sum over the kernel's offsets of entries of the Gram matrix
  of input *pixels*: `T^2 (s^2 c + p + k^2 / 2)`, with `c` input channels a group, `k^2` offsets, and `s^2` the phases
  in which offsets fall for the layer's stride (1 for stride 1; a pixel only ever meets pixels of its phase).

The cheapest wins. Memory does not enter: none of them keeps more than one chunk of samples at a time.
"""

from __future__ import annotations

from typing import NamedTuple

from kdfast.errors import UsageError

__all__ = ["METHODS", "Sizes", "costs", "pick"]

METHODS = ("auto", "direct", "gram", "pixel")


class Sizes(NamedTuple):
    """One sample and one group of a layer: positions, length of inputs and of output gradients, kernel."""

    positions: int
    inputs: int
    outputs: int
    offsets: int = 1
    phases: int = 1


def costs(sizes: Sizes) -> dict[str, float]:
    """Multiply-adds of each way."""
    t, d, p, offsets, phases = sizes
    return {
        "direct": t * d * p,
        "gram": t * t * (d + p),
        "pixel": t * t * (phases * d / offsets + p + offsets / 2),
    }


def pick(sizes: Sizes, method: str = "auto") -> str:
    """The way to go: the cheapest, or the one that is asked for.

    Args:
        sizes: Of one sample and group.
        method: One of ``METHODS``.

    Raises:
        UsageError: The method is none of them.
    """
    if method not in METHODS:
        raise UsageError(f"method={method!r} does not exist: choose one of {', '.join(METHODS)}")
    if method != "auto":
        return method
    found = costs(sizes)
    return min(found, key=lambda name: found[name])
