from __future__ import annotations

import json
import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdfast
from kdfast.data.subset import check_subset_path, class_budgets, read_subset, subset_size, write_subset
from kdfast.data.subset import file as module
from kdfast.errors import OutputError, SubsetError, UsageError

PROVENANCE = {"data": "f" * 64, "method": "el2n", "parameters": {"fraction": 0.5}, "seed": 0, "seconds": 1.5}


@pytest.fixture
def saved(tmp_path):
    def save(array, **options):
        np.save(tmp_path / "idx.npy", array, **options)
        return tmp_path / "idx.npy"

    return save


def rejects(path, match, n=10, **options):
    with pytest.raises(SubsetError, match=match) as caught:
        read_subset(path, n=n, **options)
    assert "\n" not in str(caught.value)


def test_reads_a_plain_numpy_file_in_its_order(saved):
    path = saved(np.array([7, 0, 9]))
    subset = read_subset(path, n=10, fingerprint="anything", batch_size=3)
    assert subset.ids.tolist() == [7, 0, 9]
    assert subset.ids.dtype == np.int64
    assert (subset.provenance, subset.path) == (None, path)


def test_reads_a_big_endian_file(tmp_path, saved):
    write_subset(tmp_path / "idx.npy", np.array([7, 0, 9]), PROVENANCE)
    subset = read_subset(saved(np.array([7, 0, 9], dtype=">i8")), n=10)
    assert (subset.ids.tolist(), subset.ids.dtype, subset.ids.dtype.isnative) == ([7, 0, 9], np.int64, True)
    assert subset.provenance is not None


def test_subset_round_trips_with_its_provenance(tmp_path):
    path = tmp_path / "idx.npy"
    write_subset(path, np.array([7, 0, 9]), PROVENANCE)
    assert sorted(os.listdir(tmp_path)) == ["idx.json", "idx.npy"]
    subset = read_subset(str(path), n=10, fingerprint="f" * 64)
    assert subset.ids.tolist() == [7, 0, 9]
    assert subset.provenance is not None
    assert PROVENANCE.items() <= subset.provenance.items()
    assert subset.provenance["kdfast"] == kdfast.__version__
    assert np.load(path).tolist() == [7, 0, 9]


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.arange(4.0), "float64.*int64"),
        (np.arange(4)[:, None], r"int64 \(4, 1\).*one-dimensional"),
        (np.array(3), "one-dimensional"),
        (np.array(["1"]), "one-dimensional integers"),
        (np.zeros(0, np.int64), "empty"),
        (np.array([3, -1]), "negative.*-1"),
        (np.array([3, 10]), "past the end, such as 10.*10 training samples, 0 to 9"),
        (np.array([2**62]), "past the end"),
        (np.array([3, 4, 3, 4, 4]), "repeats 3 indices, such as 4"),
    ],
)
def test_rejects_arrays_that_are_not_a_subset(saved, array, match):
    rejects(saved(array), match)


def test_rejects_fewer_samples_than_a_batch(saved):
    path = saved(np.arange(4))
    rejects(path, "keeps 4 samples, fewer than one batch of 5", batch_size=5)
    assert len(read_subset(path, n=10, batch_size=4).ids) == 4


@pytest.mark.parametrize("cut", [1, 8, 40, 127, 135])
def test_rejects_truncated_files(saved, cut):
    path = saved(np.arange(4))
    path.write_bytes(path.read_bytes()[:-cut])
    rejects(path, "damaged or not a plain")


def test_rejects_files_that_are_not_a_plain_array(tmp_path, saved):
    rejects(saved(np.array([print, 1], object), allow_pickle=True), "pickles are not read")
    for name, content in {"empty": b"", "text": b"1\n2\n3\n", "pickle": b"\x80\x04K\x01."}.items():
        (tmp_path / name).write_bytes(content)
        rejects(tmp_path / name, "not a plain .npy array")
    np.savez(tmp_path / "a.npz", ids=np.arange(3))
    rejects(tmp_path / "a.npz", r"zip archive, as np\.savez")
    rejects(tmp_path / "missing.npy", "cannot read.*No such file")
    rejects(tmp_path, "cannot read.*directory")


def test_rejects_a_header_that_claims_more_than_memory(saved):
    path = saved(np.arange(4))
    path.write_bytes(path.read_bytes().replace(b"(4,), }            ", b"(4000000000000000,), }"))
    rejects(path, "damaged or not a plain")


