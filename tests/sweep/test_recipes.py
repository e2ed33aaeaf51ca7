import re

import numpy as np
import pytest

from kdfast.errors import UsageError
from kdfast.pruning import selectors
from kdfast.pruning.options import Option
from kdfast.pruning.rules.registry import RULES
from kdfast.pruning.score_file import ScoreFile
from kdfast.pruning.scores.registry import SCORES
from kdfast.pruning.select import SelectionMethod
from kdfast.pruning.selector import SubsetSelector
from kdfast.sweep.recipes import ResolvedMethod, resolve_method
from kdfast.sweep.spec import parse_methods

ALL = frozenset({"cache", "dynamics"})
FILES = {"mine": ScoreFile(np.zeros(3), "ccs", "data"), "theirs": ScoreFile(np.zeros(3), "their method", "data")}


def recipe(text: str, given: frozenset[str] = ALL) -> ResolvedMethod:
    (spec,) = parse_methods(text)
    return resolve_method(spec, FILES, given)


@pytest.mark.parametrize("name", [name for name, entry in SCORES.items() if "teacher" not in entry.needs])
def test_score_alone_has_its_published_rule(name: str) -> None:
    made = recipe(name)
    assert (made.method.name, made.method.rule, made.label) == (name, SCORES[name].rule, name)
    assert recipe(f"{name}/{made.method.rule}") == made
    assert made.inputs >= SCORES[name].needs


def test_score_that_needs_a_network_is_taken_from_a_file() -> None:
    with pytest.raises(UsageError, match=r"influence-fvm needs a network .* the file of kdfast score as `scores`"):
        recipe("influence-fvm")


@pytest.mark.parametrize("name", sorted(set(RULES) - set(SCORES)))
def test_rule_alone_ranks_by_self_influence(name: str) -> None:
    if not RULES[name].needs:
        assert (recipe(name).method.name, recipe(name).method.rule) == ("influence", name)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("beta:a=2,b=5", "influence:kind=self/beta:a=2,b=5"),
        ("dual:c=4", "dual/dual:c=4"),
        ("d2:score=aum", "d2:score=aum"),
        ("d2:score=aum,k=7", "d2:score=aum/d2:k=7"),
        ("mine", "mine"),
        ("mine/strata", "mine"),
        ("theirs/hard", "theirs"),
        ("theirs/beta:b=3,a=2", "theirs/beta:a=2,b=3"),
    ],
)
def test_options_are_split_between_score_and_rule_and_labels_parse_to_the_same_recipe(text: str, label: str) -> None:
    made = recipe(text)
    assert made.label == label
    assert recipe(label) == made


@pytest.mark.parametrize(
    ("text", "given", "inputs"),
    [
        ("random", ALL, set()),
        ("forgetting", ALL, {"dynamics"}),
        ("el2n", ALL, {"cache", "dynamics"}),
        ("el2n:use=cache", ALL, {"cache"}),
        ("el2n", frozenset({"dynamics"}), {"dynamics"}),
        ("d2", frozenset({"cache"}), {"cache"}),
        ("forgetting/d2", ALL, {"cache", "dynamics"}),
        ("mine", ALL, {"scores mine"}),
        ("theirs/d2", ALL, {"scores theirs", "cache"}),
    ],
)
def test_inputs_are_the_given_ones_that_the_method_can_use(text: str, given: frozenset[str], inputs: set[str]) -> None:
    assert recipe(text, given).inputs == inputs


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("forgetting", frozenset({"cache"}), "needs training dynamics (record them with kdfast dynamics"),
        ("el2n:use=dynamics", frozenset({"cache"}), "needs training dynamics"),
        (
            "el2n",
            frozenset(),
            "needs a teacher's cache (make one with kdfast cache and pass `cache`) or training dynamics",
        ),
        (
            "forgetting/d2",
            frozenset({"dynamics"}),
            "needs a teacher's cache (make one with kdfast cache and pass `cache`) for the features",
        ),
        ("mine:kind=self", ALL, "scores read from a file take no options, got 'kind'"),
        ("mein", ALL, "did you mean 'mine'"),
        ("el2n/bata", ALL, "did you mean 'beta'"),
    ],
)
def test_rejects_unknown_names_and_missing_inputs(text: str, given: frozenset[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        recipe(text, given)


@pytest.mark.parametrize(
    ("text", "fixed"),
    [
        ("if-beta", {"influence_l2": 0.1}),
        ("if-beta:score=removal,l2=0.5", {"influence_l2": 0.1, "influence_head": "optimum"}),
        ("if-beta:score=residual", {}),
        ("if-beta:score=crossfit", {}),
        ("influence", {}),
        ("beta:a=2,b=2", {}),
        ("el2n", {}),
    ],
)
def test_only_if_beta_by_influence_has_a_fixed_setting(text: str, fixed: dict[str, float | str]) -> None:
    assert dict(recipe(text).fixed) == fixed


def test_selector_takes_options_but_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    selector = SubsetSelector(
        lambda inputs: (np.arange(2), {}), "keeps two", {"steps": Option(3, "of its search", integer=True)}
    )
    monkeypatch.setitem(selectors.SELECTORS, "twins", selector)
    made = recipe("twins:steps=4")
    assert made == ResolvedMethod("twins:steps=4", SelectionMethod("twins", (("steps", 4),)), frozenset({"cache"}))
    for text, given, message in (
        ("twins/hard", ALL, "takes no rule"),
        ("twins", frozenset(), "needs a teacher's cache"),
        ("twins:stops=4", ALL, "did you mean 'steps'"),
    ):
        with pytest.raises(UsageError, match=message):
            recipe(text, frozenset(given))
