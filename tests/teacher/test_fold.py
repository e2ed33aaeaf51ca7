import copy

import pytest
import torch
from torch import fx, nn

from kdfast.nets import NETS, build_net
from kdfast.nets.outputs import adapt
from kdfast.teacher.fold import fold_batch_norms


def count_batch_norms(net):
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def randomize_statistics(net):
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
    return net.eval()


@pytest.mark.parametrize("name", [name for name in NETS if "110" not in name])
def test_folded_network_has_the_same_outputs(name):
    torch.manual_seed(0)
    net = randomize_statistics(build_net(name, 10)).double()
    folded = fold_batch_norms(copy.deepcopy(net))
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        expected, got = net(x), folded(x)
    torch.testing.assert_close(got, expected)
    # A pre-activation network keeps the norms that follow a sum; the others keep none.
    assert count_batch_norms(folded) == {"wrn_40_2": 18, "wrn_16_2": 6}.get(name, 0)


class Shared(nn.Module):
    """One convolution is called twice, and one has an output used beside its norm: neither may be folded."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 1)
        self.bn2 = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv(self.bn(self.conv(x)))
        y = self.conv2(x)
        return self.bn2(y) + y


class Gray(Shared):
    """Takes one channel, and returns its logits beside another output."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x):
        z = self.bn(self.conv(x))
        return {"logits": z.mean((2, 3)), "map": z}


def test_a_folded_network_takes_gray_images_and_returns_logits_as_before():
    torch.manual_seed(0)
    net = adapt(randomize_statistics(Gray()))
    folded = fold_batch_norms(copy.deepcopy(net))
    x = torch.randn(2, 3, 5, 5)
    assert isinstance(folded, fx.GraphModule)
    torch.testing.assert_close(folded(x), net(x))
    assert folded(x).shape == (2, 3)


def test_does_not_fold_convolutions_used_elsewhere():
    torch.manual_seed(0)
    net = randomize_statistics(Shared())
    folded = fold_batch_norms(copy.deepcopy(net))
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(folded(x), net(x))
    assert count_batch_norms(folded) == 2


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


def test_returns_untraceable_networks_unchanged():
    net = Branching()
    assert fold_batch_norms(net) is net
