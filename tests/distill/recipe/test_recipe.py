"""Each setting of a recipe against its definition, in float64 or by hand."""

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from kdfast.data.augment.presets import augment_source
from kdfast.data.loaders import ResidentLoader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import compute_normalization
from kdfast.data.views import apply_views
from kdfast.distillation.batches import Batches
from kdfast.distillation.config import RunConfig
from kdfast.distillation.losses.settings import TermSetting
from kdfast.distillation.plan import LoadedInputs, Plan
from kdfast.distillation.recipe.average import WeightAverage
from kdfast.distillation.recipe.mixing import Mixing, mix_images, partner_labels
from kdfast.distillation.recipe.optimizer import OPTIMIZERS, ScheduledOptimizer
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.trainer import Trainer
from kdfast.distributed.group import Distributed
from kdfast.errors import UsageError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model

IDS = np.arange(0, 210, 3, dtype=np.int64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def make_plan() -> Callable[..., Plan]:
    """Return a function that plans a run of 6 steps: of 32, 32 and 6 samples in each of two epochs."""
    plain = open_source("digits")
    torch.manual_seed(5)
    net = build_net("resnet8", 10).eval()
    teacher = Model(net, "resnet8", 10, tuple("0123456789"), compute_normalization(plain.train), {})

    def make(*, augment: str | None = None, online: bool = False, **settings: Any) -> Plan:
        source, views = augment_source(plain, augment, 0)
        targets = TeacherTargets(model=teacher) if online else TeacherTargets()
        inputs = LoadedInputs(source, ResidentLoader(source.train), compute_normalization(source.train), targets)
        given = {"epochs": 2, "batch_size": 32, "lr": 0.05, "alpha": 0.5 if online else 0.0, "views": views}
        return inputs.plan(RunConfig("resnet8", **{**given, **settings}), IDS, device=CPU)

    return make


def first_batch(trainer: Trainer) -> Any:
    return next(trainer.batches.epoch(0))


RECIPES: list[dict[str, Any]] = [
    {"optimizer": "nesterov", "ema": 0.9, "label_smoothing": 0.1},
    {"online": True, "mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1, "ema": 0.99},
    {"online": True, "augment": "randaugment:n=2,m=5", "optimizer": "adamw", "lr": 0.002, "clip": 1.0},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: ", ".join(recipe))
def test_a_resumed_run_ends_with_the_same_bits(make_plan: Callable[..., Plan], recipe: dict[str, Any]) -> None:
    whole, resumed = (Trainer(make_plan(**recipe)) for _ in range(2))

    def advance(trainer: Trainer, stop: int) -> None:
        while trainer.step < stop:
            for batch in trainer.batches.epoch(trainer.epoch, trainer.step % trainer.batches.per_epoch):
                trainer.train_step(batch)
                if trainer.step == stop:
                    return

    advance(whole, 2)
    file = io.BytesIO()
    torch.save(whole.state(), file)
    file.seek(0)
    advance(whole, 4)
    resumed.load_state(torch.load(file))
    advance(resumed, 4)
    assert resumed.model().digest == whole.model().digest


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_updates_are_those_of_the_definition(kind: str) -> None:
    gradients = np.random.default_rng(0).normal(size=(4, 3))
    start, decay, beta = np.array([1.0, -2.0, 0.5]), 0.1, 0.9
    rates = [0.1, 0.05, 0.2, 0.1]
    parameter = nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = ScheduledOptimizer(
        [parameter], rates.__getitem__, 4, kind=kind, momentum=beta, weight_decay=decay, device=CPU
    )
    weights, first, second = start.copy(), np.zeros(3), np.zeros(3)
    for step, (rate, gradient) in enumerate(zip(rates, gradients, strict=True)):
        optimizer.set_rate(step, torch.tensor(step))
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.inner.step()
        if kind == "adamw":
            weights *= 1 - rate * decay
            first = beta * first + (1 - beta) * gradient
            second = 0.999 * second + 0.001 * gradient**2
            unbiased = first / (1 - beta ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            weights -= rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        else:
            decayed = gradient + decay * weights
            first = decayed if step == 0 else beta * first + decayed
            weights -= rate * (decayed + beta * first if kind == "nesterov" else first)
    np.testing.assert_allclose(parameter.detach().numpy(), weights, rtol=1e-5)


def test_average_of_weights_and_buffers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).train()
    average = WeightAverage(net, 0.6)
    expected = {name: value.double() for name, value in net.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        net(torch.randn(4, 3, 2, 2, generator=generator) + step)
        for parameter in net.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
        average.update(torch.tensor(step))
        keep = min(0.6, (1 + step) / (10 + step))
        for name, value in net.state_dict().items():
            counts = not value.is_floating_point()
            expected[name] = value.double() if counts else keep * expected[name] + (1 - keep) * value.double()
    found = average.net.state_dict()
    assert found["1.num_batches_tracked"] == 12
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)
    assert not average.net.training
    assert not any(parameter.requires_grad for parameter in average.net.parameters())


def test_the_average_is_the_student_and_does_not_change_the_training(make_plan: Callable[..., Plan]) -> None:
    plain, averaged = Trainer(make_plan()), Trainer(make_plan(ema=0.5))
    for trainer in (plain, averaged):
        for batch in trainer.batches.epoch(0):
            trainer.train_step(batch)
    assert averaged.model().digest != plain.model().digest
    for name, value in plain.net.state_dict().items():
        assert torch.equal(averaged.net.state_dict()[name], value), name
    assert "average" not in plain.state()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_clipping_scales_the_gradient_of_all_parameters_together(
    make_plan: Callable[..., Plan], precision: str
) -> None:
    moved, settings = [], {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "precision": precision}
    for clip in (0.0, 0.01, 1e6):
        trainer = Trainer(make_plan(clip=clip, **settings))
        before = [p.detach().clone() for p in trainer.net.parameters()]
        trainer.train_step(first_batch(trainer))
        steps = [(b - p.detach()).flatten() / 0.05 for b, p in zip(before, trainer.net.parameters(), strict=True)]
        moved.append(torch.cat(steps))
    free, clipped, loose = moved
    assert float(free.norm()) > 0.02
    torch.testing.assert_close(loose, free)
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-3)
    assert float(F.cosine_similarity(clipped, free, 0)) == pytest.approx(1, abs=1e-4)


def naive_loss(trainer: Trainer, logits: torch.Tensor, batch: Any, share: float) -> float:
    """Return the loss of a batch from target distributions, in float64."""
    config, classes = trainer.plan.config, logits.shape[1]
    logs = logits.double().log_softmax(1)
    labels = trainer.labels[batch.ids]
    total = 0.0
    for i in range(len(labels)):
        target = torch.full((classes,), config.label_smoothing / classes, dtype=torch.float64)
        target[labels[i]] += (1 - config.label_smoothing) * share
        target[labels[i - 1]] += (1 - config.label_smoothing) * (1 - share)
        total -= config.cross_entropy_weight * float((target * logs[i]).sum())
        if batch.teacher is not None:
            t = config.temperature
            p, q = (x[i].double().div(t).log_softmax(0) for x in (logits, batch.teacher))
            total += config.alpha * t**2 * float((q.exp() * (q - p)).sum())
    return total / len(labels)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"label_smoothing": 0.2}, {"mixup": 0.7}, {"cutmix": 1.0, "label_smoothing": 0.1}, {"mixup": 1.0, "ce": 2.0}],
)
def test_loss_is_that_of_the_mixed_and_smoothed_labels(
    make_plan: Callable[..., Plan], settings: dict[str, Any], online: bool
) -> None:
    trainer = Trainer(make_plan(online=online, **settings))
    batch = first_batch(trainer)
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(len(batch.ids), 10, generator=generator) for _ in range(2))
    batch = dataclasses.replace(batch, teacher=teacher if online else None, index=batch.index[:2])
    share = 1.0 if batch.mixing is None else float(batch.mixing[0])
    found = float(trainer.compute_loss(logits, batch))
    assert found == pytest.approx(naive_loss(trainer, logits, batch, share), rel=1e-5)


