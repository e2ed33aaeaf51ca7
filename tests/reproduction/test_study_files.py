"""Every study that comes with kdfast: its names exist, its published values have one cell each, all data come along."""

import math

import pytest
import yaml

from kdfast.distillation.losses.settings import parse_terms
from kdfast.nets.registry import NETS
from kdfast.reproduction.cells import resolve
from kdfast.reproduction.published import FIGURES
from kdfast.reproduction.selection import compressed_epochs
from kdfast.reproduction.study import Study
from kdfast.reproduction.study_file import FOLDER, load_study, study_names

NAMES = study_names()
# Studies of all data.
ON_ALL_DATA = {"anchor"}
SMALL = 0.11  # fractions whose steps a run on all data must match


@pytest.fixture(scope="module", params=NAMES)
def study(request: pytest.FixtureRequest) -> Study:
    return load_study(request.param)


def test_the_papers_figures_and_tables_are_there() -> None:
    figures = {"fig3", "fig4-imagenet", "fig5", "fig6", "fig7", "fig8", "fig11", "fig12", "table1", "anchor"}
    second = {"if-beta", "if-beta-policies", "if-beta-terms", "if-beta-networks", "if-beta-imagenet", "if-beta-cost"}
    assert figures | second <= set(NAMES)


def test_networks_terms_and_methods_exist(study: Study) -> None:
    for cell in study.cells:
        for net in {cell.student, cell.teacher} - {None}:
            assert net in NETS or str(net).startswith("torchvision:")
        if cell.term is not None:
            assert parse_terms([cell.term], [cell.term_weight or 0.0])
        resolve(cell.method)
    teachers = {cell.teacher for cell in study.cells}
    assert all(set(known) <= teachers for known in study.teacher_top1.values())


def test_published_values_are_one_for_each_cell_named(study: Study) -> None:
    given = yaml.safe_load((FOLDER / f"{study.name}.yaml").read_text()).get("published", {})
    for kind, entries in given.items():
        named = [max([1, *(len(v) for v in entry.values() if isinstance(v, list))]) for entry in entries]
        assert len(study.published[kind]) == sum(named)
        for cell, figures in study.published[kind].items():
            assert cell in study.cells
            assert figures.keys() <= set(FIGURES)
            assert all(1 < value < 100 for value in figures.values())


@pytest.mark.parametrize("epochs", [1, 10])
def test_every_schedule_can_be_shortened(study: Study, epochs: int) -> None:
    for cell in study.cells:
        shorter = compressed_epochs(study, cell, epochs, 50_000)
        config = cell.run_config(epochs=shorter, seed=0, precision="fp32")
        phases = dict(cell.recipe)["warmup_epochs"] + dict(cell.recipe)["terms_warmup_epochs"]
        assert config.warmup_epochs + config.terms_warmup_epochs == pytest.approx(
            phases * shorter / dict(cell.recipe)["epochs"]
        )


def test_all_data_come_along_with_the_same_epochs_and_the_steps_of_small_fractions(study: Study) -> None:
    if study.name in ON_ALL_DATA:
        assert all(cell.fraction == 1 for cell in study.cells)
        return
    full = [cell for cell in study.cells if cell.fraction == 1]
    assert any(cell.kd and cell.match_steps_of is None for cell in full)
    assert any(not cell.kd and cell.match_steps_of is None for cell in full)
    small = min(cell.fraction for cell in study.cells)
    matched = {cell.match_steps_of for cell in full} - {None}
    assert matched
    assert any(math.isclose(small, fraction) or fraction <= SMALL for fraction in matched)


def test_sources_and_comments_name_where_values_come_from(study: Study) -> None:
    text = (FOLDER / f"{study.name}.yaml").read_text()
    if study.published:
        assert any(name in study.source for name in ("Ben-Baruch et al.", "Wu et al.", "RepDistiller"))
        assert "#" in text or study.name in ("fig3", "table1")  # whose values are all of the source itself


def test_anchor_has_the_weights_of_the_tuned_preset() -> None:
    for cell in load_study("anchor").cells:
        if cell.term is not None:
            assert cell.term_weight == parse_terms([cell.term], [], "tuned")[0].weight
