"""Caches of imported logits hold what a float64 computation gives, in every format, and refuse what does not fit."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import kdfast
from kdfast.data.views import view_table
from kdfast.errors import CacheMismatch, DataError, DataWarning, UsageError
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.verify import verify_cache

CLASSES = 4


@pytest.fixture
def outputs(source):
    """Logits of every sample, which fit the labels."""
    rng = np.random.default_rng(0)
    n = len(source.train)
    return (rng.normal(size=(n, CLASSES)) + 5 * np.eye(CLASSES)[source.train.labels]).astype(np.float32)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def centred(z):
    return z - z.mean(-1, keepdims=True)


def stored(cache):
    ids = np.arange(len(cache))
    return np.stack([cache.lookup(ids, np.full(len(ids), v)).float().numpy() for v in range(cache.n_views)], 1)


def test_holds_the_logits_of_one_view(tmp_path, source, outputs):
    cache = kdfast.teacher_outputs(outputs, source, tmp_path / "c", dtype="float32")
    np.testing.assert_array_equal(stored(cache)[:, 0], outputs)
    np.testing.assert_array_equal(cache.identity_logits(), outputs)
    assert (cache.n_views, cache.is_imported, cache.has_features) == (1, True, False)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["teacher"]["net"] == "imported"
    assert (manifest["test_top1"], manifest["features"]) == (None, 0)
    assert manifest["train_top1"] == 100 * np.mean(outputs.argmax(1) == source.train.labels)
    half = kdfast.teacher_outputs(outputs, source, tmp_path / "half")
    np.testing.assert_array_equal(stored(half)[:, 0], outputs.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("views", [2, None])
def test_holds_the_logits_of_every_view(tmp_path, source, outputs, views):
    count = views or source.view_spec.count
    rng = np.random.default_rng(1)
    logits = outputs[:, None] + rng.normal(size=(len(outputs), count, 1)).astype(np.float32)
    cache = kdfast.teacher_outputs(logits, source, tmp_path / "c", view_seed=7, dtype="float32")
    np.testing.assert_array_equal(stored(cache), logits)
    assert (cache.n_views, cache.view_seed) == (count, 7)
    table = view_table(source.view_spec, 7, np.arange(len(outputs)), count)
    column = np.flatnonzero(table[0] == source.view_spec.identity)[0]
    np.testing.assert_array_equal(cache.identity_logits(), logits[:, column])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["logits", "probabilities", "log-probabilities"])
def test_every_kind_gives_the_same_softmax(tmp_path, source, outputs, kind, temperature):
    z = outputs.astype(np.float64) / temperature
    given = {"logits": z, "probabilities": softmax(z), "log-probabilities": np.log(softmax(z))}[kind]
    cache = kdfast.teacher_outputs(given, source, tmp_path / "c", kind=kind, temperature=temperature, dtype="float32")
    np.testing.assert_allclose(centred(cache.identity_logits()), centred(outputs), atol=1e-5)


@pytest.mark.parametrize("kind", ["probabilities", "log-probabilities"])
def test_probabilities_rounded_to_zero_stay_finite(tmp_path, source, outputs, kind):
    rounded = softmax(outputs.astype(np.float64) * 12).astype(np.float16)
    assert (rounded == 0).any()
    with np.errstate(divide="ignore"):
        given = rounded if kind == "probabilities" else np.log(rounded.astype(np.float64)).astype(np.float16)
    logits = kdfast.teacher_outputs(given, source, tmp_path / "c", kind=kind, dtype="float32").identity_logits()
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[rounded == 0], np.log(2.0**-24), rtol=1e-6)


FORMATS = {
    "z.npy": np.save,
    "fortran.npy": lambda path, z: np.save(path, np.asfortranarray(z)),
    "only.npz": lambda path, z: np.savez(path, z),
    "named.npz": lambda path, z: np.savez_compressed(path, logits=z, labels=np.arange(3)),
    "tensor.pt": lambda path, z: torch.save(torch.from_numpy(z), path),
    "dict.pt": lambda path, z: torch.save({"labels": torch.arange(3), "logits": torch.from_numpy(z)}, path),
    "arrays.pt": lambda path, z: torch.save({"labels": np.arange(3), "logits": z}, path),
    "legacy.pth": lambda path, z: torch.save(torch.from_numpy(z), path, _use_new_zipfile_serialization=False),
    "z.safetensors": lambda path, z: save_file({"logits": torch.from_numpy(z)}, path),
}


@pytest.mark.parametrize("name", FORMATS)
def test_reads_every_format(tmp_path, source, outputs, name):
    FORMATS[name](tmp_path / name, outputs)
    features = np.random.default_rng(2).normal(size=(len(outputs), 6)).astype(np.float32)
    np.save(tmp_path / "h.npy", features)
    cache = kdfast.teacher_outputs(
        tmp_path / name, source, tmp_path / "c", features=tmp_path / "h.npy", dtype="float32"
    )
    np.testing.assert_array_equal(cache.identity_logits(), outputs)
    np.testing.assert_array_equal(cache.features(), features)
    TeacherCache.open(tmp_path / "c", source=source)


def test_reads_half_precision(tmp_path, source, outputs):
    half = torch.from_numpy(outputs).bfloat16()
    torch.save(half, tmp_path / "z.pt")
    save_file({"logits": half}, tmp_path / "z.safetensors")
    for given in (half, tmp_path / "z.pt", tmp_path / "z.safetensors"):
        cache = kdfast.teacher_outputs(given, source, tmp_path / f"c{len(list(tmp_path.iterdir()))}", dtype="float32")
        np.testing.assert_array_equal(cache.identity_logits(), half.float().numpy())


def test_the_same_import_is_reused_and_another_refused(tmp_path, source, outputs):
    kdfast.teacher_outputs(outputs, source, tmp_path / "c")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c").iterdir()}
    kdfast.teacher_outputs(outputs.astype(np.float64), source, tmp_path / "c")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c").iterdir()} == before
    for change in ({"temperature": 2.0}, {"dtype": "float32"}, {"features": outputs}):
        with pytest.raises(CacheMismatch, match="another plan"):
            kdfast.teacher_outputs(outputs, source, tmp_path / "c", **change)


def test_an_interrupted_import_starts_again(tmp_path, source, outputs, monkeypatch):
    from kdfast.teacher.writing import outputs as module

    with monkeypatch.context() as context:
        context.setattr(module, "seal_cache", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            kdfast.teacher_outputs(outputs, source, tmp_path / "c")
    with pytest.raises(CacheMismatch, match="not a finished cache"):
        TeacherCache.open(tmp_path / "c")
    kdfast.teacher_outputs(outputs, source, tmp_path / "c")
    kdfast.teacher_outputs(outputs, source, tmp_path / "d")
    for path in (tmp_path / "d").iterdir():
        if path.name != "timing.json":
            assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes()


def spoil(z, value, row=17):
    bad = z.copy()
    bad[row, 1] = value
    return bad


@pytest.mark.parametrize(
    ("change", "options", "kind", "match"),
    [
        (lambda z: z[:-1], {}, CacheMismatch, r"shape \(\d+, 4\); .*training samples and 4 classes"),
        (lambda z: np.c_[z, z], {}, CacheMismatch, r"shape \(\d+, 8\)"),
        (lambda z: z.T, {}, CacheMismatch, "training samples and 4 classes"),
        (lambda z: z[0], {}, DataError, r"shape \(4,\)"),
        (lambda z: np.repeat(z[:, None], 99, 1), {}, DataError, "has 99 views of each sample, and this data has 9"),
        (lambda z: spoil(z, np.nan), {}, DataError, "not finite, first at row 17"),
        (lambda z: spoil(z, -np.inf), {}, DataError, "not finite, first at row 17"),
        (lambda z: np.stack([z, spoil(z, np.inf)], 1), {}, DataError, "first at row 17, view 1"),
        (lambda z: z.astype(np.int64), {}, DataError, "holds int64: write floating-point numbers"),
        (lambda z: z * 1e5, {}, DataError, r"the logits of row \d+ reach .*pass `dtype` float32"),
        (softmax, {}, DataError, "either probabilities, or logits by chance"),
        (lambda z: z, {"kind": "probabilities"}, DataError, "holds negative values, so no probabilities"),
        (lambda z: np.abs(z), {"kind": "probabilities"}, DataError, "row 0 sum to .*, not to 1"),
        (lambda z: -np.abs(z), {"kind": "log-probabilities"}, DataError, "not to 1: pass another `kind`"),
        (lambda z: spoil(softmax(z), np.nan), {"kind": "probabilities"}, DataError, "first at row 17"),
        (lambda z: z, {"kind": "odds"}, UsageError, "`kind` is 'odds'"),
        (lambda z: z, {"temperature": 0.0}, UsageError, "`temperature` is 0"),
        (lambda z: z, {"view_seed": -1}, UsageError, "`view_seed` is -1"),
        (lambda z: z, {"dtype": "bfloat16"}, UsageError, "`dtype` is 'bfloat16'"),
        (lambda z: z, {"features": np.zeros((3, 2))}, DataError, r"`features` have shape \(3, 2\)"),
        (lambda z: z, {"features": np.full((120, 2), np.nan)}, DataError, "`features` of row 0 are not finite"),
    ],
)
def test_refuses_what_does_not_fit_and_writes_nothing(tmp_path, source, outputs, change, options, kind, match):
    if "features" in options and len(options["features"]) > 3:
        options = {"features": options["features"][:1].repeat(len(outputs), 0)}
    with pytest.raises(kind, match=match) as caught:
        kdfast.teacher_outputs(change(outputs), source, tmp_path / "c", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "write", "options", "kind", "match"),
    [
        ("z.txt", lambda p, z: p.write_text("1"), {}, UsageError, r"pass a file named \.npy"),
        ("z.npy", lambda p, z: p.write_bytes(b"junk"), {}, DataError, "not a plain .npy"),
        ("z.npy", np.save, {"key": "a"}, UsageError, "holds one array: omit it"),
        ("z.npz", lambda p, z: p.write_bytes(b"junk"), {}, DataError, "is damaged or of another kind"),
        ("z.npz", lambda p, z: np.savez(p, a=z, b=z), {}, UsageError, "holds a, b: choose one with `key`"),
        ("z.npz", lambda p, z: np.savez(p, ab=z, b=z), {"key": "aa"}, UsageError, "no `key` 'aa': did you mean 'ab'"),
        ("z.npz", lambda p, z: np.savez(p, np.asfortranarray(z)), {}, DataError, "is stored by columns"),
        ("z.pt", lambda p, z: p.write_bytes(b"junk"), {}, DataError, "is damaged or of another kind"),
        ("z.pt", lambda p, z: torch.save({"logits": z, "path": Path("x")}, p), {}, DataError, "nothing in it was run"),
        ("z.pt", lambda p, z: torch.save([1], p), {}, UsageError, "holds no array"),
        ("z.safetensors", lambda p, z: p.write_bytes(b"junk"), {}, DataError, "is damaged or of another kind"),
    ],
)
def test_refuses_files_of_other_kinds(tmp_path, source, outputs, name, write, options, kind, match):
    write(tmp_path / name, outputs)
    with pytest.raises(kind, match=match) as caught:
        kdfast.teacher_outputs(tmp_path / name, source, tmp_path / "c", **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="there is no file"):
        kdfast.teacher_outputs(tmp_path / "none.npy", source, tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_shuffled_rows_are_warned_of(tmp_path, source, outputs):
    with pytest.warns(DataWarning, match="no more than chance"):
        kdfast.teacher_outputs(np.roll(outputs, 1, 0), source, tmp_path / "c")


def test_an_imported_cache_has_no_teacher(tmp_path, source, teacher, outputs):
    cache = kdfast.teacher_outputs(outputs, source, tmp_path / "c")
    for action in (
        lambda: TeacherCache.open(cache.path, teacher=teacher),
        lambda: verify_cache(cache, source, teacher),
    ):
        with pytest.raises(CacheMismatch, match="imported logits, whose teacher is not known"):
            action()
    with pytest.raises(CacheMismatch, match="without features"):
        cache.features()


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_memory_does_not_grow_with_the_file(tmp_path, new_source, suffix):
    from kdfast.teacher.writing.rows import blocks, open_rows

    rows = np.zeros((200_000, 20), np.float32)
    (np.save if suffix == "npy" else np.savez)(tmp_path / f"z.{suffix}", rows)
    del rows
    opened = open_rows(tmp_path / f"z.{suffix}", what="logits")
    tracemalloc.start()
    total = sum(len(block) for _, block in blocks(opened))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 200_000
    assert peak < 10 << 20  # of 16 MB
