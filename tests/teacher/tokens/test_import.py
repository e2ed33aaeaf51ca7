"""Log-probabilities in the forms in which people have them, each written here from full distributions."""

import copy
import gzip
import json
import random

import numpy as np
import pytest
import torch

import kdfast
from kdfast.errors import CacheMismatch, DataError, UsageError
from kdfast.teacher.tokens.records import RecordReader
from kdfast.teacher.tokens.sequence import check_rows

K, VOCABULARY = 5, 50


def add_drawn(pairs, text, i):
    """The entries of a server: the token of the text, then the k most probable ones, as an object by class."""
    token = text.tokens[i]
    ranks = {c: r for r, (c, _) in enumerate(pairs, 1)}
    own = int((text.logp[i] > text.logp[i, token]).sum()) + 1
    entries = {str(token): {"logprob": float(text.logp[i, token]), "rank": own, "decoded_token": "x"}}
    return entries | {str(c): {"logprob": v, "rank": ranks[c], "decoded_token": "y"} for c, v in pairs}


def vllm_prompt(text):
    positions = [None, *[add_drawn(text.top(K)[i], text, i) for i in range(1, len(text.tokens))]]
    return {"prompt_token_ids": text.tokens, "prompt_logprobs": positions}


def vllm_served_prompt(text):
    body = vllm_prompt(text)
    return {"choices": [{"index": 0, "text": "x", "logprobs": None, **body}], "model": "m", "id": "cmpl-1"}


def vllm_output(text):
    positions = [add_drawn(pairs, text, i) for i, pairs in enumerate(text.top(K))]
    return {"outputs": [{"token_ids": text.tokens, "logprobs": positions}]}


def openai_chat(text, name="token_id:{}".format):
    content = [
        {
            "token": name(token),
            "logprob": float(text.logp[i, token]),
            "bytes": None,
            "top_logprobs": [{"token": name(c), "logprob": v, "bytes": None} for c, v in text.top(K)[i]],
        }
        for i, token in enumerate(text.tokens)
    ]
    return {"id": "chatcmpl-1", "choices": [{"index": 0, "message": {}, "logprobs": {"content": content}}]}


def openai_batch(text):
    return {"custom_id": "17", "response": {"status_code": 200, "body": openai_chat(text)}}


def openai_completion(text):
    return {
        "choices": [
            {
                "logprobs": {
                    "tokens": [f"token_id:{token}" for token in text.tokens],
                    "token_logprobs": [float(text.logp[i, token]) for i, token in enumerate(text.tokens)],
                    "top_logprobs": [{f"token_id:{c}": v for c, v in pairs} for pairs in text.top(K)],
                }
            }
        ]
    }


def sglang(text):
    return {
        "text": "x",
        "meta_info": {
            "input_token_logprobs": [[None, text.tokens[0], None]]
            + [[float(text.logp[i, token]), token, None] for i, token in enumerate(text.tokens) if i],
            "input_top_logprobs": [None, *[[[v, c, None] for c, v in pairs] for pairs in text.top(K)[1:]]],
        },
    }


def plain(text):
    pairs = text.top(K)
    return {
        "values": [[v for _, v in row] for row in pairs],
        "ids": [[c for c, _ in row] for row in pairs],
        "labels": text.tokens,
    }


# Kind: function, first token with a prediction, whether the token of the text is among the entries.
KINDS = {
    "vllm_prompt": (vllm_prompt, 1, True),
    "vllm_served_prompt": (vllm_served_prompt, 1, True),
    "vllm_output": (vllm_output, 0, True),
    "openai_chat": (openai_chat, 0, True),
    "openai_batch": (openai_batch, 0, True),
    "openai_completion": (openai_completion, 0, True),
    "sglang": (sglang, 1, True),
    "plain": (plain, 0, False),
}


