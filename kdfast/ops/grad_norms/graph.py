"""What the autograd graph tells before the backward pass: where to stop it, and where parameters are really used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

__all__ = ["lowest", "parameter_uses", "walk"]

Node = Any  # torch.autograd.graph.Node and C++ nodes without a common Python class

# They hand a parameter on as it is: autocast's copy, which several uses share, and the transposition inside of linear.
_HANDED_ON = ("ToCopyBackward0", "TBackward0", "TransposeBackward0")


def walk(root: Tensor) -> list[Node]:
    """All nodes below a tensor, children before parents.

    The list keeps the nodes alive: without it two looks at one node could give two objects.
    """
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root.grad_fn, False)]
    while stack:
        node, left = stack.pop()
        if left:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child in _children(node) if child not in seen]
    return order


def parameter_uses(order: Sequence[Node]) -> Counter[int]:
    """How often each parameter is used, by its id.

    Args:
        order: All nodes of a graph, children before parents.
    """
    uses: Counter[int] = Counter()
    handed_on: dict[Node, int] = {}
    for node in order:
        children = _children(node)
        used = [id(c.variable) if hasattr(c, "variable") else handed_on[c] for c in children if _is_use(c, handed_on)]
        if node.name() in _HANDED_ON and len(children) == len(used) == 1:
            handed_on[node] = used[0]
        else:
            uses.update(used)
    return uses


def lowest(order: Iterable[Node], marked: set[Node]) -> set[Node]:
    """Marked nodes below which there is no other: a backward pass that reaches these meets all of them."""
    below: dict[Node, bool] = {}
    found = set()
    for node in order:
        inside = any(below[child] for child in _children(node))
        if node in marked and not inside:
            found.add(node)
        below[node] = inside or node in marked
    return found


def _children(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


def _is_use(child: Node, handed_on: dict[Node, int]) -> bool:
    return hasattr(child, "variable") or child in handed_on
