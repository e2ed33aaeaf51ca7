"""Study files: a figure or table of a paper as one YAML file, read and checked in full.

A study file is a mapping with these keys. Unknown keys, wrong types and values that no code accepts are refused with a
line that names the file and the key.

    title: Pruning methods against the fraction kept     # required; one line
    source: Ben-Baruch et al., ICML 2025, Figure 3       # required; what is reproduced
    recipe: {epochs: 240, batch_size: 64, lr: 0.05}      # training of the students; see below
    defaults: {student: resnet32, teacher: resnet32}     # values of axes that an entry of cells does not name
    cells:                                               # required; each entry is the product of its lists
      - {method: [random, forgetting], fraction: [0.1, 0.3], kd: [off, on]}
      - {fraction: 1.0, kd: [off, on], match_steps_of: 0.1}
    order: [fraction, kd, method]                        # the order of runs; the first axis varies slowest
    dynamics: {net: resnet32, epochs: 30, lr: 0.1}       # the recording that scores such as forgetting read
    teachers: {epochs: 240}                              # training of teachers that come without a file
    cache: {views: 5}                                    # the teacher's outputs that methods such as if-beta read
    published:                                           # by kind of data; values in percent
      cifar100:
        - {method: random, fraction: 0.1, kd: off, top1: 39.8}
        - {method: forgetting, kd: off, fraction: [0.1, 0.3], top1: [22.21, 49.41]}
    teacher_top1: {cifar100: {resnet32: 71.6}}           # the paper's teachers, in percent
    reported:                                            # what the paper says without values, shown on the page
      - At a tenth, random samples are the best.
    plot: {x: fraction, lines: [method, kd]}             # the chart: its horizontal axis, and what tells lines apart
    samples: 50000                                       # training samples of the paper's data, for --list

`recipe`: fields of `kdfast.distillation.config.RunConfig`, those of `axes.RECIPE_FIELDS`, and the axis temperature.
What is missing has the default of `kdfast distill`, the recipe of RepDistiller: 240 epochs, batches of 64, SGD with a
learning rate of 0.05 divided by ten after 62.5%, 75% and 87.5%, momentum 0.9, weight decay 5e-4, fp32 or as
`--precision` says.

Axes of a cell, in `defaults`, `cells` and `published`; recipe fields may stand there too, for single cells:

    method            as in `kdfast sweep --methods`: random, forgetting, el2n, el2n/beta:a=1,b=3, grand:epoch=10;
                      levels are rules: el2n/easy, el2n/moderate, el2n/hard
    fraction          share of the training split to train on; 1: all data, whatever the method
    kd                on, or off: training on the labels alone, without the axes of the teacher and the loss
    alpha             weight of the divergence from the teacher: a number, or auto; above 1 only with ce_weight
    temperature       temperature of the divergence
    ce_weight         weight of the cross-entropy; none: 1 - alpha
    term              further term of the loss, as `kdfast distill --kd-term` takes it, such as vid; none: no term
    term_weight       its weight; none: 1
    teacher           network of the teacher
    teacher_fraction  share of the training split that the teacher is trained on, a seeded class-balanced draw
    disjoint          on: the student's samples are chosen from those that the teacher was not trained on; fraction
                      stays a share of the whole training split
    student           network of the student
    match_steps_of    a fraction: train for as many steps as a run on it, in place of the recipe's epochs; rounded to
                      whole epochs, at least one

Defaults: method random, fraction 1, kd on, alpha 0.5, temperature 4, teacher and student resnet32, teacher_fraction 1,
disjoint off. A cell that several entries name is one cell.

`order`: runs go seed by seed, and within a seed by these axes, each in the order in which the file first names its
values; a run with `match_steps_of` goes with the runs on that fraction. `dynamics`: `net` (default: the student of
`defaults`), the fields of `RecordingConfig` `runs`, `record`, `record_every`, `features_every` and `top_k`, and recipe
fields; default 30 epochs, batches of 128, learning rate 0.1 with the schedule cosine. `teachers`: recipe fields in
place of those of `recipe`.

`published`: an entry names one cell as an entry of `cells` would, completed by `defaults`; or it has one list of values
and lists of figures of the same length. `top1` and `top5` are figures; a note in `note` is allowed. The kind of data is
that of `Source.kind`, such as cifar10, cifar100 or svhn, or a name that `--dataset` chooses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kdfast
from kdfast.distillation.config import RunConfig
from kdfast.distillation.record_dynamics import RecordingConfig
from kdfast.errors import UsageError, unknown_name
from kdfast.files.validate import read_yaml
from kdfast.reproduction.axes import AXES, RECIPE_FIELDS, Values, locate_errors, parse_fields
from kdfast.reproduction.cells import Cell, expand
from kdfast.reproduction.published import read_published, read_teachers
from kdfast.reproduction.study import Plot, Study

FOLDER = Path(kdfast.__file__).parent / "studies"
SUFFIX = ".yaml"
RECORDING_FIELDS = ("runs", "record", "record_every", "features_every", "top_k")

_DYNAMICS: dict[str, Any] = {"epochs": 30, "batch_size": 128, "lr": 0.1, "schedule": "cosine"}
_OF_STUDENTS = ("temperature", "initial_epochs", "terms_warmup_epochs")  # of a loss with a teacher
_REQUIRED = ("title", "source", "cells")
_KINDS = {
    "title": str, "source": str, "recipe": dict, "defaults": dict, "cells": list, "order": list, "dynamics": dict,
    "teachers": dict, "cache": dict, "published": dict, "reported": list, "teacher_top1": dict, "plot": dict,
    "samples": int,
}  # fmt: skip
_WORDS = {str: "a text", dict: "a mapping", list: "a list", int: "an integer"}


def study_names() -> list[str]:
    """Return the names of the studies that kdfast has, sorted."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def load_study(name: str) -> Study:
    """Read a study by its name, or by the path of a file that ends in .yaml.

    Raises:
        UsageError: There is no such study, or its file is not as this module describes.
    """
    if name.endswith((SUFFIX, ".yml")):
        return read_study(Path(name))
    if name not in study_names():
        raise unknown_name("no study is named", name, study_names())
    return read_study(FOLDER / f"{name}{SUFFIX}")


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        UsageError: It cannot be read, or is not as this module describes; the message names the file and the key.
    """
    values = read_yaml(path, f"the study {path}")
    _check_keys(values, path)
    with locate_errors(f"{path}, recipe"):
        recipe = parse_fields(values.get("recipe", {}), (*RECIPE_FIELDS, "temperature"))
        _check_recipe(recipe)
    with locate_errors(f"{path}, defaults"):
        defaults = parse_fields(values.get("defaults", {}), (*AXES, *RECIPE_FIELDS))
    base = {**recipe, **defaults}
    cells = _read_cells(values["cells"], base, path)
    _check_axes(values.get("order", []), f"{path}, order")
    net = str(defaults.get("student", next(iter(cells)).student))
    with locate_errors(f"{path}, teachers"):
        teachers = _read_teacher_recipe(values.get("teachers", {}), recipe, net)
    with locate_errors(f"{path}, dynamics"):
        dynamics = _read_dynamics(values.get("dynamics", {}), net)
    return Study(
        name=path.stem,
        title=values["title"],
        source=values["source"],
        cells=tuple(cells),
        order=tuple(values.get("order", ())),
        recipe=recipe,
        teachers=teachers,
        dynamics=dynamics,
        cache_views=_read_cache_views(values.get("cache", {}), path),
        published=read_published(values.get("published", {}), base, cells, path),
        teacher_top1=read_teachers(values.get("teacher_top1", {}), path),
        reported=_read_sentences(values.get("reported", []), path),
        plot=_read_plot(values.get("plot"), tuple(cells), path),
        samples=_read_samples(values.get("samples", 50_000), path),
        argument=path.stem if path.parent == FOLDER else str(path),
    )


def _check_keys(values: Any, path: Path) -> None:
    if not isinstance(values, dict):
        raise UsageError(f"the study {path} is not a mapping: write title, source and cells")
    for key, value in values.items():
        if key not in _KINDS:
            raise unknown_name(f"the study {path} has no key", str(key), _KINDS)
        kind = _KINDS[key]
        if not isinstance(value, kind) or isinstance(value, bool) or value in ("", []):
            raise UsageError(f"{path}, {key}, is {value!r}: write {_WORDS[kind]}")
    for key in _REQUIRED:
        if key not in values:
            raise UsageError(f"the study {path} has no {key}: add it")


def _check_recipe(recipe: Values) -> None:
    """Check a recipe as far as it depends on neither the network nor the loss."""
    fields: dict[str, Any] = {name: value for name, value in recipe.items() if name not in _OF_STUDENTS}
    RunConfig("any", **fields)


def _read_cells(entries: list[Any], base: Values, path: Path) -> dict[Cell, None]:
    """Return the cells in the order in which the file first names them."""
    cells: dict[Cell, None] = {}
    for number, entry in enumerate(entries, 1):
        with locate_errors(f"{path}, cells, entry {number}"):
            if not isinstance(entry, dict):
                raise UsageError(f"it is {entry!r}: write values or lists of values by axis")
            cells.update(dict.fromkeys(expand(entry, base)))
    return cells


def _read_teacher_recipe(given: Mapping[str, Any], recipe: Values, net: str) -> Values:
    """Return the recipe of teachers: that of the students, and what the file changes."""
    own: dict[str, Any] = {name: value for name, value in recipe.items() if name not in _OF_STUDENTS}
    own |= parse_fields(given, RECIPE_FIELDS)
    RunConfig(net, **own)
    return own


def _read_dynamics(given: Mapping[str, Any], net: str) -> dict[str, Any]:
    """Return the settings of the recording, checked as it checks them; of the network `net` if none is named."""
    recording = {name: value for name, value in given.items() if name in ("net", *RECORDING_FIELDS)}
    for name, value in recording.items():
        kind = str if name in ("net", "record") else int
        if type(value) is not kind:
            raise UsageError(f"`{name}` is {value!r}: write {'a word' if kind is str else 'an integer'}")
    rest = {name: value for name, value in given.items() if name not in recording}
    trained = {**_DYNAMICS, **parse_fields(rest, RECIPE_FIELDS)}
    RunConfig(recording.get("net", net), **trained)
    RecordingConfig(**{name: value for name, value in recording.items() if name != "net"})
    return {"net": net, **recording, **trained}


def _read_cache_views(given: Mapping[str, Any], path: Path) -> int:
    views = given.get("views", 1)
    if set(given) - {"views"} or type(views) is not int or views < 1:
        raise UsageError(f"{path}, cache, is {given}: write views, an integer of at least 1")
    return views


def _read_samples(given: int, path: Path) -> int:
    if given < 1:
        raise UsageError(f"{path}, samples, is {given}: write an integer of at least 1")
    return given


def _read_sentences(given: list[Any], path: Path) -> tuple[str, ...]:
    for sentence in given:
        if not isinstance(sentence, str) or not sentence:
            raise UsageError(f"{path}, reported, has {sentence!r}: write a sentence")
    return tuple(given)


def _check_axes(names: Any, where: str) -> None:
    for name in names:
        if not isinstance(name, str) or (name not in AXES and name not in RECIPE_FIELDS):
            raise unknown_name(f"{where}: there is no axis", str(name), [*AXES, *RECIPE_FIELDS])


def _read_plot(given: Mapping[str, Any] | None, cells: tuple[Cell, ...], path: Path) -> Plot | None:
    if given is None:
        return None
    lines = given.get("lines", [])
    if set(given) - {"x", "lines"} or "x" not in given or not isinstance(lines, list):
        raise UsageError(f"{path}, plot, is {dict(given)}: write x, an axis, and lines, a list of axes")
    _check_axes((given["x"], *lines), f"{path}, plot")
    plot = Plot(given["x"], tuple(lines))
    drawn: dict[tuple[Any, ...], Cell] = {}
    for cell in filter(plot.has_place, cells):
        other = drawn.setdefault(tuple(cell.value(name) for name in (plot.x, *lines)), cell)
        if other != cell:
            apart = next(name for name in (*AXES, *RECIPE_FIELDS) if cell.value(name) != other.value(name))
            raise UsageError(f"{path}, plot, draws cells that differ in {apart} as one: add {apart} to lines")
    return plot
