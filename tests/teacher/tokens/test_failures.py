"""Requests that failed: what the server said is named, and with `skip_failed` the other texts keep their numbers."""

import json

import numpy as np
import pytest

import kdfast
from kdfast.errors import CacheMismatch, DataError

LONG = "This model's maximum context length is 128 tokens.\nHowever, you requested 200"


def good(number):
    """A line of a batch: a text of one token."""
    entry = {"token": "token_id:3", "logprob": -0.5, "top_logprobs": [{"token": "token_id:3", "logprob": -0.5}]}
    body = {"choices": [{"index": 0, "finish_reason": "stop", "logprobs": {"content": [entry]}}]}
    response = {"status_code": 200, "request_id": "x", "body": body}
    return {"id": "b", "custom_id": f"request-{number}", "response": response, "error": None}


def batch(response, error=None):
    return {"id": "b", "custom_id": "request-1", "response": response, "error": error}


# Kind: a record of a failed request, and what the message says of it.
FAILED = {
    "expired batch of OpenAI": (
        batch(None, {"code": "batch_expired", "message": "Not executed in time."}),
        "the request 'request-1' failed (batch_expired: Not executed in time.)",
    ),
    "refused request of OpenAI": (
        batch({"status_code": 400, "body": {"error": {"message": LONG, "code": "context_length_exceeded"}}}),
        "the request 'request-1' failed (status 400: context_length_exceeded: This model's maximum context length is "
        "128 tokens. However, you requested 200)",
    ),
    "no answer": (batch({"status_code": 0, "request_id": "", "body": {}}), "'request-1' failed (status 0)"),
    "no response": (batch(None), "'request-1' failed (there is no response)"),
    "batch of vLLM": (
        batch({"status_code": 404, "body": None}, {"error": {"message": "No `x`.", "type": "NotFoundError"}}),
        "'request-1' failed (status 404: NotFoundError: No 'x'.)",
    ),
    "earlier batch of vLLM": (
        batch({"status_code": 400}, {"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}),
        "'request-1' failed (status 400: BadRequestError: too long)",
    ),
    "answer of vLLM": (
        {"object": "error", "message": "too long", "type": "BadRequestError", "param": None, "code": 400},
        "its request failed (BadRequestError: too long)",
    ),
    "answer of SGLang": ({"error": {"message": "too long"}}, "its request failed (too long)"),
    "SGLang stopped it": (
        {"text": "", "meta_info": {"finish_reason": {"type": "abort", "message": "too long", "status_code": 400}}},
        "its request failed (finish reason abort: too long)",
    ),
    "vLLM stopped it": (
        {"choices": [{"text": "", "logprobs": None, "finish_reason": "abort"}]},
        "its request failed (finish reason abort)",
    ),
    "no choices": ({"choices": [], "error": "overloaded"}, "its request failed (overloaded)"),
    "row of a table": ({"values": None, "ids": None, "error": "timeout"}, "its request failed (timeout)"),
    "object without a message": ({"error": {"reason": 7}}, 'its request failed ({"reason": 7})'),
}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("kind", FAILED)
def test_failed_requests_are_named_and_may_be_skipped(tmp_path, kind):
    record, message = FAILED[kind]
    log = write_lines(tmp_path / "log.jsonl", [good(0), record, good(2)])
    with pytest.raises(DataError) as raised:
        kdfast.token_outputs(log, tmp_path / "t", 50)
    advice = "request the text again, or pass `skip_failed` to keep its number without tokens"
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"{log}, line 2: ")
    assert str(raised.value).endswith(f": {advice}")
    cache = kdfast.token_outputs(log, tmp_path / "t", 50, skip_failed=True)
    assert (len(cache), cache.tokens) == (3, 2)
    assert cache.failed.tolist() == [1]
    assert cache.lookup([2, 0]).labels.tolist() == [[3], [3]]
    with pytest.raises(
        CacheMismatch, match=r"has no tokens of 1 of the texts \(for example 1\), whose requests failed"
    ):
        cache.lookup([0, 1])


def test_long_messages_are_cut(tmp_path):
    with pytest.raises(DataError) as raised:
        kdfast.token_outputs([{"error": "x" * 5000}], tmp_path / "t", 50)
    assert len(str(raised.value)) < 400


def test_numbers_of_failed_requests_are_those_of_their_field(tmp_path):
    log = write_lines(tmp_path / "log.jsonl", [good(7), FAILED["no answer"][0], good(4)])
    cache = kdfast.token_outputs(log, tmp_path / "t", 50, names={"sequence": "custom_id"}, skip_failed=True)
    assert cache.numbers.tolist() == [7, 1, 4]
    assert cache.failed.tolist() == [1]
    write_lines(log, [good(1), FAILED["no answer"][0]])
    with pytest.raises(DataError, match="line 2: the number of the text is 1, which another text has"):
        kdfast.token_outputs(log, tmp_path / "u", 50, names={"sequence": "custom_id"}, skip_failed=True)


@pytest.mark.parametrize(
    "record",
    [
        {"values": [[-0.5]], "ids": [[3]], "labels": [3], "error": "a column of the user", "response": None},
        {"values": [[-0.5]], "ids": [[3]], "labels": [3], "status_code": 500},
        good(0) | {"error": ""},
        good(0) | {"error": {}},
        {"prompt_logprobs": [{"3": -0.5}], "prompt_token_ids": [3], "response": None, "finish_reason": "abort"},
    ],
)
def test_records_with_log_probabilities_have_not_failed(tmp_path, record):
    cache = kdfast.token_outputs([record], tmp_path / "t", 50, skip_failed=True)
    assert cache.failed.tolist() == []
    assert cache.lookup([0]).labels.tolist() == [[3]]


def test_records_that_are_wrong_are_not_skipped(tmp_path):
    for record, message in (
        ({"error": None}, "no log-probabilities of known form"),
        (good(0) | {"response": {"status_code": 200, "body": {}}}, "no log-probabilities of known form"),
        ({"values": [[1.5]], "ids": [[3]]}, "the log-probability 1.5"),
    ):
        with pytest.raises(DataError, match=f"record 1: .*{message}"):
            kdfast.token_outputs([good(0), record], tmp_path / "t", 50, skip_failed=True)


def test_if_all_requests_failed_there_is_no_cache(tmp_path):
    log = write_lines(tmp_path / "log.jsonl", [FAILED["no answer"][0]])
    with pytest.raises(DataError, match="there are no texts"):
        kdfast.token_outputs(log, tmp_path / "t", 50, skip_failed=True)
    whole = kdfast.token_outputs([good(0)], tmp_path / "u", 50)
    with pytest.raises(DataError, match="there are no texts"):
        kdfast.token_outputs(log, tmp_path / "u", 50, skip_failed=True, force=True)
    assert kdfast.TokenTeacher.open(tmp_path / "u").manifest == whole.manifest


def test_shards_of_failed_requests_resume(tmp_path, monkeypatch):
    from kdfast.teacher.tokens import write

    monkeypatch.setattr(write, "_SHARD_BYTES", 1)
    failed = FAILED["no answer"][0]
    log = write_lines(tmp_path / "log.jsonl", [failed, good(1), failed, failed, good(4), failed])
    whole = kdfast.token_outputs(log, tmp_path / "whole", 50, skip_failed=True)
    calls = []

    def stop(done, total, note):
        calls.append(done)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kdfast.token_outputs(log, tmp_path / "t", 50, skip_failed=True, progress=stop)
    with pytest.raises(CacheMismatch, match="skip_failed is true, expected false"):
        kdfast.token_outputs(log, tmp_path / "t", 50)
    cache = kdfast.token_outputs(log, tmp_path / "t", 50, skip_failed=True, progress=stop)
    assert len(calls) == 6
    assert cache.manifest == whole.manifest
    assert cache.failed.tolist() == [0, 2, 3, 5]
    assert cache.lookup([4, 1]).labels.tolist() == [[3], [3]]
    with pytest.raises(CacheMismatch, match="skip_failed is true, expected false"):
        kdfast.token_outputs(log, tmp_path / "t", 50)


def test_scores_of_texts_without_tokens_are_nan(tmp_path):
    failed = FAILED["no answer"][0]
    records = [failed, good(1), failed, {"values": [[-0.5], [-1.5]], "ids": [[3], [4]], "labels": [3, 4]}, failed]
    cache = kdfast.token_outputs(records, tmp_path / "t", 50, top_k=0, skip_failed=True)
    scores = kdfast.token_scores(cache, "ce").texts()
    np.testing.assert_allclose(scores, [np.nan, 0.5, np.nan, 1.0, np.nan], atol=1e-3)
