"""`kdfast prune`: select the samples to keep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdfast.cli import options
from kdfast.cli.commands.score import Cache, Dynamics
from kdfast.cli.output import show
from kdfast.cli.progress import progress
from kdfast.errors import UsageError

if TYPE_CHECKING:
    from kdfast.pruning.select import Selection

# Values of --balance, and the words that the library writes to disk.
BALANCES = {"proportional": "balanced", "equal": "equal", "none": "unbalanced"}

# The library's words, which its messages use, are accepted too.
_SYNONYMS = {"balanced": "proportional", "unbalanced": "none"}

# Values of --balance that the older flags stand for.
_OLDER_FLAGS = {"--balanced": "proportional", "--unbalanced": "none", "--equal": "equal"}


def prune(
    context: typer.Context,
    data: options.Data,
    fraction: Annotated[
        list[float],
        typer.Option(
            "--fraction",
            help="Share of the training split to keep, above 0 and at most 1; repeatable.",
            metavar="NUMBER",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="Subset file to write, idx.npy; its provenance goes into idx.json. For several fractions, put "
            "{fraction} into the name, as in idx-{fraction}.npy.",
        ),
    ],
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores",
            help="Score file written by `kdfast score`, or scores of your own (.npy, .npz, .csv, .txt, .pt, .pickle), "
            "to select by with a rule, or to rank by with a --method that selects the subset directly.",
        ),
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help=f"{options.KEY_HELP}.", metavar="KEY")] = None,
    higher: Annotated[
        str | None, typer.Option("--higher", help=f"{options.HIGHER_HELP}.", metavar=options.HIGHER)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="Compute this score instead of reading --scores, or let this method select the subset directly; the "
            "lists are below. Without --scores and --method: random.",
            metavar="NAME",
        ),
    ] = None,
    cache: Cache = None,
    dynamics: Dynamics = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            "--teacher",
            help="Network, T.pt, for scores that differentiate it. if-beta with preset=paper flattens it first, unless "
            "it comes from `kdfast teacher flatten`.",
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule",
            help="Rule that selects samples by their scores; the list is below. Default: the rule published with the "
            "score.",
            metavar="NAME",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            help="Option of the rule, or of a method that selects the subset directly; repeatable.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    score_option: Annotated[
        list[str] | None,
        typer.Option(
            "--score-option",
            help="Option of the score, also of the one that a --method with an option score ranks by; repeatable.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    help_options: Annotated[
        bool,
        typer.Option(
            "--help-options",
            help="Print every option of --method and --rule and exit; without both, the options of all.",
        ),
    ] = False,
    balance: Annotated[
        str | None,
        typer.Option(
            "--balance",
            help="How the budget is divided among the classes. proportional: in proportion to their sizes, at least "
            "one of each; equal: the same number of each, or all of a smaller class; none: select from all samples "
            "together. Default: proportional.",
            metavar="proportional|equal|none",
        ),
    ] = None,
    exclude: Annotated[
        Path | None,
        typer.Option(
            "--exclude",
            help="Subset file whose samples must not be kept, such as that of a teacher, T.pt.subset.npy; --fraction "
            "stays the share of the whole training split.",
        ),
    ] = None,
    balanced: Annotated[bool | None, typer.Option("--balanced/--unbalanced", hidden=True)] = None,
    equal: Annotated[bool, typer.Option("--equal", hidden=True)] = False,
    teacher_net: options.TeacherNet = None,
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    force: options.Force = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Select the training samples to keep and write their indices, one subset file per fraction.

    A subset file is a one-dimensional array of integers saved with np.save, so you can also make your own.
    """
    import numpy as np

    from kdfast.data.readers.registry import open_source
    from kdfast.data.subset import check_subset_file, check_subset_path, read_origin, write_subset
    from kdfast.device import resolve_device
    from kdfast.files import check_writable
    from kdfast.pruning.flat_scores import state_paths
    from kdfast.pruning.options import parse_options
    from kdfast.pruning.request import PruneRequest, subset_paths

    paths = subset_paths(out, fraction)
    for path in paths:
        check_subset_path(path)
    request = PruneRequest(
        fractions=tuple(fraction),
        method=method,
        scores=scores,
        key=key,
        higher=higher,
        rule=rule,
        options=parse_options(option or []),
        score_options=parse_options(score_option or []),
        balance=_balance(context, balance, balanced, equal),
        seed=seed,
        device=str(resolve_device(device)),
        cache=cache,
        dynamics=dynamics,
        teacher=teacher,
        exclude=exclude,
    )
    request.check()
    if exclude is not None:
        check_subset_file(exclude)
    source = open_source(data, size=size, order=order, split=split)
    if request.uses_selector and not dry_run:
        for folder in {path.parent for path in paths}:
            check_writable(folder)
        # What can be told before long work.
        asked = {"method": method, "seed": seed, "data": source.fingerprint}
        for path, held in ((path, read_origin(path)) for path in paths):
            options.refuse_other(path, held is None or asked == {name: held.get(name) for name in asked}, force)
    if request.ranks_by_fvm and dry_run:
        request.check_data(source)
        _show_flattening(len(source.train), fraction, teacher)
        return
    states = [path.with_suffix(".search.json") for path in paths]
    score_state = None if dry_run else paths[0]
    selections = []
    with progress(method or "prune", shown=request.uses_selector) as report:
        found = request.run(source, None if dry_run else states, report, score_state=score_state)
        if not (dry_run or request.uses_selector):  # a selector's subsets are written as they are found
            found = _refuse_others(paths, found, force)
        for path, state, selection in zip(paths, states, found, strict=True):
            selections.append(selection)
            if not dry_run:
                _refuse_other(path, selection, force)
                write_subset(path, selection.ids, selection.provenance)
                if request.uses_selector:
                    state.unlink(missing_ok=True)
    if request.ranks_by_fvm:
        for path in state_paths(paths[0]):
            path.unlink(missing_ok=True)
    lines, found_facts = _describe_scores(selections[0]), []
    for path, selection in zip(paths, selections, strict=True):
        counts = np.bincount(source.train.labels[selection.ids], minlength=len(source.classes))
        least, most = counts.min(), counts.max()
        per_class = f"{least} to {most}" if least < most else f"{most}"
        lines.append(
            f"{'would keep' if dry_run else 'kept'} {len(selection.ids)} of {len(source.train)} training samples "
            f"({selection}); {per_class} per class"
        )
        found_facts.append({"out": str(path), "kept": len(selection.ids), "per_class": counts.tolist()})
    facts = {"of": len(source.train), "subsets": found_facts, "dry_run": dry_run}
    show("\n".join(lines), facts | ({"scores": lines[0]} if len(lines) > len(found_facts) else {}))


