"""Networks of Hugging Face model folders, with weights or without."""

import json
import shutil
import sys

import pytest
import torch

from kdfast.data.views import Normalization
from kdfast.errors import CheckpointError, UsageError
from kdfast.nets import build_net, forward_with_features
from kdfast.nets.checkpoint import Model, load_model, save_model
from kdfast.nets.importing import import_checkpoint
from kdfast.nets.initial import load_initial_weights
from kdfast.nets.sources.hugging_face import read_hugging_face_weights
from kdfast.nets.sources.own_code import name_code

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
HALF = Normalization((0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a ViT and of a ResNet with four classes, and the logits of the ViT."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        num_labels=4,
    )  # fmt: skip
    net = transformers.ViTForImageClassification(vit).eval()
    net.save_pretrained(folder / "vit")
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    transformers.ResNetForImageClassification(resnet).save_pretrained(folder / "resnet")
    with torch.no_grad():
        return folder, net(IMAGES).logits


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_folder_names_a_classifier_that_returns_logits(models, name):
    net = build_net(f"hf:{models[0] / name}", 7)
    logits, features = forward_with_features(net, IMAGES)
    assert logits.shape == (2, 7)
    assert features.ndim == 2


def test_arguments_replace_values_of_the_configuration(models):
    net = build_net(f"hf:{models[0] / 'vit'}", 7, image_size=32)
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    with pytest.raises(UsageError, match="did you mean 'image_size'"):
        build_net(f"hf:{models[0] / 'vit'}", 7, image_sice=32)
    with pytest.raises(UsageError, match="not in the configuration"):
        build_net(f"hf:{models[0] / 'vit'}", 7, _attn_implementation="someone/kernels")


def test_a_folder_is_imported_as_a_teacher_with_the_same_logits(models):
    folder, expected = models
    place = folder / "vit"
    model, report = import_checkpoint(place, net=f"hf:{place}", classes=4, normalization=HALF)
    assert report.complete
    with torch.no_grad():
        torch.testing.assert_close(model.net(IMAGES), expected)


def test_a_student_starts_from_the_weights_but_its_classifier(models):
    place = models[0] / "vit"
    net = build_net(f"hf:{place}", 7)
    assert load_initial_weights(net, place, name=f"hf:{place}", classes=7) == ("classifier.bias", "classifier.weight")
    again = build_net(f"hf:{place}", 4)
    assert load_initial_weights(again, place, name=f"hf:{place}", classes=4) == ()
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(IMAGES), models[1])


def test_a_checkpoint_needs_the_folder_or_its_new_place(models, tmp_path):
    place = tmp_path / "vit"
    place.mkdir()
    (place / "config.json").write_text((models[0] / "vit" / "config.json").read_text())
    name = f"hf:{place}"
    save_model(tmp_path / "T.pt", Model(build_net(name, 4).eval(), name, 4, ("a", "b", "c", "d"), HALF))
    assert load_model(tmp_path / "T.pt").name == name
    place.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="whose folder is not there"):
        load_model(tmp_path / "T.pt")
    name_code(f"hf:{tmp_path / 'moved'}")
    assert load_model(tmp_path / "T.pt").name == f"hf:{tmp_path / 'moved'}"


def test_code_in_a_folder_is_not_run(models, tmp_path):
    config = json.loads((models[0] / "vit" / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Net"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UsageError, match="cannot be used"):
        build_net(f"hf:{tmp_path}", 4)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("_attn_implementation", "owner/kernels"), ("attn_implementation", {"": "owner/kernels@v1"})],
)
def test_kernels_that_a_configuration_names_are_not_run(models, tmp_path, key, value):
    shutil.copytree(models[0] / "vit", tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config | {"nested": [{key: value}]}))
    for read in (lambda: build_net(f"hf:{tmp_path / 'vit'}", 4), lambda: read_hugging_face_weights(tmp_path / "vit")):
        with pytest.raises(UsageError, match=f"asks for {key} 'owner/kernels.*, code from elsewhere"):
            read()


def test_folders_without_a_model(models, tmp_path):
    with pytest.raises(UsageError, match=r"there is no .*config.json"):
        build_net(f"hf:{tmp_path}", 4)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match="cannot be built as a classifier of images"):
        build_net(f"hf:{tmp_path}", 4)
    with pytest.raises(CheckpointError, match=r"the folder has no model.safetensors"):
        load_initial_weights(build_net("resnet8", 4), tmp_path, name="resnet8", classes=4)


def test_without_transformers_a_line_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="needs the package transformers: pip install transformers"):
        build_net(f"hf:{tmp_path}", 4)
