"""`kdfast export` and `kdfast predict`: what is written is run, and equals the network computed by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.deploy import formats
from kdfast.deploy.export import export
from kdfast.deploy.trained import open_trained
from kdfast.errors import OutputError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import load_model, save_model

WEIGHTS = ("safetensors", "state_dict")


@pytest.fixture
def run(finished: Path) -> Path:
    return finished


@pytest.fixture(scope="module")
def images(tiny: Path) -> np.ndarray:
    return np.load(tiny)["test_images"][:5]


def reference(model_file: Path, images: np.ndarray) -> torch.Tensor:
    """Logits from the checkpoint's own fields, normalized by hand in float64."""
    content = torch.load(model_file, weights_only=True)
    mean, std = (np.array(content[key]) for key in ("mean", "std"))
    net = build_net(content["net"], content["classes"]).double()
    net.load_state_dict(content["state_dict"])
    inputs = (images / 255 - mean) / std
    with torch.no_grad():
        return net.eval()(torch.from_numpy(inputs).permute(0, 3, 1, 2))


def read_weights(file: Path, format: str) -> dict[str, torch.Tensor]:
    if format == "state_dict":
        return torch.load(file, weights_only=True)
    from safetensors.torch import load_file

    return load_file(file)


@pytest.mark.parametrize("format", WEIGHTS)
def test_exported_weights_are_those_of_the_student(kdfast, run: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / "net.weights"
    ran = kdfast("export", run, "--format", format, "--out", out, "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert (told["input"], told["input_size"]) == ("normalized", [12, 12])
    assert told["difference"] < 1e-6
    expected = torch.load(run / "student.pt", weights_only=True)["state_dict"]
    found = read_weights(out, format)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    card = Path(told["card"]).read_text()
    assert "normalize before you call the network" in card
    result = json.loads((run / "result.json").read_text())
    for words in ("120", "12 x 12", f"{result['test_top1']:.2f}%", "alpha", "none: trained on the labels", "Licence"):
        assert words in card


@pytest.mark.parametrize("takes", ["pixels", "normalized"])
def test_torchscript_equals_the_network_in_float64(kdfast, run: Path, images, tmp_path: Path, takes: str) -> None:
    out = tmp_path / "net.pt"
    ran = kdfast("export", run, "--format", "torchscript", "--input", takes, "--out", out)
    assert ran.code == 0, ran.err
    assert "run and compared: differs by" in ran.out
    extra = {formats.FACTS_FILE: ""}
    loaded = torch.jit.load(out, _extra_files=extra)
    content = torch.load(run / "student.pt", weights_only=True)
    given = torch.from_numpy(images / 255)
    if takes == "normalized":
        given = (given - torch.tensor(content["mean"]).double()) / torch.tensor(content["std"]).double()
    found = loaded(given.permute(0, 3, 1, 2).float())
    torch.testing.assert_close(found.double(), reference(run / "student.pt", images), rtol=1e-4, atol=1e-4)
    assert '["0", "1", "2"]' in extra[formats.FACTS_FILE].decode()


def test_onnx_equals_the_network_in_float64(kdfast, run: Path, images, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "net.onnx"
    ran = kdfast("export", run, "--format", "onnx", "--out", out)
    assert ran.code == 0, ran.err
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["net.onnx", "net.onnx.md"]
    assert {p.key: p.value for p in onnx.load(out).metadata_props}["input"] == '"pixels"'
    session = runtime.InferenceSession(out, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        pixels = (images[:count] / 255).transpose(0, 3, 1, 2).astype(np.float32)
        (found,) = session.run(["logits"], {"image": pixels})
        expected = reference(run / "student.pt", images[:count]).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_missing_package_is_named_before_anything_is_written(kdfast, run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    ran = kdfast("export", run, "--format", "onnx", "--out", tmp_path / "net.onnx")
    assert (ran.code, ran.err) == (
        2,
        "kdfast: this format needs missing packages: pip install onnx onnxscript\n",
    )
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_kept(run: Path, tmp_path: Path, monkeypatch) -> None:
    entry = formats.FORMATS["torchscript"]

    def run_shifted(path: Path, model: object) -> formats.Run:
        right = entry.run(path, model)
        return lambda images: right(images) + 0.01

    shifted = formats.Format(entry.summary, entry.write, run_shifted, True)
    monkeypatch.setitem(formats.FORMATS, "torchscript", shifted)
    with pytest.raises(OutputError, match="differs from the original by"):
        export(open_trained(run), tmp_path / "net.pt", "torchscript", "pixels")
    assert not list(tmp_path.iterdir())


def test_force_replaces_exports_only(kdfast, run: Path, tmp_path: Path) -> None:
    out, mine = tmp_path / "net.safetensors", tmp_path / "mine.safetensors"
    mine.write_bytes(b"years of work")
    assert kdfast("export", run, "--out", out).code == 0
    again = kdfast("export", run, "--out", out)
    assert (again.code, "replace it with --force" in again.err) == (4, True)
    assert kdfast("export", run, "--out", out, "--force").code == 0
    assert kdfast("export", run, "--out", mine, "--force").code == 4
    assert mine.read_bytes() == b"years of work"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--format", "onyx"), 2, "no format is named 'onyx': did you mean 'onnx'?"),
        (("--input", "pixels"), 2, "--input is pixels, but safetensors holds weights alone"),
        (("--input", "rgb", "--format", "torchscript"), 2, "--input is 'rgb': pass one of pixels, normalized"),
    ],
)
def test_refuses_what_no_format_can_do(kdfast, run: Path, tmp_path: Path, words, code: int, message: str) -> None:
    ran = kdfast("export", run, *words, "--out", tmp_path / "x")
    assert (ran.code, message in ran.err) == (code, True), ran.err
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_run_needs_its_size(kdfast, run: Path, tmp_path: Path) -> None:
    model = load_model(run / "student.pt")
    del model.metadata["input_size"]
    save_model(tmp_path / "alone.pt", model)
    ran = kdfast("export", tmp_path / "alone.pt", "--out", tmp_path / "x")
    assert (ran.code, "does not record the size of its images: pass --size" in ran.err) == (2, True), ran.err
    assert kdfast("export", tmp_path / "alone.pt", "--size", 12, "--out", tmp_path / "x").code == 0
    assert "teacher | not recorded" in (tmp_path / "x.md").read_text()


def test_refuses_unfinished_runs_and_other_folders(kdfast, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    ran = kdfast("export", tmp_path / "run", "--out", tmp_path / "x")
    assert (ran.code, "holds a run that is not finished" in ran.err) == (3, True)
    ran = kdfast("predict", tmp_path, tmp_path)
    assert (ran.code, "holds no run" in ran.err) == (3, True)


def test_predicts_the_classes_of_the_network(kdfast, run: Path, images, tmp_path: Path) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / ".hidden").mkdir()
    Image.fromarray(images[1]).save(tmp_path / "folder" / "deep" / "b.png")
    Image.fromarray(images[0]).save(tmp_path / "folder" / "a.bmp")
    Image.fromarray(images[0]).save(tmp_path / "folder" / ".hidden" / "c.png")
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    np.save(tmp_path / "x.npy", images)
    ran = kdfast("predict", run, tmp_path / "folder", tmp_path / "x.npy", "--top", 3, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["images"]
    names = [Path(one["file"]).name + (f"[{one['index']}]" if "index" in one else "") for one in found]
    assert names == ["a.bmp", "b.png", *(f"x.npy[{i}]" for i in range(5))]
    expected = reference(run / "student.pt", images).softmax(1).numpy()
    for one, row in zip(found, [0, 1, *range(5)], strict=True):
        order = np.argsort(-expected[row])
        assert [p["label"] for p in one["predictions"]] == order.tolist()
        assert [p["class"] for p in one["predictions"]] == [str(label) for label in order]
        given = [p["probability"] for p in one["predictions"]]
        np.testing.assert_allclose(given, expected[row][order], rtol=1e-4, atol=1e-5)


def test_images_of_another_size_are_scaled_and_cropped(kdfast, run: Path, tmp_path: Path) -> None:
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:, 4:36, 1] = 150  # the central square has one color
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    np.save(tmp_path / "flat.npy", np.broadcast_to(np.array([0, 150, 0], np.uint8), (1, 12, 12, 3)))
    lines = kdfast("predict", run, tmp_path / "wide.png", tmp_path / "flat.npy").out.splitlines()
    assert lines[0].split(": ")[1] == lines[1].split(": ")[1]


def test_refuses_what_is_no_image(kdfast, run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "float.npy", np.zeros((2, 12, 12, 3), np.float32))
    np.save(tmp_path / "large.npy", np.zeros((2, 13, 13, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    for name, message in {
        "float.npy": "has dtype float32: must be uint8",
        "large.npy": "has images of 13x13, the network was trained on 12x12",
        "empty": "has no image files",
        "nowhere": "there is nothing at",
        "text.png": "cannot be read as an image",
    }.items():
        ran = kdfast("predict", run, tmp_path / name)
        assert (ran.code, message in ran.err, ran.err.count("\n")) == (3, True, 1), ran.err
