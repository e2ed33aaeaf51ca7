"""Subsets as other programs write them: any integer dtype, masks, lists, tables, and files of torch.save."""

from __future__ import annotations

import dataclasses
import os
import pickle

import numpy as np
import pytest
import torch

from kdfast.data.holdout import SplitPart
from kdfast.data.readers.registry import open_source
from kdfast.data.readers.relabel import replace_labels
from kdfast.data.source import sample_files
from kdfast.data.subset import check_subset_file, read_subset
from kdfast.errors import SubsetError

N = 10
FILES = [f"/data/train/{name}/{name}_{i} a.JPEG" for name in ("cat", "dog") for i in range(5)]
# Samples 7, 0 and 9 of the files above, in this order.
NAMES = ["dog/dog_2 a.JPEG", "cat/cat_0 a.JPEG", "dog/dog_4 a.JPEG"]


def rejects(path, match, files=None):
    with pytest.raises(SubsetError, match=match) as caught:
        read_subset(path, n=N, files=files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "<u2", "i4", ">i4", "u4", "u8", ">i8"])
def test_reads_every_integer_dtype(tmp_path, dtype):
    np.save(tmp_path / "idx.npy", np.array([7, 0, 9]).astype(dtype))
    ids = read_subset(tmp_path / "idx.npy", n=N).ids
    assert (ids.tolist(), ids.dtype, ids.dtype.isnative) == ([7, 0, 9], np.int64, True)


def test_rejects_an_index_that_int64_cannot_hold(tmp_path):
    np.save(tmp_path / "idx.npy", np.array([3, 2**64 - 1], np.uint64))
    rejects(tmp_path / "idx.npy", "past the end, such as 18446744073709551615")


def test_reads_a_boolean_mask_of_all_samples(tmp_path):
    np.save(tmp_path / "mask.npy", np.isin(np.arange(N), [7, 0, 9]))
    check_subset_file(tmp_path / "mask.npy")
    assert read_subset(tmp_path / "mask.npy", n=N).ids.tolist() == [0, 7, 9]


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (np.ones(9, bool), r"boolean mask \(9,\).*10 training samples"),
        (np.ones((N, 1), bool), r"boolean mask \(10, 1\)"),
        (np.zeros(N, bool), "keeps no sample"),
        (
            np.eye(1, N, 3, dtype=np.int64)[0],
            r"only 0 and 1 .*either a mask of all 10 samples, or indices.*mask\.astype",
        ),
        (np.zeros(9, np.uint8), "either a mask, but not of these 10 samples, or indices"),
        (np.ones(N), "either a mask of all 10 samples"),
    ],
)
def test_rejects_masks_that_do_not_fit_or_may_be_indices(tmp_path, mask, match):
    np.save(tmp_path / "mask.npy", mask)
    rejects(tmp_path / "mask.npy", match)


def test_rejects_a_ranking_of_all_samples(tmp_path):
    order = np.random.default_rng(0).permutation(N)
    np.save(tmp_path / "dual_mask_T30.npy", order)
    rejects(tmp_path / "dual_mask_T30.npy", "a ranking by a score.*or the whole training split.*`scores`")
    np.save(tmp_path / "order.npy", order)
    assert read_subset(tmp_path / "order.npy", n=N).ids.tolist() == order.tolist()


LISTS = {
    "indices": "7\n0\n\n9\n",
    "savetxt": "7.000000000000000000e+00\n0.000000000000000000e+00\n9.000000000000000000e+00\n",
    "windows": "\ufeff7\r\n0\r\n9\r\n",
    "paths": "".join(f"{name}\n" for name in NAMES),
    "paths and labels": "".join(f"{name} 1\n" for name in NAMES),
    "paths, labels": "".join(f"{name},1\n" for name in NAMES),
    "full paths": "".join(f"/elsewhere/imagenet/train/{name} 3\n" for name in NAMES),
    "names": "".join(f"./{os.path.basename(name)}\t1\n" for name in NAMES),
    "backslashes": "".join(name.replace("/", "\\") + "\n" for name in NAMES),
}


@pytest.mark.parametrize("case", LISTS)
def test_reads_lists(tmp_path, case):
    (tmp_path / "kept.txt").write_text(LISTS[case], newline="")
    check_subset_file(tmp_path / "kept.txt")
    assert read_subset(tmp_path / "kept.txt", n=N, files=FILES).ids.tolist() == [7, 0, 9]