def test_rejects_a_subset_of_other_data(tmp_path):
    write_subset(tmp_path / "idx.npy", np.arange(4), PROVENANCE)
    rejects(tmp_path / "idx.npy", "made from other data.*ffffffffffff.*000000000000", fingerprint="0" * 64)
    assert len(read_subset(tmp_path / "idx.npy", n=10).ids) == 4


def test_rejects_a_provenance_of_other_indices(tmp_path, saved):
    write_subset(tmp_path / "idx.npy", np.arange(4), PROVENANCE)
    path = saved(np.arange(5))
    rejects(path, "idx.json describes other indices")
    for text, match in (
        ("{", "not valid JSON"),
        ("[1]", "expected object, got array"),
        ('{"data": 3, "ids": ""}', "idx.json: field data: expected str, got int"),
        ('{"data": "f", "ids": 1}', "field ids"),
        (json.dumps({"data": "f", "ids": "0" * 64, "seconds": "1"}), "field seconds"),
        ("[" * 100_000, "not valid JSON"),
        ('{"data": NaN}', "NaN is not finite"),
        ('{"data": "f", "ids": "", "seed": ' + "1" * 5000 + "}", "out of range"),
    ):
        (tmp_path / "idx.json").write_text(text)
        rejects(path, match)


@pytest.mark.parametrize("writers", [2, 3, 5])
def test_writers_at_the_same_time_leave_a_pair_of_one_of_them(tmp_path, monkeypatch, writers):
    original = module.write_json

    def slow_for_the_first(path, provenance):
        original(path, provenance)
        time.sleep(0.2 if provenance["writer"] == 0 else 0)

    monkeypatch.setattr(module, "write_json", slow_for_the_first)

    def write(writer):
        time.sleep(0.03 * writer)
        write_subset(tmp_path / "idx.npy", np.arange(writer + 1), {**PROVENANCE, "writer": writer})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    subset = read_subset(tmp_path / "idx.npy", n=10)
    assert len(subset.ids) == subset.provenance["writer"] + 1


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (np.ones(3, bool), "boolean"),
        (np.array([1, 1]), "repeats"),
        (np.array([-1]), "negative"),
        (np.arange(3.0), "float"),
    ],
)
def test_writes_no_file_that_would_be_rejected(tmp_path, ids, match):
    with pytest.raises(SubsetError, match=match):
        write_subset(tmp_path / "idx.npy", ids, PROVENANCE)
    assert os.listdir(tmp_path) == []


def test_writing_requires_a_name_a_fingerprint_and_a_folder(tmp_path):
    with pytest.raises(UsageError, match=r"rename it to end in \.npy"):
        write_subset(tmp_path / "idx", np.arange(3), PROVENANCE)
    with pytest.raises(SubsetError, match="fingerprint"):
        write_subset(tmp_path / "idx.npy", np.arange(3), {"method": "el2n"})
    write_subset(tmp_path / "new" / "er" / "idx.npy", np.arange(3), PROVENANCE)
    assert read_subset(tmp_path / "new" / "er" / "idx.npy", n=3).provenance is not None
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_subset(tmp_path / "file" / "idx.npy", np.arange(3), PROVENANCE)


@pytest.mark.parametrize("name", ["idx", "idx.json", "idx.npy.gz", ".npy"])
def test_name_can_be_checked_in_advance(tmp_path, name):
    with pytest.raises(UsageError, match=r"rename it to end in \.npy"):
        check_subset_path(tmp_path / "new" / name)
    check_subset_path(tmp_path / "new" / "idx.npy")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ['{"mine": 1}', "[]", "{", '{"data": 3, "ids": ""}', ""])
def test_does_not_replace_a_foreign_json(tmp_path, text):
    (tmp_path / "idx.json").write_text(text)
    for call in (check_subset_path, lambda path: write_subset(path, np.arange(3), PROVENANCE)):
        with pytest.raises(OutputError, match=r"idx\.json .*another name"):
            call(tmp_path / "idx.npy")
    assert os.listdir(tmp_path) == ["idx.json"]
    assert (tmp_path / "idx.json").read_text() == text


def test_a_write_interrupted_between_the_two_files_can_be_repeated(tmp_path, monkeypatch):
    path = tmp_path / "idx.npy"
    write_subset(path, np.arange(4), PROVENANCE)
    with monkeypatch.context() as context:
        context.setattr(module.np, "save", lambda *_, **__: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            write_subset(path, np.arange(5), PROVENANCE)
    rejects(path, "cannot read")
    check_subset_path(path)
    write_subset(path, np.arange(5), PROVENANCE)
    assert len(read_subset(path, n=10).ids) == 5


MINE = {"ids": lambda path: np.save(path, np.arange(3, 9)), "an order": lambda path: np.save(path, np.arange(4)[::-1]),
        "other data": lambda path: np.save(path, np.eye(3)), "text": lambda path: path.write_text("1 2 3"),
        "an archive": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18))}  # fmt: skip


