import dataclasses

import numpy as np
import pytest

from kdfast.errors import DataError, UsageError
from kdfast.prune.score_file import ScoreFile, read_scores, write_scores
from kdfast.prune.scores.compute import parse_options

PRINT = "a" * 64


@pytest.fixture
def content():
    rng = np.random.default_rng(0)
    return ScoreFile(
        scores=rng.normal(size=20),
        method="el2n",
        data=PRINT,
        extras={"stderr": rng.random(20)},
        parameters={"epoch": 3, "use": None, "seed": 0},
        sources={"dynamics": "b" * 64},
        seconds=1.5,
    )


def test_a_file_comes_back_as_it_was(tmp_path, content):
    write_scores(tmp_path / "new" / "s.npz", content)
    back = read_scores(tmp_path / "new" / "s.npz", n=20, fingerprint=PRINT)
    assert np.array_equal(back.scores, content.scores)
    assert np.array_equal(back.extras["stderr"], content.extras["stderr"])
    for name in ("method", "data", "parameters", "sources", "seconds", "digest"):
        assert getattr(back, name) == getattr(content, name)


def test_plain_numpy_reads_the_scores(tmp_path, content):
    write_scores(tmp_path / "s.npz", content)
    with np.load(tmp_path / "s.npz") as held:
        assert np.array_equal(held["scores"], content.scores)


def test_the_digest_is_of_all_that_decides_but_the_seconds(content):
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


def test_another_length_or_other_data(tmp_path, content):
    write_scores(tmp_path / "s.npz", content)
    with pytest.raises(DataError, match="holds 20 scores, this data has 21"):
        read_scores(tmp_path / "s.npz", n=21, fingerprint=PRINT)
    with pytest.raises(DataError, match="made of other data"):
        read_scores(tmp_path / "s.npz", n=20, fingerprint="d" * 64)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_neither_written_nor_read(tmp_path, content, value):
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
        read_scores(tmp_path / "s.npz", n=20, fingerprint=PRINT)


def test_scores_that_were_edited_are_refused(tmp_path, content):
    write_scores(tmp_path / "s.npz", content)
    with np.load(tmp_path / "s.npz") as held:
        arrays = dict(held)
    np.savez(tmp_path / "s.npz", **{**arrays, "scores": arrays["scores"] + 1})
    with pytest.raises(DataError, match="digest does not match"):
        read_scores(tmp_path / "s.npz", n=20, fingerprint=PRINT)


@pytest.mark.parametrize("damage", ["absent", "empty", "text", "half", "npy", "foreign"])
def test_files_that_are_no_scores(tmp_path, content, damage):
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
        read_scores(path, n=20, fingerprint=PRINT)


def test_another_suffix(tmp_path, content):
    with pytest.raises(UsageError, match=r"named \.npz"):
        write_scores(tmp_path / "s.npy", content)


def test_options_from_the_command_line():
    assert parse_options(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    for bad in ("a", "=1", "a="):
        with pytest.raises(UsageError, match="name=value"):
            parse_options([bad])
    with pytest.raises(UsageError, match="twice"):
        parse_options(["a=1", "a=2"])
