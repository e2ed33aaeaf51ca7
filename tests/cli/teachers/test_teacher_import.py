"""Teachers of other code and of renamed data, from the command line; what a message advises is done by the test."""

import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdfast.nets import NETS, build_net
from kdfast.nets.checkpoint import load_model, save_model

MEAN = ("--mean", "0.5", "--std", "0.2")


def import_teacher(kdfast, path: Path, tiny: Path, *more, net="resnet8"):
    return kdfast("teacher", "import", path, "--net", net, "--data", tiny, "--out", path.with_suffix(".T.pt"), *more)


@pytest.fixture
def state() -> dict:
    torch.manual_seed(0)
    return build_net("resnet8", 3).state_dict()


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


AMBIGUOUS = {
    "two sets": lambda s, t: {"model_state": s, "ema_state": t},
    "two networks under prefixes": lambda s, t: under("module.student.", s) | under("module.teacher.", t),
    "more tensors": lambda s, t: s | {"aux.0.weight": torch.ones(2, 2), "gain": torch.ones(2)},
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_the_options_of_the_message_import_the_file(kdfast, tiny, tmp_path, state, kind):
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save(AMBIGUOUS[kind](state, other), tmp_path / "c.pth")
    refused = import_teacher(kdfast, tmp_path / "c.pth", tiny, *MEAN)
    assert refused.code == 3
    assert refused.err.count("\n") == 1
    options = re.findall(r"(--(?:key|prefix|ignore)) ('[^']+'|[\w.]+)$|(--ignore) ('[^']+')", refused.err, re.MULTILINE)
    words = [word for found in options for word in shlex.split(" ".join(found))]
    assert words, refused.err
    assert import_teacher(kdfast, tmp_path / "c.pth", tiny, *MEAN, *words).code == 0


def test_one_number_stands_for_all_channels(kdfast, tiny, tmp_path, state):
    torch.save(state, tmp_path / "c.pth")
    assert import_teacher(kdfast, tmp_path / "c.pth", tiny, *MEAN).code == 0
    assert load_model(tmp_path / "c.T.pt").normalization.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--mean is not given"),
        (("--mean", "0.5"), "--mean and --std together"),
        (("--mean", "0.5,0.5", "--std", "0.2"), "three numbers"),
        ((*MEAN, "--ignore", "nothing.*"), "--ignore 'nothing.*' matches no tensor"),
    ],
)
def test_incomplete_options_are_refused(kdfast, tiny, tmp_path, state, options, words):
    torch.save(state, tmp_path / "c.pth")
    outcome = import_teacher(kdfast, tmp_path / "c.pth", tiny, *options)
    assert outcome.code == 2
    assert words in outcome.err
    assert not (tmp_path / "c.T.pt").exists()


def write_folder(root: Path, names: dict[str, int]) -> Path:
    """Write 16 images of 8 x 8 a class and split; name -> brightness."""
    from PIL import Image

    rng = np.random.default_rng(3)
    for split in ("train", "test"):
        for name, level in names.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(16):
                pixels = (rng.integers(0, 60, (8, 8, 3)) + level).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return root


@pytest.fixture(scope="module")
def animals(tmp_path_factory) -> tuple[Path, Path]:
    """Image folders of two classes, and a teacher trained on them."""
    from kdfast.device import resolve_device
    from kdfast.distillation.config import RunConfig
    from kdfast.distillation.folder import RunFolder
    from kdfast.distillation.inputs import InputPaths, plan_run
    from kdfast.distillation.train import train

    root = tmp_path_factory.mktemp("animals")
    data = write_folder(root / "old", {"cat": 20, "dog": 180})
    plan = plan_run(InputPaths(str(data)), RunConfig("resnet8", epochs=4, batch_size=8), device=resolve_device("cpu"))
    with RunFolder(root / "run", plan.identity) as claimed:
        train(plan, claimed)
    return data, root / "run" / "student.pt"


