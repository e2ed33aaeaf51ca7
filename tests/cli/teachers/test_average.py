"""`kdfast teacher average`: its file and line, and what it refuses."""

from pathlib import Path

from kdfast.nets.checkpoint import load_model


def test_writes_an_ordinary_model(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "other.pt", tmp_path / "average.pt"
    common = ("--epochs", 1, "--batch-size", 32, "--init", teacher, "--out", other)
    trained = kdfast("teacher", "train", "--data", tiny, "--net", load_model(teacher).name, *common)
    assert trained.code == 0, trained.err
    command = ("teacher", "average", teacher, other, "--data", tiny, "--out", out)
    ran = kdfast(*command)
    assert ran.code == 0, ran.err
    assert ran.out.endswith(f"average of 2, written to {out}\n")
    average = load_model(out)
    assert average.metadata["averaged"]["teachers"] == [load_model(path).digest for path in (teacher, other)]
    evaluated = kdfast("eval", "--data", tiny, "--model", out)
    assert evaluated.code == 0, evaluated.err
    assert f"top-1 {average.metadata['test_top1']:.2f}" in evaluated.out
    again = kdfast(*command)
    assert again.code == 4
    assert "exists" in again.err
    assert kdfast(*command, "--force").code == 0


def test_refuses_other_architectures(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    net = "resnet14" if load_model(teacher).name != "resnet14" else "resnet8"
    trained = kdfast(
        "teacher", "train", "--data", tiny, "--net", net, "--epochs", 1, "--batch-size", 32, "--out", other
    )
    assert trained.code == 0, trained.err
    ran = kdfast("teacher", "average", teacher, other, "--data", tiny, "--out", tmp_path / "average.pt")
    assert ran.code == 3
    assert "differ in their architecture and tensors" in ran.err
    assert not (tmp_path / "average.pt").exists()
