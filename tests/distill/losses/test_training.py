"""The trainer with terms: every term trains, phases, resuming, cached features, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch

from kdfast.data.loaders import ResidentLoader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import compute_normalization
from kdfast.distillation.config import Execution, RunConfig
from kdfast.distillation.losses.registry import LOSSES
from kdfast.distillation.losses.settings import TermSetting, parse_taps, parse_terms
from kdfast.distillation.plan import LoadedInputs
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.trainer import Trainer
from kdfast.errors import CacheMismatch, UsageError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.nets.taps import TapRecorder
from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.row_format import TopK

CPU = torch.device("cpu")
IDS = np.arange(100, dtype=np.int64)
CONFIG = RunConfig("resnet8", epochs=2, batch_size=50, lr=0.05, alpha=0.5, views=1)


@pytest.fixture(scope="module")
def source():
    return open_source("digits")


@pytest.fixture(scope="module")
def teacher(source):
    torch.manual_seed(1)
    return Model(build_net("resnet14", 10), "resnet14", 10, source.classes, compute_normalization(source.train), {})


@pytest.fixture(scope="module")
def inputs(source, teacher):
    statistics = compute_normalization(source.train)
    return LoadedInputs(source, ResidentLoader(source.train), statistics, TeacherTargets(model=teacher))


@pytest.fixture(scope="module")
def cached_inputs(inputs, source, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "c"
    build_cache(source, teacher, folder, n_views=4, dtype="float32")
    return dataclasses.replace(inputs, teacher=TeacherTargets(cache=TeacherCache.open(folder, source=source)))


def make_trainer(inputs, config=CONFIG, **changes):
    return Trainer(inputs.plan(dataclasses.replace(config, **changes), IDS, device=CPU))


def run(trainer, steps=None):
    until = trainer.total_steps if steps is None else trainer.step + steps
    while trainer.step < until:
        for batch in trainer.batches.epoch(trainer.epoch, trainer.step % trainer.batches.per_epoch):
            trainer.train_step(batch)
            if trainer.step == until:
                break
    trainer.check_finite()
    return trainer


def weights(trainer):
    return {name: x.clone() for name, x in trainer.net.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.filterwarnings("ignore:the term crd")
@pytest.mark.parametrize("name", LOSSES)
def test_every_term_changes_the_student_and_trains_its_own_parameters(inputs, name):
    initial = 1 if LOSSES[name].initial or LOSSES[name].prepares else None
    plain = weights(run(make_trainer(inputs)))
    trainer = make_trainer(inputs, terms=(TermSetting(name),), initial_epochs=initial)
    before = {key: x.clone() for key, x in trainer.terms.named_parameters()}
    run(trainer)
    assert not same(plain, weights(trainer))
    assert all(not torch.equal(x, before[key]) for key, x in trainer.terms.named_parameters())


@pytest.mark.filterwarnings("ignore:the term crd")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_term_computes_in_float32_at_any_precision(inputs, name, precision, monkeypatch):
    trainer = make_trainer(inputs, terms=(TermSetting(name),), initial_epochs=0, precision=precision)
    seen = []
    compute = trainer.terms.forward

    def spy(student, teacher, *args, **options):
        seen.extend(x.dtype for side in (student, teacher) for x in (side.logits, *side.taps.values()))
        assert teacher.taps.keys() == student.taps.keys()
        return compute(student, teacher, *args, **options)

    monkeypatch.setattr(trainer.terms, "forward", spy)
    run(trainer, steps=1)
    assert len(seen) == 2 * (1 + len(LOSSES[name].taps))
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize(
    ("epochs", "initial", "expected"),
    [(1, None, 0), (2, None, 1), (4, None, 1), (8, None, 1), (60, None, 8), (9, 0, 0)],
)
def test_the_initial_phase_is_an_eighth_at_least_one_epoch_and_never_all(epochs, initial, expected):
    config = dataclasses.replace(CONFIG, epochs=epochs, terms=(TermSetting("ab"),), initial_epochs=initial)
    assert config.initial_phase == expected
    with pytest.raises(UsageError, match=f"`initial_epochs` is {epochs} of {epochs} epochs, which leaves none"):
        dataclasses.replace(config, initial_epochs=epochs)


class InPlace(torch.nn.Module):
    """A network that changes what enters its activation."""

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.relu(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize(("place", "changed"), [("relu@input", True), ("first", True), ("relu", False)])
def test_a_tap_that_the_network_changes_in_place_is_refused(place, changed):
    net = InPlace()
    with TapRecorder(net, {"stage1": place}) as taps, torch.no_grad():
        net(torch.randn(2, 3, 8, 8))
    if changed:
        with pytest.raises(UsageError, match="changes 'stage1' in place"):
            taps.take()
    else:
        assert taps.take()["stage1"].min() == 0


def test_pooled_features_of_a_cache_serve_similarity(inputs, cached_inputs):
    config = dataclasses.replace(CONFIG, terms=(TermSetting("sp-pooled"),))
    online, cached = (make_trainer(given, config) for given in (inputs, cached_inputs))
    assert same(weights(run(make_trainer(cached_inputs, config))), weights(run(cached)))
    assert not same(weights(run(make_trainer(cached_inputs))), weights(cached))
    run(online)


def test_terms_leave_the_initial_weights_alone_and_a_weight_of_zero_the_final_ones(inputs):
    plain, with_term = make_trainer(inputs), make_trainer(inputs, terms=(TermSetting("vid", 0.0),))
    assert same(weights(plain), weights(with_term))
    assert same(weights(run(plain)), weights(run(with_term)))


@pytest.mark.filterwarnings("ignore:the term crd")
@pytest.mark.parametrize("names", [("vid", "rkd"), ("crd",)])
def test_a_stopped_run_continues_with_the_same_bits(inputs, names):
    config = dataclasses.replace(CONFIG, terms=tuple(map(TermSetting, names)))
    whole = run(make_trainer(inputs, config))
    first = run(make_trainer(inputs, config), steps=1)
    saved = first.state()
    second = make_trainer(inputs, config)
    second.load_state(saved)
    run(second)
    assert same(weights(whole), weights(second))
    assert same(whole.terms.state_dict(), second.terms.state_dict())


def test_variances_have_no_weight_decay(inputs):
    groups = make_trainer(inputs, terms=(TermSetting("vid"),)).optimizer.inner.param_groups
    rates = [group["weight_decay"] for group in groups]
    assert rates == [CONFIG.weight_decay, CONFIG.weight_decay, 0.0]
    assert sum(len(group["params"]) for group in groups[2:]) == 3


def test_activation_boundaries_train_alone_first_and_then_not_at_all(inputs):
    trainer = make_trainer(inputs, terms=(TermSetting("ab"),), initial_epochs=1)
    before = weights(trainer)
    run(trainer, steps=2)
    assert trainer.epoch == 1
    after = weights(trainer)
    assert torch.equal(before["fc.weight"], after["fc.weight"])
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])
    adapters = {name: x.clone() for name, x in trainer.terms.named_parameters()}
    run(trainer)
    assert not torch.equal(after["fc.weight"], trainer.net.state_dict()["fc.weight"])
    assert all(torch.equal(x, adapters[name]) for name, x in trainer.terms.named_parameters())


def test_factor_transfer_is_prepared_before_the_student_trains(inputs):
    trainer = make_trainer(inputs, terms=(TermSetting("ft"),), initial_epochs=1)
    before = {name: p.clone() for name, p in trainer.net.named_parameters()}
    translator = {n: p.clone() for n, p in trainer.terms.named_parameters() if "translator" in n}
    run(trainer, steps=2)
    assert all(torch.equal(p, before[name]) for name, p in trainer.net.named_parameters())
    encoder = {n: x.clone() for n, x in trainer.terms.state_dict().items() if "encoder" in n}
    run(trainer)
    assert same(encoder, {n: trainer.terms.state_dict()[n] for n in encoder}), "the fitted paraphraser is fixed"
    moved = {n for n, p in trainer.terms.named_parameters() if "translator" in n and not torch.equal(p, translator[n])}
    assert moved == set(translator)


def test_the_initial_phase_is_an_eighth_of_the_run():
    config = dataclasses.replace(CONFIG, epochs=240, terms=(TermSetting("fsp"),))
    assert config.initial_phase == 30
    assert dataclasses.replace(config, terms=(TermSetting("vid"),)).initial_phase == 0


@pytest.mark.filterwarnings("ignore:the term crd")
@pytest.mark.parametrize("name", ["pkt", "rkd", "dkd", "crd"])
def test_cached_outputs_train_as_the_teacher_does(inputs, cached_inputs, name):
    trainers = [run(make_trainer(x, terms=(TermSetting(name),)), steps=1) for x in (inputs, cached_inputs)]
    (online, cached) = (weights(trainer) for trainer in trainers)
    for key, x in online.items():
        torch.testing.assert_close(cached[key], x, rtol=1e-3, atol=1e-5)


def test_weights_of_terms_rise_over_the_warm_up(inputs):
    trainer = make_trainer(inputs, terms=(TermSetting("logit-mse"),), epochs=4, terms_warmup_epochs=2.0)
    factors = []
    for _ in range(6):
        factors.append(float(trainer._terms_weight()))
        run(trainer, steps=1)
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_weights_of_the_loss(inputs):
    """ce = 1 and alpha = 2 is three times the loss with alpha = 2/3, and a third of the rate makes up for it."""
    weighted = make_trainer(inputs, ce=1.0, alpha=2.0, lr=0.01, weight_decay=0.0)
    usual = make_trainer(inputs, alpha=2 / 3, lr=0.03, weight_decay=0.0)
    for trainer in (weighted, usual):
        run(trainer, steps=1)
    for key, x in weights(usual).items():
        torch.testing.assert_close(weights(weighted)[key], x, rtol=1e-4, atol=1e-6)


def test_a_run_without_terms_has_the_identity_it_always_had():
    assert not CONFIG.to_dict().keys() & {"ce", "terms", "taps", "initial_epochs", "terms_warmup_epochs"}
    fields = dataclasses.replace(CONFIG, ce=0.0, terms=parse_terms(["jsd:beta=0.2"], [])).to_dict()
    assert fields["ce"] == 0.0
    assert fields["terms"] == [{"name": "jsd", "weight": 1.0, "options": {"beta": 0.2, "temperature": 4.0}}]


def test_taps_by_name(inputs):
    taps = parse_taps(["student.stage2=layer3", "teacher.stage2=layer2.0"])
    trainer = make_trainer(inputs, terms=(TermSetting("fitnets"),), taps=taps)
    assert trainer.plan.terms.shapes.pairs(("stage2",)) == [((64, 2, 2), (32, 4, 4))]
    run(trainer, steps=1)


def test_terms_by_text():
    terms = parse_terms(["dkd:beta=2,temperature=1", "vid"], [0.5, 2.0])
    assert [(t.name, t.weight) for t in terms] == [("dkd", 0.5), ("vid", 2.0)]
    assert dict(terms[0].options) == {"alpha": 1.0, "beta": 2.0, "temperature": 1.0}
    assert [t.weight for t in parse_terms(["at", "ls"], [], "tuned")] == [1000.0, 9.0]


@pytest.mark.parametrize(
    ("texts", "weights", "message"),
    [
        (["vit"], [], "vid"),
        (["vid"], [-1.0], "the term vid has weight -1: pass a finite number, 0 or more"),
        (["vid"], [1.0, 2.0], "1 terms have 2 weights"),
        (["vid", "vid"], [], "names vid twice"),
        (["dkd:gamma=1"], [], "dkd has no option"),
        (["dkd:beta=x"], [], "write NAME or NAME:option=number"),
        (["dist:temperature=0"], [], r"the temperature of the term dist is 0.0: must be a positive number"),
        (["ls:temperature=-1"], [], r"the temperature of the term ls is -1.0: must be a positive number"),
    ],
)
def test_wrong_terms(texts, weights, message):
    with pytest.raises(UsageError, match=message):
        parse_terms(texts, weights)


@pytest.mark.parametrize("text", ["stage2=layer2", "student.stage9=layer2", "student.stage2=", "pupil.stage2=layer2"])
def test_wrong_taps(text):
    with pytest.raises(UsageError, match=r"write student\.NAME=MODULE"):
        parse_taps([text])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0, "ce": 0.0}, "every weight of the loss is 0"),
        ({"alpha": 1.5}, "pass a number in"),
        ({"ce": -1.0}, "`ce` is -1.0"),
        ({"initial_epochs": 1}, "no term trains alone first"),
        ({"terms": (TermSetting("fsp"),), "initial_epochs": 3}, "3 of 2 epochs"),
        ({"terms": (TermSetting("vid"),), "taps": (("student.stage1", "layr1"),)}, "layer1"),
        ({"terms": (TermSetting("fsp"),), "student": "wrn_40_2"}, "equal numbers of channels"),
        ({"taps": (("student.stage1", "layer1"),)}, r"`tap` names student.stage1, which no term of the loss reads"),
        (
            {"terms": (TermSetting("vid"),), "taps": (("teacher.stage1", "fc"),)},
            r"vid reads stage1 as \(channels, height, width\), and the teacher's has shape \(10,\)",
        ),
        (
            {"terms": (TermSetting("rkd"),), "taps": (("student.pooled", "layer3"),)},
            r"rkd reads pooled as \(features\), and the student's has shape \(64, 2, 2\)",
        ),
    ],
)
def test_refused_settings(inputs, changes, message):
    with pytest.raises(UsageError, match=message):
        make_trainer(inputs, **changes)


@pytest.mark.parametrize(("name", "views", "message"), [("vid", 1, "its stage1"), ("rkd", 4, "4 views")])
def test_a_cache_without_the_activations_is_refused(cached_inputs, name, views, message):
    with pytest.raises(CacheMismatch, match=f"{message}.*pass `teacher` instead of `cache`"):
        make_trainer(cached_inputs, terms=(TermSetting(name),), views=views)


def test_a_cache_of_some_classes_is_refused(inputs, source, teacher, tmp_path):
    build_cache(source, teacher, tmp_path / "c", n_views=1, top_k=TopK(3, 4.0))
    targets = TeacherTargets(cache=TeacherCache.open(tmp_path / "c", source=source))
    with pytest.raises(CacheMismatch, match=r"holds 3 classes.*needs all"):
        make_trainer(dataclasses.replace(inputs, teacher=targets), terms=(TermSetting("dist"),))


def test_a_network_without_default_taps_needs_names(inputs, teacher, source):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.Linear(4, 10)

        def forward(self, x):
            return self.fc(self.body(x).mean((2, 3)))

    targets = TeacherTargets(model=dataclasses.replace(teacher, net=Own()))
    own = dataclasses.replace(inputs, teacher=targets)
    with pytest.raises(UsageError, match=r"the teacher's stage2, and Own has no default.*`tap` teacher\.stage2=MODULE"):
        make_trainer(own, terms=(TermSetting("fitnets"),))
    run(make_trainer(own, terms=(TermSetting("fitnets"),), taps=(("teacher.stage2", "body"),)), steps=1)
    run(make_trainer(own, terms=(TermSetting("rkd"),)), steps=1)


class Tokens(torch.nn.Module):
    """Has activations without the axes of a map, without the batch's axis, and a module that it does not call."""

    def __init__(self):
        super().__init__()
        self.body, self.flat, self.spare = torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.Linear(4, 4), torch.nn.ReLU()
        self.tokens, self.fc = torch.nn.Identity(), torch.nn.Linear(4, 10)

    def forward(self, x):
        x = self.body(x).flatten(2).mT
        x = self.tokens(self.flat(x.flatten(0, 1)).view(x.shape))
        return self.fc(x.mean(1))


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("fitnets", "tokens", r"\(channels, height, width\), and the teacher's has shape \(4, 4\)"),
        ("fitnets", "flat", r"'flat' of Tokens has shape \(8, 4\) for a batch of 2 images"),
        ("fitnets", "spare", r"Tokens has 'spare', but does not call it"),
        ("sp", "tokens", None),
    ],
)
def test_activations_of_other_shapes(inputs, teacher, name, place, message):
    tokens = dataclasses.replace(inputs, teacher=TeacherTargets(model=dataclasses.replace(teacher, net=Tokens())))
    settings = {"terms": (TermSetting(name),), "taps": ((f"teacher.stage{2 if name == 'fitnets' else 3}", place),)}
    if message is None:
        run(make_trainer(tokens, **settings), steps=1)
    else:
        with pytest.raises(UsageError, match=message):
            make_trainer(tokens, **settings)


def test_a_place_in_a_teacher_that_does_not_run_is_refused(cached_inputs):
    with pytest.raises(UsageError, match=r"`tap` names teacher\.pooled, and the cache holds the teacher's features"):
        make_trainer(cached_inputs, terms=(TermSetting("pkt"),), taps=(("teacher.pooled", "fc@input"),))


def test_a_last_batch_of_one_sample(inputs):
    config = dataclasses.replace(CONFIG, batch_size=33, epochs=1)
    run(make_trainer(inputs, config, terms=(TermSetting("vid"), TermSetting("rkd"))))
    with pytest.raises(UsageError, match=r"a single sample, and the term review cannot.*another `batch_size`"):
        make_trainer(inputs, config, terms=(TermSetting("review"),))


def test_what_cannot_run_so(inputs):
    config = dataclasses.replace(CONFIG, terms=(TermSetting("vid"),))
    with pytest.raises(UsageError, match="`compile` cannot read activations"):
        inputs.plan(config, IDS, device=CPU, execution=Execution(compile=True))