def check(teacher, texts, first, has_own, numbers=None):
    """Compare every row with the distribution that it was taken from."""
    assert len(teacher) == len(texts)
    for number, text in zip(numbers or range(len(texts)), texts, strict=True):
        batch = teacher.lookup([number])
        assert batch.mask[0].tolist() == [i >= first for i in range(len(text.tokens))]
        assert batch.labels[0, first:].tolist() == text.tokens[first:]
        for i in range(first, len(text.tokens)):
            row = batch.rows[0, i]
            kept = ~torch.isneginf(batch.teacher.values[row])
            ids = batch.teacher.classes[row][kept].tolist()
            expected = {c for c, _ in text.top(K)[i]} | ({text.tokens[i]} if has_own else set())
            assert len(ids) == len(expected)
            assert set(ids) == expected
            torch.testing.assert_close(
                batch.teacher.values[row][kept].double(), text.logp[i, ids], rtol=1e-3, atol=1e-3
            )
            rest = 1 - text.logp[i, ids].exp().sum()
            torch.testing.assert_close(batch.teacher.tail[row].exp().double(), rest, rtol=1e-4, atol=1e-6)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_reads_logs(texts, tmp_path, kind):
    make, first, has_own = KINDS[kind]
    log = write_lines(tmp_path / "log.jsonl", map(make, texts))
    teacher = kdfast.token_outputs(log, tmp_path / "t", VOCABULARY)
    check(teacher, texts, first, has_own)
    # The tail at another temperature relies on which entries are the most probable ones.
    for number, text in enumerate(texts):
        batch = teacher.lookup([number], 2.0)
        true = (text.logp / 2).clone()
        for i in range(first, len(text.tokens)):
            row = batch.rows[0, i]
            kept = batch.teacher.classes[row][~torch.isneginf(batch.teacher.values[row])].long()
            rest = true[i].index_fill(0, kept, -torch.inf).logsumexp(0)
            assert float(batch.teacher.tail[row]) == pytest.approx(float(rest), abs=0.5)


def test_reads_tokens_by_their_texts(texts, tmp_path):
    log = write_lines(tmp_path / "log.jsonl", [openai_chat(text, "w{}".format) for text in texts])
    with pytest.raises(DataError, match=r"log.jsonl, line 1: the token 'w\d+' is given by its text: ask the server"):
        kdfast.token_outputs(log, tmp_path / "t", VOCABULARY)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    check(kdfast.token_outputs(log, tmp_path / "t", VOCABULARY, tokens=words), texts, 0, True)
    del words["w7"]
    with pytest.raises(DataError, match="the token 'w7' is not among `tokens`"):
        kdfast.token_outputs(log, tmp_path / "u", VOCABULARY, tokens=words)


def test_reads_several_files_folders_and_compressed_ones(texts, tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    write_lines(folder / "a.jsonl", map(plain, texts[:3]))
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(plain(t)) + "\n\n" for t in texts[3:]).encode())
    )
    (folder / "notes.txt").write_text("not a log")
    check(kdfast.token_outputs(folder, tmp_path / "t", VOCABULARY), texts, 0, False)
    files = [folder / "a.jsonl", str(folder / "b.jsonl.gz")]
    check(kdfast.token_outputs(files, tmp_path / "u", VOCABULARY), texts, 0, False)


def test_responses_in_any_order_are_numbered_by_a_field(texts, tmp_path):
    records = [openai_batch(text) | {"custom_id": str(10 * i)} for i, text in enumerate(texts)]
    log = write_lines(tmp_path / "log.jsonl", records[::-1])
    teacher = kdfast.token_outputs(log, tmp_path / "t", VOCABULARY, names={"sequence": "custom_id"})
    check(teacher, texts, 0, True, numbers=[10 * i for i in range(len(texts))])
    write_lines(log, [records[0], records[0]])
    with pytest.raises(DataError, match="line 2: the number of the text is 0, which another text has"):
        kdfast.token_outputs(log, tmp_path / "u", VOCABULARY, names={"sequence": "custom_id"})


