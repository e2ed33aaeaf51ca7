import argparse
import copy
import pathlib
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from kdfast.data.views import Normalization
from kdfast.errors import CheckpointError, UsageError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model, digest_of, load_model, save_model
from kdfast.nets.importing import import_checkpoint

NORM = Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
NAMES = tuple("abcdefghij")


class WritesFile:
    """A pickle that creates a file if an unsafe loader reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model(build_net("resnet8", 10).eval(), "resnet8", 10, NAMES, NORM, {"epochs": 3, "top1": 61.5})


def imported(path, net="resnet8", classes=10, **options):
    return import_checkpoint(path, net=net, classes=classes, normalization=NORM, **options)


def test_model_round_trips(tmp_path, model):
    save_model(tmp_path / "m.pt", model)
    back = load_model(tmp_path / "m.pt", classes=10)
    assert (back.name, back.classes, back.class_names, back.metadata) == ("resnet8", 10, NAMES, model.metadata)
    assert back.normalization == NORM
    assert back.digest == model.digest
    assert not back.net.training
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(back.net(x), model.net(x))


def test_digest_depends_only_on_names_values_shapes_and_dtypes():
    state = {"a": torch.arange(4.0), "b": torch.ones(2, 3)}
    same = {"b": torch.ones(3, 2).T, "a": torch.arange(4.0), "bn.num_batches_tracked": torch.tensor(7)}
    assert digest_of(state) == digest_of(same)
    others = [
        {**state, "a": torch.tensor([0.0, 1.0, 2.0, 3.5])},
        {**state, "a": torch.arange(4.0).reshape(2, 2)},
        {**state, "a": torch.arange(4.0).view(torch.int32)},
        {"c": state["a"], "b": state["b"]},
    ]
    assert len({digest_of(state), *map(digest_of, others)}) == 5


def test_detects_a_flipped_bit_of_the_weights(tmp_path, model):
    path = tmp_path / "m.pt"
    save_model(path, model)
    raw = bytearray(path.read_bytes())
    at = raw.find(model.net.fc.weight.detach().numpy().tobytes()[:16])
    assert at > 0
    raw[at + 1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="do not match their digest"):
        load_model(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_rejects_a_malicious_pickle_and_runs_nothing(tmp_path, model, zipped):
    created, path = tmp_path / "owned", tmp_path / "evil.pth"
    content = {"state_dict": model.net.state_dict(), "extra": WritesFile(created)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for read in (load_model, imported):
        with pytest.raises(CheckpointError, match="nothing in it was run"):
            read(path)
    assert not created.exists()
    # An unsafe loader runs the code, so the assertion above is not vacuous.
    torch.load(path, weights_only=False)
    assert created.exists()


def test_rejects_a_bare_malicious_pickle(tmp_path):
    created, path = tmp_path / "owned", tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(WritesFile(created)))
    with pytest.raises(CheckpointError) as caught:
        imported(path)
    assert not created.exists()
    assert "weights_only" not in str(caught.value), "the message must not suggest unsafe loading"


def test_rejects_a_model_with_non_finite_weights(tmp_path, model):
    broken = copy.deepcopy(model)
    broken.net.fc.bias.data[1] = float("nan")
    save_model(tmp_path / "m.pt", broken)
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in fc\.bias"):
        load_model(tmp_path / "m.pt")


def test_rejects_a_pickled_module(tmp_path, model):
    torch.save(model.net, tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"state dict alone, or a \.safetensors"):
        imported(tmp_path / "module.pt")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_rejects_truncated_files(tmp_path, model, keep, suffix):
    path = tmp_path / f"m{suffix}"
    if suffix == ".pt":
        save_model(path, model)
    else:
        safetensors.torch.save_file(model.net.state_dict(), path)
    raw = path.read_bytes()
    path.write_bytes(raw[: keep if keep >= 1 else int(keep * len(raw))])
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        imported(path)


def test_message_names_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            imported(path)


def test_a_folder_of_a_run_stands_for_its_student(tmp_path, model):
    save_model(tmp_path / "student.pt", model)
    assert load_model(tmp_path).digest == model.digest


def test_rejects_another_class_count(tmp_path, model):
    save_model(tmp_path / "m.pt", model)
    with pytest.raises(CheckpointError, match="10 classes, but the data has 100"):
        load_model(tmp_path / "m.pt", classes=100)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "not a kdfast checkpoint"),
        ({"version": 99}, "version 99"),
        ({"net": "resnet20"}, "is damaged"),
        ({"net": "nonsense"}, "is damaged"),
        ({"std": [0.0, 1.0, 1.0]}, "is damaged"),
        ({"mean": [0.5, 0.5]}, "is damaged"),
        ({"class_names": ["one"]}, "1 class names for 10 classes"),
        ({"digest": "0" * 64}, "do not match their digest"),
    ],
)
def test_rejects_inconsistent_checkpoints(tmp_path, model, change, words):
    save_model(tmp_path / "m.pt", model)
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    torch.save({**content, **change}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path / "m.pt")


def test_rejects_models_that_cannot_be_saved(tmp_path, model):
    model.metadata["object"] = object()
    with pytest.raises(UsageError, match="plain JSON"):
        save_model(tmp_path / "m.pt", model)
    model.metadata.clear()
    model.class_names = ("one",)
    with pytest.raises(UsageError, match="1 class names"):
        save_model(tmp_path / "m.pt", model)
    assert not list(tmp_path.iterdir())


FOREIGN = {
    "bare": lambda state: state,
    "data parallel": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "best_prec1": 93.6},
    "compiled, nested": lambda state: {"model": {f"_orig_mod.backbone.{k}": v for k, v in state.items()}, "epoch": 3},
    "under an unusual key": lambda state: {"weights_of_run_7": state, "epoch": 3},
    "numpy and argparse": lambda state: {
        "net": state,
        "acc": np.float64(71.5),
        "step": np.int64(3),
        "args": argparse.Namespace(lr=0.1),
    },
    "linear and shortcut": lambda state: {
        k.replace("fc.", "linear.").replace("downsample", "shortcut"): v for k, v in state.items()
    },
    "without counters, half precision": lambda state: {k: v.half() for k, v in state.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("layout", FOREIGN)
def test_imports_foreign_layouts(tmp_path, model, layout):
    torch.save(FOREIGN[layout](model.net.state_dict()), tmp_path / "foreign.th")
    got, report = imported(tmp_path / "foreign.th", class_names=NAMES)
    assert report.complete
    assert str(report).startswith(f"{tmp_path / 'foreign.th'}: all ")
    expected = {k: v.half() if "half" in layout else v for k, v in model.net.state_dict().items() if "num_b" not in k}
    state = got.net.state_dict()
    assert all(torch.equal(state[name].to(tensor.dtype), tensor) for name, tensor in expected.items())
    assert (got.class_names, got.normalization, got.net.training) == (NAMES, NORM, False)


def test_renamed_layers_are_reported(tmp_path, model):
    torch.save(FOREIGN["linear and shortcut"](model.net.state_dict()), tmp_path / "f.pt")
    _, report = imported(tmp_path / "f.pt")
    assert ("linear.bias", "fc.bias") in report.renamed
    assert ("layer2.0.shortcut.1.running_var", "layer2.0.downsample.1.running_var") in report.renamed
    assert "renamed" in report.summary()


def test_imports_option_a_names_into_option_a(tmp_path):
    source = build_net("resnet14a", 10)
    torch.save({"module." + k.replace("linear", "fc"): v for k, v in source.state_dict().items()}, tmp_path / "a.th")
    got, _ = imported(tmp_path / "a.th", net="resnet14a")
    assert torch.equal(got.net.linear.weight, source.linear.weight)


def test_imports_safetensors(tmp_path, model):
    safetensors.torch.save_file(model.net.state_dict(), tmp_path / "m.safetensors")
    assert imported(tmp_path / "m.safetensors")[0].digest == model.digest


def test_message_about_the_wrong_architecture_names_the_right_one(tmp_path):
    torch.save(build_net("resnet20a", 10).state_dict(), tmp_path / "m.pt")
    with pytest.raises(
        CheckpointError, match=r"it holds resnet20a with 10 classes; set `net` to that network"
    ) as caught:
        imported(tmp_path / "m.pt", net="resnet20")
    assert "missing (10): layer2.0.downsample.0.weight" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_message_about_the_number_of_classes_names_the_right_one(tmp_path, model):
    torch.save(model.net.state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"resnet8 with 10 classes; use one trained on this data"):
        imported(tmp_path / "m.pt", classes=100)


def test_rejects_unexpected_tensors(tmp_path, model):
    torch.save({**model.net.state_dict(), "aux.weight": torch.zeros(2, 2)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): aux\.weight"):
        imported(tmp_path / "m.pt")


def test_two_networks_in_one_file_require_a_key(tmp_path, model):
    other = {name: tensor + 1 for name, tensor in model.net.state_dict().items()}
    torch.save({"teacher_a": model.net.state_dict(), "pair": {"teacher_b": other}}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"'teacher_a' \(\d+ tensors\), 'pair.teacher_b' .*choose one with `key`"):
        imported(tmp_path / "two.pt")
    got, _ = imported(tmp_path / "two.pt", key="pair.teacher_b")
    assert torch.equal(got.net.fc.bias, model.net.fc.bias + 1)
    with pytest.raises(CheckpointError, match="nothing under `key` 'teacher_c'"):
        imported(tmp_path / "two.pt", key="teacher_c")


def test_rejects_tensors_that_collide_after_renaming(tmp_path, model):
    state = model.net.state_dict()
    torch.save({**state, "module.fc.bias": state["fc.bias"]}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"both match 'fc\.bias'"):
        imported(tmp_path / "m.pt")


def test_rejects_non_finite_weights(tmp_path, model):
    state = dict(model.net.state_dict())
    state["fc.bias"] = torch.full((10,), float("nan"))
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in fc\.bias"):
        imported(tmp_path / "m.pt")


def test_rejects_files_without_weights_and_wrong_class_names(tmp_path, model):
    torch.save({"epoch": 3, "loss": [1.0, 2.0]}, tmp_path / "log.pt")
    with pytest.raises(CheckpointError, match="no weights found"):
        imported(tmp_path / "log.pt")
    torch.save(model.net.state_dict(), tmp_path / "m.pt")
    with pytest.raises(UsageError, match="`class_names` has 2 names"):
        imported(tmp_path / "m.pt", class_names=("a", "b"))
