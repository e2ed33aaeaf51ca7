"""Habits of servers: which entries are the top ones, what stands for -inf, and which tokens are those of the text."""

import math

import pytest

from kdfast.errors import DataError
from kdfast.teacher.tokens.records import RecordReader
from kdfast.teacher.tokens.sequence import check_rows

VOCABULARY = 50


def read(record, **options):
    return check_rows(RecordReader(**options).read(record), VOCABULARY)


def entry(token, logprob, top=()):
    return {"token": f"token_id:{token}", "logprob": logprob, "bytes": None, "top_logprobs": list(top)}


def chat(*entries):
    return {"choices": [{"logprobs": {"content": list(entries)}}]}


def completion(token, value, **top):
    body = {"tokens": [f"token_id:{token}"], "token_logprobs": [value]}
    return {"choices": [{"logprobs": {**body, "top_logprobs": [{f"token_id:{c[1:]}": v for c, v in top.items()}]}}]}


def test_drawn_token_that_chats_list_first_is_not_one_of_the_most_probable():
    # vLLM lists the drawn token before the top ones, and cuts the list at k.
    text = read(chat(entry(9, -6.0, [entry(9, -6.0), entry(3, -0.5), entry(4, -1.5)])))
    assert text.ids.tolist() == [3, 4, 9]
    assert text.ranks.tolist() == [2]
    # OpenAI lists the top ones alone.
    text = read(chat(entry(9, -6.0, [entry(3, -0.5), entry(4, -1.5)])))
    assert text.ids.tolist() == [3, 4, 9]
    assert text.ranks.tolist() == [2]
    text = read(chat(entry(3, -0.5, [entry(3, -0.5), entry(4, -1.5)])))
    assert text.ranks.tolist() == [2]


def test_chats_without_top_ones_know_the_drawn_token_alone():
    for record in (chat(entry(9, -6.0)), chat({"token": "token_id:9", "logprob": -6.0})):
        text = read(record)
        assert (text.ids.tolist(), text.ranks.tolist(), text.labels.tolist()) == ([9], [0], [9])
        assert float(text.tail[0]) == pytest.approx(math.log1p(-math.exp(-6)), abs=1e-6)


def test_drawn_token_that_completions_add_is_not_one_of_the_most_probable():
    text = read(completion(9, -6.0, t3=-0.5, t4=-1.5, t9=-6.0))
    assert text.ids.tolist() == [3, 4, 9]
    assert text.ranks.tolist() == [2]
    assert read(completion(3, -0.5, t3=-0.5, t4=-1.5)).ranks.tolist() == [2]


def test_entries_by_class_without_ranks():
    positions = [None, {"9": -6.0, "3": -0.5, "4": -1.5}, {"3": {"logprob": -0.5}, "4": {"logprob": -1.5}}]
    text = read({"prompt_token_ids": [1, 9, 3], "prompt_logprobs": positions})
    assert text.ranks.tolist() == [0, 2, 2]
    with pytest.raises(DataError, match="position 1: 47 other classes have the"):
        read({"prompt_logprobs": positions})  # which token was drawn is not known


def test_tokens_of_the_prompt_are_not_those_of_the_output():
    output = {"prompt_token_ids": [1, 2], "token_ids": [3, 4], "logprobs": [{"3": -0.5}, {"4": -0.7}]}
    assert read(output).labels.tolist() == [3, 4]
    del output["token_ids"]
    assert read(output).labels.tolist() == [-1, -1]
    prompt = {"prompt_token_ids": [1, 2], "token_ids": [3, 4], "prompt_logprobs": [None, {"2": -0.5}]}
    assert read(prompt).labels.tolist() == [1, 2]


def test_nothing_in_place_of_a_log_probability_means_no_probability():
    info = {
        "input_token_logprobs": [[None, 1, None]],
        "input_top_logprobs": [None],
        "output_token_logprobs": [[-0.5, 3, "a"], [None, 7, "b"]],
        "output_top_logprobs": [[[-0.5, 3, "a"], [None, 4, "b"]], [[-0.1, 8, None], [-3.4028234663852886e38, 4, None]]],
    }
    text = read({"meta_info": info})  # SGLang's input without a prediction does not hide its output
    assert text.ids.tolist() == [3, 8]
    assert text.counts.tolist() == [1, 1]
    assert text.labels.tolist() == [3, 7]
    text = read(chat(entry(9, None, [entry(3, -0.5), entry(4, -9999.0)])))
    assert (text.ids.tolist(), text.labels.tolist()) == ([3], [9])


def test_chats_that_name_the_class():
    text = read(chat({"id": 9, "token": " a", "logprob": -2.0, "top_logprobs": [{"id": 3, "logprob": -0.5}]}))
    assert (text.ids.tolist(), text.labels.tolist()) == ([3, 9], [9])


@pytest.mark.parametrize(("name", "number"), [("request-17", 17), ("17", 17), (17, 17), ("Text no. 4", 4)])
def test_number_of_a_text_may_end_its_name(name, number):
    record = {"custom_id": name, **chat(entry(9, -6.0))}
    assert RecordReader({"sequence": "custom_id"}).read(record).sequence == number


@pytest.mark.parametrize("name", ["a1-b2", "request", "-17", "1.5", "9" * 19, 1.5, True, ["1"]])
def test_other_names_are_no_numbers(name):
    record = {"custom_id": name, **chat(entry(9, -6.0))}
    with pytest.raises(DataError, match=r"custom_id is .*: must be an integer, or end in one"):
        RecordReader({"sequence": "custom_id"}).read(record)


@pytest.mark.parametrize("record", [chat(), {"prompt_logprobs": []}, {"values": [], "ids": []}])
def test_texts_without_tokens_are_refused(record):
    with pytest.raises(DataError, match="the text has no tokens: leave it out"):
        read(record)
