"""Complete weights are imported however they were saved; a message about ambiguous ones says what to pass."""

import argparse
import datetime
import pathlib
import re
import types

import pytest
import torch
from torch import nn

from kdfast.data.views import Normalization
from kdfast.errors import CheckpointError, UsageError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model, load_model, save_model
from kdfast.nets.importing import import_checkpoint

NORM = Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
GRAY = Normalization((0.13,) * 3, (0.31,) * 3)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return build_net("resnet8", 10).eval()


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def shifted(state: dict) -> dict:
    return {name: tensor + 1 for name, tensor in state.items()}


def load(path, content, **options):
    """Save a content and import it."""
    torch.save(content, path)
    return import_checkpoint(path, **{"net": "resnet8", "classes": 10, "normalization": NORM, **options})


def assert_imported(model: Model, net: nn.Module) -> None:
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.net(images), net(images))


SCALAR = torch.zeros(1, dtype=torch.float64)
HARMLESS = {
    "thop": {f"{module}total_{what}": SCALAR for module in ("", "conv1.", "layer1.0.") for what in ("ops", "params")},
    "AveragedModel": {"n_averaged": torch.tensor(7)},
    "an averaged model with its decay": {"decay": torch.tensor(0.99), "num_updates": torch.tensor(3)},
    "weights of a criterion": {"criterion.weight": torch.ones(10)},
    "weights of nested losses": {"losses.ce_loss.weight": torch.ones(10), "train_loss.weight": torch.ones(10)},
    "class weights of the training module": {"class_weights": torch.ones(10)},
}  # fmt: skip


@pytest.mark.parametrize("wrapper", ["", "model."])
@pytest.mark.parametrize("kind", HARMLESS)
def test_counters_and_losses_are_left_out(tmp_path, net, kind, wrapper):
    model, report = load(tmp_path / "c.pth", {"state_dict": under(wrapper, net.state_dict()) | HARMLESS[kind]})
    assert_imported(model, net)
    assert set(report.left_out) == set(HARMLESS[kind])
    assert "left out" in report.summary()


@pytest.mark.parametrize("name", ["logit_scale", "aux.weight", "lossless.weight", "total_ops"])
def test_other_tensors_are_refused_with_a_pattern_that_leaves_them_out(tmp_path, net, name):
    tensor = torch.ones(2)  # a counter has one value
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "c.pth", net.state_dict() | {name: tensor})
    patterns = re.findall(r"`ignore` '([^']+)'", str(caught.value))
    model, _ = load(tmp_path / "c.pth", net.state_dict() | {name: tensor}, ignore=patterns)
    assert_imported(model, net)


def test_patterns_of_the_message_spare_the_layers_beside_unexpected_tensors(tmp_path, net):
    extra = {"layer1.0.se.fc.weight": torch.ones(2, 2), "layer1.0.se.fc.bias": torch.ones(2), "aux.a.b": torch.ones(2)}
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "c.pth", net.state_dict() | extra)
    patterns = re.findall(r"`ignore` '([^']+)'", str(caught.value))
    assert patterns == ["layer1.0.se.*", "aux.*"]
    assert_imported(load(tmp_path / "c.pth", net.state_dict() | extra, ignore=patterns)[0], net)


def test_a_pattern_that_matches_nothing_is_refused(tmp_path, net):
    with pytest.raises(UsageError, match=r"`ignore` 'au\.\*' matches no tensor"):
        load(tmp_path / "c.pth", net.state_dict(), ignore=["au.*"])


@pytest.mark.parametrize(
    "wrapper", ["student.", "module.student.", "ema_model.module.", "lit.classifier_net._orig_mod."]
)
def test_a_single_wrapper_of_any_name_is_stripped(tmp_path, net, wrapper):
    assert_imported(load(tmp_path / "c.pth", under(wrapper, net.state_dict()))[0], net)


FLAT = [
    ("student", "teacher"),
    ("module.student", "module.teacher"),
    ("online_model", "ema_model"),
    ("encoder_q", "encoder_k"),
]


