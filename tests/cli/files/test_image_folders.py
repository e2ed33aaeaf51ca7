"""Image folders on the command line: what is left out is said, and each command can order the samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.filterwarnings("always::kdfast.errors.DataWarning")


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    """Two classes of eight images, one with a sub-folder beside its own images, and files that are left out."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "data" / part / name
            (folder / "3").mkdir(parents=True)
            for number in range(8):
                image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(folder / ("3" if number < 2 else "") / f"{number}.png")
    (tmp_path / "data/train/a/notes.txt").touch()
    (tmp_path / "data/train/b/.ipynb_checkpoints").mkdir()
    (tmp_path / "data/train/b/.ipynb_checkpoints/0-checkpoint.png").touch()
    return tmp_path / "data"


def test_what_is_left_out_is_said_by_every_command(kdfast, nested: Path, tmp_path: Path) -> None:
    notes = [
        f"{nested}/train: skipped 1 file without the suffix of an image: 1 .txt",
        f"{nested}/train: skipped 1 image in hidden files and folders, such as "
        f"{nested}/train/b/.ipynb_checkpoints/0-checkpoint.png",
    ]
    outcome = kdfast("data", "info", nested)
    assert (outcome.code, outcome.err) == (0, "")
    assert "16 training and 16 test images" in outcome.out
    assert [line.partition(" ")[2].strip() for line in outcome.out.splitlines() if line.startswith("note")] == notes
    outcome = kdfast("prune", "--data", nested, "--fraction", 0.5, "--out", tmp_path / "idx.npy")
    assert outcome.code == 0
    assert outcome.err.splitlines() == [f"kdfast: {note}" for note in notes]


def test_files_made_in_another_order_are_rejected(kdfast, nested: Path, tmp_path: Path) -> None:
    idx = tmp_path / "idx.npy"
    assert kdfast("prune", "--data", nested, "--fraction", 0.5, "--out", idx, "--order", "imagefolder").code == 0
    train = ("distill", "--data", nested, "--student", "resnet8", "--alpha", 0, "--batch-size", 4, "--subset", idx)
    outcome = kdfast(*train, "--dry-run", "--out", tmp_path / "run")
    assert (outcome.code, "made from other data" in outcome.err) == (3, True)
    assert kdfast(*train, "--dry-run", "--out", tmp_path / "run", "--order", "imagefolder").code == 0


@pytest.mark.parametrize(
    ("data", "order", "message"),
    [
        ("digits", "imagefolder", "--order is imagefolder, but digits is no image folder"),
        (None, "folder", "--order is 'folder': did you mean 'imagefolder'? pass one of path, imagefolder"),
    ],
)
def test_rejects_orders_that_do_not_fit(kdfast, nested: Path, data: str | None, order: str, message: str) -> None:
    outcome = kdfast("data", "info", data or nested, "--order", order)
    assert (outcome.code, message in outcome.err) == (2, True), outcome.err


def test_every_command_that_resizes_images_also_orders_and_divides_them() -> None:
    import typer

    from kdfast.cli.program import app

    def commands(command):
        return [command, *(leaf for sub in getattr(command, "commands", {}).values() for leaf in commands(sub))]

    names = [{parameter.name for parameter in command.params} for command in commands(typer.main.get_command(app))]
    readers = [parameters for parameters in names if parameters & {"data", "src"}]
    assert len(readers) >= 10
    for parameters in readers:
        assert len(parameters & {"size", "order", "split"}) in (0, 3)
    assert sum("split" in parameters for parameters in readers) >= 10


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of ten images, without a test split."""
    rng = np.random.default_rng(1)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image.save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_data_without_a_test_split_asks_for_one(kdfast, photos: Path, tmp_path: Path) -> None:
    prune = ("prune", "--data", photos, "--fraction", 0.5, "--out", tmp_path / "idx.npy")
    outcome = kdfast(*prune)
    assert (outcome.code, outcome.out) == (3, "")
    assert "no test split (looked for test/, val/, valid/" in outcome.err
    assert "take a share of every class with --split, such as 0.1" in outcome.err
    assert not (tmp_path / "idx.npy").exists()
    outcome = kdfast(*prune, "--split", "2")
    assert (outcome.code, "--split is 2: pass the share of the test split" in outcome.err) == (2, True)
    assert "kept 8 of 16 training samples" in kdfast(*prune, "--split", 0.2).out


def test_every_stage_must_divide_the_data_alike(kdfast, photos: Path, tmp_path: Path) -> None:
    idx = tmp_path / "idx.npy"
    assert kdfast("prune", "--data", photos, "--fraction", 0.5, "--split", 0.2, "--out", idx).code == 0
    train = ("distill", "--data", photos, "--student", "resnet8", "--alpha", 0, "--batch-size", 4, "--subset", idx)
    train = (*train, "--dry-run", "--out", tmp_path / "run")
    assert kdfast(*train, "--split", 0.2).code == kdfast(*train, "--split", "0.20:0").code == 0
    for other in ("0.2:1", "0.3"):
        outcome = kdfast(*train, "--split", other)
        assert (outcome.code, "made from other data" in outcome.err) == (3, True)
    (tmp_path / "c.yaml").write_text("split: 0.2\n")
    assert kdfast(*train, "--config", tmp_path / "c.yaml").code == 0


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Two classes of JPEG files of several sizes, which are cropped at random."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 9), ("test", 2)):
        for name in ("a", "b"):
            folder = tmp_path / "large" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (70 + number, 90 - number, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return tmp_path / "large"


def test_streamed_files_train_the_weights_of_resident_ones(kdfast, large: Path, tmp_path: Path) -> None:
    train = ("distill", "--data", large, "--size", 64, "--student", "resnet8", "--alpha", 0, "--batch-size", 5)
    names = ("resident", "files")
    for loader in names:
        outcome = kdfast(*train, "--epochs", 2, "--loader", loader, "--out", tmp_path / loader)
        assert (outcome.code, f"{loader} loader" in outcome.out) == (0, True)
    nets = [torch.load(tmp_path / name / "student.pt", weights_only=True) for name in names]
    states = [net["state_dict"] for net in nets]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    outcome = kdfast(*train, "--loader", "ffcv", "--out", tmp_path / "ffcv")
    assert (outcome.code, "the ffcv loader reads .beton files" in outcome.err) == (2, True)


def test_a_run_says_that_images_are_streamed_and_records_their_decoder(
    kdfast, nested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdfast.data.loaders.device_memory", lambda device: 1000)
    train = ("distill", "--data", nested, "--student", "resnet8", "--alpha", 0, "--batch-size", 8, "--epochs", 1)
    outcome = kdfast(*train, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "more than a quarter of the memory, so each epoch decodes them from their files" in outcome.err
    assert "files loader" in outcome.out
    assert '"decoder": "Pillow ' in (tmp_path / "run/config.json").read_text()


def test_a_plan_has_the_first_reading_of_files_until_it_is_remembered(
    kdfast, nested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDFAST_CACHE_DIR", str(tmp_path / "remembered"))
    monkeypatch.setattr("kdfast.files.remembered._SETTLED_SECONDS", -60.0)  # the files are new
    plan = ("plan", "--data", nested, "--student", "resnet8", "--alpha", 0, "--fraction", 0.5, "--batch-size", 4)
    first = kdfast(*plan, "--calibrate-seconds", 0.1)
    assert first.code == 0, first.err
    assert first.out.count("  first reading ") == 2
    assert not (tmp_path / "remembered").exists()
    assert kdfast("data", "info", nested).code == 0
    assert "first reading" not in kdfast(*plan, "--calibrate-seconds", 0.1).out
