"""torchvision and timm that are missing or made for another torch, and networks of theirs that are no classifiers."""

import collections
import importlib.metadata
import sys
import types

import pytest
import torch
from torch import nn

from kdfast.data.views import Normalization
from kdfast.errors import UsageError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model, load_model, save_model
from kdfast.nets.sources.libraries import LibraryError, describe_misfit

FAULTS = {
    "a missing operator": RuntimeError("operator torchvision::nms does not exist"),
    "a missing symbol": OSError("libtorch_cuda.so: undefined symbol: _ZN3c10"),
    "a name that moved": ImportError("cannot import name 'x' from 'torch'"),
    "an attribute that went": AttributeError("module 'torch.library' has no attribute 'register_fake'"),
}


@pytest.fixture
def broken(monkeypatch, tmp_path, request):
    """A library on the path whose import fails."""
    library, fault = request.param
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / library
    folder.mkdir()
    error = FAULTS[fault]
    (folder / "__init__.py").write_text(f"raise {type(error).__name__}({str(error)!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.2")
    return library, str(error)


@pytest.mark.parametrize("broken", [(lib, f) for lib in ("torchvision", "timm") for f in FAULTS], indirect=True)
def test_a_library_for_another_torch_is_named_with_the_remedy(broken):
    library, reason = broken
    with pytest.raises(LibraryError) as caught:
        build_net(f"{library}:resnet18", 10)
    expected = f"{library} 0.1.2 does not work with torch {torch.__version__} ({reason})"
    assert expected in str(caught.value)
    base = torch.__version__.split("+")[0]
    assert f"pip uninstall -y torchvision; pip install torchvision torch=={base}" in str(caught.value)
    assert expected in str(describe_misfit(library))


@pytest.mark.parametrize(
    ("version", "index"), [("2.9.1+cpu", "whl/cpu"), ("2.11.0+cu130", "whl/cu130"), ("2.8.0", None)]
)
def test_the_remedy_names_the_index_of_the_installed_torch(monkeypatch, version, index):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(LibraryError, match=r"torch==" + version.split("+")[0]) as caught:
        build_net("timm:resnet18", 10)
    assert ("--index-url" in str(caught.value)) == (index is not None)
    assert (index or "pip install timm") in str(caught.value)


def test_metadata_tell_a_torchvision_made_for_another_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", types.ModuleType("models"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy", "torch==2.5.0"])
    assert f"made for torch 2.5.0, installed is {torch.__version__}" in str(describe_misfit("torchvision"))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [f"torch=={torch.__version__.split('+')[0]}"])
    assert describe_misfit("torchvision") is None


def test_nothing_is_said_about_a_library_that_is_not_installed(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert describe_misfit("timm") is None


def torchvision_models() -> types.SimpleNamespace:
    tasks = {"segmentation": ["fcn_resnet50"], "detection": ["ssd300"], "video": ["r3d_18"], "optical_flow": ["raft"]}

    def list_models(module=None):
        return (
            tasks[module.name] if module else ["resnet18", "odd", *(name for names in tasks.values() for name in names)]
        )

    def get_model(name, weights, num_classes):
        if name == "odd":
            raise TypeError("unexpected keyword argument 'num_classes'")
        return nn.Linear(2, num_classes)

    parts = {name: types.SimpleNamespace(name=name) for name in tasks}
    return types.SimpleNamespace(list_models=list_models, get_model=get_model, **parts)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fcn_resnet50", "is a network for segmentation"),
        ("ssd300", "is a network for detection"),
        ("r3d_18", "is a network for video"),
        ("raft", "is a network for optical flow"),
        ("odd", r"cannot be built as a classifier of 10 classes \(unexpected keyword"),
        ("resnet81", "did you mean 'resnet18'"),
    ],
)
def test_networks_that_are_no_classifiers_are_refused(monkeypatch, name, words):
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", torchvision_models())
    assert isinstance(build_net("torchvision:resnet18", 10), nn.Linear)
    with pytest.raises(UsageError, match=words):
        build_net(f"torchvision:{name}", 10)


class Recorder:
    """Stands for timm: names, and the arguments of the last builder."""

    def __init__(self):
        self.given = {}

    def list_models(self):
        return ["resnet18", "vit_tiny"]

    def create_model(self, name, *, pretrained, num_classes, **arguments):
        self.given = {"name": name, "pretrained": pretrained, **arguments}
        return nn.Linear(2, num_classes)


def test_tags_and_arguments_reach_timm_and_never_load_weights(monkeypatch):
    timm = Recorder()
    monkeypatch.setitem(sys.modules, "timm", timm)
    build_net("timm:resnet18.a1_in1k(in_chans=1)", 10)
    assert timm.given == {"name": "resnet18.a1_in1k", "pretrained": False, "in_chans": 1}
    with pytest.raises(UsageError, match="did you mean 'resnet18'"):
        build_net("timm:resnet81.a1_in1k", 10)
    for argument in ("pretrained", "checkpoint_path", "num_classes"):
        with pytest.raises(UsageError, match=f"`net_arg` {argument} is not for timm:resnet18"):
            build_net("timm:resnet18", 10, **{argument: 3})


class Auxiliary(nn.Module):
    """Returns further outputs in training, as torchvision's googlenet does."""

    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        z = self.fc(x.flatten(1))
        return collections.namedtuple("Out", ["logits", "aux2", "aux1"])(z, 2 * z, 3 * z) if self.training else z


def test_outputs_beside_the_logits_are_left_out(monkeypatch):
    library = torchvision_models()
    library.get_model = lambda name, weights, num_classes: Auxiliary(num_classes)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", library)
    net, x = build_net("torchvision:resnet18", 10), torch.randn(3, 3, 2, 2)
    assert torch.equal(net.train()(x), net.fc(x.flatten(1)))
    assert torch.equal(net.eval()(x), net.fc(x.flatten(1)))
    assert torch.equal(torch.func.functional_call(net.train(), dict(net.named_parameters()), (x,)), net(x))


def test_a_checkpoint_of_a_missing_library_is_not_called_damaged(monkeypatch, tmp_path):
    names = tuple("abc")
    model = Model(nn.Linear(2, 3), "timm:resnet18", 3, names, Normalization((0.5,) * 3, (0.2,) * 3))
    save_model(tmp_path / "m.pt", model)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(LibraryError, match="needs the package timm"):
        load_model(tmp_path / "m.pt")