@pytest.mark.parametrize(("first", "second"), FLAT)
def test_two_networks_under_prefixes_are_named_and_chosen(tmp_path, net, first, second):
    content = under(f"{first}.", net.state_dict()) | under(f"{second}.", shifted(net.state_dict()))
    with pytest.raises(CheckpointError, match=f"'{first}' .*'{second}' .*`prefix`"):
        load(tmp_path / "c.pth", content)
    for chosen in (first, f"{first}."):
        assert_imported(load(tmp_path / "c.pth", content, prefix=chosen)[0], net)
    assert_imported(load(tmp_path / "c.pth", content, key=first)[0], net)
    assert_imported(load(tmp_path / "c.pth", {"state_dict": content}, key=f"state_dict.{first}")[0], net)
    with pytest.raises(CheckpointError, match=rf"no tensor under `prefix` 'pupil': .*'{first.split('.')[0]}'"):
        load(tmp_path / "c.pth", content, prefix="pupil")


def test_the_same_network_twice_is_one_network(tmp_path, net):
    state = net.state_dict()
    content = under("module.model.", state) | under("module.attacker.model.", {k: v.clone() for k, v in state.items()})
    model, report = load(tmp_path / "c.pth", content)
    assert_imported(model, net)
    assert all(name.startswith("module.attacker.") for name in report.left_out)


SETS = [("model_state", "ema_state"), ("student", "teacher"), ("best", "last"), ("run.a", "run.b")]


@pytest.mark.parametrize(("first", "second"), SETS)
def test_several_sets_of_weights_are_named_and_chosen(tmp_path, net, first, second):
    content: dict = {"epoch": 3, "optimizer_state": {}, "metrics": {"confusion": torch.ones(3, 3)}}
    for place, state in ((first, net.state_dict()), (second, shifted(net.state_dict()))):
        *outer, last = place.split(".")
        inside = content.setdefault(outer[0], {}) if outer else content
        inside[last] = state
    with pytest.raises(CheckpointError, match=f"'{first}' .*'{second}' .*choose one with `key`") as caught:
        load(tmp_path / "c.pth", content)
    assert "metrics" not in str(caught.value)
    assert_imported(load(tmp_path / "c.pth", content, key=first)[0], net)


def test_weights_under_a_common_key_come_first_and_others_are_reported(tmp_path, net):
    model, report = load(
        tmp_path / "c.pth", {"state_dict_ema": shifted(net.state_dict()), "state_dict": net.state_dict()}
    )
    assert_imported(model, net)
    assert "also in the file, not used: 'state_dict_ema' (56 tensors)" in report.summary()


HEADS = {
    "in a Sequential": lambda name: name.replace("fc.", "fc.1."),
    "of another name": lambda name: name.replace("fc.", "my_logits."),
    "nested": lambda name: name.replace("fc.", "cls_head.fc_cls."),
    "beside the backbone": lambda name: name.replace("fc.", "probe.0.") if "fc." in name else f"backbone.{name}",
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_classifier_of_any_name_is_recognized(tmp_path, net, kind):
    rename = HEADS[kind]
    model, report = load(tmp_path / "c.pth", {rename(name): tensor for name, tensor in net.state_dict().items()})
    assert_imported(model, net)
    assert (rename("fc.weight"), "fc.weight") in report.renamed


def test_a_classifier_of_two_layers_is_refused(tmp_path, net):
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("fc.")}
    for index, shape in enumerate(((64, 64), (10, 64))):
        state |= {f"fc.{index}.weight": torch.ones(shape), f"fc.{index}.bias": torch.ones(shape[0])}
    with pytest.raises(CheckpointError, match=r"missing \(2\): fc\.weight, fc\.bias; unexpected \(4\): fc\.0\.weight"):
        load(tmp_path / "c.pth", state)


def test_a_renamed_classifier_tells_the_number_of_classes(tmp_path, net):
    state = {name.replace("fc.", "fc.1."): tensor for name, tensor in net.state_dict().items()}
    with pytest.raises(CheckpointError, match="its classifier has 10 classes"):
        load(tmp_path / "c.pth", state, classes=3)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BUFFERS = [
    ("mu", "sigma"),
    ("mean", "std"),
    ("normalize.mean", "normalize.std"),
    ("normalizer.new_mean", "normalizer.new_std"),
    ("0.pixel_mean", "0.pixel_std"),
]


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize(("mean", "std"), BUFFERS)
def test_a_normalization_in_the_network_is_taken_from_the_file(tmp_path, net, mean, std, scale):
    values = [torch.tensor(v).reshape(1, 3, 1, 1) * scale for v in IMAGENET]
    content = under("1.", net.state_dict()) | {mean: values[0], std: values[1]}
    model, report = load(tmp_path / "c.pth", content, normalization=None)
    assert_imported(model, net)
    for given, found in zip(IMAGENET, (model.normalization.mean, model.normalization.std), strict=True):
        assert found == pytest.approx(given)
    assert mean in report.summary()


