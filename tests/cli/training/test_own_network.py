"""Every command takes networks of the user's own code, by file, and refuses what does not fit before it writes."""

import json
import sys

import pytest
import torch

from kdfast.nets.checkpoint import read_model_file
from kdfast.nets.sources import own_code

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.fc = nn.Linear(width, num_classes)

    def logits(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))

    def forward(self, x):
        z = self.logits(x)
        return {"logits": z, "aux": z}

class Named(Net):
    def forward(self, x):
        return {"out": self.logits(x)}

class Gray(Net):
    def __init__(self, classes):
        super().__init__(classes)
        self.conv = nn.Conv2d(1, 4, 3)

class OneSize(Net):
    def forward(self, x):
        assert x.shape[-1] == 224, "made for 224 pixels"
        return self.logits(x)

class Segmentation(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 1)

    def forward(self, x):
        return self.conv(x)
"""
SHORT = ("--epochs", 1, "--batch-size", 40, "--views", 1)


def forget(monkeypatch):
    """As in a new process."""
    for name in ("_NAMED", "_MODULES", "_LOADED"):
        monkeypatch.setattr(own_code, name, {})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "models.py").write_text(SOURCE)
    forget(monkeypatch)
    return tmp_path


def test_from_an_own_teacher_to_an_own_student(kdfast, tiny, folder, monkeypatch):
    train = ("teacher", "train", "--data", tiny, "--net", "models.py:Net", "--net-arg", "width=8", *SHORT)
    assert kdfast(*train, "--out", "T.pt").code == 0
    content = read_model_file("T.pt")
    assert (content["net"], content["code"]["file"]) == ("models.py:Net(width=8)", str(folder / "models.py"))
    forget(monkeypatch)
    cache = ("cache", "--data", tiny, "--teacher", "T.pt", "--views", 1, "--out", "cache")
    refused = kdfast(*cache)
    assert refused.code == 2
    assert f"--teacher-net {folder / 'models.py'}:Net" in refused.err
    assert not (folder / "cache").exists()
    assert kdfast(*cache, "--teacher-net", "models.py:Net").code == 0
    forget(monkeypatch)
    distill = ("distill", "--data", tiny, "--student", "models.py:Net", *SHORT, "--out", "run")
    assert kdfast(*distill, "--cache", "cache").code == 0
    config = json.loads((folder / "run/config.json").read_text())
    assert config["student"] == "models.py:Net"
    assert len(config["student_code"]) == 64
    forget(monkeypatch)
    assert "--net" in kdfast("eval", "--data", tiny, "--model", "run/student.pt").err
    shown = kdfast("eval", "--data", tiny, "--model", "run/student.pt", "--net", "models.py:Net")
    assert shown.code == 0
    assert "models.py:Net: top-1" in shown.out
    # A finished run is recognized, also from another path to the same code; not with other code.
    assert kdfast(*distill, "--cache", "cache").code == 0
    (folder / "models.py").write_text(SOURCE + "\n# changed")
    forget(monkeypatch)
    changed = kdfast(*distill, "--cache", "cache")
    assert changed.code != 0
    assert "student_code" in changed.err
    assert "the file with the student's code has changed" in changed.err


def test_a_teacher_of_own_code_runs_online(kdfast, tiny, monkeypatch):
    assert kdfast("teacher", "train", "--data", tiny, "--net", "models.py:Net", *SHORT, "--out", "T.pt").code == 0
    forget(monkeypatch)
    distill = (
        "distill",
        "--data",
        tiny,
        "--student",
        "resnet8",
        "--teacher",
        "T.pt",
        *SHORT,
        "--out",
        "run",
        "--dry-run",
    )
    assert "--teacher-net" in kdfast(*distill).err
    assert kdfast(*distill, "--teacher-net", "models.py:Net").code == 0
    assert kdfast(*distill, "--teacher-net", "resnet8").code == 2


COMMANDS = {
    "distill": ("distill", "--student", "{}", "--alpha", 0, *SHORT, "--out", "out"),
    "teacher train": ("teacher", "train", "--net", "{}", *SHORT, "--out", "out"),
    "dynamics": ("dynamics", "--net", "{}", *SHORT, "--out", "out"),
    "sweep": ("sweep", "--student", "{}", "--kd", "off", "--steps", 3, "--batch-size", 8, "--out", "out"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("net", "words"),
    [
        ("models.py:Named", "returns a dict of out"),
        ("models.py:Gray", "are in color"),
        ("models.py:OneSize", "made for 224 pixels"),
        ("models.py:Segmentation", "not logits of shape (2, 3)"),
        ("models.py:Missing", "has no 'Missing'"),
        ("missing.py:Net", "there is no file missing.py"),
        ("models.py:Net(depth=3)", "--net-arg"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_before_anything_is_written(kdfast, tiny, folder, command, net, words):
    words_of_command = [net if word == "{}" else word for word in COMMANDS[command]]
    for dry in ([], ["--dry-run"]):
        found = kdfast(*words_of_command, "--data", tiny, *dry)
        assert found.code == 2
        assert words in found.err
        assert "kdfast: unexpected" not in found.err
        assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == ["models.py"]


def test_a_student_starts_from_weights(kdfast, tiny, folder):
    torch.manual_seed(5)
    net = own_code.build_own_net(own_code.parse_spec("models.py:Net"), 7)
    torch.save({"state_dict": {f"module.{name}": t for name, t in net.state_dict().items()}}, "w.pth")
    distill = ("distill", "--data", tiny, "--student", "models.py:Net", "--alpha", 0, "--lr", 0, *SHORT, "--out", "run")
    assert kdfast(*distill, "--init", "w.pth").code == 0
    state = read_model_file("run/student.pt")["state_dict"]
    assert torch.equal(state["conv.weight"], net.conv.weight)  # with a rate of 0, nothing moves
    assert state["fc.weight"].shape == (3, 4)
    assert "--init was" in kdfast(*distill).err  # the same run without it is another run
    refused = kdfast(*distill[:-1], "other", "--net-arg", "width=5", "--init", "w.pth")
    assert refused.code == 3
    assert "does not match models.py:Net(width=5)" in refused.err
    assert kdfast(*distill[:-1], "other", "--init", "none.pth").code == 3
    assert not (folder / "other").exists()


def test_a_foreign_checkpoint_is_imported_into_an_own_network(kdfast, tiny):
    torch.manual_seed(5)
    net = own_code.build_own_net(own_code.parse_spec("models.py:Net(width=6)"), 3)
    torch.save(net.state_dict(), "w.pth")
    done = kdfast("teacher", "import", "w.pth", "--net", "models.py:Net", "--net-arg", "width=6", "--data", tiny,
                  "--mean", 0.5, "--std", 0.5, "--out", "T.pt")  # fmt: skip
    assert done.code == 0, done.err
    assert torch.equal(read_model_file("T.pt")["state_dict"]["fc.weight"], net.fc.weight)
