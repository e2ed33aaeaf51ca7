"""kdfast cache import-tokens and verify-tokens: results and exit codes."""

import json


def write_log(path, texts=3):
    record = {"values": [[-0.5, -1.5], [-0.1, -3.0]], "ids": [[1, 2], [3, 4]], "labels": [1, 4]}
    path.write_text((json.dumps(record) + "\n") * texts)
    return path


def test_imports_and_verifies(kdfast, tmp_path):
    log, out = write_log(tmp_path / "log.jsonl"), tmp_path / "t"
    ran = kdfast("cache", "import-tokens", log, "--vocabulary", 9, "--out", out, "--json")
    assert ran.code == 0
    assert json.loads(ran.out) | {"cache": ""} == {
        "texts": 3, "tokens": 6, "entries": 12, "vocabulary": 9, "labels": True, "failed": 0, "cache": "",
    }  # fmt: skip
    assert kdfast("cache", "verify-tokens", "--cache", out).out.endswith(
        "3 texts with 6 tokens and 2.0 classes per token\n"
    )
    damaged = bytearray((out / "values-00000.npy").read_bytes())
    damaged[-1] ^= 1
    (out / "values-00000.npy").write_bytes(damaged)
    ran = kdfast("cache", "verify-tokens", "--cache", out)
    assert (ran.code, "values-00000.npy has another SHA-256" in ran.err) == (3, True)


def test_wrong_input_is_one_line(kdfast, tmp_path):
    log = write_log(tmp_path / "log.jsonl")
    command = ("--vocabulary", 9, "--out", tmp_path / "t")
    ran = kdfast("cache", "import-tokens", tmp_path / "none.jsonl", *command)
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    ran = kdfast("cache", "import-tokens", log, "--vocabulary", 4, "--out", tmp_path / "t")
    assert (ran.code, ran.err) == (3, f"kdfast: {log}, line 1: position 1 has the class 4: must be in [0, 4)\n")
    ran = kdfast("cache", "import-tokens", log, *command, "--names", "values")
    assert (ran.code, "`--names`" in ran.err or "--names has 'values'" in ran.err) == (2, True)
    assert kdfast("cache", "import-tokens", log, *command, "--temperature", 0).code == 2
    (tmp_path / "words.json").write_text("[1]")
    ran = kdfast("cache", "import-tokens", log, *command, "--tokens", tmp_path / "words.json")
    assert (ran.code, "holds no object of classes by text" in ran.err) == (3, True)
    assert kdfast("cache", "verify-tokens", "--cache", tmp_path / "nothing").code == 3
    assert kdfast("cache", "import-tokens", log, *command).code == 0


def test_failed_requests_are_counted(kdfast, tmp_path):
    log, out = write_log(tmp_path / "log.jsonl"), tmp_path / "t"
    command = ("cache", "import-tokens", log, "--vocabulary", 9, "--out", out)
    log.write_text(log.read_text() + '{"error": "overloaded"}\n')
    ran = kdfast(*command)
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert "line 4: its request failed (overloaded): request the text again, or pass --skip-failed" in ran.err
    ran = kdfast(*command, "--skip-failed")
    summary = "4 texts with 6 tokens and 2.0 classes per token; 1 text has no tokens, since its request failed\n"
    assert (ran.code, ran.out) == (0, f"imported {summary}")
    assert kdfast("cache", "verify-tokens", "--cache", out).out == f"{out} is whole: {summary}"


def test_the_other_kind_of_cache_is_named(kdfast, tmp_path, tiny, cache):
    tokens = tmp_path / "t"
    log = write_log(tmp_path / "log.jsonl")
    assert kdfast("cache", "import-tokens", log, "--vocabulary", 9, "--out", tokens).code == 0
    short = ("--student", "resnet8", "--epochs", 1, "--out", tmp_path / "o")
    for command in (
        ("cache", "verify"),
        ("cache", "verify", "--data", tiny),
        ("distill", "--data", tiny, *short),
        ("score", "--data", tiny, "--method", "el2n", "--out", tmp_path / "s.npz"),
        ("prune", "--data", tiny, "--method", "el2n", "--fraction", 0.1, "--out", tmp_path / "i.npy"),
    ):
        ran = kdfast(*command, "--cache", tokens)
        assert (ran.code, ran.err.count("\n")) == (3, 1), command
        assert ran.err.startswith(
            f"kdfast: {tokens} is a cache of log-probabilities of texts, and a teacher's cache of"
        )
        assert "kdfast cache verify-tokens" in ran.err
    ran = kdfast("cache", "verify-tokens", "--cache", cache)
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert ran.err.startswith(f"kdfast: {cache} is a teacher's cache of images")
    assert "kdfast cache verify," in ran.err
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "t"}
    assert kdfast("cache", "verify", "--cache", cache).code == 2  # --data is missing
