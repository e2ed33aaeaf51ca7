"""Help about scores, rules and selectors comes from their registries and is complete."""

import pytest

from kdfast.pruning.rules.registry import RULES
from kdfast.pruning.scores.registry import SCORES
from kdfast.pruning.selectors import SELECTORS

ENTRIES = {
    **{f"--method {name}": entry for name, entry in {**SCORES, **SELECTORS}.items()},
    **{f"--rule {name}": entry for name, entry in RULES.items()},
}


def squeeze(text: object) -> str:
    """Drop all white space: help wraps lines anywhere."""
    return "".join(str(text).split())


def require_options(text: str, options) -> None:
    for name, option in options.items():
        assert f"{name}=" in text
        assert squeeze(option.summary) in squeeze(text)
        assert option.default is None or f"default:{option.default}" in squeeze(text)
        assert all(choice in text for choice in option.choices)


@pytest.mark.parametrize("command", ["score", "prune"])
def test_help_lists_every_entry_with_its_summary(kdfast, command: str) -> None:
    outcome = kdfast(command, "--help")
    assert outcome.code == 0
    names = {**SCORES, **SELECTORS, **RULES} if command == "prune" else SCORES
    for name in names:
        assert f"\n  {name} " in outcome.out
    registries = [SELECTORS, RULES] if command == "prune" else []
    summaries = [entry.summary for registry in [SCORES, *registries] for entry in registry.values()]
    assert all(squeeze(summary) in squeeze(outcome.out) for summary in summaries)


@pytest.mark.parametrize("words", ENTRIES)
def test_help_options_prints_every_option_of_an_entry(kdfast, words: str) -> None:
    outcome = kdfast("prune", *words.split(), "--help-options")
    assert outcome.code == 0, outcome.err
    assert squeeze(ENTRIES[words].summary) in squeeze(outcome.out)
    require_options(outcome.out, ENTRIES[words].options)


@pytest.mark.parametrize("name", SCORES)
def test_help_options_of_a_score(kdfast, name: str) -> None:
    outcome = kdfast("score", "--help-options", "--method", name)
    assert outcome.code == 0, outcome.err
    require_options(outcome.out, SCORES[name].options)
    alone, pruned = outcome.out, kdfast("prune", "--method", name, "--help-options").out
    assert alone.count("\nRule ") == 0
    assert f"\nRule {SCORES[name].rule}:" in pruned
    require_options(pruned, RULES[SCORES[name].rule].options)


def test_help_options_without_a_name_prints_all(kdfast) -> None:
    outcome = kdfast("prune", "--help-options")
    assert outcome.code == 0
    for entry in ENTRIES.values():
        require_options(outcome.out, entry.options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prune --method el2m --help-options", "did you mean 'el2n'"),
        ("prune --method el2n --rule bata --help-options", "did you mean 'beta'"),
        ("score --method if-beta --help-options", "no score is named 'if-beta'"),
        ("score --nosuch --help-options", "No such option: --nosuch"),
    ],
)
def test_help_options_rejects_unknown_names(kdfast, words: str, message: str) -> None:
    outcome = kdfast(*words.split())
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
