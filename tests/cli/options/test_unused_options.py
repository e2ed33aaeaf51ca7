"""An option that has no effect beside the others is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

REFUSED = {
    "weight without a term": (("--kd-weight", 2), "--kd-weight is 2, and the loss has no terms"),
    "preset without a term": (("--kd-preset", "tuned"), "--kd-preset is tuned, and the loss has no terms"),
    "preset and weights": (
        ("--kd-preset", "tuned", "--kd-term", "dist", "--kd-weight", 2),
        "--kd-preset is tuned, and every term has a weight of its own: omit it, or --kd-weight",
    ),
    "warm-up without a term": (
        ("--kd-warmup-epochs", 0.5),
        "--kd-warmup-epochs is 0.5, and the loss has no terms: omit it, or add --kd-term",
    ),
}
SWEEPS = {
    "term": (("--kd", "off", "--kd-term", "dist"), "--kd is off, and --kd-term is for runs with the teacher"),
    "alpha": (("--kd", "off", "--alpha", 0.5), "--kd is off, and --alpha is for runs with the teacher"),
    "temperature": (("--kd", "off", "--temperature", 2), "--kd is off, and --temperature is for"),
    "weight": (("--kd", "off", "--ce-weight", 1), "--kd is off, and --ce-weight is for"),
    "activations": (("--kd-term", "at"), "the term at reads activations of the teacher, and a sweep has its cache"),
    "pooled features of views": (("--kd-term", "pkt"), "the term pkt reads activations of the teacher"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("command", ["distill", "sweep"])
def test_options_of_terms_need_a_term(kdfast, tiny: Path, tmp_path: Path, command: str, name: str) -> None:
    options, message = REFUSED[name]
    inputs = ("--data", tiny, "--student", "resnet8", "--cache", tmp_path, "--out", tmp_path / "run")
    outcome = kdfast(command, *inputs, *options)
    assert outcome.code == 2, outcome.err
    assert message in outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_name_options_of_the_loss_that_no_run_has(kdfast, tiny: Path, cache: Path, tmp_path: Path, name) -> None:
    options, message = SWEEPS[name]
    inputs = ("--data", tiny, "--student", "resnet8", "--cache", cache, "--fractions", 0.5, "--batch-size", 10)
    outcome = kdfast("sweep", *inputs, *options, "--out", tmp_path / "run")
    assert outcome.code == 2, outcome.err
    assert message in outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert not (tmp_path / "run").exists()


def test_a_run_without_the_teacher_says_what_it_does_not_read(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    inputs = ("--data", tiny, "--student", "resnet8", "--epochs", 1, "--batch-size", 40, "--device", "cpu")
    out = ("--out", tmp_path / "run")
    told = kdfast("distill", *inputs, "--alpha", 0, "--cache", cache, "--temperature", 2, *out)
    assert told.code == 0
    assert "kdfast: --cache has no effect: --alpha is 0 and there is no --kd-term\n" in told.err
    assert "kdfast: --temperature has no effect: --alpha is 0\n" in told.err
    quiet = kdfast("distill", *inputs, "--alpha", 0, "--out", tmp_path / "other")
    assert "no effect" not in quiet.err


def test_smoothed_labels_need_a_cross_entropy(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    inputs = ("--data", tiny, "--student", "resnet8", "--epochs", 1, "--batch-size", 40, "--cache", cache)
    given = ("--label-smoothing", 0.1, "--device", "cpu", "--out")
    told = kdfast("distill", *inputs, "--alpha", 1, *given, tmp_path / "run")
    assert told.code == 0
    assert "--label-smoothing has no effect: the weight of the cross-entropy is 0 (--alpha is 1)\n" in told.err
    assert "no effect" not in kdfast("distill", *inputs, "--alpha", 0.5, *given, tmp_path / "other").err
