"""From a method as written to a recipe: which score, which rule, which options, made from which inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdfast.errors import UsageError, did_you_mean
from kdfast.prune.rules.registry import RULES, rule_named
from kdfast.prune.score_file import ScoreFile
from kdfast.prune.scores.registry import MAKE_CACHE, MAKE_DYNAMICS, SCORES
from kdfast.prune.select import published_rule
from kdfast.prune.selectors import CHOOSERS
from kdfast.sweep.spec import MethodSpec, Options

# What a rule that stands alone, such as beta:a=2,b=2, ranks the samples by.
SCORE_OF_A_RULE = ("influence", (("kind", "self"),))

_MAKE = {"cache": MAKE_CACHE, "dynamics": MAKE_DYNAMICS}


@dataclass(frozen=True)
class Recipe:
    """A method whose names and options have been looked up.

    Attributes:
        label: The shortest way to write it; equal recipes have equal labels.
        score: A key of `SCORES`, the name of a score file, or a key of `CHOOSERS`.
        options: Its options.
        rule: A key of `RULES`; empty for a method that chooses the subset itself.
        rule_options: The rule's options.
        inputs: What it is made from: `cache`, `dynamics`, or `scores NAME` for a score file.
    """

    label: str
    score: str
    options: Options
    rule: str
    rule_options: Options
    inputs: frozenset[str]

    def __str__(self) -> str:
        """The label."""
        return self.label


def make_recipe(spec: MethodSpec, files: Mapping[str, ScoreFile], given: frozenset[str]) -> Recipe:
    """Look a method's names and options up.

    Args:
        spec: As written. A score alone has the rule it was published with, and its options may be the rule's; a rule
            alone ranks by `SCORE_OF_A_RULE`.
        files: Score files by name; they go before computed scores.
        given: Which of `cache` and `dynamics` there are.

    Raises:
        UsageError: If a name or an option is unknown (the nearest is suggested), a value is out of range, or an input
            is missing (the command that makes it is named).
    """
    if spec.name in CHOOSERS and spec.name not in files:
        return _chooser(spec, given)
    if spec.name in RULES and spec.name not in SCORES and spec.name not in files and spec.rule is None:
        spec = MethodSpec(*SCORE_OF_A_RULE, spec.name, spec.options)
    if spec.name not in SCORES and spec.name not in files:
        raise UsageError(f"--methods: {_unknown(spec.name, [*files, *SCORES, *CHOOSERS, *RULES])}")
    kind = files[spec.name].method if spec.name in files else spec.name
    published = published_rule(kind)
    rule = spec.rule or published
    options, rule_options = spec.options, spec.rule_options
    known = frozenset() if spec.name in files else frozenset(SCORES[spec.name].options)
    if spec.rule is None:
        rule_options = tuple(o for o in options if o[0] not in known and o[0] in rule_named(rule).options)
        options = tuple(o for o in options if o not in rule_options)
    _check_options(spec, files, options, rule, rule_options)
    shown = MethodSpec(spec.name, options, rule, rule_options)
    if rule == published and not rule_options:
        shown = MethodSpec(spec.name, options)
    _check_extras(shown, kind, rule, published)
    inputs = _inputs(shown, files, options, rule, given)
    return Recipe(str(shown), spec.name, options, rule, rule_options, inputs)


def _chooser(spec: MethodSpec, given: frozenset[str]) -> Recipe:
    if spec.rule is not None:
        raise UsageError(f"--methods: {spec.name} chooses the subset itself and takes no rule; leave out /{spec.rule}")
    if "cache" not in given:
        raise UsageError(f"--methods: {spec.name} needs --cache: make one with {MAKE_CACHE}")
    try:
        CHOOSERS[spec.name].complete(spec.name, dict(spec.options))
    except UsageError as error:
        raise UsageError(f"--methods, {spec}: {error}") from error
    return Recipe(str(spec), spec.name, spec.options, "", (), frozenset({"cache"}))


def _check_options(
    spec: MethodSpec, files: Mapping[str, ScoreFile], options: Options, rule: str, rule_options: Options
) -> None:
    try:
        if spec.name in files:
            if options:
                raise UsageError(f"scores of a file have no option {options[0][0]!r}")
        else:
            SCORES[spec.name].complete(dict(options))
        rule_named(rule).complete(rule, dict(rule_options))
    except UsageError as error:
        raise UsageError(f"--methods, {spec}: {error}") from error


def _check_extras(shown: MethodSpec, kind: str, rule: str, published: str) -> None:
    lacking = RULES[rule].needs - {"features"}
    if lacking and rule != published:
        raise UsageError(
            f"--methods, {shown}: the rule {rule!r} needs {', '.join(sorted(lacking))}, which the score {kind!r} does "
            "not come with; take another rule"
        )


def _inputs(
    shown: MethodSpec, files: Mapping[str, ScoreFile], options: Options, rule: str, given: frozenset[str]
) -> frozenset[str]:
    """What the recipe is made from, of what is given."""
    if shown.name in files:
        used = {f"scores {shown.name}"}
    else:
        needs = SCORES[shown.name].needs
        asked = dict(options).get("use")
        wanted = needs & {str(asked)} if asked is not None else needs
        if needs and not wanted & given:
            makers = "; or ".join(f"make one with {_MAKE[need]}" for need in sorted(wanted))
            raise UsageError(f"--methods: {shown} needs {' or '.join(f'--{n}' for n in sorted(wanted))}: {makers}")
        used = set(wanted & given)
    if "features" in RULES[rule].needs:
        if "cache" not in given:
            raise UsageError(f"--methods: {shown} needs --cache, for the features: make it with {_MAKE['cache']}")
        used.add("cache")
    return frozenset(used)


def _unknown(name: str, known: list[str]) -> str:
    hint = did_you_mean(name, known)
    return f"no method is named {name!r}: {hint}known: {', '.join(dict.fromkeys(known))}"