@pytest.mark.parametrize("name", MINE)
def test_does_not_replace_indices_changed_by_hand(tmp_path, name):
    path = tmp_path / "idx.npy"
    write_subset(path, np.arange(4), PROVENANCE)
    MINE[name](path)
    mine = path.read_bytes()
    for call in (check_subset_path, lambda path: write_subset(path, np.arange(3), PROVENANCE)):
        with pytest.raises(OutputError, match=r"idx\.npy exists, and kdfast did not write it: use another name"):
            call(path)
    assert path.read_bytes() == mine
    path.unlink()  # the advice works
    write_subset(path, np.arange(3), PROVENANCE)


@pytest.mark.parametrize(("field", "value"), [("method", "x"), ("seconds", 9), ("kdfast", "0.0"), ("more", [])])
def test_an_edited_provenance_is_refused_and_written_anew(tmp_path, field, value):
    path, about = tmp_path / "idx.npy", tmp_path / "idx.json"
    write_subset(path, np.arange(4), PROVENANCE)
    about.write_text(json.dumps({**json.loads(about.read_text()), field: value}))
    rejects(path, r"idx\.json was damaged or edited, it does not match its own digest: prune again")
    check_subset_path(path)
    write_subset(path, np.arange(4), PROVENANCE)
    assert read_subset(path, n=10).provenance["data"] == "f" * 64


def test_provenance_of_earlier_versions_has_no_digest(tmp_path):
    path, about = tmp_path / "idx.npy", tmp_path / "idx.json"
    write_subset(path, np.arange(4), PROVENANCE)
    before = read_subset(path, n=10).provenance
    about.write_text(json.dumps(before))
    assert read_subset(path, n=10).provenance == before


@given(st.integers(1, 10**6), st.floats(1e-6, 1.0))
def test_size_is_the_rounded_fraction(n, fraction):
    if round(fraction * n) == 0:
        with pytest.raises(SubsetError, match="keeps none"):
            subset_size(n, fraction)
    else:
        assert subset_size(n, fraction) == round(fraction * n)


def test_known_sizes():
    assert [subset_size(50_000, f) for f in (0.1, 0.3, 0.7, 1.0, 0.99999)] == [5000, 15000, 35000, 50000, 50000]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_rejects_fractions_out_of_range(fraction):
    with pytest.raises(SubsetError, match="above 0 and at most 1"):
        subset_size(100, fraction)


def labels_of(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.data())
def test_proportional_budgets_are_within_one_of_the_quota(sizes, data):
    n = sum(sizes)
    total = data.draw(st.integers(1, n))
    quotas = [total * size / n for size in sizes]
    if total < len(sizes):
        with pytest.raises(SubsetError, match=f"keep at least {len(sizes)}"):
            class_budgets(labels_of(sizes), total)
        return
    budgets = class_budgets(labels_of(sizes), total).tolist()
    assert sum(budgets) == total
    if min(quotas) < 1:  # small classes keep more than their quota
        assert all(1 <= budget <= size for budget, size in zip(budgets, sizes, strict=True))
        assert all(budget <= max(1, quota + 1) for budget, quota in zip(budgets, quotas, strict=True))
        return
    for budget, size, quota in zip(budgets, sizes, quotas, strict=True):
        assert 1 <= budget <= size
        assert abs(budget - quota) < 1
    rest = [quota % 1 for quota in quotas]
    rounded_up = [r for b, q, r in zip(budgets, quotas, rest, strict=True) if b > q]
    rounded_down = [r for b, q, r in zip(budgets, quotas, rest, strict=True) if b < q]
    assert not rounded_up or not rounded_down or min(rounded_up) >= max(rounded_down) - 1e-9


def test_long_tails_keep_one_sample_of_each_class():
    assert class_budgets(labels_of([60, 15, 4, 1]), 40).tolist() == [30, 7, 2, 1]
    assert class_budgets(labels_of([60, 15, 4, 1]), 40, "equal").tolist() == [20, 15, 4, 1]
    assert class_budgets(labels_of([96, 2, 1, 1]), 5).tolist() == [2, 1, 1, 1]
    assert class_budgets(labels_of([20, 0, 20]), 9, "equal").tolist() == [5, 0, 4]


