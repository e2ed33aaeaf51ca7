import numpy as np
import pytest
import torch

from kdfast.data import loaders
from kdfast.data.holdout import SplitPart
from kdfast.data.loaders import device_memory, make_loader
from kdfast.data.readers.registry import open_source
from kdfast.data.readers.relabel import RelabelledSplit
from kdfast.errors import UsageError
from kdfast.files import inputs


@pytest.fixture
def beton_split(split, tmp_path):
    pytest.importorskip("ffcv")
    from kdfast.data.ffcv.read import BetonSplit
    from kdfast.data.ffcv.write import write_beton

    write_beton(split(60), tmp_path / "train.beton")
    return BetonSplit(tmp_path / "train.beton")


@pytest.mark.parametrize("kind", ["resident", "ffcv"])
def test_every_loader_yields_the_same_batches(split, beton_split, kind):
    loader = make_loader(beton_split, kind)
    assert loader.name == kind
    assert loader.compile_seconds >= 0
    ids = np.random.default_rng(0).permutation(60)[:50]
    batches = [batch.clone() for batch in loader.batches(ids, 16)]
    assert [len(batch) for batch in batches] == [16, 16, 16, 2]
    assert np.array_equal(torch.cat(batches).numpy(), split(60).images[ids])
    loader.close()


def test_auto_is_resident_if_a_quarter_of_the_memory_suffices(beton_split, monkeypatch):
    decoded = 60 * 8 * 8 * 3
    monkeypatch.setattr(loaders, "device_memory", lambda device: 4 * decoded)
    assert make_loader(beton_split).name == "resident"
    monkeypatch.setattr(loaders, "device_memory", lambda device: 4 * decoded - 1)
    assert make_loader(beton_split).name == "ffcv"


def test_image_files_that_do_not_fit_are_streamed(image_folder, tmp_path, monkeypatch):
    train = open_source(image_folder(tmp_path)).train
    assert make_loader(train).name == "resident"
    monkeypatch.setattr(loaders, "device_memory", lambda device: 1000)
    for part in (train, RelabelledSplit(train, 1 - train.labels), SplitPart(train, [0, 2])):
        loader = make_loader(part)
        assert (loader.name, loader.shape) == ("files", train.shape)


def test_files_requires_image_files(split, beton_split):
    for part in (split(), beton_split):
        with pytest.raises(UsageError, match="reads image files"):
            make_loader(part, "files")


def test_rejects_a_large_split_that_is_not_a_beton(split, monkeypatch):
    monkeypatch.setattr(loaders, "device_memory", lambda device: 1000)
    with pytest.raises(UsageError, match="kdfast data convert"):
        make_loader(split())
    assert make_loader(split(), "resident").name == "resident"


def test_ffcv_requires_a_beton(split):
    with pytest.raises(UsageError, match=r"reads \.beton files"):
        make_loader(split(), "ffcv")


def test_rejects_an_unknown_kind(split):
    with pytest.raises(UsageError, match="auto, resident, ffcv, files"):
        make_loader(split(), "dali")


def test_cpu_memory_respects_the_container_limit(monkeypatch, tmp_path):
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(inputs, "_CGROUP_LIMITS", ())
    assert device_memory(torch.device("cpu")) == psutil.virtual_memory().total
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(inputs, "_CGROUP_LIMITS", (str(limit),))
    limit.write_text("123456\n")
    assert device_memory(torch.device("cpu")) == 123456
    limit.write_text("max\n")
    assert device_memory(torch.device("cpu")) == psutil.virtual_memory().total
