"""Analysis of the autograd graph before the backward pass: where it may stop, and how often parameters are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["Edge", "Node", "bypassing_parameters", "count_parameter_uses", "find_deepest_nodes", "sort_topologically"]

Node = Any  # torch.autograd.graph.Node and C++ nodes without a common Python class
Edge = Any  # torch.autograd.graph.GradientEdge

# Nodes that pass a parameter through: the copy that autocast shares among uses, and the transposition inside linear.
_PASS_THROUGH = ("ToCopyBackward0", "TBackward0", "TransposeBackward0")


def sort_topologically(root: Tensor) -> list[Node]:
    """Return all graph nodes that a tensor depends on, children before parents.

    The list keeps the nodes alive: otherwise two accesses to one node could return two Python objects.
    """
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root.grad_fn, False)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child in _children(node) if child not in seen]
    return order


def count_parameter_uses(order: Sequence[Node]) -> Counter[int]:
    """Count the uses of each parameter, by id.

    Args:
        order: All nodes of a graph, children before parents.
    """
    uses: Counter[int] = Counter()
    passed: dict[Node, int] = {}
    for node in order:
        children = _children(node)
        used = [id(c.variable) if hasattr(c, "variable") else passed[c] for c in children if _is_use(c, passed)]
        if node.name() in _PASS_THROUGH and len(children) == len(used) == 1:
            passed[node] = used[0]
        else:
            uses.update(used)
    return uses


def find_deepest_nodes(order: Iterable[Node], marked: set[Node]) -> set[Node]:
    """Return the marked nodes with no marked node below them: a backward pass that reaches these visits all marked."""
    marked_below: dict[Node, bool] = {}
    found = set()
    for node in order:
        below = any(marked_below[child] for child in _children(node))
        if node in marked and not below:
            found.add(node)
        marked_below[node] = below or node in marked
    return found


def bypassing_parameters(loss: Tensor, recorded: Mapping[Node, Sequence[Node]]) -> set[int]:
    """Return the ids of parameters that the loss also depends on by a path that avoids the recorded operations.

    Args:
        loss: The loss.
        recorded: For each node that is an output of a recorded operation, the nodes of its inputs from which the search
            goes on: all but the parameters.
    """
    found: set[int] = set()
    seen: set[Node] = set()
    stack: list[Node] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += recorded[node] if node in recorded else _children(node)
    return found


def _children(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


def _is_use(child: Node, passed: dict[Node, int]) -> bool:
    return hasattr(child, "variable") or child in passed
