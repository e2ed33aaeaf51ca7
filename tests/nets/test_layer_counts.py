"""Numbers of parameters, counted layer by layer from the tables of the papers instead of from the networks."""

import pytest

from kdfast.nets import NETS, build_net

INVERTED = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))  # t, c, n


def conv(inputs, outputs, side, groups=1):
    """A convolution without bias."""
    return inputs // groups * outputs * side * side


def norm(channels):
    return 2 * channels


def linear(inputs, classes):
    return inputs * classes + classes


def basic_block(inputs, outputs, projects):
    body = conv(inputs, outputs, 3) + norm(outputs) + conv(outputs, outputs, 3) + norm(outputs)
    return body + projects * (conv(inputs, outputs, 1) + norm(outputs))


def bottleneck(inputs, width, projects):
    body = conv(inputs, width, 1) + norm(width) + conv(width, width, 3) + norm(width)
    body += conv(width, 4 * width, 1) + norm(4 * width)
    return body + projects * (conv(inputs, 4 * width, 1) + norm(4 * width))


def cifar_resnet(depth, classes, widths=(16, 16, 32, 64), projects=True):
    count, inputs = conv(3, widths[0], 3) + norm(widths[0]), widths[0]
    for outputs in widths[1:]:
        for block in range((depth - 2) // 6):
            count += basic_block(inputs, outputs, projects and block == 0 and inputs != outputs)
            inputs = outputs
    return count + linear(inputs, classes)


def deep_resnet(blocks, classes, expansion=1):
    count, inputs = conv(3, 64, 3) + norm(64), 64
    for number, width in zip(blocks, (64, 128, 256, 512), strict=True):
        for block in range(number):
            outputs = expansion * width
            projects = block == 0 and inputs != outputs
            count += (bottleneck if expansion == 4 else basic_block)(inputs, width, projects)
            inputs = outputs
    return count + linear(inputs, classes)


def wide_resnet(depth, factor, classes):
    count, inputs = conv(3, 16, 3), 16
    for width in (16, 32, 64):
        for _ in range((depth - 4) // 6):
            outputs = factor * width
            count += norm(inputs) + conv(inputs, outputs, 3) + norm(outputs) + conv(outputs, outputs, 3)
            count += conv(inputs, outputs, 1) if inputs != outputs else 0
            inputs = outputs
    return count + norm(inputs) + linear(inputs, classes)


def vgg(per_stage, classes):
    count, inputs = 0, 3
    for outputs in (64, 128, 256, 512, 512):
        for _ in range(per_stage):
            count += conv(inputs, outputs, 3) + outputs + norm(outputs)  # with bias
            inputs = outputs
    return count + linear(inputs, classes)


def half_mobilenet(classes):
    count, inputs = conv(3, 16, 3) + norm(16), 16
    for expansion, channels, number in INVERTED:
        for _ in range(number):
            wide, outputs = expansion * inputs, channels // 2
            count += conv(inputs, wide, 1) + norm(wide) + conv(wide, wide, 3, groups=wide) + norm(wide)
            count += conv(wide, outputs, 1) + norm(outputs)
            inputs = outputs
    return count + conv(inputs, 1280, 1) + norm(1280) + linear(1280, classes)


COUNTS = {
    **{f"resnet{depth}": lambda c, depth=depth: cifar_resnet(depth, c) for depth in (8, 14, 20, 32, 56, 110)},
    **{
        f"resnet{depth}a": lambda c, depth=depth: cifar_resnet(depth, c, projects=False)
        for depth in (8, 14, 20, 32, 56, 110)
    },
    **{
        f"resnet{depth}x4": lambda c, depth=depth: cifar_resnet(depth, c, widths=(32, 64, 128, 256))
        for depth in (8, 32)
    },
    "resnet18": lambda c: deep_resnet((2, 2, 2, 2), c),
    "resnet34": lambda c: deep_resnet((3, 4, 6, 3), c),
    "resnet50": lambda c: deep_resnet((3, 4, 6, 3), c, expansion=4),
    "wrn_16_2": lambda c: wide_resnet(16, 2, c),
    "wrn_40_2": lambda c: wide_resnet(40, 2, c),
    "vgg8": lambda c: vgg(1, c),
    "vgg13": lambda c: vgg(2, c),
    "mobilenetv2": half_mobilenet,
}


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("name", NETS)
def test_every_network_has_the_layers_of_its_paper(name, classes):
    assert sum(p.numel() for p in build_net(name, classes).parameters()) == COUNTS[name](classes)
