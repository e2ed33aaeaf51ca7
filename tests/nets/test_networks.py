import pytest
import torch

from kdfast.errors import ShapeError, UsageError
from kdfast.nets import NETS, build_net, find_classifier, forward_with_features
from kdfast.nets.cifar.resnet import CifarResNet, SubsampleAndPad
from kdfast.nets.cifar.wrn import WideResNet

PARAMETERS = {  # option B and wide networks with 10 / 100 classes, as published
    "resnet8": (78_042, 83_892),
    "resnet14": (175_258, 181_108),
    "resnet20": (272_474, 278_324),
    "resnet32": (466_906, 472_756),
    "resnet56": (855_770, 861_620),
    "resnet110": (1_730_714, 1_736_564),
    "wrn_40_2": (2_243_546, 2_255_156),
    "resnet20a": (269_722, 275_572),  # 0.27M in He et al.; no projections, unlike option B
    "resnet56a": (853_018, 858_868),
    "resnet8x4": (1_210_410, 1_233_540),
    "resnet32x4": (7_410_730, 7_433_860),
    "wrn_16_2": (691_674, 703_284),
    "resnet18": (11_173_962, 11_220_132),
    "resnet34": (21_282_122, 21_328_292),
    "resnet50": (23_520_842, 23_705_252),
    "vgg8": (3_918_858, 3_965_028),
    "vgg13": (9_416_010, 9_462_180),
    "mobilenetv2": (697_546, 812_836),
}


def trained(net: torch.nn.Module) -> torch.nn.Module:
    """Set the statistics of the batch norms as after training, so that evaluation mode is not the identity."""
    generator = torch.Generator().manual_seed(3)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return net.eval()


@pytest.mark.parametrize(("name", "counts"), PARAMETERS.items())
def test_parameter_counts_match_the_publications(name, counts):
    found = tuple(sum(p.numel() for p in build_net(name, classes).parameters()) for classes in (10, 100))
    assert found == counts


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("size", [8, 32])
def test_every_network_runs_on_digits_and_cifar(name, size):
    net = build_net(name, 7).eval()
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        logits, features = forward_with_features(net, x)
    head = find_classifier(net)
    assert logits.shape == (2, 7)
    torch.testing.assert_close(logits, features @ head.weight.T + head.bias)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", NETS)
def test_gradients_reach_every_parameter(name):
    net = build_net(name, 5)
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "wrn_16_2", "vgg8", "mobilenetv2"])
def test_a_network_may_be_built_for_gray_images(name):
    net = build_net(name, 5, channels=1).eval()
    first = next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    assert first.in_channels == 1
    gray = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(net(gray.expand(2, 3, 16, 16)), net(gray))


def test_vgg_is_the_published_stack():
    torch.manual_seed(0)
    net = trained(build_net("vgg13", 4))
    x = torch.randn(2, 3, 32, 32)
    expected, sizes = x, []
    for stage in range(5):
        block = net.get_submodule(f"block{stage}")
        assert [type(m).__name__ for m in block] == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d"]
        expected = torch.relu(block(expected))
        sizes.append(expected.shape[-1])
        if stage < 3:
            expected = torch.nn.functional.max_pool2d(expected, 2)
    torch.testing.assert_close(net(x), net.classifier(expected.mean((2, 3))))
    assert sizes == [32, 16, 8, 4, 4]


def test_mobilenet_halves_the_image_in_the_published_stages():
    net = build_net("mobilenetv2", 4).eval()
    x, sizes, widths = net.conv1(torch.randn(1, 3, 32, 32)), [], []
    for stage in net.blocks:
        x = stage(x)
        sizes.append(x.shape[-1])
        widths.append(x.shape[1])
    assert sizes == [16, 16, 8, 4, 4, 2, 2]
    assert widths == [8, 12, 16, 32, 48, 80, 160]
    assert [len(stage) for stage in net.blocks] == [1, 2, 3, 4, 3, 3, 1]


def test_an_inverted_residual_matches_its_definition():
    net = trained(build_net("mobilenetv2", 3))
    block = net.blocks[2][1]
    x = torch.randn(2, 16, 8, 8)
    wide = torch.relu(block.conv[1](block.conv[0](x)))
    assert wide.shape[1] == 6 * 16
    depthwise = torch.nn.functional.conv2d(wide, block.conv[3].weight, padding=1, groups=96)
    expected = x + block.conv[7](block.conv[6](torch.relu(block.conv[4](depthwise))))
    torch.testing.assert_close(block(x), expected)


def test_a_bottleneck_matches_its_definition():
    net = trained(build_net("resnet50", 3))
    block = net.layer2[0]
    x = torch.randn(2, 256, 8, 8)
    inner = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))))
    expected = torch.relu(block.bn3(block.conv3(inner)) + block.shortcut(x))
    assert expected.shape == (2, 512, 4, 4)
    torch.testing.assert_close(block(x), expected)