def array_layouts(texts):
    """Arrays of the same texts in each layout, with its names."""
    longest = max(len(text.tokens) for text in texts)
    values, ids = np.full((len(texts), longest, K), -np.inf), np.zeros((len(texts), longest, K), np.int32)
    labels = np.full((len(texts), longest), -100)
    for s, text in enumerate(texts):
        top, length = text.logp.topk(K), len(text.tokens)
        values[s, :length], ids[s, :length], labels[s, :length] = top.values, top.indices, text.tokens
    lengths = np.array([len(text.tokens) for text in texts])
    inside = np.arange(longest) < lengths[:, None]
    flat = {"values": values[inside], "ids": ids[inside], "labels": labels[inside], "lengths": lengths}
    offsets = np.arange(len(flat["values"]) + 1) * K
    ragged = {**flat, "values": flat["values"].ravel(), "ids": flat["ids"].ravel(), "offsets": offsets}
    return {
        "padded": {"values": values, "ids": ids, "labels": labels, "lengths": lengths},
        "flat": flat,
        "ragged": ragged,
    }


@pytest.mark.parametrize("layout", ["padded", "flat", "ragged"])
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_reads_arrays(texts, tmp_path, layout, suffix):
    arrays = array_layouts(texts)[layout]
    file = tmp_path / f"arrays.{suffix}"
    if suffix == "npz":
        np.savez(file, **arrays)
    else:
        from safetensors.torch import save_file

        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        save_file({**tensors, "values": tensors["values"].float()}, file)
    check(kdfast.token_outputs(file, tmp_path / "t", VOCABULARY), texts, 0, False)


def test_reads_arrays_of_other_names(texts, tmp_path):
    arrays = array_layouts(texts)["flat"]
    names = {"values": "logprobs", "ids": "indices", "labels": "input_ids", "lengths": "n"}
    np.savez(tmp_path / "a.npz", **{names[name]: array for name, array in arrays.items()})
    check(kdfast.token_outputs(tmp_path / "a.npz", tmp_path / "t", VOCABULARY, names=names), texts, 0, False)
    with pytest.raises(DataError, match=r"a.npz lacks values, ids; it holds indices, input_ids, logprobs, n"):
        kdfast.token_outputs(tmp_path / "a.npz", tmp_path / "u", VOCABULARY)
    with pytest.raises(UsageError, match="`names` has 'logits'"):
        kdfast.token_outputs(tmp_path / "a.npz", tmp_path / "u", VOCABULARY, names={"logits": "x"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": np.array([3])}, "lengths sum to 3"),
        ({"lengths": np.array([0.5])}, "lengths are float64"),
        ({"ids": np.zeros((2, K), np.int64)}, "must be the same"),
        ({"values": np.zeros(4), "ids": np.zeros(4, np.int64), "lengths": np.array([4])}, "or .E,. with offsets"),
        ({"ids": np.zeros((1, 2, 3, 4), np.int64), "values": np.zeros((1, 2, 3, 4))}, "must be .S, L, k."),
    ],
)
def test_refuses_arrays_of_other_layouts(texts, tmp_path, change, message):
    np.savez(tmp_path / "a.npz", **{**array_layouts(texts)["flat"], **change})
    with pytest.raises(DataError, match=message):
        kdfast.token_outputs(tmp_path / "a.npz", tmp_path / "t", VOCABULARY)


def test_reads_records_in_memory_and_tables(texts, tmp_path):
    records = [plain(text) for text in texts]
    check(kdfast.token_outputs(records, tmp_path / "t", VOCABULARY), texts, 0, False)
    with pytest.raises(CacheMismatch, match="records in memory cannot be compared with it"):
        kdfast.token_outputs(records, tmp_path / "t", VOCABULARY)
    arrays = [
        {name: [np.array(row) if isinstance(row, list) else row for row in r[name]] for name in r} for r in records
    ]
    check(kdfast.token_outputs(iter(arrays), tmp_path / "t", VOCABULARY, force=True), texts, 0, False)
    tensors = [
        {**{name: torch.tensor(r[name]) for name in r}, "sequence": torch.tensor(i)} for i, r in enumerate(records)
    ]
    check(kdfast.token_outputs(tensors, tmp_path / "t", VOCABULARY, force=True), texts, 0, False)


def test_reads_tables_of_parquet(texts, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([plain(text) for text in texts])
    pq.write_table(table, tmp_path / "a.parquet")
    check(kdfast.token_outputs(tmp_path / "a.parquet", tmp_path / "t", VOCABULARY), texts, 0, False)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    check(kdfast.token_outputs(tmp_path / "a.arrow", tmp_path / "u", VOCABULARY), texts, 0, False)


def test_reads_data_sets_of_hugging_face(texts, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([plain(text) for text in texts])
    check(kdfast.token_outputs(data, tmp_path / "t", VOCABULARY), texts, 0, False)
    data.save_to_disk(tmp_path / "saved")
    check(kdfast.token_outputs(tmp_path / "saved", tmp_path / "u", VOCABULARY), texts, 0, False)


def test_tables_without_pyarrow_name_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(kdfast.errors.BackendUnavailable, match="needs pyarrow: run pip install pyarrow"):
        kdfast.token_outputs(tmp_path / "a.parquet", tmp_path / "t", VOCABULARY)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: it is not valid JSON"),
        ("[1, 2]", "line 2: it is a list: must be an object"),
        ('{"text": "x"}', "line 2: it has no log-probabilities of known form, only text"),
        ('{"values": [[-1.0]]}', "line 2: it has values, but no ids"),
        ('{"values": [[-1.0]], "ids": [[1, 2]]}', "line 2: values and ids have different numbers of entries"),
        ('{"values": [[-1.0]], "ids": [[1.5]]}', "line 2: log-probabilities, classes and offsets are float64, float64"),
        ('{"values": [[-1.0]], "ids": [[99]]}', "line 2: position 0 has the class 99"),
        ('{"values": [["a"]], "ids": [[1]]}', "line 2: its log-probabilities are not in the form of their kind"),
        ('{"choices": [{}, {}]}', "line 2: it holds 2 choices: write one text per record"),
        ('{"prompt_logprobs": [null, {"1": {}}]}', "line 2: its log-probabilities are not in the form of their kind"),
        ('{"prompt_logprobs": [null], "prompt_token_ids": [1, 2]}', "prompt_token_ids has 2 tokens, and there are 1"),
        ('{"values": [[-1.0]], "ids": [[1]], "sequence": "a"}', "line 2: sequence is 'a': must be an integer"),
    ],
)
def test_wrong_lines_are_named_and_nothing_is_left(texts, tmp_path, line, message):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps(plain(texts[0])) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        kdfast.token_outputs(log, tmp_path / "t", VOCABULARY)
    assert not [name for name in (tmp_path / "t").iterdir() if not name.name.startswith(".")]
    log.write_text(json.dumps(plain(texts[0])) + "\n")
    assert len(kdfast.token_outputs(log, tmp_path / "t", VOCABULARY)) == 1


ODD = [None, True, -1, 1.5, "x", "", "7", [], {}, [[]], [None], {"a": 1}, 1e308, 10**30, float("nan"), 2**63, [1, 2, 3]]


def change_anything(draw, value):
    """Replace, delete or rename a random part of nested dicts and lists."""
    places = []

    def walk(part):
        for key in list(part) if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], (dict, list)):
                walk(part[key])

    walk(value)
    part, key = draw.choice(places)
    if draw.random() < 0.2:
        del part[key]
    elif draw.random() < 0.1 and isinstance(part, dict):
        part[str(draw.choice(ODD))] = part.pop(key)
    else:
        part[key] = draw.choice(ODD)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_records_are_read_or_refused_in_one_line(texts, kind):
    draw, messages = random.Random(kind), []
    for _ in range(150):
        record = copy.deepcopy(KINDS[kind][0](draw.choice(texts)))
        for _ in range(draw.choice([1, 1, 2, 3])):
            if record:
                change_anything(draw, record)
        try:
            check_rows(RecordReader().read(record), VOCABULARY)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all("\n" not in message and len(message) < 400 for message in messages)


@pytest.mark.parametrize("logprob", ["-Infinity", "-9999.0", "null"])
def test_entries_without_probability_are_left_out(tmp_path, logprob):
    log = tmp_path / "log.jsonl"
    log.write_text(f'{{"values": [[-1.0, {logprob}]], "ids": [[3, 4]]}}\n')
    batch = kdfast.token_outputs(log, tmp_path / "t", VOCABULARY).lookup([0])
    assert batch.teacher.values.shape == (1, 1)


def test_same_call_resumes_and_other_files_are_another_cache(texts, tmp_path, monkeypatch):
    from kdfast.teacher.tokens import write

    monkeypatch.setattr(write, "_SHARD_BYTES", 1)
    log = write_lines(tmp_path / "log.jsonl", map(plain, texts))
    whole = kdfast.token_outputs(log, tmp_path / "whole", VOCABULARY)
    calls = []

    def stop(done, total, note):
        calls.append((done, total))
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kdfast.token_outputs(log, tmp_path / "t", VOCABULARY, progress=stop)
    teacher = kdfast.token_outputs(log, tmp_path / "t", VOCABULARY, progress=stop)
    assert len(calls) == 7
    assert calls == sorted(calls)
    assert calls[-1] == (log.stat().st_size // 1000,) * 2
    assert teacher.manifest == whole.manifest
    kdfast.token_outputs(log, tmp_path / "t", VOCABULARY, progress=stop)
    assert len(calls) == 7
    write_lines(log, [plain(text) for text in texts[:2]])
    with pytest.raises(CacheMismatch, match="a finished cache with another plan"):
        kdfast.token_outputs(log, tmp_path / "t", VOCABULARY)
    assert len(kdfast.token_outputs(log, tmp_path / "t", VOCABULARY, force=True)) == 2


def test_force_keeps_the_old_cache_until_all_texts_are_checked(texts, tmp_path):
    records = [plain(text) | {"sequence": i} for i, text in enumerate(texts)]
    log = write_lines(tmp_path / "log.jsonl", records)
    kdfast.token_outputs(log, tmp_path / "t", VOCABULARY)
    wrong = [
        (write_lines(tmp_path / "a.jsonl", [records[0], {"values": [[1.0]], "ids": [[1]], "sequence": 7}]), "line 2"),
        (write_lines(tmp_path / "b.jsonl", [records[0], records[0]]), "which another text has"),
        ([records[1], {}], "record 1"),
        (write_lines(tmp_path / "c.jsonl", []), "there are no texts"),
    ]
    for source, message in wrong:
        with pytest.raises(DataError, match=message):
            kdfast.token_outputs(source, tmp_path / "t", VOCABULARY, force=True)
        check(kdfast.TokenTeacher.open(tmp_path / "t"), texts, 0, False)
    with pytest.raises(UsageError, match="`temperature` is 0"):
        kdfast.token_outputs(log, tmp_path / "t", VOCABULARY, temperature=0, force=True)
    check(kdfast.TokenTeacher.open(tmp_path / "t"), texts, 0, False)
    check(kdfast.token_outputs(records[::-1], tmp_path / "t", VOCABULARY, force=True), texts, 0, False)
    check(kdfast.token_outputs(iter(records[:2]), tmp_path / "t", VOCABULARY, force=True), texts[:2], 0, False)


def test_top_k_says_which_entries_are_the_most_probable(tmp_path):
    record = {"values": [[-1.0, -2.0, -30.0]], "ids": [[1, 2, 3]]}
    teacher = kdfast.token_outputs([record], tmp_path / "t", VOCABULARY, top_k=2)
    assert torch.isfinite(teacher.lookup([0], 2.0).teacher.tail).all()
    with pytest.raises(DataError, match="record 0: position 0: 47 other classes have the"):
        kdfast.token_outputs([record], tmp_path / "u", VOCABULARY)
    unknown = kdfast.token_outputs([record], tmp_path / "v", VOCABULARY, top_k=0).lookup([0], 2.0)
    rest = 1 - np.exp([-1.0, -2.0, -30.0]).sum()
    assert (
        rest**0.5 < float(unknown.teacher.tail.exp()) < (47 * rest) ** 0.5
    )  # one class has all of it, or all the same
    record = {"prompt_logprobs": [{"1": -1.0, "2": -2.0, "3": -30.0}]}  # without ranks
    served = kdfast.token_outputs([record], tmp_path / "x", VOCABULARY, top_k=2).lookup([0], 2.0)
    assert torch.equal(served.teacher.tail, teacher.lookup([0], 2.0).teacher.tail)
    with pytest.raises(DataError, match="`top_k` is -1"):
        kdfast.token_outputs([record], tmp_path / "w", VOCABULARY, top_k=-1)
