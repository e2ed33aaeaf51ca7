"""A network is tried on the data before any work: classes, their names, images of the data's size, and its output."""

import collections
import dataclasses
import re

import numpy as np
import pytest
import torch
from torch import nn

from kdfast.data.source import ArraySplit, Source, default_view_spec
from kdfast.data.views import Normalization
from kdfast.errors import CheckpointError, DataWarning, UsageError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.nets.fit import check_class_names, check_fit, check_logits, check_training

Output = collections.namedtuple("Output", ["logits", "aux"])


class Base(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, classes)

    def logits(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))

    def forward(self, x):
        return self.logits(x)


class OneSize(Base):
    def forward(self, x):
        torch._assert(x.shape[-1] == 224, f"Wrong image height! Expected 224 but got {x.shape[-1]}!")
        return self.logits(x)


class FixedLinear(Base):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8 * 224 * 224, 3)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


class TooDeep(Base):
    def forward(self, x):
        return self.logits(nn.functional.max_pool2d(x, 64))


class Aux(Base):
    def forward(self, x):
        z = self.logits(x)
        return Output(z, z) if self.training else z


class Pair(Base):
    def forward(self, x):
        return self.logits(x), x


class EvalPair(Base):
    def forward(self, x):
        return self.logits(x) if self.training else (self.logits(x), x)


class Segmentation(Base):
    def forward(self, x):
        return collections.OrderedDict(out=self.conv(x))


class Map(Base):
    def forward(self, x):
        return self.conv(x)


class Integers(Base):
    def forward(self, x):
        return self.logits(x).argmax(1)[:, None].expand(-1, 3)


class OldView(Base):
    """Views a tensor that channels_last memory does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8 * 8 * 8, 3)

    def forward(self, x):
        return self.fc(self.conv(x).view(x.shape[0], -1))


class NoGradient(Base):
    def forward(self, x):
        with torch.no_grad():
            return self.logits(x)


class Probabilities(Base):
    def forward(self, x):
        return self.logits(x).softmax(1)


class Exits(Base):
    def forward(self, x):
        raise SystemExit(3)


class InPlace(Base):
    def forward(self, x):
        hidden = self.conv(x).sigmoid()
        hidden_sum = hidden.sum((2, 3))
        hidden.mul_(2)
        return self.fc(hidden_sum)


BAD = {
    OneSize: r"cannot run on images of 8x8 \(Wrong image height! Expected 224 but got 8!\)",
    FixedLinear: "cannot run on images of 8x8",
    TooDeep: "cannot run on images of 8x8",
    Aux: r"returns a Output of logits, aux, not logits of shape \(2, 3\)",
    Pair: "returns a tuple, not logits",
    EvalPair: "returns a tuple, not logits",
    Segmentation: "returns a OrderedDict of out, not logits",
    Map: r"returns a tensor of shape \(2, 8, 8, 8\)",
    Integers: r"returns a tensor of shape \(2, 3\) and dtype torch\.int64",
    OldView: "cannot run on images of 8x8 .view size is not compatible.*write reshape or flatten",
    Probabilities: "returns probabilities, not logits: let it return the inputs of its softmax",
    Exits: r"cannot run on images of 8x8 \(3\)",
    NoGradient: "no trainable parameter",
    InPlace: "cannot run on images of 8x8 .*inplace operation",
}


@pytest.mark.parametrize("network", BAD)
def test_networks_that_cannot_be_trained_are_refused(network):
    with pytest.raises(UsageError, match=BAD[network]) as caught:
        check_training(network(), "NAME", 3, (8, 8))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("name", ["resnet8", "resnet14a", "wrn_40_2"])
def test_networks_pass_and_leaves_the_random_numbers_alone(name):
    net = build_net(name, 3)
    before = torch.get_rng_state()
    check_training(net, name, 3, (8, 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("network", [OneSize, FixedLinear, TooDeep, Pair, EvalPair, Segmentation, Map, Probabilities])
def test_teachers_that_cannot_serve_the_data_are_refused(network):
    with pytest.raises(CheckpointError, match=r"T\.pt does not fit DATA: NAME (cannot run|returns)"):
        check_fit(model(("0", "1", "2"), network()), source(("0", "1", "2")), "T.pt")


def test_a_teacher_keeps_its_mode_and_weights():
    net = build_net("resnet8", 3).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    check_logits(net, "resnet8", 3, (8, 8))
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def source(classes) -> Source:
    labels = np.arange(12) % len(classes)
    split = ArraySplit(np.zeros((12, 8, 8, 3), np.uint8), labels, "images")
    return Source("DATA", "npz", tuple(classes), split, split, default_view_spec((8, 8, 3), flip=False))


def model(classes, net=None) -> Model:
    norm = Normalization((0.5,) * 3, (0.2,) * 3)
    return Model(net or Base(len(classes)), "NAME", len(classes), tuple(classes), norm)


NUMBERS = tuple(map(str, range(12)))
AGREE = [
    (("cat", "dog"), ("cat", "dog")),
    (("0", "1"), ("cat", "dog")),
    (("cat", "dog"), ("0", "1")),
    (NUMBERS, tuple("abcdefghijkl")),
]
DISAGREE = [
    (("cat", "dog"), ("0_dog", "1_cat"), "has other class names than the data: class 0 is 'cat' .* and '0_dog'"),
    (("cat", "dog"), ("cat", "fox"), "other class names than the data: class 1 is 'dog'"),
    (NUMBERS, tuple(sorted(NUMBERS)), "in another order: class 2 is '2' in the network and '10' in the data"),
    (tuple("abcdefgh"), tuple("stuvwxyz"), "and 4 more"),
    (("1", "2"), ("cat", "dog"), "other class names"),
]


@pytest.mark.parametrize(("theirs", "ours"), AGREE)
def test_same_names_and_numbers_agree(theirs, ours):
    check_fit(model(theirs), source(ours), "T.pt")


@pytest.mark.parametrize(("theirs", "ours", "words"), DISAGREE)
def test_other_names_are_refused_with_the_mapping(theirs, ours, words):
    for check in (check_fit, check_class_names):
        with pytest.raises(CheckpointError, match=words) as caught:
            check(model(theirs), source(ours), "T.pt")
        assert "kdfast teacher import T.pt --net NAME --data DATA --out NEW.pt" in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("cat", "dog"), ("dog", "cat")),
        (("cat", "dog", "cow"), ("cow", "cat", "dog")),
        (("10", "9", "cat"), ("9", "10", "cat")),
    ],
)
def test_the_same_names_in_another_order_are_mapped_with_a_word(theirs, ours):
    net = build_net("resnet8", len(ours)).eval()
    images = torch.randn(2, 3, 8, 8)
    before = dict(zip(theirs, net(images).detach().unbind(1), strict=True))
    fitted = model(theirs, net)
    with pytest.raises(CheckpointError, match="in another order"):
        check_class_names(fitted, source(ours), "T.pt")
    with pytest.warns(DataWarning, match="in another order: its outputs are reordered by name"):
        check_fit(fitted, source(ours), "T.pt")
    assert fitted.class_names == ours
    for name, logits in zip(ours, net(images).unbind(1), strict=True):
        assert torch.equal(logits, before[name])
    check_fit(fitted, source(ours), "T.pt")  # no more to say


def test_another_number_of_classes_is_refused():
    with pytest.raises(CheckpointError, match=re.escape("T.pt has 3 classes, but DATA has 2 classes")):
        check_fit(model(("a", "b", "c")), dataclasses.replace(source(("a", "b")), classes=("a", "b")), "T.pt")
