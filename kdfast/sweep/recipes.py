"""Resolve a method as written: score, rule, options, and the inputs it is computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdfast.errors import UsageError, unknown_name
from kdfast.pruning.if_beta.selector.select import fixed_settings
from kdfast.pruning.rules.registry import RULES, get_rule
from kdfast.pruning.score_file import ScoreFile
from kdfast.pruning.scores.base import HOW_TO_GET
from kdfast.pruning.scores.registry import SCORES
from kdfast.pruning.select import Options, SelectionMethod, published_rule
from kdfast.pruning.selectors import SELECTORS
from kdfast.sweep.spec import MethodSpec

# The score that a rule alone, such as beta:a=2,b=2, ranks the samples by.
SCORE_OF_A_RULE = ("influence", (("kind", "self"),))

# What determines the subset of a selector but is no option, as a function of the options.
_FIXED_SETTINGS = {"if-beta": fixed_settings}


@dataclass(frozen=True)
class ResolvedMethod:
    """A method whose names and options are resolved.

    Attributes:
        label: The shortest spelling; equal methods have equal labels.
        method: How to select the subset.
        inputs: What it is computed from: `cache`, `dynamics`, or `scores NAME` for a score file.
        fixed: Settings that determine the subset but are no options; part of the key of a run.
    """

    label: str
    method: SelectionMethod
    inputs: frozenset[str]
    fixed: Options = ()

    def __str__(self) -> str:
        """Return the label."""
        return self.label


def resolve_method(spec: MethodSpec, files: Mapping[str, ScoreFile], given: frozenset[str]) -> ResolvedMethod:
    """Resolve the names and options of a method.

    Args:
        spec: The method as written. A score alone has the rule it was published with, and its options may include the
            rule's; a rule alone ranks by `SCORE_OF_A_RULE`.
        files: Score files by name; they take precedence over scores of the same name.
        given: Which of `cache` and `dynamics` there are.

    Raises:
        UsageError: A name or an option does not exist (the nearest is suggested), a value is out of range, or an input
            is missing (the message names the command that makes it).
    """
    if spec.name in SELECTORS and spec.name not in files:
        return _resolve_selector(spec, files, given)
    if spec.name in RULES and spec.name not in SCORES and spec.name not in files and spec.rule is None:
        spec = MethodSpec(*SCORE_OF_A_RULE, spec.name, spec.options)
    if spec.name not in SCORES and spec.name not in files:
        known = dict.fromkeys([*files, *SCORES, *SELECTORS, *RULES])
        raise unknown_name("`methods`: no method is named", spec.name, known)
    score = files[spec.name].method if spec.name in files else spec.name
    published = published_rule(score)
    rule = spec.rule or published
    options, rule_options = spec.options, spec.rule_options
    if spec.rule is None:
        score_options = frozenset() if spec.name in files else frozenset(SCORES[spec.name].options)
        rule_options = tuple(o for o in options if o[0] not in score_options and o[0] in get_rule(rule).options)
        options = tuple(o for o in options if o not in rule_options)
    method = SelectionMethod(spec.name, options, rule, rule_options)
    _check(method, spec, files)
    label = MethodSpec(spec.name, options, rule, rule_options)
    if rule == published and not rule_options:
        label = MethodSpec(spec.name, options)
    missing = RULES[rule].needs - {"features"}
    if missing and rule != published:
        raise UsageError(
            f"`methods`, {label}: the rule {rule!r} needs {', '.join(sorted(missing))}, which the score {score!r} does "
            "not have: use another rule"
        )
    return ResolvedMethod(str(label), method, _inputs(label, rule, options, files, given))


def _resolve_selector(spec: MethodSpec, files: Mapping[str, ScoreFile], given: frozenset[str]) -> ResolvedMethod:
    if spec.rule is not None:
        raise UsageError(f"`methods`: {spec.name} selects the subset directly and takes no rule: omit /{spec.rule}")
    if "cache" not in given:
        raise UsageError(f"`methods`: {spec.name} needs {HOW_TO_GET['cache']}")
    method = SelectionMethod(spec.name, spec.options)
    _check(method, spec, files)
    score = method.selector_options(files).get("score")
    inputs = {"cache"}
    if score in files:
        inputs.add(f"scores {score}")
    elif score in SCORES:
        inputs |= _score_inputs(spec, str(score), (), given)
    fixed = _FIXED_SETTINGS[spec.name](dict(spec.options)) if spec.name in _FIXED_SETTINGS else {}
    return ResolvedMethod(str(spec), method, frozenset(inputs), tuple(fixed.items()))


def _check(method: SelectionMethod, spec: MethodSpec, files: Mapping[str, ScoreFile]) -> None:
    try:
        method.check(files)
    except UsageError as error:
        raise UsageError(f"`methods`, {spec}: {error}") from error


def _inputs(
    label: MethodSpec, rule: str, options: Options, files: Mapping[str, ScoreFile], given: frozenset[str]
) -> frozenset[str]:
    """Return what the method is computed from, out of what is given."""
    used = {f"scores {label.name}"} if label.name in files else _score_inputs(label, label.name, options, given)
    if "features" in RULES[rule].needs:
        if "cache" not in given:
            raise UsageError(f"`methods`: {label} needs {HOW_TO_GET['cache']} for the features")
        used.add("cache")
    return frozenset(used)


def _score_inputs(label: MethodSpec, score: str, options: Options, given: frozenset[str]) -> set[str]:
    """Return what a score of the registry is computed from, out of what is given."""
    usable = SCORES[score].usable_inputs(dict(options))
    if usable and not usable & given:
        raise UsageError(f"`methods`: {label} needs {' or '.join(HOW_TO_GET[name] for name in sorted(usable))}")
    return set(usable & given)
