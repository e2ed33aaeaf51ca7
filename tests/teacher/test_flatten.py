"""Flattening: the formulas against naive loops, what moves and what stays, resuming, and flatter minima."""

import copy
import itertools
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast.data.holdout import hold_out
from kdfast.data.source import ArraySplit, Source
from kdfast.data.views import Normalization, ViewSpec
from kdfast.errors import CheckpointError, DataError, DivergedError, Interrupted, OutputError, UsageError
from kdfast.nets.checkpoint import Model, load_model, save_model
from kdfast.teacher.evaluate import evaluate
from kdfast.teacher.flatten import FlattenConfig, flatten_teacher
from kdfast.teacher.flatten.checkpoint import _seal
from kdfast.teacher.flatten.flattener import Flattener
from kdfast.teacher.flatten.perturbations import SHARPNESS, FilterNoise, FriendlySAM

SHAPES = ((3, 2, 3, 3), (3,), (4, 3), ())
SHORT = {"iterations": 12, "batch_size": 8, "held": 0.5}


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.net.state_dict().items()}


def same(first: Model, second: Model) -> bool:
    a, b = weights_of(first), weights_of(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("sigma", [1.0, 0.4])
def test_fsam_follows_the_gradient_minus_its_running_mean(sigma):
    rng = np.random.default_rng(0)
    rho, decay = 0.05, 0.9
    sam = FriendlySAM([torch.zeros(s, dtype=torch.float64) for s in SHAPES], rho, 0, sigma=sigma, decay=decay)
    mean = [0.0] * sum(math.prod(s) for s in SHAPES)
    for step in range(6):
        batch = [rng.standard_normal(s) for s in SHAPES]
        flat = [float(x) for g in batch for x in np.ravel(g)]
        mean = [decay * m + (1 - decay) * g for m, g in zip(mean, flat, strict=True)]
        d = [g - sigma * m for g, m in zip(flat, mean, strict=True)]
        length = math.sqrt(sum(x * x for x in d))
        found = sam.offsets(lambda batch=batch: [torch.from_numpy(np.asarray(g)) for g in batch], step)
        assert [o.shape for o in found] == [torch.Size(s) for s in SHAPES]
        expected = [rho * x / length for x in d]
        np.testing.assert_allclose(np.concatenate([o.reshape(-1) for o in found]), expected, rtol=1e-12)


def test_fsam_moves_nothing_along_a_zero_gradient():
    sam = FriendlySAM([torch.zeros(3)], 0.05, 0)
    (offset,) = sam.offsets(lambda: [torch.zeros(3)], 0)
    assert offset.tolist() == [0, 0, 0]


def test_lpf_noise_is_scaled_by_the_norm_of_each_filter():
    rho, seed = 0.3, 5
    # Filters of norm 1 show the draws themselves.
    units = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    for unit in units:
        unit.view(len(unit) if unit.dim() > 1 else 1, -1)[:, 0] = 1
    draws = FilterNoise(units, 1.0, seed).offsets(list, 7)
    rng = np.random.default_rng(1)
    weights = [torch.from_numpy(np.asarray(rng.standard_normal(s))) for s in SHAPES]
    weights[0][1] = 0
    found = FilterNoise(weights, rho, seed).offsets(list, 7)
    for weight, draw, offset in zip(weights, draws, found, strict=True):
        rows = len(weight) if weight.dim() > 1 else 1
        for w, z, o in zip(*(x.reshape(rows, -1).tolist() for x in (weight, draw, offset)), strict=True):
            norm = math.sqrt(sum(x * x for x in w))
            np.testing.assert_allclose(o, [rho * norm * x for x in z], rtol=1e-12)
    assert not found[0][1].any()


def test_lpf_noise_is_standard_normal_and_a_function_of_seed_and_step():
    weights = [torch.zeros(200, 50), torch.zeros(200, 50)]
    for w in weights:
        w[:, 0] = 1
    noise = FilterNoise(weights, 1.0, 3)
    first, second = noise.offsets(list, 4)
    assert first.mean().item() == pytest.approx(0, abs=0.05)
    assert first.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(first, noise.offsets(list, 4)[0])
    others = (second, noise.offsets(list, 5)[0], FilterNoise(weights, 1.0, 2).offsets(list, 4)[0])
    for other in others:
        assert abs(np.corrcoef(first.reshape(-1), other.reshape(-1))[0, 1]) < 0.05


class Head(nn.Module):
    """A network without batch norms, small enough for a naive loop."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(8 * 8 * 3, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x.flatten(1)).tanh())


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_steps_match_a_naive_loop_in_float64(source, sharpness, clip):
    model = Model(Head(), "head", 4, tuple("0123"), Normalization((0.5,) * 3, (0.25,) * 3))
    ids = hold_out(source.train.labels, 4, share=0.5)[1]
    rho = None if sharpness == "none" else 0.1
    config = FlattenConfig(sharpness, iterations=9, batch_size=12, lr=0.1, rho=rho, clip=clip)
    part = ArraySplit(source.train.read(ids), source.train.labels[ids], "part")
    naive = copy.deepcopy(model.net).double()
    flattener = Flattener(model, part, ids, source.view_spec, config)
    velocity, mean = ([torch.zeros_like(p) for p in naive.parameters()] for _ in range(2))
    shrunk = 0
    for step in range(config.iterations):
        x, y = flattener._batch()
        start = [p.detach().clone() for p in naive.parameters()]
        if sharpness == "fsam":
            g = torch.autograd.grad(F.cross_entropy(naive(x.double()), y), list(naive.parameters()))
            mean = [0.9 * m + 0.1 * one for m, one in zip(mean, g, strict=True)]
            d = [one - m for one, m in zip(g, mean, strict=True)]
            norm = math.sqrt(sum(float((one**2).sum()) for one in d))
            offsets = [config.rho * one / norm for one in d]
        elif sharpness == "lpf":
            offsets = flattener._perturbation.offsets(list, step)
        else:
            offsets = [torch.zeros_like(p) for p in start]
        with torch.no_grad():
            for p, o in zip(naive.parameters(), offsets, strict=True):
                p.add_(o)
        g = torch.autograd.grad(F.cross_entropy(naive(x.double()), y), list(naive.parameters()))
        length = math.sqrt(sum(float((one**2).sum()) for one in g))
        if clip and length > clip:
            g = [one * clip / length for one in g]
            shrunk += 1
        with torch.no_grad():
            for p, w, v, one in zip(naive.parameters(), start, velocity, g, strict=True):
                v.mul_(0.9).add_(one)
                p.copy_(w - config.lr * v)
        flattener.take_step()
    for ours, theirs in zip(model.net.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6)
    assert bool(shrunk) == bool(clip)


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_all_weights_move_and_no_statistics(source, teacher, sharpness):
    before = weights_of(teacher)
    flat = flatten_teacher(teacher, source, FlattenConfig(sharpness, **SHORT))
    assert all(torch.equal(value, before[name]) for name, value in weights_of(teacher).items())
    assert not flat.net.training
    after, parameters = weights_of(flat), dict(flat.net.named_parameters())
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in parameters), name


def test_reads_the_held_out_part_only(source, teacher):
    class Watched(ArraySplit):
        """A split that records what is read."""

        seen: set[int]

        def read(self, ids):
            self.seen |= set(np.asarray(ids).tolist())
            return super().read(ids)

    splits = [Watched(s.images, s.labels, "watched") for s in (source.train, source.test)]
    for split in splits:
        split.seen = set()
    watched = Source("watched", "datasets", source.classes, *splits, source.view_spec, recorded="f" * 64)
    flatten_teacher(teacher, watched, FlattenConfig(seed=3, **SHORT))
    held_out = hold_out(source.train.labels, 4, share=0.5, seed=3)[1]
    assert splits[0].seen == set(held_out.tolist())
    assert not splits[1].seen


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_same_seed_same_bits(source, teacher, sharpness):
    first, again, other = (
        flatten_teacher(teacher, source, FlattenConfig(sharpness, seed=s, **SHORT)) for s in (1, 1, 2)
    )
    assert same(first, again)
    assert not same(first, other)


def test_views_are_those_of_the_data(source, teacher):
    flat = [flatten_teacher(teacher, source, FlattenConfig(views=v, **SHORT)) for v in (1, 2, 0, 9)]
    assert not any(same(a, b) for a, b in itertools.combinations(flat[:3], 2))
    assert same(flat[2], flat[3]), "0 means all nine"


def test_crop_views(teacher, new_source):
    spec = ViewSpec(kind="crop", size=(8, 8), flip=True, crops=6)
    flat = flatten_teacher(teacher, new_source(views=spec), FlattenConfig(**SHORT))
    assert all(bool(torch.isfinite(x).all()) for x in weights_of(flat).values())


def test_metadata_tell_how_and_from_what(source, teacher, tmp_path):
    teacher = copy.deepcopy(teacher)
    teacher.metadata = {"imported_from": "x.pt", "test_top1": 93.0, "test_top5": 99.0}
    flat = flatten_teacher(teacher, source, FlattenConfig("fsam", seed=4, **SHORT))
    save_model(tmp_path / "flat.pt", flat)
    read = load_model(tmp_path / "flat.pt")
    assert same(read, flat)
    assert set(read.metadata) == {"imported_from", "flattened"}, "accuracies of other weights are gone"
    about = read.metadata["flattened"]
    expected = {"teacher": teacher.digest, "data": source.fingerprint, "sharpness": "fsam", "rho": 0.05, "seed": 4,
                "iterations": 12, "held": 0.5, "held_out": 28}  # fmt: skip
    assert {name: about[name] for name in expected} == expected
    assert about["images"] == 2 * (3 * 28), "two passes; three epochs of 8 + 8 + 8 + 4"
    assert about["seconds"] > 0
    ids = hold_out(source.train.labels, 4, share=0.5, seed=4)[1]
    part = ArraySplit(source.train.read(ids), source.train.labels[ids], "part")
    for name, model in (("before", teacher), ("after", flat)):
        scores = evaluate(model, part, view_spec=source.view_spec)
        assert about[name] == {"loss": pytest.approx(scores["loss"]), "top1": scores["top1"]}
    assert about["after"]["loss"] < about["before"]["loss"]


class Stop(BaseException):
    """Ends a flattening as a signal does."""


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_resumes_to_the_same_bits(source, teacher, tmp_path, sharpness):
    config, state = FlattenConfig(sharpness, **{**SHORT, "iterations": 25}), tmp_path / "state"
    whole = flatten_teacher(teacher, source, config)

    for last in (7, 16):

        def stop(done: int, total: int, note: str, last: int = last) -> None:
            assert (total, note.split()[0]) == (25, "loss")
            if done == last:
                raise Stop

        with pytest.raises(Stop):
            flatten_teacher(teacher, source, config, state=state, progress=stop, checkpoint_seconds=0)
        assert torch.load(state, weights_only=True)["step"] == last
    parts = flatten_teacher(teacher, source, config, state=state)
    assert same(whole, parts)
    steps: list[int] = []
    again = flatten_teacher(teacher, source, config, state=state, progress=lambda done, *_: steps.append(done))
    assert same(whole, again)
    assert not steps, "the finished state is the result"


def test_refuses_states_of_other_settings_and_other_files(source, teacher, new_teacher, tmp_path):
    state = tmp_path / "state"
    flatten_teacher(teacher, source, FlattenConfig(**SHORT), state=state)
    for config, model, what in (
        (FlattenConfig(seed=1, **SHORT), teacher, "`seed` was 0, is 1"),
        (FlattenConfig("lpf", **SHORT), teacher, '`sharpness` was "fsam", is "lpf"'),
        (FlattenConfig(**SHORT), new_teacher(seed=1), "`teacher` was"),
    ):
        with pytest.raises(OutputError, match=f"of another flattening .*{what}"):
            flatten_teacher(model, source, config, state=state)
    content = torch.load(state, weights_only=True)
    for change in ({"step": 3}, {"seconds": -1.0}, {"seal": None}, {"tensors": {}}, {"settings": []}):
        torch.save(content | change, state)
        with pytest.raises(OutputError, match="delete it to start over"):
            flatten_teacher(teacher, source, FlattenConfig(**SHORT), state=state)
    for foreign in (b"", b"a book", (tmp_path / "state").read_bytes()[:-9]):
        state.write_bytes(foreign)
        with pytest.raises(OutputError, match="is not the state of a flattening and would be overwritten"):
            flatten_teacher(teacher, source, FlattenConfig(**SHORT), state=state)
        assert state.read_bytes() == foreign


def test_divergence_is_an_error_and_is_not_saved(source, teacher, tmp_path):
    config = FlattenConfig(lr=1e9, **SHORT)
    with pytest.raises(DivergedError, match="lower `lr`"):
        flatten_teacher(teacher, source, config, state=tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_a_network_that_ignores_the_image_is_an_error(source, tmp_path):
    torch.manual_seed(0)
    teacher = Model(Head(), "head", 4, tuple("0123"), Normalization((0.5,) * 3, (0.25,) * 3))
    fitted = flatten_teacher(teacher, source, FlattenConfig(iterations=60, held=0.5, views=1, sharpness="none"))
    about = fitted.metadata["flattened"]
    assert about["after"]["loss"] < about["before"]["loss"]
    state, config = tmp_path / "state", FlattenConfig(lr=300.0, clip=0.0, **SHORT)
    with pytest.raises(DivergedError, match="probabilities that ignore the image have less"):
        flatten_teacher(fitted, source, config, state=state)
    assert not state.exists(), "a lower learning rate starts at the teacher"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sharpness": "sam"}, "did you mean 'fsam'"),
        ({"sharpness": "none", "rho": 0.1}, "omit it"),
        ({"rho": -1.0}, "`rho` is -1.0"),
        ({"iterations": 0}, "`iterations` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"lr": math.nan}, "`lr` is nan"),
        ({"momentum": 1.0}, "`momentum` is 1.0"),
        ({"clip": -1.0}, "`clip` is -1.0"),
        ({"held": 0.6}, "`held` is 0.6"),
        ({"seed": -1}, "`seed` is -1"),
    ],
)
def test_rejects_bad_settings(values, message):
    with pytest.raises(UsageError, match=message):
        FlattenConfig(**values)


def test_rejects_data_that_do_not_fit(source, teacher, new_source):
    with pytest.raises(UsageError, match="`views` is 10, but the data has 9"):
        flatten_teacher(teacher, source, FlattenConfig(views=10))
    three = Model(teacher.net, "resnet8", 3, tuple("012"), teacher.normalization)
    with pytest.raises(DataError, match="the teacher has the classes 0 to 2"):
        flatten_teacher(three, source)


class Two(nn.Module):
    """Two layers for images of 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(12, 32), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x.flatten(1)).relu())


