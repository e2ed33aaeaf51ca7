"""One test per hazard of FFCV 1.0.2, which fails or times out if the guard against it is removed."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.data.ffcv import format as beton_format
from kdfast.data.ffcv import read as beton
from kdfast.data.ffcv.read import BetonLoader, BetonSplit, worker_count
from kdfast.data.ffcv.write import write_beton
from kdfast.data.source import ArraySplit
from kdfast.errors import BackendUnavailable, DataError, SubsetError, UsageError

pytest.importorskip("ffcv")

COUNT = 600


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    return ArraySplit(rng.integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8), np.arange(COUNT) % 7, "random")


@pytest.fixture(scope="module")
def opened(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("beton") / "train.beton"
    write_beton(source, path)
    return BetonSplit(path)


@pytest.fixture(scope="module")
def loader(opened):
    return BetonLoader(opened)


def within(seconds, work):
    """Return the result of `work`, or fail if it takes more than `seconds`."""
    outcome = []

    def run():
        try:
            outcome.append(("value", work()))
        except Exception as error:
            outcome.append(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        pytest.fail(f"still running after {seconds} s")
    kind, result = outcome[0]
    if kind == "error":
        raise result
    return result


def load(loader, ids, batch_size):
    return within(60, lambda: [batch.clone() for batch in loader.batches(ids, batch_size)])


def test_pixels_round_trip(source, opened):
    assert opened.shape == (8, 8, 3)
    assert np.array_equal(opened.labels, source.labels)
    assert np.array_equal(opened.read(range(COUNT)), source.images)


def test_read_accepts_any_order_and_repetition(source, opened):
    ids = [5, 3, 3, 599, 0]
    assert np.array_equal(opened.read(ids), source.images[ids])
    assert opened.read([]).shape == (0, 8, 8, 3)


@pytest.mark.parametrize("batch_size", [1, 7, 256, COUNT, 1000])
def test_batches_follow_the_ids(source, loader, batch_size):
    ids = np.random.default_rng(1).permutation(COUNT)[:500]
    batches = load(loader, ids, batch_size)
    assert np.array_equal(torch.cat(batches).numpy(), source.images[ids])
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert batches[0].dtype == torch.uint8


@pytest.mark.parametrize("ids", [[COUNT], [10**9], [0, 2**62], np.array([2**64 - 1], np.uint64)])
def test_rejects_indices_past_the_end(loader, ids):
    with pytest.raises(SubsetError, match=f"0 to {COUNT - 1}"):
        loader.batches(ids, 4)


@pytest.mark.parametrize("ids", [[-1], [3, -2]])
def test_rejects_negative_indices(loader, ids):
    with pytest.raises(SubsetError, match="sample ids go from -"):
        loader.batches(ids, 4)


def test_rejects_duplicate_indices(loader):
    with pytest.raises(SubsetError, match="sample id 7 occurs 2 times"):
        loader.batches([7, 1, 7], 4)


@pytest.mark.parametrize("ids", [np.ones(COUNT, bool), np.arange(4.0), np.array(["1"]), [[0, 1]]])
def test_rejects_ids_that_are_not_integers(loader, ids):
    with pytest.raises(SubsetError, match="must be integers"):
        loader.batches(ids, 4)


def test_rejects_empty_ids(loader):
    with pytest.raises(SubsetError, match="at least one"):
        loader.batches([], 4)


def test_fewer_indices_than_a_batch_make_one_small_batch(source, loader):
    (batch,) = load(loader, [4, 2, 9], 256)
    assert np.array_equal(batch.numpy(), source.images[[4, 2, 9]])


def test_batch_of_one_keeps_its_axis(source, loader):
    (batch,) = load(loader, [11], 1)
    assert batch.shape == (1, 8, 8, 3)
    assert np.array_equal(batch.numpy(), source.images[[11]])


def test_exception_in_the_thread_of_ffcv_is_raised(loader, monkeypatch):
    from ffcv.loader.epoch_iterator import EpochIterator

    whole = EpochIterator.run_pipeline

    def failing(self, number, *rest):
        if number == 2:
            raise RuntimeError("broken decoder")
        return whole(self, number, *rest)

    monkeypatch.setattr(EpochIterator, "run_pipeline", failing)
    before = threading.active_count()
    with pytest.raises(DataError, match="broken decoder"):
        load(loader, np.arange(COUNT), 100)
    assert threading.active_count() == before


def test_later_changes_of_the_ids_have_no_effect(source, loader):
    ids = np.arange(COUNT)
    batches = loader.batches(ids, 50)
    ids[:] = 0
    assert np.array_equal(torch.cat([batch.clone() for batch in batches]).numpy(), source.images)


def test_batch_is_valid_until_the_next_is_requested(source, loader):
    for number, batch in enumerate(loader.batches(np.arange(COUNT), 20)):
        time.sleep(0.01)  # FFCV decodes ahead in the meantime
        assert np.array_equal(batch.numpy(), source.images[20 * number : 20 * number + 20])


def test_buffers_are_reused(loader):
    addresses = [batch.data_ptr() for batch in loader.batches(np.arange(COUNT), 20)]
    assert len(addresses) == 30
    assert len(set(addresses)) < 10


@pytest.mark.parametrize("taken", [0, 1, 2, 5])
def test_leaving_an_epoch_midway_stops_its_thread(loader, taken):
    before = threading.active_count()
    for _ in range(5):
        batches = loader.batches(np.arange(COUNT), 10)
        for _ in range(taken):
            next(batches)
        within(10, batches.close)
    assert threading.active_count() == before


def test_break_and_exception_stop_the_thread(loader):
    before = threading.active_count()
    for _ in loader.batches(np.arange(COUNT), 10):
        break

    def fail():
        for _ in loader.batches(np.arange(COUNT), 10):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert threading.active_count() == before


def test_leaving_midway_does_not_decode_the_rest(loader, monkeypatch):
    from ffcv.loader.epoch_iterator import EpochIterator

    whole, decoded = EpochIterator.run_pipeline, []
    monkeypatch.setattr(EpochIterator, "run_pipeline", lambda self, *a: decoded.append(a[0]) or whole(self, *a))
    batches = loader.batches(np.arange(COUNT), 2)
    next(batches)
    batches.close()
    assert len(decoded) < 20


TWO_AT_ONCE = """
import sys
from kdfast.data.ffcv.read import BetonLoader, BetonSplit
import numba
split = BetonSplit(sys.argv[1])
one, two = BetonLoader(split), BetonLoader(split)
for _ in range(20):
    for first, second in zip(one.batches(range(600), 10), two.batches(range(599, -1, -1), 10), strict=True):
        pass