REPDISTILLER = {
    "resnet8x4": ["layer1.0.downsample.0.weight", "layer3.0.bn2.running_var", "fc.weight"],
    "resnet18": ["layer2.0.shortcut.0.weight", "layer4.1.conv2.weight", "linear.bias"],
    "resnet50": ["layer1.0.shortcut.1.weight", "layer3.5.conv3.weight", "linear.weight"],
    "vgg13": ["block0.0.bias", "block0.3.weight", "block4.4.running_mean", "classifier.weight"],
    "mobilenetv2": ["conv1.0.weight", "blocks.1.1.conv.3.weight", "blocks.6.0.conv.7.bias", "conv2.1.weight",
                    "classifier.0.weight"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "some"), REPDISTILLER.items())
def test_further_layer_names_equal_those_of_repdistiller(name, some):
    assert {*some} <= {*build_net(name, 10).state_dict()}


def test_layer_names_equal_those_of_repdistiller():
    names = set(build_net("resnet8", 10).state_dict())
    expected = {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "fc.bias"}
    assert expected <= names
    assert "layer1.0.downsample.0.weight" not in names
    wide = set(build_net("wrn_40_2", 10).state_dict())
    assert {"conv1.weight", "block1.layer.0.convShortcut.weight", "block3.layer.5.bn2.weight", "bn1.weight"} <= wide
    assert "block1.layer.1.convShortcut.weight" not in wide


def test_option_a_has_no_shortcut_parameters_and_ends_in_linear():
    names = set(build_net("resnet20a", 10).state_dict())
    assert "linear.weight" in names
    assert not any("downsample" in name or name.startswith("fc") for name in names)


def test_option_a_shortcut_subsamples_and_pads_on_both_sides():
    x = torch.arange(2 * 2 * 5 * 5, dtype=torch.float32).reshape(2, 2, 5, 5)
    out = SubsampleAndPad(extra_channels=3, stride=2)(x)
    assert out.shape == (2, 5, 3, 3)
    assert out[:, 0].eq(0).all()
    assert out[:, 3:].eq(0).all()
    torch.testing.assert_close(out[:, 1:3], x[:, :, ::2, ::2])


@pytest.mark.parametrize("name", ["resnet8", "wrn_40_2"])
def test_convolutions_are_initialized_by_kaiming_fan_out(name):
    torch.manual_seed(0)
    net = build_net(name, 10)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.08)


def test_pre_activation_block_matches_its_definition():
    torch.manual_seed(0)
    net = trained(WideResNet(10, 2, classes=3))
    block = net.block2.layer[0]
    x = torch.randn(2, 32, 8, 8)
    active = torch.relu(block.bn1(x))
    expected = block.convShortcut(active) + block.conv2(torch.relu(block.bn2(block.conv1(active))))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    "build", [lambda: CifarResNet(21, 10), lambda: WideResNet(38, 2, 10), lambda: WideResNet(40, 1, 10)]
)
def test_rejects_impossible_depths_and_widths(build):
    with pytest.raises(UsageError, match="got"):
        build()


def test_suggests_the_nearest_name():
    with pytest.raises(UsageError, match="did you mean 'resnet56'"):
        build_net("resnet65", 10)


@pytest.mark.parametrize(("name", "words"), [("keras:resnet50", "torchvision:NAME"), ("resnet20", "at least 2")])
def test_rejects_unknown_libraries_and_single_classes(name, words):
    with pytest.raises(UsageError, match=words):
        build_net(name, 1 if name == "resnet20" else 10)


def test_message_names_a_missing_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UsageError, match="pip install timm"):
        build_net("timm:resnet18", 10)


def test_builds_networks_of_a_library_by_name(monkeypatch):
    made = []

    class Library:
        @staticmethod
        def list_models():
            return ["vit_tiny", "resnet18"]

        @staticmethod
        def create_model(name, pretrained, num_classes):
            made.append((name, pretrained, num_classes))
            return torch.nn.Linear(2, num_classes)

    monkeypatch.setitem(__import__("sys").modules, "timm", Library)
    assert isinstance(build_net("timm:resnet18", 6), torch.nn.Linear)
    assert made == [("resnet18", False, 6)]
    with pytest.raises(UsageError, match="did you mean 'resnet18'"):
        build_net("timm:resnet81", 6)


def test_rejects_networks_without_a_suitable_classifier():
    with pytest.raises(UsageError, match=r"no nn\.Linear"):
        find_classifier(torch.nn.Conv2d(3, 4, 1))
    per_pixel = torch.nn.Sequential(torch.nn.Linear(4, 5))
    with pytest.raises(ShapeError, match=r"\(2, 3, 8, 4\)"):
        forward_with_features(per_pixel, torch.randn(2, 3, 8, 4))
    assert not per_pixel[0]._forward_pre_hooks