TABLES = {
    "index": "index,label\n7,1\n0,0\n9,1\n",
    "path": "label,Path\n" + "".join(f"0,{name}\n" for name in NAMES),
    "quoted": 'filename,width\n"dog/dog_2 a.JPEG",8\n"cat/cat_0 a.JPEG",8\n"dog/dog_4 a.JPEG",8\n',
    "pandas": ",label\n7,1\n0,0\n9,1\n",
    "pandas with paths": ",path\n" + "".join(f"{i},{name}\n" for i, name in enumerate(NAMES)),
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_reads_tables(tmp_path, case, suffix):
    file = tmp_path / f"kept.{suffix}"
    file.write_text(TABLES[case].replace(",", "\t" if suffix == "tsv" else ","))
    check_subset_file(file)
    assert read_subset(file, n=N, files=FILES).ids.tolist() == [7, 0, 9]


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", "\n \n", "is empty"),
        ("a.txt", "7\nseven\n", "holds 'seven', which is no index"),
        ("a.txt", "7\n1.5\n", "holds '1.5'"),
        ("a.txt", "7\n1e300\n", "holds '1e300'"),
        ("a.txt", "7\nnan\n", "holds 'nan'"),
        ("a.txt", "7\n7\n", "repeats 1 indices, such as 7"),
        ("a.txt", "7\n10\n", "past the end, such as 10"),
        ("a.txt", "7\n-1\n", "negative"),
        ("a.txt", "1\n0\n1\n", "only 0 and 1"),
        ("a.txt", "cat/cat_0 a.JPEG\ncat/cat_0 a.JPEG\n", "repeats 1 indices, such as 0"),
        (
            "a.txt",
            "cat/cat_0 a.JPEG\ncat/cat_9 a.JPEG 3\n",
            "names 1 of 2 files.*cat_9 a.JPEG 3: write paths such as cat/",
        ),
        ("a.txt", "7\0", "not a text file"),
        ("a.txt", "x/VAL/cat/cat_0 a.JPEG\n", "names 1 of 1 files that this data does not have"),
        ("a.txt", "test/cat/cat_0 a.JPEG 0\n", "names 1 of 1 files that this data does not have"),
        ("a.csv", "index,keep\n7,1\n0,0\n", "column keep: either it says which rows to keep, or all of them are kept"),
        ("a.csv", "id,path\n0,cat/cat_0 a.JPEG\n", "the columns id and path, and either may say which sample"),
        ("a.csv", "index\n", "a header and no rows"),
        ("a.csv", "index,index\n1,2\n", "two columns of the same name"),
        ("a.csv", "index,label\n1\n", "row 2, has 1 fields, the header has 2"),
        ("a.csv", "score\n1\n", "columns score, and none says which sample"),
        ("a.csv", "id\nabc\n", "column id, holds 'abc'"),
    ],
)
def test_rejects_damaged_lists_and_tables(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    rejects(tmp_path / name, match, files=FILES)


def test_names_of_several_samples_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("1.png\n")
    rejects(tmp_path / "a.txt", "1.png, which several samples are called: write paths such as a/1.png",
            files=["x/a/1.png", "x/b/1.png"])  # fmt: skip


def test_files_of_a_list_may_be_absolute_or_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("b/2.png\n")
    assert read_subset(tmp_path / "a.txt", n=2, files=[str(tmp_path / "a" / "1.png"), "b/2.png"]).ids.tolist() == [1]


def test_paths_need_an_image_folder(tmp_path):
    (tmp_path / "a.txt").write_text("cat/cat_0 a.JPEG 0\n")
    rejects(tmp_path / "a.txt", "holds paths, such as cat/cat_0 a.JPEG 0, and the samples of this data are not files")


PICKLED = {
    "tensor": torch.tensor([7, 0, 9]),
    "list": [7, 0, 9],
    "array": np.array([7, 0, 9], np.int32),
    "paths": NAMES,
    "mask": torch.from_numpy(np.isin(np.arange(N), [7, 0, 9])),
    "DeepCore": {"exp": 0, "rec": {"loss": [0.5]}, "subset": {"indices": np.array([7, 0, 9]), "scores": np.ones(N)}},
}


@pytest.mark.parametrize("case", PICKLED)
@pytest.mark.parametrize("suffix", ["pt", "pickle"])
def test_reads_files_of_torch_and_pickles(tmp_path, case, suffix):
    file = tmp_path / f"kept.{suffix}"
    if suffix == "pt":
        torch.save(PICKLED[case], file)
    else:
        file.write_bytes(pickle.dumps(PICKLED[case]))
    check_subset_file(file)
    expected = [0, 7, 9] if case == "mask" else [7, 0, 9]
    assert read_subset(file, n=N, files=FILES).ids.tolist() == expected


def test_rejects_pickles_without_one_array_of_indices(tmp_path):
    torch.save({"a": torch.arange(3), "nested": {"b": 1}}, tmp_path / "a.pt")
    rejects(tmp_path / "a.pt", r"holds a, nested\.b, and none of these is called indices")
    torch.save({"indices": torch.arange(3), "subset": torch.arange(4)}, tmp_path / "b.pt")
    rejects(tmp_path / "b.pt", "more than one of these")
    torch.save([[1, 2], [3]], tmp_path / "c.pt")
    rejects(tmp_path / "c.pt", "holds no array of indices")


@pytest.mark.parametrize("kind", ["folder", "split", "flipped"])
def test_paths_select_the_samples_of_an_image_folder(tmp_path, image_folder, kind):
    folder = image_folder(tmp_path / "images")
    source = open_source(folder)
    if kind == "split":
        source = dataclasses.replace(source, train=SplitPart(source.train, [6, 1, 3, 0, 7]))
    elif kind == "flipped":
        source = replace_labels(source, 1 - source.train.labels)
    files = sample_files(source.train)
    picked = [3, 0, len(files) - 1]
    (tmp_path / "a.txt").write_text("".join(f"{os.path.relpath(files[i], folder)} 0\n" for i in picked))
    assert read_subset(tmp_path / "a.txt", n=len(files), files=files).ids.tolist() == picked