def test_a_given_normalization_must_agree_with_the_file(tmp_path, net):
    content = net.state_dict() | {
        "mean": torch.tensor([0.485, 0.456, 0.406]),
        "std": torch.tensor([0.229, 0.224, 0.225]),
    }
    rounded = Normalization((0.485, 0.456, 0.406), (0.229, 0.2241, 0.225))
    assert load(tmp_path / "c.pth", content, normalization=rounded)[0].normalization.std[1] == pytest.approx(0.224)
    with pytest.raises(CheckpointError, match=r"normalization of the input \(mean, std\): mean 0\.485,.*omit it"):
        load(tmp_path / "c.pth", content, normalization=NORM)
    left_out = load(tmp_path / "c.pth", content, normalization=NORM, ignore=["mean", "std"])[0]
    assert left_out.normalization == NORM


def test_an_identity_in_the_network_leaves_the_given_normalization(tmp_path, net):
    content = net.state_dict() | {"mu": torch.zeros(1, 3, 1, 1), "sigma": torch.ones(1, 3, 1, 1)}
    assert load(tmp_path / "c.pth", content)[0].normalization == NORM
    assert load(tmp_path / "c.pth", content, normalization=None)[0].normalization == Normalization((0,) * 3, (1,) * 3)


@pytest.mark.parametrize(("mean", "std"), [(-3.0, 0.5), (0.5, 4.0), (300.0, 60.0), (float("nan"), 0.5)])
def test_a_normalization_of_unknown_scale_is_named(tmp_path, net, mean, std):
    content = net.state_dict() | {"mu": torch.full((3,), mean), "sigma": torch.full((3,), std)}
    with pytest.raises(CheckpointError, match="mu, sigma look like the normalization of the input") as caught:
        load(tmp_path / "c.pth", content)
    patterns = re.findall(r"`ignore` '([^']+)'", str(caught.value))
    assert load(tmp_path / "c.pth", content, ignore=patterns)[0].normalization == NORM


def test_different_normalizations_are_refused(tmp_path, net):
    content = net.state_dict() | {
        f"{a}.{b}": torch.full((3,), v) for a, v in (("x", 0.4), ("y", 0.5)) for b in ("mean", "std")
    }
    with pytest.raises(CheckpointError, match="several normalizations"):
        load(tmp_path / "c.pth", content)


def test_without_any_normalization_the_message_asks_for_it(tmp_path, net):
    with pytest.raises(UsageError, match="`normalization` is not given"):
        load(tmp_path / "c.pth", net.state_dict(), normalization=None)


@pytest.mark.parametrize("name", ["resnet8", "resnet14", "resnet14a"])
def test_a_gray_teacher_computes_the_same_on_gray_images(tmp_path, name):
    torch.manual_seed(1)
    gray = build_net(name, 10).eval()
    gray.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
    model, report = load(tmp_path / "c.pth", gray.state_dict(), net=name, normalization=GRAY)
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(model.net(images.expand(4, 3, 8, 8)), gray(images), rtol=1e-4, atol=1e-5)
    assert "conv1.weight has one input channel" in report.summary()


def test_a_gray_teacher_needs_one_mean_for_all_channels(tmp_path, net):
    state = net.state_dict() | {"conv1.weight": torch.randn(16, 1, 3, 3)}
    with pytest.raises(UsageError, match="gray images"):
        load(tmp_path / "c.pth", state)


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_teachers_of_other_channels_are_refused_with_the_channels(tmp_path, net, channels):
    state = net.state_dict() | {"conv1.weight": torch.randn(16, channels, 3, 3)}
    with pytest.raises(CheckpointError, match=f"its images have {channels} channels"):
        load(tmp_path / "c.pth", state)