def loss_near(net: nn.Module, x: torch.Tensor, y: torch.Tensor, rho: float = 0.1, draws: int = 50) -> float:
    """Return the mean loss at weights with Gaussian noise of rho times the norm of each row."""
    draw, total = torch.Generator().manual_seed(1), 0.0
    for _ in range(draws):
        noisy = copy.deepcopy(net)
        with torch.no_grad():
            for p in noisy.parameters():
                rows = p.view(len(p), -1) if p.dim() > 1 else p.view(1, -1)
                rows += rho * rows.norm(dim=1, keepdim=True) * torch.randn(rows.shape, generator=draw)
            total += F.cross_entropy(noisy(x), y).item()
    return total / draws


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_minima_are_flatter_than_those_of_plain_sgd(seed):
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 3
    images = rng.integers(0, 256, (400, 2, 2, 3), dtype=np.uint8)
    images[np.arange(400), 0, 0, labels] //= 2
    split = ArraySplit(images, labels, "noisy colors")
    toy = Source("noisy colors", "datasets", tuple("012"), split, split, ViewSpec(kind="shift", size=(2, 2)))
    torch.manual_seed(seed)
    start = Model(Two(), "two", 3, tuple("012"), Normalization((0.4,) * 3, (0.25,) * 3))
    held_out = hold_out(labels, 3, share=0.5, seed=seed)[1]
    x = (torch.from_numpy(images[held_out]).permute(0, 3, 1, 2) / 255 - 0.4) / 0.25
    y = torch.from_numpy(labels[held_out])
    near = {}
    for sharpness, rho in (("none", None), ("fsam", 0.5), ("lpf", 0.1)):
        settings = {"iterations": 250, "batch_size": 20, "held": 0.5, "lr": 0.1, "seed": seed}
        flat = flatten_teacher(start, toy, FlattenConfig(sharpness, rho, **settings))
        near[sharpness] = loss_near(flat.net, x, y)
    assert near["fsam"] < 0.75 * near["none"], near
    assert near["lpf"] < 0.9 * near["none"], near