def test_teacher_and_student_see_the_same_mixed_batch(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(online=True, mixup=0.5, cutmix=0.5)
    trainer = Trainer(plan)
    seen: dict[str, torch.Tensor] = {}
    trainer.net.register_forward_pre_hook(lambda module, inputs: seen.update(student=inputs[0]))
    plan.targets._net.register_forward_pre_hook(lambda module, inputs: seen.update(teacher=inputs[0]))  # type: ignore[union-attr]
    batch = first_batch(trainer)
    trainer.train_step(batch)
    torch.testing.assert_close(seen["student"], seen["teacher"])  # both have the data's statistics
    own = apply_views(batch.images, batch.view_ids, plan.source.view_spec, plan.normalization, rows=batch.ids)
    assert not torch.equal(seen["student"], own)
    torch.testing.assert_close(seen["student"], mix_images(own, batch.mixing))


def test_images_are_mixed_with_their_neighbors() -> None:
    images = torch.randn(4, 3, 5, 6)
    mixup = torch.tensor([0.3, 0.3, 0.3, 0, 0, 0, 0])
    for i in range(4):
        torch.testing.assert_close(mix_images(images, mixup)[i], 0.3 * images[i] + 0.7 * images[i - 1])
    cut = mix_images(images, torch.tensor([0.8, 1.0, 0.0, 1, 2, 3, 5]))  # rows 1 and 2, columns 2 to 4
    for i in range(4):
        expected = images[i].clone()
        expected[:, 1:3, 2:5] = images[i - 1][:, 1:3, 2:5]
        assert torch.equal(cut[i], expected)
    assert partner_labels(torch.tensor([5, 6, 7, 8])).tolist() == [8, 5, 6, 7]


@pytest.mark.parametrize("a", [0.2, 1.0, 4.0])
def test_shares_have_the_beta_distribution(a: float) -> None:
    batches = np.arange(5000)
    mixup = Mixing(a, 0.0, (32, 32)).draw(1, 0, batches)
    assert stats.kstest(mixup[:, 0], stats.beta(a, a).cdf).pvalue > 1e-3
    assert (mixup[:, 0] == mixup[:, 1]).all()
    assert (mixup[:, 0] == mixup[:, 2]).all()


def test_boxes_of_cutmix_have_the_share_of_their_area() -> None:
    rows = Mixing(0.0, 1.0, (40, 24)).draw(1, 0, np.arange(4000)).astype(np.float64)
    share, outside, inside, top, left, bottom, right = rows.T
    assert set(outside) == {1.0}
    assert set(inside) == {0.0}
    assert (top >= 0).all()
    assert (bottom <= 40).all()
    assert (right <= 24).all()
    np.testing.assert_allclose(share, 1 - (bottom - top) * (right - left) / 960, rtol=1e-6)
    # A box that lies inside has sides of the same share, whose squares are uniform for a = 1.
    whole = (top > 0) & (left > 0) & (bottom < 40) & (right < 24)
    np.testing.assert_allclose((bottom - top)[whole] / 40, (right - left)[whole] / 24, atol=2 / 24)
    assert abs(np.mean((top + bottom) / 2) - 20) < 1
    both = Mixing(1.0, 1.0, (40, 24)).draw(1, 0, np.arange(4000))
    assert np.mean(both[:, 5] > 0) == pytest.approx(0.5, abs=0.05)


def test_mixing_depends_on_seed_epoch_and_batch_alone(make_plan: Callable[..., Plan]) -> None:
    mixing = Mixing(0.5, 0.5, (8, 8))
    whole = mixing.draw(3, 2, np.arange(10))
    np.testing.assert_array_equal(mixing.draw(3, 2, np.arange(4, 10)), whole[4:])
    assert not np.array_equal(mixing.draw(4, 2, np.arange(10)), whole)
    assert not np.array_equal(mixing.draw(3, 3, np.arange(10)), whole)
    source = open_source("digits")
    shares = [
        [batch.mixing for batch in Batches(
            IDS, ResidentLoader(source.train), source.view_spec, n_views=9, view_seed=0, targets=None, batch_size=32,
            seed=1, distributed=Distributed(rank, 2), mixing=mixing,
        ).epoch(1, first=1)]
        for rank in range(2)
    ]  # fmt: skip
    expected = torch.from_numpy(mixing.draw(1, 1, np.arange(1, 3)))
    for rank in range(2):
        assert torch.equal(torch.stack(shares[rank]), expected)


def test_settings_at_their_default_are_not_in_the_identity(make_plan: Callable[..., Plan]) -> None:
    names = {"optimizer", "label_smoothing", "ema", "clip", "mixup", "cutmix"}
    plain = make_plan().identity
    assert not names & set(plain)
    given = {"optimizer": "adamw", "label_smoothing": 0.1, "ema": 0.9, "clip": 1.0, "mixup": 0.1, "cutmix": 0.2}
    changed = make_plan(augment="trivial", **given).identity
    assert {name: changed[name] for name in names} == given
    assert changed["augmentation"]["policy"] == "trivial"
    assert "policy" not in plain["augmentation"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adam"}, "`optimizer` is 'adam': pass one of sgd, nesterov, adamw"),
        ({"optimizer": "nesterov", "momentum": 0.0}, "nesterov, which needs momentum"),
        ({"ema": 1.0}, r"`ema` is 1.0: pass a number in \[0, 1\)"),
        ({"label_smoothing": -0.1}, "`label_smoothing` is -0.1"),
        ({"clip": float("inf")}, "`clip` is inf"),
        ({"mixup": 1e9}, "`mixup` is 1000000000.0: pass at most 1000.0"),
        ({"mixup": 0.1, "terms": (TermSetting("dkd"),)}, "the term dkd compares with one label per image"),
        ({"mixup": 0.1, "terms": (TermSetting("crd"),)}, "the term crd compares with one label per image"),
        ({"cutmix": 1.0, "terms": (TermSetting("crd"),)}, "the term crd compares with one label per image"),
    ],
)
def test_rejects(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RunConfig("resnet8", **settings)