BESIDE = {
    "a path": pathlib.PosixPath("data/train"),
    "a path of Windows": pathlib.PureWindowsPath("C:/data"),
    "a pure path": pathlib.PurePosixPath("data"),
    "a date": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
    "a duration": datetime.timedelta(hours=3),
    "a namespace": types.SimpleNamespace(lr=0.1, data=pathlib.PosixPath("x")),
    "arguments": argparse.Namespace(lr=0.1),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_plain_values_beside_the_weights_are_no_obstacle(tmp_path, net, kind):
    content = {"state_dict": under("model.", net.state_dict()), "hyper_parameters": {"value": BESIDE[kind]}}
    assert_imported(load(tmp_path / "c.ckpt", content)[0], net)


def own(path) -> Model:
    torch.manual_seed(2)
    model = Model(build_net("resnet8", 3).eval(), "resnet8", 3, ("cat", "dog", "fox"), NORM, {"epochs": 3})
    save_model(path, model)
    return model


@pytest.mark.parametrize("order", [("fox", "cat", "dog"), ("dog", "cat", "fox"), ("fox", "dog", "cat")])
def test_an_own_checkpoint_is_reordered_by_the_names_of_its_classes(tmp_path, net, order):
    model = own(tmp_path / "T.pt")
    moved, report = import_checkpoint(tmp_path / "T.pt", net="resnet8", classes=3, class_names=order)
    assert (moved.class_names, moved.normalization) == (order, NORM)
    images = torch.randn(2, 3, 8, 8)
    columns = [model.class_names.index(name) for name in order]
    torch.testing.assert_close(moved.net(images), model.net(images)[:, columns])
    assert "outputs reordered by name" in report.summary()
    save_model(tmp_path / "U.pt", moved)
    assert load_model(tmp_path / "U.pt").class_names == order


def test_other_names_of_an_own_checkpoint_are_replaced_in_place(tmp_path, net):
    model = own(tmp_path / "T.pt")
    renamed, report = import_checkpoint(
        tmp_path / "T.pt", net="resnet8", classes=3, class_names=("cats", "dogs", "fox")
    )
    assert renamed.digest == model.digest
    assert "classes renamed in place: cat -> cats, dog -> dogs" in report.summary()


def test_an_own_checkpoint_must_agree_with_what_is_given(tmp_path, net):
    own(tmp_path / "T.pt")
    with pytest.raises(CheckpointError, match="holds resnet8, not resnet14: set `net`"):
        import_checkpoint(tmp_path / "T.pt", net="resnet14", classes=3)
    with pytest.raises(CheckpointError, match="normalization"):
        import_checkpoint(tmp_path / "T.pt", net="resnet8", classes=3, normalization=GRAY)


ODD = {
    "int8": lambda t: t.to(torch.int8),
    "complex64": lambda t: t.to(torch.complex64),
    "float8_e4m3fn": lambda t: t.to(torch.float8_e4m3fn),
    "qint8": lambda t: torch.quantize_per_tensor(t, 0.01, 0, torch.qint8),
    "sparse": lambda t: t.to_sparse(),
    "without values": lambda t: t.to("meta"),
    "bool": lambda t: t > 0,
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("kind", ODD)
def test_weights_that_are_no_plain_numbers_are_refused_by_name(tmp_path, net, kind):
    """Copying them into the network would change the values without a word, or fail."""
    state = {**net.state_dict(), "fc.weight": ODD[kind](net.state_dict()["fc.weight"])}
    with pytest.raises(CheckpointError, match=rf"holds fc\.weight as .*{kind}.*save the weights as float32"):
        load(tmp_path / "w.pt", state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_are_converted(tmp_path, net, dtype):
    model, _ = load(
        tmp_path / "w.pt", {n: t.to(dtype) if t.is_floating_point() else t for n, t in net.state_dict().items()}
    )
    assert torch.equal(model.net.fc.weight, net.fc.weight.to(dtype).float())


@pytest.mark.parametrize(
    ("content", "found"), [({}, "an empty dict; use another file"), ([torch.ones(2)], "a list; use")]
)
def test_says_what_a_file_without_weights_holds(tmp_path, content, found):
    with pytest.raises(CheckpointError, match=f"it holds {found}"):
        load(tmp_path / "w.pt", content)