DISTILL = ("distill", "--student", "resnet8", "--batch-size", 8)
COMMANDS = {
    "cache": lambda d, t, o: ("cache", "--data", d, "--teacher", t, "--views", 1, "--out", o),
    "cache --dry-run": lambda d, t, o: ("cache", "--data", d, "--teacher", t, "--views", 1, "--out", o, "--dry-run"),
    "distill": lambda d, t, o: (*DISTILL, "--data", d, "--teacher", t, "--out", o),
    "distill --dry-run": lambda d, t, o: (*DISTILL, "--data", d, "--teacher", t, "--out", o, "--dry-run"),
    "eval": lambda d, t, o: ("eval", "--data", d, "--model", t),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_teacher_of_other_class_names_serves_only_after_the_advised_import(kdfast, animals, tmp_path, command):
    old, teacher = animals
    new = write_folder(tmp_path / "new", {"0_dog": 180, "1_cat": 20})
    outcome = kdfast(*COMMANDS[command](new, teacher, tmp_path / "out"))
    assert outcome.code == 3
    assert "class 0 is 'cat' in the network and '0_dog' in the data" in outcome.err
    assert not (tmp_path / "out").exists()
    assert kdfast(*COMMANDS["eval"](old, teacher, None)).code == 0


def test_the_advised_import_renames_classes(kdfast, animals, tmp_path):
    _, teacher = animals
    new = write_folder(tmp_path / "new", {"a_cat": 20, "b_dog": 180})
    advice = re.search(r"kdfast (teacher import .*)$", kdfast("eval", "--data", new, "--model", teacher).err.strip())
    assert advice is not None
    words = [str(tmp_path / "T.pt") if word == "NEW.pt" else word for word in shlex.split(advice[1])]
    outcome = kdfast(*words)
    assert outcome.code == 0, outcome.err
    assert "classes renamed in place: cat -> a_cat, dog -> b_dog" in outcome.out
    assert "top-1 100.00" in kdfast("eval", "--data", new, "--model", tmp_path / "T.pt").out


@pytest.mark.filterwarnings("default::kdfast.errors.DataWarning")
def test_classes_in_another_order_are_mapped_by_name(kdfast, animals, tmp_path):
    old, teacher = animals
    model = load_model(teacher)
    assert model.class_names == ("cat", "dog")
    with torch.no_grad():
        for tensor in (model.net.fc.weight, model.net.fc.bias):
            tensor.copy_(tensor.flip(0))
    model.class_names = ("dog", "cat")
    save_model(tmp_path / "turned.pt", model)
    mapped = kdfast("eval", "--data", old, "--model", tmp_path / "turned.pt")
    assert mapped.code == 0
    assert "top-1 100.00" in mapped.out
    assert "its outputs are reordered by name (cat, dog)" in mapped.err
    words = ["teacher", "import", tmp_path / "turned.pt", "--net", "resnet8", "--data", old, "--out", tmp_path / "T.pt"]
    assert "outputs reordered by name: cat, dog" in kdfast(*words).out
    assert "top-1 100.00" in kdfast("eval", "--data", old, "--model", tmp_path / "T.pt").out


class OneSize(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        torch._assert(x.shape[-1] == 224, "Wrong image height!")
        return self.fc(self.conv(x).mean((2, 3)))


class Pair(OneSize):
    def forward(self, x):
        z = self.fc(self.conv(x).mean((2, 3)))
        return z, z


class Segmentation(OneSize):
    def forward(self, x):
        return {"out": self.conv(x)}


TRAINING = {
    "distill": ("distill", "--student", "bad", "--alpha", "0"),
    "distill --dry-run": ("distill", "--student", "bad", "--alpha", "0", "--dry-run"),
    "teacher train": ("teacher", "train", "--net", "bad"),
    "dynamics": ("dynamics", "--net", "bad"),
}


@pytest.mark.parametrize("network", [OneSize, Pair, Segmentation])
@pytest.mark.parametrize("command", TRAINING)
def test_networks_that_cannot_be_trained_are_refused_before_any_work(
    kdfast, tiny, tmp_path, monkeypatch, command, network
):
    monkeypatch.setitem(NETS, "bad", network)
    outcome = kdfast(*TRAINING[command], "--data", tiny, "--epochs", 1, "--out", tmp_path / "out")
    assert outcome.code == 2, outcome.err
    assert re.search(r"bad (cannot run on images of 12x12|returns)", outcome.err)
    assert not list(tmp_path.iterdir())


def test_a_teacher_for_another_size_is_refused(kdfast, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(NETS, "bad", OneSize)
    torch.save(OneSize(3).state_dict(), tmp_path / "c.pth")
    outcome = import_teacher(kdfast, tmp_path / "c.pth", tiny, *MEAN, net="bad")
    assert outcome.code == 3
    assert "bad cannot run on images of 12x12 (Wrong image height!)" in outcome.err


def test_doctor_names_a_library_that_does_not_work(kdfast, monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2.3")
    out = kdfast("doctor").out
    assert re.search(r"torchvision +1\.2\.3: .* does not work with torch .*pip install torchvision torch==", out)
    assert re.search(r"timm +1\.2\.3\n", out)
