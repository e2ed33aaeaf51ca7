import json

import numpy as np
import pytest

from kdfast.data.readers.registry import open_source
from kdfast.data.readers.relabel import flip_labels, replace_labels, write_flipped
from kdfast.errors import DataError, OutputError, UsageError
from kdfast.files import write_sealed


def test_flips_the_requested_share_to_other_classes():
    labels = np.arange(5000) % 10
    flipped = flip_labels(labels, 0.1, 3, 10)
    changed = flipped != labels
    assert changed.sum() == 500
    assert flipped.min() >= 0
    assert flipped.max() <= 9
    counts = np.bincount((flipped[changed] - labels[changed]) % 10, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 25  # 500 / 9 = 56 each


def test_flips_depend_only_on_the_seed():
    labels = np.arange(40) % 4
    assert np.array_equal(flip_labels(labels, 0.1, 0, 4), flip_labels(labels, 0.1, 0, 4))
    assert not np.array_equal(flip_labels(labels, 0.1, 0, 4), flip_labels(labels, 0.1, 1, 4))
    assert np.flatnonzero(flip_labels(labels, 0.1, 0, 4) != labels).tolist() == [2, 9, 19, 22]


@pytest.mark.parametrize(("share", "classes"), [(0.0, 3), (1.0, 3), (float("nan"), 3), (0.001, 3), (0.5, 1)])
def test_rejects_invalid_shares(share, classes):
    with pytest.raises(UsageError, match="share"):
        flip_labels(np.zeros(30, np.int64), share, 0, classes)


def test_relabelled_source_keeps_images_and_test_split_and_has_its_own_fingerprint(tmp_path, npz):
    data = npz(tmp_path / "d.npz")
    base = open_source(data)
    changed = write_flipped(base, str(data), tmp_path / "noisy", share=0.25, seed=1)
    noisy = open_source(tmp_path / "noisy")
    assert np.array_equal(np.flatnonzero(noisy.train.labels != base.train.labels), changed)
    assert len(changed) == 3
    assert np.array_equal(noisy.train.read(np.arange(12)), base.train.read(np.arange(12)))
    assert np.array_equal(noisy.test.labels, base.test.labels)
    assert noisy.fingerprint != base.fingerprint
    assert noisy.fingerprint == open_source(tmp_path / "noisy").fingerprint


def test_rejects_labels_of_another_length_or_class(tmp_path, npz):
    base = open_source(npz(tmp_path / "d.npz"))
    with pytest.raises(DataError, match="one integer per image"):
        replace_labels(base, np.zeros(5, np.int64))
    with pytest.raises(DataError, match="classes"):
        replace_labels(base, np.full(12, 7))


def test_rejects_a_folder_that_is_not_empty(tmp_path, npz):
    data = npz(tmp_path / "d.npz")
    (tmp_path / "noisy").mkdir()
    (tmp_path / "noisy" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        write_flipped(open_source(data), str(data), tmp_path / "noisy", share=0.25, seed=1)


def test_rejects_images_that_have_changed(tmp_path, npz):
    data = npz(tmp_path / "d.npz")
    write_flipped(open_source(data), str(data), tmp_path / "noisy", share=0.25, seed=1)
    npz(data, train_labels=np.arange(12)[::-1] % 3)
    with pytest.raises(DataError, match="has changed since"):
        open_source(tmp_path / "noisy")


@pytest.mark.parametrize("damage", ["record", "labels"])
def test_rejects_damaged_files(tmp_path, npz, damage):
    data = npz(tmp_path / "d.npz")
    write_flipped(open_source(data), str(data), tmp_path / "noisy", share=0.25, seed=1)
    if damage == "record":
        (tmp_path / "noisy" / "relabelled.json").write_text(json.dumps({"format": "other"}))
    else:
        (tmp_path / "noisy" / "labels.npy").write_bytes(b"")
    with pytest.raises(DataError, match="run kdfast data flip again"):
        open_source(tmp_path / "noisy")


def edit(folder, *, version=None, **fields):
    """Rewrite relabelled.json: as version 1, or as an edit that leaves the seal."""
    record = json.loads((folder / "relabelled.json").read_text())
    if version == 1:
        record = {name: record[name] for name in ("data", "base", "share", "seed")} | {"format": "kdfast relabelled 1"}
    (folder / "relabelled.json").write_text(json.dumps({**record, **fields}, indent=1) + "\n")


@pytest.mark.parametrize("version", [1, 2])
def test_rejects_changed_labels(tmp_path, npz, version):
    data = npz(tmp_path / "d.npz")
    write_flipped(open_source(data), str(data), tmp_path / "noisy", share=0.25, seed=1)
    if version == 1:
        edit(tmp_path / "noisy", version=1)
    labels = open_source(tmp_path / "noisy").train.labels.copy()
    labels[0] = (labels[0] + 1) % 3
    np.save(tmp_path / "noisy" / "labels.npy", labels)
    with pytest.raises(DataError, match=r"labels\.npy does not hold the labels that were written"):
        open_source(tmp_path / "noisy")


@pytest.mark.parametrize("field", [{"data": "digits"}, {"base": "f" * 64}, {"labels": "f" * 64}, {"share": 0.5}])
def test_rejects_an_edited_record(tmp_path, npz, field):
    data = npz(tmp_path / "d.npz")
    write_flipped(open_source(data), str(data), tmp_path / "noisy", share=0.25, seed=1)
    edit(tmp_path / "noisy", **field)
    with pytest.raises(DataError, match="was edited"):
        open_source(tmp_path / "noisy")


@pytest.mark.parametrize("field", [{"seed": "1"}, {"share": 2.0}, {"base": 7}, {"data": None}])
def test_names_the_field_of_a_record_that_has_no_seal(tmp_path, npz, field):
    data = npz(tmp_path / "d.npz")
    write_flipped(open_source(data), str(data), tmp_path / "noisy", share=0.25, seed=1)
    edit(tmp_path / "noisy", version=1, **field)
    with pytest.raises(DataError, match=rf"relabelled\.json: field {next(iter(field))}"):
        open_source(tmp_path / "noisy")


@pytest.mark.parametrize("field", ["labels", "base", "share"])
def test_names_the_missing_field_of_a_sealed_record(tmp_path, npz, field):
    data, folder = npz(tmp_path / "d.npz"), tmp_path / "noisy"
    write_flipped(open_source(data), str(data), folder, share=0.25, seed=1)
    record = json.loads((folder / "relabelled.json").read_text())
    write_sealed(
        folder / "relabelled.json", {k: v for k, v in record.items() if k not in (field, "sha256_of_the_rest")}
    )
    with pytest.raises(DataError, match=rf"relabelled\.json: .*{field}"):
        open_source(folder)


@pytest.mark.parametrize("way", ["itself", "another"])
def test_rejects_a_record_that_leads_back_to_itself(tmp_path, npz, way):
    data = npz(tmp_path / "d.npz")
    for name in ("one", "two"):
        write_flipped(open_source(data), str(data), tmp_path / name, share=0.25, seed=1)
    edit(tmp_path / "one", version=1, data=str(tmp_path / ("one" if way == "itself" else "two")))
    edit(tmp_path / "two", version=1, data=str(tmp_path / "one"))
    with pytest.raises(DataError, match="refers to itself"):
        open_source(tmp_path / "one")
