import dataclasses
import json
import zipfile

import numpy as np
import pytest

from kdfast.errors import DataError, UsageError
from kdfast.pruning.score_file import ScoreFile, read_scores, write_scores

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
    with pytest.raises(DataError, match=r"1 of 20 .*are not finite"):
        write_scores(tmp_path / "s.npz", dataclasses.replace(content, scores=bad))
    assert not (tmp_path / "s.npz").exists()
    write_scores(tmp_path / "s.npz", content)
    with np.load(tmp_path / "s.npz") as held:
        arrays = dict(held)
    np.savez(tmp_path / "s.npz", **{**arrays, "scores": bad})
    with pytest.raises(DataError, match=r"1 of 20 .*are not finite"):
        read_scores(tmp_path / "s.npz", n=20, fingerprint=FINGERPRINT)


def test_rejects_edited_scores(tmp_path, content):
    write_scores(tmp_path / "s.npz", content)
    with np.load(tmp_path / "s.npz") as held:
        arrays = dict(held)
    np.savez(tmp_path / "s.npz", **{**arrays, "scores": arrays["scores"] + 1})
    with pytest.raises(DataError, match="digest does not match"):
        read_scores(tmp_path / "s.npz", n=20, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("damage", ["absent", "empty", "text", "half", "npy"])
def test_rejects_files_that_are_not_score_files(tmp_path, content, damage):
    path = tmp_path / "s.npz"
    write_scores(path, content)
    if damage == "absent":
        path.unlink()
    elif damage == "npy":
        with open(path, "wb") as file:
            np.save(file, content.scores)
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "half": path.read_bytes()[:300]}[damage])
    with pytest.raises(DataError, match="kdfast score"):
        read_scores(path, n=20, fingerprint=FINGERPRINT)


def test_rejects_another_suffix(tmp_path, content):
    with pytest.raises(UsageError, match=r"named \.npz"):
        write_scores(tmp_path / "s.npy", content)


def rewrite(path, **changes):
    with np.load(path) as held:
        arrays = dict(held)
    np.savez(path, **{name: value for name, value in {**arrays, **changes}.items() if value is not None})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seconds", "1"),
        ("seconds", -1),
        ("method", None),
        ("parameters", []),
        ("sources", {"cache": 1}),
        ("digest", "x"),
    ],
)
def test_names_the_field_of_a_changed_description(tmp_path, content, field, value):
    write_scores(tmp_path / "s.npz", content)
    with np.load(tmp_path / "s.npz") as held:
        about = json.loads(str(held["about"]))
    rewrite(tmp_path / "s.npz", about=np.array(json.dumps({**about, field: value})))
    with pytest.raises(DataError, match=rf"s\.npz: about: field {field}.*score this data again"):
        read_scores(tmp_path / "s.npz", n=20, fingerprint=FINGERPRINT)


@pytest.mark.parametrize(
    "about",
    [np.array("[" * 5000), np.array('{"format": NaN}'), np.array("1" * 5000), np.arange(3), np.array(b"{}")],
)
def test_rejects_a_description_of_another_kind(tmp_path, content, about):
    write_scores(tmp_path / "s.npz", content)
    rewrite(tmp_path / "s.npz", about=about)
    with pytest.raises(DataError, match=r"s\.npz.*score this data"):
        read_scores(tmp_path / "s.npz", n=20, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("scores", [np.array("a"), np.array(["a"] * 20), np.zeros(20, complex), np.float64(1), None])
def test_rejects_scores_of_another_kind(tmp_path, content, scores):
    write_scores(tmp_path / "s.npz", content)
    rewrite(tmp_path / "s.npz", scores=scores)
    with pytest.raises(DataError, match=r"s\.npz.*score this data"):
        read_scores(tmp_path / "s.npz", n=20, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("kind", ["encrypted", "bzip2", "twice"])
def test_rejects_odd_members(tmp_path, content, kind):
    path = tmp_path / "s.npz"
    write_scores(path, content)
    if kind == "encrypted":
        raw = bytearray(path.read_bytes())
        raw[raw.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(raw)
    else:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2 if kind == "bzip2" else zipfile.ZIP_STORED) as archive:
            for name, raw in members.items():
                archive.writestr(name, raw)
            if kind == "twice":
                with pytest.warns(UserWarning, match="Duplicate"):
                    archive.writestr("scores.npy", members["scores.npy"])
    message = {"encrypted": "is encrypted", "bzip2": "compression method 12", "twice": "twice"}[kind]
    with pytest.raises(DataError, match=message):
        read_scores(path, n=20, fingerprint=FINGERPRINT)
