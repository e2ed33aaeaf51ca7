"""The formats of exported networks. To add one, write its two functions and an entry in FORMATS."""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import UsageError
from kdfast.nets.checkpoint import Model

Facts = Mapping[str, str]
Run = Callable[[Tensor], Tensor]


class NotRunnable(Exception):
    """An exported file cannot be run here; the message says why."""


@dataclass(frozen=True)
class Format:
    """A format of exported networks.

    Attributes:
        summary: What the file is.
        write: Writes a network, given an example of its input (B, 3, H, W), a path, and facts to store in it.
        run: Returns a function from images to logits that runs the file; may raise `NotRunnable`.
        has_graph: Whether the file holds the computation, and not only the weights.
        packages: Packages to install for writing it.
    """

    summary: str
    write: Callable[[nn.Module, Tensor, Path, Facts], None]
    run: Callable[[Path, Model], Run]
    has_graph: bool
    packages: tuple[str, ...] = ()

    def check_package(self) -> None:
        """Raise UsageError if a package is missing."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(f"this format needs missing packages: pip install {' '.join(missing)}")


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}


def _with_weights(model: Model, state: Mapping[str, Tensor]) -> Run:
    """Return a copy of the network with other weights."""
    net = copy.deepcopy(model.net)
    for tensor in net.state_dict().values():
        tensor.zero_()
    net.load_state_dict(dict(state))
    return net.eval()


def write_safetensors(network: nn.Module, example: Tensor, path: Path, facts: Facts) -> None:
    """Write the weights, with the facts in the header."""
    from safetensors.torch import save_file

    save_file(_state(network), str(path), metadata=dict(facts))


def run_safetensors(path: Path, model: Model) -> Run:
    """Run the network with the weights of the file."""
    from safetensors.torch import load_file

    return _with_weights(model, load_file(str(path)))


def write_state_dict(network: nn.Module, example: Tensor, path: Path, facts: Facts) -> None:
    """Write the weights alone, as `torch.save` does; `torch.load(..., weights_only=True)` reads them."""
    torch.save(_state(network), path)


def run_state_dict(path: Path, model: Model) -> Run:
    """Run the network with the weights of the file."""
    return _with_weights(model, torch.load(path, map_location="cpu", weights_only=True))


FACTS_FILE = "kdfast.json"
"""Name of the extra file in a TorchScript archive; its lines are NAME=JSON."""


def write_torchscript(network: nn.Module, example: Tensor, path: Path, facts: Facts) -> None:
    """Trace the network and write it, with the facts in an extra file."""
    text = "\n".join(f"{name}={value}" for name, value in facts.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, which advises other formats
        traced: Any = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, str(path), _extra_files={FACTS_FILE: text})


def run_torchscript(path: Path, model: Model) -> Run:
    """Run the file with PyTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Run = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    return loaded


def write_onnx(network: nn.Module, example: Tensor, path: Path, facts: Facts) -> None:
    """Write the network with the input `image`, the output `logits`, and batches of any size."""
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (example,),
            str(path),
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    content = onnx.load(str(path))
    onnx.helper.set_model_props(content, dict(facts))
    onnx.checker.check_model(content)
    onnx.save(content, str(path))


def run_onnx(path: Path, model: Model) -> Run:
    """Run the file with onnxruntime."""
    try:
        import onnxruntime
    except ImportError as error:
        raise NotRunnable("onnxruntime is not installed") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"image": images.numpy()})[0])


FORMATS: dict[str, Format] = {
    "safetensors": Format("weights, in a file that any framework reads", write_safetensors, run_safetensors, False),
    "onnx": Format("network for onnxruntime and others", write_onnx, run_onnx, True, ("onnx", "onnxscript")),
    "torchscript": Format("network for torch.jit.load, from C++ too", write_torchscript, run_torchscript, True),
    "state_dict": Format("weights for torch.load", write_state_dict, run_state_dict, False),
}
"""Name -> format."""
