"""Study files: what they say, against lists written by hand; what is wrong in them, against lines of one message."""

from pathlib import Path

import pytest

from kdfast.errors import UsageError
from kdfast.reproduction.cells import make_cell
from kdfast.reproduction.selection import check_epochs, compressed_epochs, parse_restrictions, select_cells
from kdfast.reproduction.study import Study
from kdfast.reproduction.study_file import load_study

GOOD = """
title: T
source: S
recipe: {epochs: 100, batch_size: 10, temperature: 2}
defaults: {student: resnet8, teacher: resnet14}
cells:
  - {method: [forgetting, random], fraction: [0.5, 0.25], kd: [on, off]}
  - {fraction: 1, kd: off}
  - {fraction: 0.25, kd: [off], method: random}
  - {fraction: 1.0, match_steps_of: 0.25, alpha: 1}
  - {fraction: 0.5, epochs: 7, term: "sp", ce_weight: 1, alpha: 2}
order: [fraction, method]
published:
  cifar10:
    - {kd: off, method: random, fraction: [0.25, 0.5], top1: [50, 60.5]}
    - {fraction: 1, kd: off, top5: 99, note: from the text}
plot: {x: fraction, lines: [method, kd, term]}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def read(tmp_path: Path, text: str = GOOD) -> Study:
    return load_study(str(write(tmp_path, text)))


def test_cells_are_the_union_of_products_each_once(tmp_path: Path) -> None:
    study = read(tmp_path)
    teacher = "alpha=0.5 temperature=2 teacher=resnet14 teacher_fraction=1"
    schedule = " epochs=100 batch_size=10"
    assert {str(cell)[-len(schedule) :] for cell in study.cells[:-1]} == {schedule}
    assert [str(cell).removesuffix(schedule) for cell in study.cells] == [
        f"method=forgetting fraction=0.5 kd=on {teacher} student=resnet8",
        "method=forgetting fraction=0.5 kd=off student=resnet8",
        f"method=forgetting fraction=0.25 kd=on {teacher} student=resnet8",
        "method=forgetting fraction=0.25 kd=off student=resnet8",
        f"method=random fraction=0.5 kd=on {teacher} student=resnet8",
        "method=random fraction=0.5 kd=off student=resnet8",
        f"method=random fraction=0.25 kd=on {teacher} student=resnet8",
        "method=random fraction=0.25 kd=off student=resnet8",
        "method=random fraction=1 kd=off student=resnet8",
        f"method=random fraction=1 kd=on {teacher.replace('0.5', '1')} student=resnet8 match_steps_of=0.25",
        "method=random fraction=0.5 kd=on alpha=2 temperature=2 ce_weight=1 term=sp term_weight=1 teacher=resnet14 "
        "teacher_fraction=1 student=resnet8 epochs=7 batch_size=10",
    ]
    assert study.varying() == (
        "method", "fraction", "kd", "alpha", "ce_weight", "term", "match_steps_of", "epochs"
    )  # fmt: skip


def test_runs_are_ordered_by_the_axes_and_matched_steps_stand_with_their_fraction(tmp_path: Path) -> None:
    shown = [(c.match_steps_of or c.fraction, c.method, c.kd, c.term) for c in read(tmp_path).sorted()]
    assert shown == [
        (0.5, "forgetting", True, None), (0.5, "forgetting", False, None),
        (0.5, "random", True, None), (0.5, "random", False, None), (0.5, "random", True, "sp"),
        (0.25, "forgetting", True, None), (0.25, "forgetting", False, None),
        (0.25, "random", True, None), (0.25, "random", False, None), (0.25, "random", True, None),
        (1, "random", False, None),
    ]  # fmt: skip


def test_epochs_follow_the_recipe_the_matched_steps_and_a_shorter_schedule(tmp_path: Path) -> None:
    study = read(tmp_path)
    plain, matched, own = study.cells[0], study.cells[9], study.cells[10]
    # 100 samples: 3 batches of 10 in a quarter, 10 in all; 100 epochs x 3 steps = 30 epochs x 10 steps.
    assert [compressed_epochs(study, cell, None, 100) for cell in (plain, matched, own)] == [100, 30, 7]
    assert [compressed_epochs(study, cell, 50, 100) for cell in (plain, matched, own)] == [50, 15, 4]
    assert [compressed_epochs(study, cell, 1, 100) for cell in (plain, matched, own)] == [1, 1, 1]


def test_published_values_belong_to_cells(tmp_path: Path) -> None:
    study = read(tmp_path)
    assert study.published == {
        "cifar10": {study.cells[7]: {"top1": 50.0}, study.cells[5]: {"top1": 60.5}, study.cells[8]: {"top5": 99.0}}
    }


def test_axes_without_effect_do_not_tell_cells_apart() -> None:
    base = {"kd": False, "fraction": 0.5, "epochs": 2}
    plain = make_cell(base)
    assert make_cell({**base, "alpha": 0.9, "teacher": "resnet14", "temperature": 2.0, "term": "sp"}) == plain
    assert make_cell({**base, "kd": True, "alpha": 0.0}) == plain, "alpha 0 without a term is training without KD"
    assert make_cell({**base, "method": "el2n:use=cache"}).teacher == "resnet32", "its scores are the teacher's"
    assert make_cell({**base, "disjoint": True, "teacher_fraction": 0.5}).teacher_fraction == 0.5
    full = make_cell({"kd": False, "fraction": 1.0, "method": "forgetting", "epochs": 2})
    assert full == make_cell({"kd": False, "epochs": 2})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: T", "titel: T", "has no key 'titel': did you mean 'title'"),
        ("title: T\n", "", "has no title: add it"),
        ("source: S", "source: 3", "source, is 3: write a text"),
        ("order: [fraction, method]", "order: [fraktion]", "order: there is no axis 'fraktion': did you mean"),
        ("epochs: 100", "epochs: many", "recipe: epochs is 'many': write a number (int)"),
        ("epochs: 100", "epoch: 100", "recipe: there is no key 'epoch': did you mean 'epochs'"),
        ("epochs: 100", "epochs: 0", "recipe: epochs is 0: pass an integer of at least 1"),
        ("kd: [on, off]", "kd: [maybe]", "cells, entry 1: kd is 'maybe': write on or off"),
        ("kd: [on, off]", "kd: []", "cells, entry 1: kd is an empty list"),
        ("[forgetting, random]", "[forgotten]", "entry 1: methods: no method is named 'forgotten': did you mean"),
        ("[forgetting, random]", "[3]", "cells, entry 1: method is 3: write a name"),
        ("[0.5, 0.25]", "[1.5]", "cells, entry 1: fraction is 1.5: write a number above 0 and at most 1"),
        ("alpha: 1}", "alpha: 2}", "cells, entry 4: alpha is 2: write a number of at most 1, or add ce_weight"),
        ('"sp"', '"spp"', "cells, entry 5: term is 'spp': no term of the loss is named 'spp'"),
        ("top1: [50, 60.5]", "top1: 50", "entry 1: it has 2 cells and 1 values of top1: write one for each cell"),
        ("top1: [50, 60.5]", "top1: [50, 101]", "entry 1: top1 is 101: write a number of percent"),
        ("fraction: [0.25, 0.5], top1", "fraction: [0.25, 0.3], top1", "entry 1: no cell of the study is "),
        ("top5: 99", "fraction: 0.5, top1: 60", "has the key fraction twice: write it once"),
        ("{x: fraction,", "{x: speed,", "plot: there is no axis 'speed'"),
        ("kd, term]", "kd]", "plot, draws cells that differ in alpha as one: add alpha to lines"),
        ("top1: [50, 60.5]", "top1: [50, 0.6]", "entry 1: top1 is 0.6: write percent, such as 60 for 0.6"),
        ("batch_size: 10", "batch_size: 10, lr: 5e-2", "recipe: lr is '5e-2', a word in YAML: write 0.05"),
        ("batch_size: 10", "batch_size: 10, lr: -1", "recipe: lr is -1"),
        ("title: T", "title: T\nreported: [1]", "reported, has 1: write a sentence"),
        ("kd: [on, off]", "kd: [[on]]", "cells, entry 1: kd is [True]: write on or off"),
        ("kd: [on, off]", "kd: {a: 1}", "cells, entry 1: kd is {'a': 1}: write on or off"),
        ("[0.5, 0.25]", "[1" + 400 * "0" + "]", ": write a number"),
        ("{fraction: 1, kd: off}", "{fraction: 1, kd: off, method: rondom}", "no method is named 'rondom'"),
        ("order: [fraction,", "order: [[fraction],", "order: there is no axis \"['fraction']\""),
        ("{x: fraction,", "{x: [fraction],", "plot: there is no axis \"['fraction']\""),
        ("title: T", "title: T\nsamples: 0", "samples, is 0: write an integer of at least 1"),
        ("title: T", "title: T\ncache: {views: on}", "cache, is {'views': True}: write views"),
        ("title: T", "title: T\ndynamics: {runs: many}", "dynamics: runs is 'many': write an integer"),
        ("title: T", "title: T\ndynamics: {net: 5}", "dynamics: net is 5: write a word"),
        ("title: T", "title: T\ndynamics: {epochs: -1}", "dynamics: epochs is -1: pass an integer of at least 1"),
        ("title: T", "title: T\ndynamics: {record_every: 0}", "dynamics: record_every is 0: pass an integer"),
        ("title: T", "title: T\nteachers: {epochs: 0}", "teachers: epochs is 0: pass an integer of at least 1"),
        ("title: T", "title: &a T", "has the anchor or alias a: write the value out"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        load_study(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_teachers_have_the_recipe_but_what_belongs_to_a_loss_with_a_teacher(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        "title: T\nsource: S\nrecipe: {epochs: 9, batch_size: 10, temperature: 2, terms_warmup_epochs: 3}\n"
        "teachers: {epochs: 5}\ncells: [{fraction: 0.5, term: sp}]\n",
    )
    assert study.teachers == {"epochs": 5, "batch_size": 10}
    assert dict(study.cells[0].recipe)["terms_warmup_epochs"] == 3
    (cell,) = study.cells
    assert cell.run_config(epochs=3, seed=0, precision="fp32").terms_warmup_epochs == 1, "a third of the schedule"


def test_an_initial_phase_is_shortened_to_whole_epochs_but_never_all(tmp_path: Path) -> None:
    text = "title: T\nsource: S\nrecipe: {epochs: 40, initial_epochs: 8}\ncells: [{fraction: 0.5, term: ab}]\n"
    (cell,) = read(tmp_path, text).cells
    found = [cell.run_config(epochs=e, seed=0, precision="fp32").initial_epochs for e in (40, 13, 2, 1)]
    assert found == [8, 3, 1, 0]


def test_a_cell_names_what_its_recipe_changes() -> None:
    cells = {str(cell): cell for cell in load_study("logit-terms").cells}
    assert len(cells) == len(load_study("logit-terms").cells)
    assert sum("label_smoothing=0.1" in name for name in cells) == 1


def test_a_schedule_may_be_shortened_alone(tmp_path: Path) -> None:
    study = read(tmp_path)
    assert check_epochs(study, 40) == 40
    assert check_epochs(study, 100) is None, "that is the published schedule"
    with pytest.raises(UsageError, match="`epochs` is 101, and the recipe of mine has 100: pass fewer"):
        check_epochs(study, 101)


def test_a_published_cell_has_one_value(tmp_path: Path) -> None:
    twice = GOOD.replace("    - {fraction: 1,", "    - {kd: off, fraction: 0.5, top1: 61}\n    - {fraction: 1,")
    with pytest.raises(UsageError, match=r"entry 2: the cell .* has a published value already"):
        read(tmp_path, twice)


def test_unknown_names_of_studies_are_compared_with_the_known() -> None:
    with pytest.raises(UsageError, match="no study is named 'fig33': did you mean 'fig3'"):
        load_study("fig33")
    with pytest.raises(UsageError, match=r"missing\.yaml cannot be read: No such file"):
        load_study("missing.yaml")


def test_restrictions_keep_what_they_do_not_concern(tmp_path: Path) -> None:
    study = read(tmp_path)

    def count(*texts: str, **limits: list) -> int:
        return len(select_cells(study, parse_restrictions(texts), **limits))

    assert count() == 11
    assert count("kd=off") == 5
    assert count("fraction=.25,1") == 6
    assert count("alpha=1") == 6, "runs without the teacher stay"
    assert count("alpha=1", "kd=on") == 1
    assert count("method=forgetting/hard") == count("method=forgetting") == 4
    assert count("term=none") == 10
    assert count("epochs=7") == 1
    assert count(fractions=[0.25]) == 6, "all data stay, and those that match the steps of a quarter"
    assert count(fractions=[0.5]) == 6
    assert count(methods=["forgetting"]) == 6
    for wrong, message in (
        (["fraction=.3"], "no cell of mine has the fraction 0.3: they have 0.5, 0.25, 1"),
        (["speed=1"], "there is no axis 'speed'"),
        (["kd"], "write AXIS=VALUE"),
        (["kd=on", "kd=off"], "each axis once"),
        (["kd=maybe"], "`kd` is 'maybe': write on or off"),
        (["fraction=1", "method=forgetting"], "no cell of mine has all these values"),
    ):
        with pytest.raises(UsageError, match=message):
            count(*wrong)
