"""Writing and looking up log-probabilities, against the full distributions that they were taken from."""

import json
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import kdfast
from kdfast.errors import CacheMismatch, DataError, OutputError, ShapeError, UsageError
from kdfast.teacher.tokens import write

K, VOCABULARY = 8, 50


def write_all(folder, texts, *, numbers=None, shard_bytes=None, monkeypatch=None, **options):
    if shard_bytes is not None:
        monkeypatch.setattr(write, "_SHARD_BYTES", shard_bytes)
    with kdfast.TokenWriter(folder, VOCABULARY, **options) as writer:
        for i, text in enumerate(texts):
            values, ids = text.logp.topk(K)
            number = None if numbers is None else numbers[i]
            writer.add(values, ids, labels=text.tokens, sequence=number)
    return kdfast.TokenTeacher.open(folder)


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


@pytest.mark.parametrize("shard_bytes", [1, 3000, None])
def test_lookup_returns_the_stored_rows_of_each_text(texts, tmp_path, monkeypatch, shard_bytes):
    teacher = write_all(tmp_path / "t", texts, shard_bytes=shard_bytes, monkeypatch=monkeypatch)
    if shard_bytes == 1:
        assert len(teacher.manifest["shards"]) == len(texts)
    assert len(teacher) == len(texts)
    assert teacher.lengths.tolist() == [len(text.tokens) for text in texts]
    batch = teacher.lookup([4, 0, 4])
    assert batch.rows.shape == (3, max(len(texts[4].tokens), len(texts[0].tokens)))
    for b, number in enumerate([4, 0, 4]):
        text = texts[number]
        length = len(text.tokens)
        assert batch.labels[b].tolist() == text.tokens + [-100] * (batch.labels.shape[1] - length)
        assert batch.mask[b].tolist() == [True] * length + [False] * (batch.labels.shape[1] - length)
        values, ids = text.logp.topk(K)
        rows = batch.rows[b, :length]
        torch.testing.assert_close(batch.teacher.values[rows].double(), values, rtol=1e-3, atol=1e-3)  # float16
        assert torch.equal(batch.teacher.classes[rows].long(), ids)
        rest = text.logp.scatter(1, ids, -torch.inf).logsumexp(1)
        torch.testing.assert_close(batch.teacher.tail[rows].double(), rest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_of_a_batch_is_that_of_its_tokens_one_by_one(texts, tmp_path, temperature):
    teacher = write_all(tmp_path / "t", texts)
    batch = teacher.lookup([1, 3], temperature)
    logits = torch.randn(*batch.rows.shape, VOCABULARY, requires_grad=True)
    loss = kdfast.kd_loss(
        logits.flatten(0, 1), batch.labels.flatten(), batch.teacher, batch.rows.flatten(), alpha=0.7,
        temperature=temperature, reduction="sum",
    )  # fmt: skip
    loss.backward()
    assert (logits.grad[~batch.mask] == 0).all()
    total = 0.0
    for b, number in enumerate([1, 3]):
        text = texts[number]
        for i, token in enumerate(text.tokens):
            z = logits[b, i].detach().double()
            top = text.logp[i].topk(K)
            given = kdfast.TopKTeacher.from_logprobs(
                top.values[None], top.indices[None], temperature, classes=VOCABULARY
            )
            q = torch.cat([given.values[0].double() / temperature, given.tail.double()]).softmax(0)
            p = (z / temperature).softmax(0)[top.indices]
            p = torch.cat([p, 1 - p.sum(0, keepdim=True)])
            kl = (q * (q.log() - p.log())).sum()
            total += 0.3 * float(-z.log_softmax(0)[token]) + 0.7 * temperature**2 * float(kl)
    assert float(loss.detach()) == pytest.approx(total, rel=2e-4)


def test_texts_are_found_by_their_numbers(texts, tmp_path, monkeypatch):
    numbers = [40, 7, 12, 3, 99, 0, 8]
    teacher = write_all(tmp_path / "t", texts, numbers=numbers, shard_bytes=3000, monkeypatch=monkeypatch)
    for number, text in zip(numbers, texts, strict=True):
        assert teacher.lookup([number]).labels[0].tolist() == text.tokens
    with pytest.raises(CacheMismatch, match=r"lacks 2 of the texts \(for example 1\)"):
        teacher.lookup([1, 2, 3])
    with pytest.raises(ShapeError, match="`numbers` are float64"):
        teacher.lookup([0.5])


def test_row_of_another_temperature_is_that_of_from_logprobs(texts, tmp_path):
    teacher = write_all(tmp_path / "t", texts)
    for tail in (True, False):
        found = teacher.lookup([2], 2.5, tail=tail).teacher
        stored = teacher.lookup([2]).teacher
        expected = kdfast.TopKTeacher.from_logprobs(stored.values, stored.classes, 2.5, classes=VOCABULARY, tail=tail)
        torch.testing.assert_close(found.tail, expected.tail, rtol=1e-3, atol=2e-3)  # values are rounded to float16


def test_logprobs_at_a_temperature_are_exact_there(texts, tmp_path):
    logits = [3 * text.logp for text in texts]
    with kdfast.TokenWriter(tmp_path / "t", VOCABULARY, temperature=2.0) as writer:
        for z in logits:
            writer.add(*(z / 2).log_softmax(1).topk(K))
    batch = kdfast.TokenTeacher.open(tmp_path / "t").lookup([5])
    student = torch.randn(len(logits[5]), VOCABULARY)
    loss = kdfast.kd_loss(student, None, batch.teacher, alpha=1.0, temperature=2.0)
    expected = kdfast.kd_loss(student, None, kdfast.topk_teacher(logits[5], K, 2.0), alpha=1.0, temperature=2.0)
    assert float(loss) == pytest.approx(float(expected), rel=2e-3)
    assert (kdfast.TokenTeacher.open(tmp_path / "t").lookup([5]).labels == -100).all()


def test_ragged_texts_and_tokens_without_entries(texts, tmp_path):
    text = texts[0]
    counts = [0, 3, 1, *[2] * (len(text.tokens) - 3)][: len(text.tokens)]
    rows = [text.logp[i].topk(n) for i, n in enumerate(counts)]
    with kdfast.TokenWriter(tmp_path / "t", VOCABULARY) as writer:
        writer.add(
            np.concatenate([row.values for row in rows]), np.concatenate([row.indices for row in rows]),
            offsets=np.cumsum([0, *counts]), labels=text.tokens,
        )  # fmt: skip
    batch = kdfast.TokenTeacher.open(tmp_path / "t").lookup([0])
    assert batch.labels[0, 0] == -100
    assert not batch.mask[0, 0]
    assert torch.isneginf(batch.teacher.values).logical_not().sum(1).tolist() == counts
    loss = kdfast.kd_loss(torch.randn(len(counts), VOCABULARY), None, batch.teacher, alpha=1.0, reduction="none")
    assert loss[0] == 0
    assert (loss[1:] > 0).all()


def test_ids_take_two_bytes_where_the_vocabulary_allows(tmp_path):
    for vocabulary, size in ((65536, 2), (65537, 4)):
        with kdfast.TokenWriter(tmp_path / str(vocabulary), vocabulary) as writer:
            writer.add(np.array([[-1.0, -2.0]]), np.array([[vocabulary - 1, 0]]))
        assert np.load(tmp_path / str(vocabulary) / "ids-00000.npy").dtype.itemsize == size
        teacher = kdfast.TokenTeacher.open(tmp_path / str(vocabulary)).lookup([0]).teacher
        assert teacher.classes.tolist() == [[vocabulary - 1, 0]]


def test_other_process_reads_the_same(texts, tmp_path):
    teacher = write_all(tmp_path / "t", texts)
    teacher.lookup([0])
    copy = pickle.loads(pickle.dumps(teacher))
    for a, b in zip(copy.lookup([0, 1]).teacher, teacher.lookup([0, 1]).teacher, strict=True):
        assert torch.equal(a, b)


def test_writer_continues_after_an_exception(texts, tmp_path, monkeypatch):
    write_all(tmp_path / "whole", texts, shard_bytes=3000, monkeypatch=monkeypatch)

    def half(writer):
        for i, text in enumerate(texts[writer.done :], writer.done):
            if i == 5 and writer.done == 0:
                raise KeyboardInterrupt
            writer.add(*text.logp.topk(K), labels=text.tokens)

    with pytest.raises(KeyboardInterrupt), kdfast.TokenWriter(tmp_path / "t", VOCABULARY) as writer:
        half(writer)
    with pytest.raises(CacheMismatch, match="not a finished cache"):
        kdfast.TokenTeacher.open(tmp_path / "t")
    with kdfast.TokenWriter(tmp_path / "t", VOCABULARY) as writer:
        assert 0 < writer.done <= 5
        half(writer)
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")
    assert {p.name for p in (tmp_path / "t").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


WRITER = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from conftest import VOCABULARY, make_texts
import kdfast
from kdfast.teacher.tokens import write
write._SHARD_BYTES = 4000
texts = make_texts(60)
print("ready", flush=True)
with kdfast.TokenWriter(sys.argv[2], VOCABULARY) as writer:
    for text in texts[writer.done:]:
        writer.add(*text.logp.topk(8), labels=text.tokens)
        time.sleep(0.003)
"""


@pytest.mark.slow
def test_killed_writer_resumes_to_the_same_bytes(many_texts, tmp_path, monkeypatch):
    write_all(tmp_path / "whole", many_texts, shard_bytes=4000, monkeypatch=monkeypatch)
    draw, folder, unfinished = random.Random(1), tmp_path / "killed", 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0.02, 0.25))
        process.kill()
        process.wait()
        process.stdout.close()
        unfinished += not (folder / "manifest.json").exists()
    assert unfinished
    with kdfast.TokenWriter(folder, VOCABULARY) as writer:
        for text in many_texts[writer.done :]:
            writer.add(*text.logp.topk(K), labels=text.tokens)
    assert contents(folder) == contents(tmp_path / "whole")


def test_changed_files_are_found(texts, tmp_path):
    write_all(tmp_path / "t", texts)
    for file in sorted((tmp_path / "t").iterdir()):
        if not file.is_file() or file.name.startswith("."):
            continue
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(CacheMismatch):
            kdfast.TokenTeacher.open(tmp_path / "t")
        file.write_bytes(before)
    kdfast.TokenTeacher.open(tmp_path / "t")
    (tmp_path / "t" / "tail-00000.npy").unlink()
    with pytest.raises(CacheMismatch, match=r"tail-00000\.npy cannot be read"):
        kdfast.TokenTeacher.open(tmp_path / "t")
    with pytest.raises(CacheMismatch, match=r"tail-00000\.npy"):
        kdfast.TokenTeacher.open(tmp_path / "t", check_files=False).lookup([0])


def test_other_settings_and_other_folders_are_refused(texts, tmp_path):
    write_all(tmp_path / "t", texts)
    with pytest.raises(CacheMismatch, match="vocabulary is 50, expected 60"):
        kdfast.TokenWriter(tmp_path / "t", 60)
    with kdfast.TokenWriter(tmp_path / "t", VOCABULARY) as writer:
        assert writer.is_finished
        with pytest.raises(UsageError, match="is finished"):
            writer.add(*texts[0].logp.topk(K))
    with kdfast.TokenWriter(tmp_path / "t", 60, force=True) as writer:
        writer.add(*texts[0].logp.topk(K))
    assert len(kdfast.TokenTeacher.open(tmp_path / "t")) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not part of a cache of log-probabilities"):
        kdfast.TokenWriter(tmp_path / "other", 60, force=True)
    with pytest.raises(UsageError, match="`vocabulary` is 1"):
        kdfast.TokenWriter(tmp_path / "n", 1)
    assert not (tmp_path / "n").exists()
    with pytest.raises(OutputError, match="in use by"), kdfast.TokenWriter(tmp_path / "u", 60):
        kdfast.TokenWriter(tmp_path / "u", 60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": [[-1.0, 0.5]]}, "position 0 has the log-probability 0.5: they are at most 0"),
        ({"values": [[-1.0, np.nan]]}, "position 0 has the log-probability nan"),
        ({"values": [[-0.1, -0.2]]}, r"position 0: the probabilities sum to 1\.724"),
        ({"ids": [[1, 50]]}, r"position 0 has the class 50: must be in \[0, 50\)"),
        ({"ids": [[1, 2, 3]]}, r"shapes \(1, 2\) and \(1, 3\)"),
        ({"labels": [1, 2]}, r"the tokens are int64 of shape \(2,\): must be integers \(1,\)"),
        ({"labels": [77]}, "position 0 has the token 77"),
        ({"sequence": -4}, "the number of the text is -4"),
    ],
)
def test_wrong_texts_are_refused(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message), kdfast.TokenWriter(tmp_path / "t", VOCABULARY) as writer:
        writer.add(**{"values": [[-1.0, -2.0]], "ids": [[1, 2]], **arguments})


def test_numbers_are_given_to_all_texts_once(tmp_path):
    with kdfast.TokenWriter(tmp_path / "t", VOCABULARY) as writer:
        writer.add([[-1.0]], [[1]], sequence=3)
        with pytest.raises(DataError, match="is 3, which another text has"):
            writer.add([[-1.0]], [[1]], sequence=3)
        with pytest.raises(DataError, match="others have none"):
            writer.add([[-1.0]], [[1]])
    with pytest.raises(DataError, match="there are no texts"), kdfast.TokenWriter(tmp_path / "e", VOCABULARY):
        pass


def test_manifest_names_format_and_settings(texts, tmp_path):
    write_all(tmp_path / "t", texts, options={"model": "m"})
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert (manifest["format"], manifest["vocabulary"], manifest["options"]) == ("kdfast-tokens", 50, {"model": "m"})
