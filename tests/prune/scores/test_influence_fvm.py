"""`influence-fvm` equals g^T F^-1 g from autograd's gradients of single samples in float64."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from kdfast.data.holdout import hold_out
from kdfast.data.source import ArraySplit, Source, default_view_spec
from kdfast.data.views import Normalization, apply_views, view_table
from kdfast.errors import DataError, DataWarning, UsageError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.pruning.scores import fvm
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.registry import compute_score

N, C = 30, 3
LABELS = np.random.default_rng(5).permutation(np.arange(N) % C).astype(np.int64)
SETTINGS = {"sharpness": "fsam", "teacher": "0" * 64, "data": "", "held": 0.2, "seed": 4}
STATISTICS = Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def source():
    images = np.random.default_rng(3).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
    split = ArraySplit(images, LABELS, "images")
    return Source("memory", "npz", ("a", "b", "c"), split, split, default_view_spec(split.shape, flip=True))


@pytest.fixture(scope="module")
def network():
    """A ResNet-8 whose batch norms have statistics and weights other than their defaults."""
    torch.manual_seed(0)
    net = build_net("resnet8", C)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return Model(net.eval(), "resnet8", C, ("a", "b", "c"), STATISTICS, {"flattened": SETTINGS})


def score(source, network, *, labels=LABELS, seed=0, progress=None, **options):
    inputs = ScoreInputs(labels, seed, options=options, source=source, network=network, progress=progress)
    return compute_score("influence-fvm", inputs)


def gradients(source, network, view=0, views=1, seed=0):
    """Return the gradient of each sample's cross-entropy by autograd in float64, a dict of (N, ...) per parameter."""
    net = copy.deepcopy(network.net).double().eval()
    spec = source.view_spec
    rows = []
    for i in range(N):
        ids = np.array([i])
        views_of = torch.from_numpy(view_table(spec, seed, ids, views)[:, view])
        image = torch.from_numpy(source.train.read(ids))
        x = apply_views(image, views_of, spec, STATISTICS, sample_ids=ids, dtype=torch.float64)
        loss = torch.nn.functional.cross_entropy(net(x), torch.tensor([int(LABELS[i])]))
        rows.append(torch.autograd.grad(loss, list(net.parameters())))
    names = [name for name, _ in net.named_parameters()]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def quadratic_forms(found, damping, fisher_of=None):
    """Return sum_j g_j^2 / (F_j + damping * mean F) of each sample; F is over `fisher_of`, or over all rows."""
    g = torch.cat([value.flatten(1) for value in found.values()], 1)
    f = (g if fisher_of is None else g[torch.from_numpy(fisher_of)]).square().mean(0)
    return (g.square() / (f + damping * f.mean())).sum(1).numpy()


@pytest.mark.parametrize("damping", [1e-3, 1.0, 100.0])
def test_matches_autograd_over_all_weights(source, network, damping):
    expected = quadratic_forms(gradients(source, network), damping)
    np.testing.assert_allclose(score(source, network, damping=damping).values, expected, rtol=1e-4)


def test_matches_autograd_of_the_head(source, network):
    found = {name: g for name, g in gradients(source, network).items() if name.startswith("fc.")}
    assert len(found) == 2
    expected = quadratic_forms(found, 0.1)
    np.testing.assert_allclose(score(source, network, layers="head", damping=0.1).values, expected, rtol=1e-4)


def test_averages_scores_over_views_and_the_fisher_too(source, network):
    views = [gradients(source, network, view, views=3, seed=7) for view in range(3)]
    stacked = {name: torch.cat([found[name] for found in views]) for name in views[0]}
    expected = quadratic_forms(stacked, 0.5).reshape(3, N).mean(0)
    found = score(source, network, views=3, seed=7, damping=0.5).values
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert not np.allclose(found, score(source, network, damping=0.5).values, rtol=0.01)


def test_without_damping_the_mean_is_the_number_of_weights(source, network):
    """sum_i g_ij^2 / F_j = N for every weight j that any sample reaches."""
    reached = sum(int(g.square().sum(0).count_nonzero()) for g in gradients(source, network).values())
    assert score(source, network, damping=1e-9).values.mean() == pytest.approx(reached, rel=1e-3)


def test_a_large_damping_ranks_like_grand_of_the_full_network(source, network):
    found = score(source, network, damping=1e9).values
    inputs = ScoreInputs(LABELS, 0, options={"network": "full"}, source=source, network=network)
    norms = compute_score("grand", inputs).values
    np.testing.assert_allclose(found / found.mean(), norms**2 / (norms**2).mean(), rtol=1e-4)


@pytest.mark.parametrize("layers", ["all", "head"])
def test_does_not_depend_on_the_batch_size_or_change_the_network(source, network, layers, monkeypatch):
    digest, state = network.digest, copy.deepcopy(network.net.state_dict())
    whole = score(source, network, layers=layers).values
    monkeypatch.setattr(fvm, "_CPU_PIXELS", 7 * 64)
    np.testing.assert_allclose(score(source, network, layers=layers).values, whole, rtol=1e-5)
    assert network.digest == digest
    assert all(torch.equal(value, network.net.state_dict()[name]) for name, value in state.items())
    assert all(p.requires_grad and p.grad is None for p in network.net.parameters())


def test_reports_progress_over_both_passes(source, network, monkeypatch):
    monkeypatch.setattr(fvm, "_CPU_PIXELS", 16 * 64)
    calls = []
    score(source, network, progress=lambda *call: calls.append(call))
    assert calls == [(16, 60, "Fisher"), (30, 60, "Fisher"), (46, 60, "influence"), (60, 60, "influence")]


def test_flipped_labels_have_high_scores():
    """A network trained on one half of separable data finds wrong labels in it with its unfitted gradients."""
    rng = np.random.default_rng(0)
    true = np.arange(120, dtype=np.int64) % C
    images = rng.integers(0, 60, (120, 8, 8, 3), dtype=np.uint8)
    images[np.arange(120), :, :, true] += 150
    flipped = rng.choice(120, 12, replace=False)
    labels = true.copy()
    labels[flipped] = (labels[flipped] + 1) % C
    split = ArraySplit(images, labels, "images")
    source = Source("memory", "npz", ("a", "b", "c"), split, split, default_view_spec(split.shape, flip=True))
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, C))
    x = (torch.from_numpy(images).float() / 255 - 0.4).permute(0, 3, 1, 2) / 0.3
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), torch.from_numpy(true)).backward()
        optimizer.step()
    model = Model(net, "linear", C, ("a", "b", "c"), Normalization((0.4,) * 3, (0.3,) * 3), {})
    with pytest.warns(DataWarning, match="was not flattened"):
        found = score(source, model, labels=labels)
    assert found.used["network"] == "not flattened"
    found = found.values
    assert found[flipped].min() > np.delete(found, flipped).max()


def test_messages(source, network):
    with pytest.raises(UsageError, match=r"influence-fvm needs a network .*kdfast teacher flatten"):
        score(source, None)
    with pytest.raises(UsageError, match="pass `source`"):
        score(None, network)
    with pytest.raises(UsageError, match=f"views=999999: this data has {source.view_spec.count} views"):
        score(source, network, views=999999)
    with pytest.raises(UsageError, match="damping=0: must be a number from"):
        score(source, network, damping=0)
    dead = copy.deepcopy(network)
    with torch.no_grad():
        dead.net.fc.weight.zero_()
        dead.net.fc.bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
    with pytest.raises(DataError, match="every gradient of the network is zero"):
        score(source, dead, labels=np.zeros(N, np.int64))


def test_fisher_of_the_held_out_part(source, network):
    flattened = dataclasses.replace(network, metadata={"flattened": {**SETTINGS, "data": source.fingerprint}})
    _, held = hold_out(LABELS, C, share=0.2, seed=4)
    assert 0 < len(held) < N
    expected = quadratic_forms(gradients(source, network), 0.3, fisher_of=held)
    found = score(source, flattened, fisher="validation", damping=0.3)
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)
    assert found.used["network"] == f"flattened, sharpness fsam, held 0.2, seed 4, teacher {'0' * 64}"


def test_fisher_of_a_held_out_part_that_is_not_known(source, network):
    with pytest.raises(UsageError, match="flattened on other data"):
        score(source, network, fisher="validation")
    plain = dataclasses.replace(network, metadata={})
    with pytest.raises(UsageError, match="was not flattened on one"):
        score(source, plain, fisher="validation")
