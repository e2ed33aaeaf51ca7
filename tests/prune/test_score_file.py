import dataclasses

import numpy as np
import pytest

from kdfast.errors import DataError, UsageError
from kdfast.prune.score_file import ScoreFile, read_scores, write_scores

FINGERPRINT = "a" * 64


@pytest.fixture
def content():
    rng = np.random.default_rng(0)
    return ScoreFile(
        scores=rng.normal(size=20),
        method="el2n",
        data=FINGERPRINT,
        extras={"stderr": rng.random(20)},
        parameters={"epoch": 3, "use": None, "seed": 0},
        sources={"dynamics": "b" * 64},
        seconds=1.5,
    )


def test_read_returns_what_was_written(tmp_path, content):
    write_scores(tmp_path / "new" / "s.npz", content)
    back = read_scores(tmp_path / "new" / "s.npz", n=20, fingerprint=FINGERPRINT)
    assert np.array_equal(back.scores, content.scores)
    assert np.array_equal(back.extras["stderr"], content.extras["stderr"])
    for name in ("method", "data", "parameters", "sources", "seconds", "digest"):
        assert getattr(back, name) == getattr(content, name)


def test_numpy_reads_the_scores(tmp_path, content):
    write_scores(tmp_path / "s.npz", content)
    with np.load(tmp_path / "s.npz") as held:
        assert np.array_equal(held["scores"], content.scores)


def test_digest_covers_everything_but_the_seconds(content):
    same = dataclasses.replace(content, seconds=99.0)
    assert same.digest == content.digest
    for change in (
        {"scores": content.scores + 1},
        {"method": "aum"},
        {"parameters": {}},
        {"extras": {}},
        {"data": "c"},
    ):
        assert dataclasses.replace(content, **change).digest != content.digest


def test_rejects_another_length_and_other_data(tmp_path, content):
    write_scores(tmp_path / "s.npz", content)
    with pytest.raises(DataError, match="holds 20 scores, this data has 21"):
        read_scores(tmp_path / "s.npz", n=21, fingerprint=FINGERPRINT)
    with pytest.raises(DataError, match="made from other data"):
        read_scores(tmp_path / "s.npz", n=20, fingerprint="d" * 64)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rejects_values_that_are_not_finite(tmp_path, content, value):
    bad = content.scores.copy()
    bad[3] = value
    with pytest.raises(DataError, match="1 of 20 are not finite"):
        write_scores(tmp_path / "s.npz", dataclasses.replace(content, scores=bad))
    assert not (tmp_path / "s.npz").exists()
    write_scores(tmp_path / "s.npz", content)
    with np.load(tmp_path / "s.npz") as held:
        arrays = dict(held)
    np.savez(tmp_path / "s.npz", **{**arrays, "scores": bad})
    with pytest.raises(DataError, match="1 of 20 are not finite"):
        read_scores(tmp_path / "s.npz", n=20, fingerprint=FINGERPRINT)


def test_rejects_edited_scores(tmp_path, content):
    write_scores(tmp_path / "s.npz", content)
    with np.load(tmp_path / "s.npz") as held:
        arrays = dict(held)
    np.savez(tmp_path / "s.npz", **{**arrays, "scores": arrays["scores"] + 1})
    with pytest.raises(DataError, match="digest does not match"):
        read_scores(tmp_path / "s.npz", n=20, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("damage", ["absent", "empty", "text", "half", "npy", "foreign"])
def test_rejects_files_that_are_not_score_files(tmp_path, content, damage):
    path = tmp_path / "s.npz"
    write_scores(path, content)
    if damage == "absent":
        path.unlink()
    elif damage == "npy":
        with open(path, "wb") as file:
            np.save(file, content.scores)
    elif damage == "foreign":
        np.savez(path, scores=content.scores)
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "half": path.read_bytes()[:300]}[damage])
    with pytest.raises(DataError, match="kdfast score"):
        read_scores(path, n=20, fingerprint=FINGERPRINT)


def test_rejects_another_suffix(tmp_path, content):
    with pytest.raises(UsageError, match=r"named \.npz"):
        write_scores(tmp_path / "s.npy", content)
