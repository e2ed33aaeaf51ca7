"""Networks of a user's own code, by file or module, and the checkpoints that hold them."""

import shutil
import sys
import types

import pytest
import torch
from torch import nn

from kdfast.data.views import Normalization
from kdfast.errors import CheckpointError, DataWarning, UsageError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model, load_model, save_model
from kdfast.nets.sources import own_code
from kdfast.nets.sources.own_code import CodeError, name_code
from kdfast.nets.sources.reopen import identify

HALF = Normalization((0.5,) * 3, (0.5,) * 3)
SOURCE = """
import helper
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4, num_classes=3):
        super().__init__()
        self.fc = nn.Linear(helper.INPUTS, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        z = self.head(self.fc(x.flatten(1)))
        return {"logits": z, "aux": 2 * z}

class Gray(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))

def make(classes):
    return Net(5, classes)

def positional(num_classes, /, width=4):
    return Net(width, num_classes)

def quoted(classes, text):
    assert text == "a, (b)='c'"
    return Net(5, classes)

def wrong(n):
    return "no network"

def raises(n):
    raise ValueError("out of luck")

instance = Net()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with models.py and what it imports; nothing was named or imported before."""
    (tmp_path / "helper.py").write_text("INPUTS = 12\n")
    (tmp_path / "models.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    for name in ("helper", "models"):
        sys.modules.pop(name, None)
    for name in ("_NAMED", "_MODULES", "_LOADED"):
        monkeypatch.setattr(own_code, name, {})
    yield tmp_path
    for name in ("helper", "models"):
        sys.modules.pop(name, None)


def forget(monkeypatch):
    """As in a new process."""
    for name in ("_NAMED", "_MODULES", "_LOADED"):
        monkeypatch.setattr(own_code, name, {})


def save(name, path="T.pt"):
    model = Model(build_net(name, 3).eval(), name, 3, ("a", "b", "c"), HALF)
    save_model(path, model)
    return model


@pytest.mark.parametrize(
    ("name", "width"),
    [("models.py:Net", 4), ("models.py:Net(width=7)", 7), ("models.py:make", 5), ("models:Net", 4),
     ("models.py:positional(width=6)", 6),
     ('models.py:quoted(text="a, (b)=\'c\'")', 5)],
)  # fmt: skip
def test_a_class_or_function_gets_the_number_of_classes_and_its_arguments(folder, name, width):
    net = build_net(name, 6 if "make" in name else 3)
    assert net.head.weight.shape == (6 if "make" in name else 3, width)
    logits = net(torch.ones(2, 3, 2, 2))
    assert isinstance(logits, torch.Tensor)
    torch.testing.assert_close(logits, net.head(net.fc(torch.ones(2, 12))))


def test_arguments_may_be_passed_in_python(folder):
    assert build_net("models.py:Net", 3, width=9).fc.weight.shape == (9, 12)


def test_a_network_for_gray_images_gets_the_mean_of_the_channels(folder):
    net = build_net("models.py:Gray", 3)
    gray = torch.randn(2, 1, 6, 6)
    expected = net(gray)
    torch.testing.assert_close(net(gray.expand(2, 3, 6, 6)), expected)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("models.py", "models.py:NAME"),
        ("models.py:Nett", "did you mean 'Net'"),
        ("models.py:instance", "is a Net: name a class or a function"),
        ("models.py:wrong", "returns a str, not an nn.Module"),
        ("models.py:raises", "ValueError: out of luck"),
        ("models.py:Net(widht=3)", "widht"),
        ("missing.py:Net", "there is no file missing.py"),
        ("nowhere:Net", "there is no module nowhere"),
        ("models:", "no network is named"),
        ("models.py:a.b", "no network is named"),
        ("resnet8(channel=1)", "omit what resnet8 does not take"),
        ("resnet8(channels=-1)", "resnet8(channels=-1) cannot be built"),
    ],
)
def test_every_mistake_has_its_message(folder, name, words):
    with pytest.raises(UsageError) as caught:
        build_net(name, 3)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = (", "SyntaxError"),
        ("import not_installed_anywhere", "No module named 'not_installed_anywhere'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_the_reason(folder, code, words):
    (folder / "models.py").write_text(code)
    for name in ("models.py:Net", "models:Net"):
        with pytest.raises(CodeError, match="cannot be imported") as caught:
            build_net(name, 3)
        assert words in str(caught.value)
    assert not (folder / "__pycache__").exists() or not list((folder / "__pycache__").glob("_kdfast*"))


def test_weights_come_back_with_the_arguments_of_the_file(folder, monkeypatch):
    saved = save("models.py:Net(width=7)")
    forget(monkeypatch)
    loaded = load_model("T.pt", net="models.py:Net")
    assert loaded.name == "models.py:Net(width=7)"
    assert loaded.digest == saved.digest
    assert torch.equal(loaded.net(torch.ones(1, 3, 2, 2)), saved.net(torch.ones(1, 3, 2, 2)))


@pytest.mark.parametrize("name", ["models.py:Net", "models:Net"])
def test_a_checkpoint_runs_no_code_that_was_not_named(folder, monkeypatch, name):
    save(name)
    forget(monkeypatch)
    marker = folder / "ran"
    (folder / "models.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n" + SOURCE)
    sys.modules.pop("models", None)
    with pytest.raises(CodeError, match="code of your own, which a checkpoint runs only where you name it") as caught:
        load_model("T.pt")
    assert "damaged" not in str(caught.value)
    assert not marker.exists()
    name_code("models.py:Gray")  # another class of the same file is not this one
    with pytest.raises(CodeError):
        load_model("T.pt")
    name_code(name)
    with pytest.warns(DataWarning, match="has changed since"):
        load_model("T.pt")
    assert marker.exists()


def test_a_checkpoint_cannot_name_other_functions_of_named_code(folder, monkeypatch):
    save("models.py:Net")
    content = torch.load("T.pt", weights_only=True)
    from kdfast.nets import checkpoint

    content["net"] = "os:system(command='touch ran')"
    del content["seal"], content["code"]
    content["seal"] = checkpoint._seal(content)
    torch.save(content, "evil.pt")
    with pytest.raises(CodeError, match="os:system"):
        load_model("evil.pt")
    assert not (folder / "ran").exists()


def test_a_file_that_moved_is_found_by_the_name_given(folder, monkeypatch):
    save("models.py:Net")
    (folder / "new").mkdir()
    shutil.move("models.py", "new/networks.py")
    forget(monkeypatch)
    with pytest.raises(CodeError, match="is not there any more"):
        load_model("T.pt")
    assert load_model("T.pt", net="new/networks.py:Net").name == "new/networks.py:Net"


def test_of_two_files_of_one_name_the_one_with_the_digest_is_run(folder, monkeypatch):
    (folder / "teacher").mkdir()
    (folder / "teacher" / "helper.py").write_text("INPUTS = 12\n")
    (folder / "teacher" / "models.py").write_text(SOURCE.replace("return {", "z = 3 * z\n        return {"))
    images = torch.ones(2, 3, 2, 2)
    saved = save("teacher/models.py:Net")
    for latest in ("models.py:Net", "teacher/models.py:Net"):
        build_net("teacher/models.py:Net", 3)
        build_net(latest, 3)
        assert load_model("T.pt").name == "teacher/models.py:Net"
        assert torch.equal(load_model("T.pt").net(images), saved.net(images))


@pytest.mark.parametrize("helper", ["helper.py", "helper/__init__.py", "helper/inputs.py"])
def test_each_file_imports_the_modules_beside_it(folder, helper):
    source = SOURCE.replace("import helper", "import helper.inputs as helper") if "inputs" in helper else SOURCE
    (folder / "helper.py").unlink()
    for place, inputs in ((folder, 12), (folder / "other", 27)):
        (place / helper).parent.mkdir(parents=True, exist_ok=True)
        (place / helper).write_text(f"INPUTS = {inputs}\n")
        (place / "models.py").write_text(source)
    for _ in range(2):
        assert build_net("models.py:Net", 3).fc.in_features == 12
        assert build_net("other/models.py:Net", 3).fc.in_features == 27
    sys.modules.pop("helper.inputs", None)


def test_code_that_no_longer_fits_is_not_called_damage(folder, monkeypatch):
    save("models.py:Net")
    (folder / "models.py").write_text(SOURCE.replace("self.head", "self.top"))
    forget(monkeypatch)
    with pytest.raises(CheckpointError, match=r"does not fit .*models.py, which has changed since") as caught:
        load_model("T.pt", net="models.py:Net")
    assert "damaged" not in str(caught.value)


def test_the_given_network_must_be_the_one_in_the_file(folder):
    save("models.py:Net(width=7)")
    for given in ("models.py:Net(width=8)", "models.py:Gray", "resnet8"):
        with pytest.raises((CheckpointError, CodeError), match="holds"):
            load_model("T.pt", net=given)
    save("resnet8", "R.pt")
    assert load_model("R.pt", net="resnet8").name == "resnet8"
    with pytest.raises(CheckpointError, match="holds resnet8, not resnet20"):
        load_model("R.pt", net="resnet20")


def test_a_network_of_another_kdfast_is_not_damage(folder, monkeypatch):
    from kdfast.nets import NETS

    monkeypatch.setitem(NETS, "tiny", lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(12, classes)))
    save("tiny")
    monkeypatch.delitem(NETS, "tiny")
    with pytest.raises(CheckpointError, match=r"register it in kdfast.nets.NETS") as caught:
        load_model("T.pt")
    assert "damaged" not in str(caught.value)


def test_identity_follows_the_code_and_not_its_place(folder):
    first = identify("models.py:Net(width=2)")
    (folder / "new").mkdir()
    shutil.copy("models.py", "new/models.py")
    assert identify(str(folder / "new" / "models.py") + ":Net(width=2)") == first
    (folder / "new" / "models.py").write_text(SOURCE + "\n# changed\n")
    assert identify("new/models.py:Net(width=2)")["student_code"] != first["student_code"]
    assert identify("resnet8") == {"student": "resnet8"}
    assert identify("resnet8(channels=1)") == {"student": "resnet8(channels=1)"}


def test_programs_name_the_code_of_a_teacher(folder, monkeypatch):
    import kdfast

    save("models.py:Net(width=7)")
    forget(monkeypatch)
    with pytest.raises(CodeError, match="name it"):
        kdfast.load_teacher("T.pt")
    assert kdfast.load_teacher("T.pt", teacher_net="models.py:Net").name == "models.py:Net(width=7)"


def test_a_network_of_a_program_is_opened_by_the_file_of_the_program(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    program = types.ModuleType("__main__")
    program.__file__ = str(folder / "models.py")
    exec(SOURCE, program.__dict__)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "__main__", program)
        saved = save("__main__:Net(width=7)")
    forget(monkeypatch)
    with pytest.raises(CodeError, match=rf"pass `teacher_net` {folder}/models\.py:Net$"):
        load_model("T.pt")
    name_code("models.py:Net")
    assert load_model("T.pt").name == "models.py:Net(width=7)"
    assert load_model("T.pt").digest == saved.digest


def test_a_model_whose_class_has_no_place_is_saved_without_its_code(folder):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    save_model("T.pt", Model(net, "place:make.<locals>.Net", 3, ("a", "b", "c"), HALF))
    with pytest.raises(CheckpointError, match="cannot be built"):
        load_model("T.pt")
