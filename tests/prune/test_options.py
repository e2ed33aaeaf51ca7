"""Options are declared so that help can be printed from them, and are checked."""

import pytest

from kdfast.errors import UsageError
from kdfast.pruning.options import Option, complete_options, parse_options, read_span
from kdfast.pruning.rules.registry import RULES
from kdfast.pruning.scores.registry import SCORES
from kdfast.pruning.selectors import SELECTORS

ENTRIES = {
    f"{kind} {name}": entry
    for kind, registry in (("score", SCORES), ("rule", RULES), ("selector", SELECTORS))
    for name, entry in registry.items()
}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_and_their_options_have_one_line_summaries_and_valid_defaults(name: str) -> None:
    entry = ENTRIES[name]
    for summary in (entry.summary, *(option.summary for option in entry.options.values())):
        assert summary
        assert "\n" not in summary
        assert "--" not in summary
    for key, option in entry.options.items():
        assert option.parse(key, option.default) == option.default
        if option.default is None:
            assert "automatic" in option.summary


def test_none_means_not_given() -> None:
    options = {"steps": Option(3, "number of steps", low=1, integer=True), "width": Option(None, "automatic: 8")}
    assert complete_options("twins", options, {}) == {"steps": 3, "width": None}
    assert complete_options("twins", options, {"steps": None, "width": "4"}) == {"steps": 3, "width": 4.0}


def test_rejects_unknown_options_and_bad_values() -> None:
    options = {
        "steps": Option(3, "number of steps", low=1, high=9, integer=True),
        "use": Option("a", "", choices=("a",)),
    }
    for given, message in (
        ({"stops": 4}, "twins has no option 'stops': did you mean 'steps'"),
        ({"steps": 2.5}, "must be a whole number from 1 to 9"),
        ({"steps": 10}, "must be a whole number from 1 to 9"),
        ({"steps": "many"}, "must be a number"),
        ({"use": "b"}, "must be one of a"),
    ):
        with pytest.raises(UsageError, match=message):
            complete_options("twins", options, given)


def test_parses_ranges_of_whole_numbers() -> None:
    options = {"epochs": Option(None, "automatic: one", low=1, high=20, span=True)}
    assert complete_options("twins", options, {}) == {"epochs": None}
    assert complete_options("twins", options, {"epochs": "01..10"}) == {"epochs": "1..10"}
    assert list(read_span("3..5")) == [3, 4, 5]
    for bad in ("10", 10, "0..4", "4..3", "1..21", "1-10", "1..", "a..b", "1.5..2", "1..2..3", " 1..2"):
        with pytest.raises(UsageError, match=r"must be first..last, two whole numbers from 1 to 20, as in 1..10"):
            complete_options("twins", options, {"epochs": bad})


def test_parses_name_value_texts() -> None:
    assert parse_options(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    for bad in ("a", "=1", "a="):
        with pytest.raises(UsageError, match="name=value"):
            parse_options([bad])
    with pytest.raises(UsageError, match="twice"):
        parse_options(["a=1", "a=2"])


@pytest.mark.parametrize(
    ("name", "given", "when"),
    [
        ("score influence", {"temperature": 2}, "with alpha above 0"),
        ("score influence", {"kind": "self", "holdout": 0.2}, "with kind=removal or absolute"),
        ("score grand", {"network": "full", "epochs": "1..3"}, "with network=head"),
        ("rule dual", {"mu": 0.5, "anchors": 3}, "without mu"),
        ("rule bws", {"start": 0.5, "ridge": 2}, "without start"),
    ],
)
def test_an_option_that_has_no_effect_beside_the_others_is_refused(name: str, given: dict, when: str) -> None:
    options, last = ENTRIES[name].options, list(given)[-1]
    with pytest.raises(UsageError, match=f"{last}=.* has an effect only {when}: change that, or omit {last}"):
        complete_options(name, options, given)
    complete_options(name, options, {**given, last: options[last].default})
    complete_options(name, options, complete_options(name, options, {}))