def long_tail(classes, largest, factor):
    """Return class sizes that fall exponentially to `largest / factor`, as CIFAR-100-LT's do."""
    return [int(largest * factor ** (-c / (classes - 1))) for c in range(classes)]


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("factor", [10, 50, 100, 200])
def test_cifar_100_with_a_long_tail_keeps_every_class_and_its_shape(factor, fraction):
    sizes = np.array(long_tail(100, 500, factor))
    total = round(fraction * sizes.sum())
    budgets = class_budgets(labels_of(sizes), total)
    assert budgets.sum() == total
    assert budgets.min() >= 1
    assert (np.diff(budgets) <= 0).all(), "a larger class never keeps less"
    single = budgets == 1
    rest = total - single.sum()
    quotas = rest * sizes[~single] / sizes[~single].sum()
    assert np.abs(budgets[~single] - quotas).max() < 1
    equal = class_budgets(labels_of(sizes), total, "equal")
    assert (equal[equal < sizes] >= equal.max() - 1).all()


def capped_by_hand(sizes, total, available):
    """Give the samples out one by one, each to the class that is furthest below its share of the sizes."""
    budgets = [1 if size else 0 for size in sizes]
    for _ in range(total - sum(budgets)):
        open_ones = [c for c in range(len(sizes)) if budgets[c] < available[c]]
        budgets[min(open_ones, key=lambda c: (budgets[c] + 0.5) / sizes[c])] += 1
    return budgets


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.data())
def test_budgets_respect_what_is_available(sizes, data):
    available = [data.draw(st.integers(1, size)) for size in sizes]
    total = data.draw(st.integers(len(sizes), sum(available)))
    for mode in ("proportional", "equal"):
        budgets = class_budgets(labels_of(sizes), total, mode, np.array(available))
        assert budgets.sum() == total
        assert (budgets >= 1).all()
        assert (budgets <= available).all()
        assert class_budgets(labels_of(sizes), total, mode, np.array(sizes)).tolist() == (
            class_budgets(labels_of(sizes), total, mode).tolist()
        )
    by_hand = capped_by_hand(sizes, total, available)
    proportional = class_budgets(labels_of(sizes), total, "proportional", np.array(available))
    assert np.abs(proportional - by_hand).max() <= 2, "largest remainders and one by one differ by rounding only"


def test_known_budgets_where_less_is_available():
    assert class_budgets(labels_of([50, 30, 20]), 10, "proportional", np.array([2, 30, 20])).tolist() == [2, 5, 3]
    assert class_budgets(labels_of([50, 30, 20]), 60, "proportional", np.array([50, 1, 15])).tolist() == [44, 1, 15]
    assert class_budgets(labels_of([50, 30, 20]), 9, "equal", np.array([1, 30, 20])).tolist() == [1, 4, 4]


def test_known_budgets_and_ties():
    assert class_budgets(labels_of([50, 30, 20]), 10).tolist() == [5, 3, 2]
    assert class_budgets(labels_of([10, 10, 10]), 10).tolist() == [4, 3, 3]
    assert class_budgets(labels_of([10, 10, 10]), 11).tolist() == [4, 4, 3]
    assert class_budgets(labels_of([6, 1, 3]), 5).tolist() == [3, 1, 1]
    assert class_budgets(labels_of([3, 0, 3]), 4).tolist() == [2, 0, 2]
    assert class_budgets(labels_of([5000] * 10), 15_000).tolist() == [1500] * 10


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
def test_equal_budgets_differ_by_at_most_one_but_for_classes_that_are_too_small(sizes, data):
    total = data.draw(st.integers(len(sizes), sum(sizes)))
    budgets = class_budgets(labels_of(sizes), total, "equal").tolist()
    assert sum(budgets) == total
    cut = [budget for budget, size in zip(budgets, sizes, strict=True) if budget < size]
    assert not cut or max(cut) - min(cut) <= 1
    assert not cut or max(budgets) <= min(cut) + 1
    assert cut == sorted(cut, reverse=True)


def test_rejects_impossible_budgets():
    for mode in ("proportional", "equal"):
        with pytest.raises(SubsetError, match=r"leaves 1 of 2 classes empty: keep at least 2, .* `fraction` of 0\.02"):
            class_budgets(labels_of([99, 1]), 1, mode)
    with pytest.raises(SubsetError, match="must be 1 to 20"):
        class_budgets(labels_of([20]), 21)
    with pytest.raises(SubsetError, match="must be 1 to 20"):
        class_budgets(labels_of([20]), 0)
    with pytest.raises(SubsetError, match="'proportional' or 'equal'"):
        class_budgets(labels_of([20]), 3, "fair")  # type: ignore[arg-type]
