"""Scores as other programs write them are read by sample, or refused with what they may mean."""

from __future__ import annotations

import pickle
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.errors import DataError, UsageError
from kdfast.pruning.own_scores import describe_scores
from kdfast.pruning.score_file import ScoreFile, read_scores, write_scores

N = 12
FINGERPRINT = "f" * 64
LABELS = np.arange(N) % 3
FILES = [f"/data/train/{name}/{i}.png" for name in ("ant", "bee", "cow") for i in range(4)]
NAMES = [file.removeprefix("/data/train/") for file in FILES]
SCORES = np.random.default_rng(0).random(N).astype(np.float32)
ORDER = np.random.default_rng(1).permutation(N)


def read(path, **options):
    return read_scores(path, n=N, fingerprint=FINGERPRINT, files=FILES, labels=LABELS, **options)


def refused(path, match, kind=DataError, **options):
    with pytest.raises(kind, match=match) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)


def save_text(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def save_pickle(path: Path, value) -> None:
    path.write_bytes(pickle.dumps(value))


FLOATS = SCORES.tolist()
DEEPCORE = {"subset": {"indices": np.arange(4), "scores": SCORES}, "exp": 0, "state_dict": {"w": torch.ones(3)}}
ROWS = [(i, NAMES[i], LABELS[i], FLOATS[i]) for i in ORDER]
# Name of the file -> how it is written, and the key that is recorded.
WRITERS = {
    "own.npy": (lambda p: np.save(p, SCORES), None),
    "big-endian.npy": (lambda p: np.save(p, SCORES.astype(">f8")), None),
    "own.npz": (lambda p: np.savez(p, scores=SCORES), "scores"),
    "several.npz": (lambda p: np.savez(p, score=SCORES, loss=SCORES * 2, short=SCORES[:3]), "score"),
    "list.txt": (lambda p: save_text(p, map(str, FLOATS)), None),
    "paths.txt": (lambda p: save_text(p, [f"{name} {s}" for _, name, _, s in ROWS]), None),
    "indices.txt": (lambda p: np.savetxt(p, [(i, s) for i, _, _, s in ROWS]), None),
    "by-index.csv": (lambda p: save_text(p, ["loss,idx", *(f"{s},{i}" for i, _, _, s in ROWS)]), "loss"),
    "pandas.csv": (lambda p: save_text(p, [",el2n", *(f"{i},{s}" for i, _, _, s in ROWS)]), "el2n"),
    "by-path.csv": (
        lambda p: save_text(p, ["path,label,score", *(f"x/train/{name},{y},{s}" for _, name, y, s in ROWS)]),
        "score",
    ),
    "european.csv": (
        lambda p: save_text(p, ["path;score", *(f"{name};{s}" for _, name, _, s in ROWS)]),
        "score",
    ),
    "with-other-splits.csv": (
        lambda p: save_text(
            p, ["path,score", "val/ant/0.png,7", *(f"train/{name},{s}" for _, name, _, s in ROWS), "new/x.png,nan"]
        ),
        "score",
    ),
    "tab.tsv": (lambda p: save_text(p, ["file\tscore", *(f"{name}\t{s}" for _, name, _, s in ROWS)]), "score"),
    "tensor.pt": (lambda p: torch.save(torch.from_numpy(SCORES), p), None),
    "legacy.pth": (lambda p: torch.save({"a": torch.from_numpy(SCORES)}, p, _use_new_zipfile_serialization=False), "a"),
    "deepcore.pt": (lambda p: torch.save(DEEPCORE, p), "subset.scores"),
    "array.pkl": (lambda p: save_pickle(p, SCORES), None),
    "numbers.pickle": (lambda p: save_pickle(p, FLOATS), None),
    "half.pt": (lambda p: torch.save(torch.from_numpy(SCORES).bfloat16(), p), None),
}


@pytest.mark.parametrize("name", WRITERS)
def test_reads_the_formats_of_others(tmp_path, name):
    write, key = WRITERS[name]
    write(tmp_path / name)
    found = read(tmp_path / name)
    # bfloat16 keeps 8 bits of a float.
    np.testing.assert_allclose(found.scores, SCORES, rtol=2**-8 if name == "half.pt" else 0)
    assert found.scores.dtype == np.float64
    assert found.method == (f"{name}:{key}" if key else name)
    assert (found.parameters["higher"], found.parameters.get("key")) == ("hard", key)
    assert len(found.sources["score file"]) == 64
    turned = read(tmp_path / name, higher="easy")
    np.testing.assert_array_equal(turned.scores, -found.scores)
    assert turned.digest != found.digest


def coverage_centric(path: Path) -> None:
    """Write the scores as the code of CCS does: a pickle of tensors."""
    save_pickle(path, {
        "entropy": torch.from_numpy(SCORES), "targets": torch.from_numpy(LABELS).int(),
        "forgetting": torch.arange(N, dtype=torch.int32).flip(0) % 5, "accumulated_margin": -torch.from_numpy(SCORES),
    })  # fmt: skip


def test_key_chooses_one_of_several(tmp_path):
    path = tmp_path / "data-score.pickle"
    coverage_centric(path)
    refused(path, "4 arrays that may be the scores: pass one of entropy, targets, forgetting, acc", UsageError)
    refused(path, "no `key` 'forgeting': did you mean 'forgetting'", UsageError, key="forgeting")
    refused(path, "targets, holds the labels of the data", key="targets")
    assert read(path, key="forgetting").scores.tolist() == [(N - 1 - i) % 5 for i in range(N)]


def test_names_of_easiness_need_the_end_that_is_hard(tmp_path):
    coverage_centric(tmp_path / "s.pickle")
    refused(tmp_path / "s.pickle", "a higher margin means an easier.*`higher` easy or hard", UsageError,
            key="accumulated_margin")  # fmt: skip
    np.testing.assert_array_equal(read(tmp_path / "s.pickle", key="accumulated_margin", higher="easy").scores, SCORES)
    np.testing.assert_array_equal(read(tmp_path / "s.pickle", key="accumulated_margin", higher="hard").scores, -SCORES)
    np.save(tmp_path / "aum_score.npy", SCORES)
    refused(tmp_path / "aum_score.npy", "a higher aum", UsageError)
    refused(tmp_path / "aum_score.npy", "`higher` is 'low'", UsageError, higher="low")


def test_indices_sorted_by_a_score_are_a_ranking(tmp_path):
    np.save(tmp_path / "dual_score.npy", SCORES)
    np.save(tmp_path / "dual_mask.npy", np.argsort(SCORES))
    np.save(tmp_path / "order.npy", np.argsort(SCORES))
    by_score, by_mask = read(tmp_path / "dual_score.npy").scores, read(tmp_path / "dual_mask.npy").scores
    assert np.argsort(by_score).tolist() == np.argsort(by_mask).tolist()
    refused(tmp_path / "order.npy", "either the samples sorted by a score, lowest first, or the rank of each sample")
    np.save(tmp_path / "order.npy", np.argsort(SCORES).astype(float))
    assert read(tmp_path / "order.npy").scores.tolist() == np.argsort(SCORES).tolist()


AMBIGUOUS = {
    "sorted": (np.sort(SCORES), "either scores that were sorted apart from their samples"),
    "descending": (np.sort(SCORES)[::-1], "holds sorted values"),
    "zeros and ones": ((SCORES > 0.5).astype(int), "either a mask of the samples to keep, .*or scores"),
    "boolean": (SCORES > 0.5, "boolean mask"),
    "labels": (LABELS, "holds the labels"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_refuses_what_may_be_no_score_of_the_samples(tmp_path, case):
    values, match = AMBIGUOUS[case]
    np.save(tmp_path / "s.npy", values)
    refused(tmp_path / "s.npy", match)


def test_a_table_says_which_samples_sorted_scores_are_of(tmp_path):
    save_text(tmp_path / "s.csv", ["index,score", *(f"{i},{i}" for i in range(N))])
    assert read(tmp_path / "s.csv").scores.tolist() == list(range(N))


def with_value(value):
    return np.where(np.arange(N) == 7, value, SCORES)


@pytest.mark.parametrize(
    ("name", "write", "match"),
    [
        ("s.npy", lambda p: np.save(p, SCORES[:-1]), "holds 11 scores, this data has 12"),
        ("s.npy", lambda p: np.save(p, np.empty(0)), "is empty"),
        ("s.npy", lambda p: np.save(p, SCORES[:, None]), r"float32 \(12, 1\): write one number for each of 12"),
        ("s.npy", lambda p: np.save(p, SCORES.astype(complex)), "complex128"),
        ("s.npy", lambda p: np.save(p, with_value(np.nan)), "1 scores that are not finite, such as nan of sample 7"),
        ("s.npy", lambda p: np.save(p, with_value(np.inf)), "such as inf of sample 7"),
        ("s.npy", lambda p: p.write_bytes(b"junk"), "damaged or not a plain .npy"),
        ("s.npz", lambda p: np.savez(p, a=SCORES[:5], b=SCORES[:3]), r"holds a \(5,\), b \(3,\), and none has one"),
        ("s.npz", lambda p: np.savez(p), "holds no array, and none"),
        ("s.csv", lambda p: save_text(p, ["index,score", "0,1"]), "holds 1 scores"),
        ("s.csv", lambda p: save_text(p, ["index,name", "0,a"]),
         "no column of numbers beside index, but name with 'a'"),
        ("s.csv", lambda p: save_text(p, ["idx,s", *(f"{min(i, 10)},{i}" for i in range(N))]),
         "2 scores of sample 10 and none of sample 11"),
        ("s.csv", lambda p: save_text(p, ["idx,s", *(f"{i + 1},{i}" for i in range(N))]), "indices from 1 to 12"),
        ("s.csv", lambda p: save_text(p, ["idx,s", *(f"{i},{'nan' if i == 7 else i}" for i in range(N)[::-1])]),
         "not finite, such as nan of sample 7"),
        ("s.txt", lambda p: save_text(p, [f"{name} {LABELS[i]}" for i, name in enumerate(NAMES)]), "the label of each"),
        ("s.txt", lambda p: save_text(p, NAMES), "the line 'ant/0.png', which does not end in a number"),
        ("s.txt", lambda p: save_text(p, [f"fly/{i}.png {i}" for i in range(N)]), "names 12 of 12 files"),
        ("s.pt", lambda p: p.write_bytes(b"junk"), "neither a pickle nor a file of torch.save"),
        ("s.pkl", lambda p: save_pickle(p, {"a": Path("x")}), r"nothing in it was run.*pathlib"),
        ("s.pkl", lambda p: save_pickle(p, {"names": ["a"] * N}), "holds no array"),
    ],
)  # fmt: skip
def test_refuses_scores_that_do_not_fit(tmp_path, name, write, match):
    write(tmp_path / name)
    refused(tmp_path / name, match)


def test_paths_need_samples_that_are_files(tmp_path):
    save_text(tmp_path / "s.txt", [f"{name} {i / 7}" for i, name in enumerate(NAMES)])
    with pytest.raises(DataError, match=r"holds paths, such as ant/0\.png, and the samples of this data are not files"):
        read_scores(tmp_path / "s.txt", n=N, fingerprint=FINGERPRINT)


class Runs:
    """Would run code when it is unpickled."""

    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize("suffix", ["pickle", "pt"])
def test_no_code_in_a_pickle_runs(tmp_path, capsys, suffix):
    path = tmp_path / f"s.{suffix}"
    if suffix == "pt":
        torch.save({"el2n": torch.from_numpy(SCORES), "more": Runs()}, path)
    else:
        save_pickle(path, {"el2n": SCORES, "more": Runs()})
    refused(path, r"refused and nothing in it was run: .*builtin(s|__)\.print")
    assert capsys.readouterr().out == ""


def test_scores_of_kdfast_have_one_reading(tmp_path):
    write_scores(tmp_path / "s.npz", ScoreFile(SCORES.astype(np.float64), "el2n", FINGERPRINT))
    for option in ({"key": "scores"}, {"higher": "easy"}):
        refused(tmp_path / "s.npz", f"was written by kdfast.*omit `{next(iter(option))}`", UsageError, **option)
    assert describe_scores("el2n", read(tmp_path / "s.npz").parameters) is None


def test_describes_how_a_file_was_read(tmp_path):
    np.save(tmp_path / "s.npy", SCORES)
    found = read(tmp_path / "s.npy")
    assert describe_scores(found.method, found.parameters) == (
        "s.npy: one score for each sample, in order; higher = harder"
    )
    found = read(tmp_path / "s.npy", higher="easy")
    assert "higher = easier, so kdfast turns them round" in describe_scores(found.method, found.parameters)


def test_scores_of_other_files_do_not_make_up_for_missing_ones(tmp_path):
    rows = [f"{name},{score}" for _, name, _, score in ROWS]
    save_text(tmp_path / "s.csv", ["path,score", *rows[1:], "held/out.png,1", "held/out2.png,1"])
    refused(tmp_path / "s.csv", "holds 13 scores, this data has 12")
    save_text(tmp_path / "s.csv", ["path,score", *rows, rows[0]])
    refused(tmp_path / "s.csv", "holds 13 scores, this data has 12")


def test_an_accent_may_be_a_code_point_of_its_own(tmp_path):
    files = [f"/data/train/{name}/größe_{i}.png" for name in ("ant", "Käfer") for i in range(2)]
    decomposed = [unicodedata.normalize("NFD", file.removeprefix("/data/train/")) for file in files]
    assert not set(decomposed) & {file.removeprefix("/data/train/") for file in files}
    for known, given in ((files, decomposed), ([unicodedata.normalize("NFD", f) for f in files], files)):
        save_text(tmp_path / "s.csv", ["path,score", *(f"{file},{i}" for i, file in enumerate(given))])
        found = read_scores(tmp_path / "s.csv", n=4, fingerprint=FINGERPRINT, files=known, labels=np.arange(4) % 2)
        assert found.scores.tolist() == [0, 1, 2, 3]