def _show_flattening(samples: int, fractions: list[float], teacher: Path | None) -> None:
    from kdfast.data.subset import subset_size

    kept = [subset_size(samples, share) for share in fractions]
    show(
        f"would flatten {teacher} if it is not flat, score {samples} samples and keep {', '.join(map(str, kept))} of "
        "them",
        {"dry_run": True, "teacher": str(teacher), "of": samples, "kept": kept},
    )


def _refuse_other(path: Path, selection: Selection, force: bool) -> None:
    from kdfast.data.subset import digest_of, read_origin

    held = read_origin(path)
    options.refuse_other(path, held is None or held["ids"] == digest_of(selection.ids), force)


def _refuse_others(paths: list[Path], selections: Iterator[Selection], force: bool) -> Iterator[Selection]:
    """Return the selections, unless the file of one of them may not be replaced."""
    found = list(selections)
    for path, selection in zip(paths, found, strict=True):
        _refuse_other(path, selection, force)
    return iter(found)


def _describe_scores(selection: Selection) -> list[str]:
    """Return a line about how a file of another program was read, if the scores come from one."""
    from kdfast.pruning.own_scores import describe_scores

    scored = {"method": selection.provenance["method"], **selection.provenance["parameters"].get("score", {})}
    text = describe_scores(scored["method"], scored)
    return [] if text is None else [f"{text}{'' if scored['higher'] == 'easy' else '; if not: --higher easy'}"]


def _balance(context: typer.Context, balance: str | None, balanced: bool | None, equal: bool) -> str:
    """Return the library's word for --balance, or for the older flags --balanced, --unbalanced and --equal.

    If any of them is on the command line, those of the configuration file are ignored.

    Raises:
        UsageError: They contradict each other, or the value is not one of `BALANCES`.
    """
    balance = _SYNONYMS.get(balance or "", balance)
    given = {
        "balance": None if balance is None else f"--balance {balance}",
        "balanced": {True: "--balanced", False: "--unbalanced", None: None}[balanced],
        "equal": "--equal" if equal else None,
    }
    typed = [flag for name, flag in given.items() if flag and options.is_typed(context, name)]
    flags = typed or [flag for flag in given.values() if flag]
    if balance is not None and given["balance"] in flags:
        options.one_of("--balance", balance, BALANCES)
    # --equal refines --balanced, so both may be given.
    deciding = [flag for flag in flags if not (flag == "--balanced" and "--equal" in flags)]
    words = {_OLDER_FLAGS.get(flag, flag.removeprefix("--balance ")) for flag in deciding}
    if len(words) > 1:
        raise UsageError(f"{' and '.join(flags)} exclude each other: pass one of them")
    return BALANCES[words.pop() if words else "proportional"]