print(numba.threading_layer() if numba.get_num_threads() > 1 else "workqueue")
"""


def test_two_epochs_run_at_once(opened):
    """Numba's fallback thread pool ends the process if two threads use it at once."""
    done = subprocess.run(
        [sys.executable, "-c", TWO_AT_ONCE, str(opened.path)],
        env={**os.environ, "NUMBA_THREADING_LAYER": "workqueue"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "workqueue"), done.stderr


def test_workers_are_clamped_to_the_affinity_mask(opened, source):
    assert worker_count(10_000) <= len(os.sched_getaffinity(0))
    assert worker_count(1) == 1
    (batch,) = load(BetonLoader(opened, workers=10_000), [3], 1)
    assert np.array_equal(batch.numpy(), source.images[[3]])


def test_workers_respect_a_narrower_affinity_mask(opened):
    code = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from kdfast.data.ffcv.read import BetonLoader, BetonSplit, worker_count;"
        "assert worker_count() == worker_count(8) == 1;"
        "print(len(next(BetonLoader(BetonSplit(sys.argv[1])).batches([1, 2], 2))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(opened.path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "2"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_torch_thread_count_is_restored(opened, threads):
    before = torch.get_num_threads()
    fresh = []
    try:
        torch.set_num_threads(threads)
        loader = BetonLoader(opened, workers=1)
        assert torch.get_num_threads() == threads
        for _ in loader.batches(np.arange(100), 10):
            assert torch.get_num_threads() == threads
        # New threads take the count from a variable of the process, which FFCV's thread sets too.
        thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert fresh == [threads]
    finally:
        torch.set_num_threads(before)


def test_import_of_ffcv_keeps_torch_threads():
    code = (
        "import torch; torch.set_num_threads(3); from kdfast.data.ffcv import read; read.load_ffcv();"
        "assert torch.get_num_threads() == 3"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_pipeline_only_decodes(loader, source):
    ids = np.arange(COUNT)
    first, second = load(loader, ids, 100), load(loader, ids, 100)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_compile_time_is_reported_and_spent_at_construction(opened):
    loader = BetonLoader(opened)
    start = time.perf_counter()
    load(loader, np.arange(COUNT), 50)
    assert 0 < time.perf_counter() - start < loader.compile_seconds


def test_message_about_missing_ffcv_names_the_packages(opened, monkeypatch):
    beton.load_ffcv.cache_clear()
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setitem(sys.modules, "ffcv.loader.epoch_iterator", None)
    with pytest.raises(BackendUnavailable, match=r"kdfast\[ffcv\]"):
        BetonSplit(opened.path)


def mapped_bytes(path):
    """Return the bytes of a file's pages that count as memory of this process."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if not name.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and name == "Rss:":
            found += int(line.split()[1]) << 10
    return found


@pytest.mark.parametrize("gives_back", [False, True])
def test_pages_of_large_files_do_not_stay_mapped(source, tmp_path, monkeypatch, gives_back):
    path = tmp_path / "large.beton"
    write_beton(source, path)
    monkeypatch.setattr(beton, "_KEPT_FILE", 0 if gives_back else 1 << 40)
    monkeypatch.setattr(beton, "_KEPT_IMAGES", 200)
    loader = BetonLoader(BetonSplit(path))
    found = load(loader, np.arange(COUNT), 100)
    assert (mapped_bytes(path) == 0) == gives_back
    assert np.array_equal(torch.cat(found), source.images)
    loader.close()


def test_rejects_use_after_close(opened):
    loader = BetonLoader(opened)
    loader.close()
    with pytest.raises(UsageError, match="closed"):
        loader.batches([0], 1)


@pytest.mark.parametrize("size", [0, 10, 1000, 5000, 1 << 20, -1, -24])
def test_rejects_a_truncated_file(opened, tmp_path, size):
    path = tmp_path / "cut.beton"
    path.write_bytes(opened.path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"cut\.beton"):
        BetonSplit(path)


def test_rejects_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        BetonSplit(tmp_path / "absent.beton")


def test_format_equals_that_of_ffcv(opened):
    ffcv = beton.load_ffcv()
    assert ffcv.types.HeaderType == beton_format.HEADER
    assert ffcv.types.FieldDescType == beton_format.FIELD
    assert beton_format.TABLE == ffcv.types.ALLOC_TABLE_TYPE
    reader = ffcv.reader.Reader(str(opened.path))
    assert reader.metadata_type == beton_format.SAMPLE
    assert (opened.labels == reader.metadata["f1"]).all()


def test_opening_a_file_does_not_import_ffcv(opened):
    code = f"""
import sys
from kdfast.data.ffcv.read import BetonSplit
assert len(BetonSplit({str(opened.path)!r})) == {COUNT}
assert "ffcv" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def damaged(opened, tmp_path, field, value, row=5):
    """Copy the file with another value in row `row` of the metadata."""
    raw = bytearray(opened.path.read_bytes())
    start = beton_format.HEADER.itemsize + 2 * beton_format.FIELD.itemsize
    rows = np.frombuffer(raw, beton_format.SAMPLE, COUNT, start)
    rows["f0"][field][row] = value
    path = tmp_path / "damaged.beton"
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [("data_ptr", 0), ("data_ptr", 2**63), ("data_ptr", 2**64 - 1), ("height", 0), ("width", 9), ("mode", 7)],
)
def test_rejects_invalid_metadata(opened, tmp_path, field, value):
    path = damaged(opened, tmp_path, field, value)
    with pytest.raises(DataError, match=r"damaged\.beton has"):
        BetonSplit(path)


@pytest.mark.parametrize(("place", "value"), [(0, 9), (2, 3), (8, 0), (24, 1)])
def test_rejects_other_headers(opened, tmp_path, place, value):
    raw = bytearray(opened.path.read_bytes())
    raw[place : place + 2] = value.to_bytes(2, "little")
    path = tmp_path / "other.beton"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"other\.beton"):
        BetonSplit(path)
