import numpy as np
import pytest

from kdfast.errors import UsageError
from kdfast.prune import selectors
from kdfast.prune.rules.base import Option
from kdfast.prune.rules.registry import RULES
from kdfast.prune.score_file import ScoreFile
from kdfast.prune.scores.registry import SCORES
from kdfast.prune.selectors import Chooser
from kdfast.sweep.recipes import Recipe, make_recipe
from kdfast.sweep.spec import parse_methods

ALL = frozenset({"cache", "dynamics"})
FILES = {"mine": ScoreFile(np.zeros(3), "ccs", "data"), "theirs": ScoreFile(np.zeros(3), "their method", "data")}


def recipe(text: str, given: frozenset[str] = ALL) -> Recipe:
    (spec,) = parse_methods(text)
    return make_recipe(spec, FILES, given)


@pytest.mark.parametrize("name", SCORES)
def test_every_score_comes_with_its_published_rule(name: str) -> None:
    made = recipe(name)
    assert (made.score, made.rule, made.label) == (name, SCORES[name].rule, name)
    assert recipe(f"{name}/{made.rule}") == made
    assert made.inputs >= SCORES[name].needs


@pytest.mark.parametrize("name", sorted(set(RULES) - set(SCORES)))
def test_a_rule_alone_ranks_by_the_influence_on_itself(name: str) -> None:
    if not RULES[name].needs:
        assert (recipe(name).score, recipe(name).rule) == ("influence", name)


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
def test_options_go_where_they_belong_and_the_label_is_read_back_alike(text: str, label: str) -> None:
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
def test_the_inputs_are_those_it_may_be_made_from(text: str, given: frozenset[str], inputs: set[str]) -> None:
    assert recipe(text, given).inputs == inputs


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        ("forgetting", frozenset({"cache"}), "needs --dynamics: make one with kdfast dynamics"),
        ("el2n:use=dynamics", frozenset({"cache"}), "needs --dynamics"),
        ("el2n", frozenset(), "needs --cache or --dynamics"),
        ("forgetting/d2", frozenset({"dynamics"}), "needs --cache, for the features"),
        ("mine:kind=self", ALL, "scores of a file have no option 'kind'"),
        ("mein", ALL, "did you mean 'mine'"),
        ("el2n/bata", ALL, "did you mean 'beta'"),
    ],
)
def test_what_cannot_be_made_says_what_to_do(text: str, given: frozenset[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe(text, given)
    assert said in str(caught.value)


def test_a_method_that_chooses_the_subset_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    chooser = Chooser(lambda inputs: (np.arange(2), {}), "keeps two", {"steps": Option(3, "of its search", whole=True)})
    monkeypatch.setitem(selectors.CHOOSERS, "twins", chooser)
    made = recipe("twins:steps=4")
    assert (made.score, made.rule, made.label, made.inputs) == ("twins", "", "twins:steps=4", {"cache"})
    for text, given, said in (
        ("twins/hard", ALL, "takes no rule"),
        ("twins", frozenset(), "needs --cache"),
        ("twins:stops=4", ALL, "did you mean 'steps'"),
    ):
        with pytest.raises(UsageError, match=said):
            recipe(text, frozenset(given))
