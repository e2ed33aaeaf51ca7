"""Folding batch norms into the convolutions before them, for networks that only answer and no longer learn."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(net: nn.Module) -> nn.Module:
    """A network with the same answers up to rounding, and fewer steps.

    Networks that torch.fx cannot trace (data-dependent control flow) are returned as they are: slower, as right.

    Args:
        net: A network in evaluation mode. It shares its modules with the result: pass a copy to keep it.
    """
    try:
        traced = fx.symbolic_trace(net)
    except Exception:  # tracing runs the network's own code, which may fail in any way on symbolic inputs
        return net
    modules = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) is not nn.BatchNorm2d:
            continue
        before = node.args[0]
        if before.op != "call_module" or type(modules[before.target]) is not nn.Conv2d:
            continue
        # A convolution called twice, or whose output is also used elsewhere, must keep its weights.
        if calls[before.target] > 1 or len(before.users) > 1:
            continue
        traced.set_submodule(before.target, fuse_conv_bn_eval(modules[before.target], modules[node.target]))
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced
