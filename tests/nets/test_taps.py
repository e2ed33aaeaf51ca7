"""Taps read what a forward pass computes, and leave the network as it was."""

import pytest
import torch
import torch.nn.functional as F

from kdfast.errors import UsageError
from kdfast.nets import build_net, find_classifier
from kdfast.nets.taps import PREACTIVATIONS, STAGES, TAPS, TapRecorder, default_places

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def record(name, places=None):
    net = build_net(name, 10).eval()
    places = default_places(net) if places is None else places
    with torch.no_grad(), TapRecorder(net, places) as recorder:
        logits = net(IMAGES)
    return net, logits, recorder.take()


@pytest.mark.parametrize(("name", "widths"), [("resnet20", (16, 32, 64)), ("resnet14a", (16, 32, 64)),
                                              ("wrn_40_2", (32, 64, 128))])  # fmt: skip
def test_shapes(name, widths):
    _, _, taken = record(name)
    assert set(taken) == set(TAPS)
    assert taken["stem"].shape == (2, 16, 32, 32)
    for names in (STAGES, PREACTIVATIONS):
        shapes = [tuple(taken[tap].shape[1:]) for tap in names]
        assert shapes == [(width, size, size) for width, size in zip(widths, (32, 16, 8), strict=True)]
    assert taken["pooled"].shape == (2, widths[-1])


@pytest.mark.parametrize(
    ("name", "stem", "shapes"),
    [
        ("resnet8x4", (32, 32), [(64, 32), (128, 16), (256, 8)]),
        ("resnet18", (64, 32), [(128, 16), (256, 8), (512, 4)]),
        ("resnet50", (64, 32), [(512, 16), (1024, 8), (2048, 4)]),
        ("vgg8", (64, 32), [(256, 8), (512, 4), (512, 4)]),
        ("mobilenetv2", (16, 16), [(16, 8), (48, 4), (160, 2)]),
    ],
)
def test_networks_of_more_stages_have_taps_at_the_last_three(name, stem, shapes):
    net, logits, taken = record(name)
    assert set(taken) == set(TAPS)
    assert taken["stem"].shape[1:3] == stem
    for names in (STAGES, PREACTIVATIONS):
        assert [tuple(taken[tap].shape[1:3]) for tap in names] == shapes
    for stage, before in zip(STAGES, PREACTIVATIONS, strict=True):
        expected = taken[before] if name == "mobilenetv2" else F.relu(taken[before])
        assert torch.equal(taken[stage], expected)
    head = find_classifier(net)
    assert torch.equal(logits, head(taken["pooled"]))


def test_stages_of_a_resnet_are_after_the_relu_and_preactivations_before_it():
    _, _, taken = record("resnet20")
    for stage, before in zip(STAGES, PREACTIVATIONS, strict=True):
        assert torch.equal(taken[stage], F.relu(taken[before]))
        assert taken[before].min() < 0
    assert taken["stem"].min() == 0


def test_preactivations_of_a_wide_resnet_are_behind_the_next_batch_norm():
    net, _, taken = record("wrn_40_2")
    with torch.no_grad():
        assert torch.equal(taken["preactivation3"], net.bn1(taken["stage3"]))
        assert torch.equal(taken["preactivation1"], net.block2.layer[0].bn1(taken["stage1"]))


def test_pooled_features_give_the_logits():
    net, logits, taken = record("resnet8")
    assert torch.equal(logits, net.fc(taken["pooled"]))


def test_any_module_can_be_named():
    _, _, taken = record("resnet8", {"a": "layer2.0.conv1", "b": "layer2.0.conv1@input"})
    assert taken["a"].shape == (2, 32, 16, 16)
    assert taken["b"].shape == (2, 16, 32, 32)


def test_hooks_are_gone_after_the_block_and_after_an_error():
    net = build_net("resnet8", 10).eval()
    recorder = TapRecorder(net, default_places(net))
    with pytest.raises(RuntimeError), recorder:
        net(IMAGES[:, :2])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    net(IMAGES)
    assert recorder.take() == {}


def test_unknown_module_suggests_the_nearest():
    with pytest.raises(UsageError, match="layer2"):
        TapRecorder(build_net("resnet8", 10), {"stage2": "layr2"})


def test_a_module_without_a_tensor_is_refused():
    class Pair(torch.nn.Module):
        def forward(self, x):
            return x, x

    net = torch.nn.Sequential(Pair())
    with pytest.raises(UsageError, match="is a tuple"), TapRecorder(net, {"stage1": "0"}):
        net(IMAGES)
