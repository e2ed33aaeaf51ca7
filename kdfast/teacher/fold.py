"""Fold batch norms into the convolutions before them, for networks that are used for inference only."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdfast.nets.outputs import keep_hooks


def fold_batch_norms(net: nn.Module) -> nn.Module:
    """Return a network with fewer layers and the same outputs up to rounding.

    Networks that torch.fx cannot trace (data-dependent control flow) are returned unchanged: correct, but slower.

    Args:
        net: A network in evaluation mode. The result shares its modules: pass a copy to keep the original.
    """
    try:
        traced = fx.symbolic_trace(net)
    except Exception:  # tracing runs the network's own code, which can fail in any way on symbolic inputs
        return net
    modules = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) is not nn.BatchNorm2d:
            continue
        before = node.args[0]
        if before.op != "call_module" or type(modules[before.target]) is not nn.Conv2d:
            continue
        # A convolution that is called twice, or whose output is also used elsewhere, must keep its weights.
        if calls[before.target] > 1 or len(before.users) > 1:
            continue
        traced.set_submodule(before.target, fuse_conv_bn_eval(modules[before.target], modules[node.target]))
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return keep_hooks(net, traced)  # tracing leaves out those of the network itself