@pytest.mark.parametrize("kind", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_the_state_first(source, teacher, tmp_path, kind):
    config, state = FlattenConfig(**{**SHORT, "iterations": 35}), tmp_path / "state"

    def ask(done: int, total: int, note: str) -> None:
        if done == 10:
            os.kill(os.getpid(), getattr(signal, kind))

    before = signal.getsignal(getattr(signal, kind))
    with pytest.raises(Interrupted, match=f"stopped by {kind} after step 11 of 35: run the same command again"):
        flatten_teacher(teacher, source, config, state=state, progress=ask, checkpoint_seconds=1e9)
    assert signal.getsignal(getattr(signal, kind)) is before
    assert torch.load(state, weights_only=True)["step"] == 11
    assert same(flatten_teacher(teacher, source, config, state=state), flatten_teacher(teacher, source, config))


def test_refuses_a_state_beyond_the_last_step(source, teacher, tmp_path):
    config, state = FlattenConfig(**SHORT), tmp_path / "state"
    flatten_teacher(teacher, source, config, state=state)
    content = torch.load(state, weights_only=True)
    content["step"] = 10**12
    torch.save({**content, "seal": _seal(content)}, state)
    with pytest.raises(CheckpointError, match="is of step 1000000000000 of 12: delete it"):
        flatten_teacher(teacher, source, config, state=state)
