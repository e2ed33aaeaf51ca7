import numpy as np
import pytest
import torch

from kdfast.data.views import Normalization, ViewSpec
from kdfast.errors import CheckpointError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.teacher.evaluate import evaluate


def test_matches_plain_torch(source, teacher):
    split = source.train
    x = torch.from_numpy(split.images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (teacher.normalization.mean, teacher.normalization.std))
    labels = torch.from_numpy(split.labels)
    with torch.no_grad():
        logits = teacher.net((x - mean) / std)
    scores = evaluate(teacher, split, batch_size=7)
    assert scores["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert scores["top5"] == 100  # four classes
    assert scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)


def test_top5_counts_the_five_most_probable_classes(source):
    torch.manual_seed(0)
    model = Model(build_net("resnet8", 9), "resnet8", 9, tuple("abcdefghi"), Normalization((0.5,) * 3, (0.2,) * 3))
    with torch.no_grad():
        model.net.fc.weight.zero_()
        model.net.fc.bias.copy_(torch.tensor([9.0, 0, 0, 5, 8, 7, 6, 5.5, 1]))
    # Labels are 0 to 3 in equal numbers. Class 0 ranks first, class 3 sixth, classes 1 and 2 last.
    scores = evaluate(model, source.train)
    assert (scores["top1"], scores["top5"]) == (25, 25)
    model.net.fc.bias.data[3] = 5.6
    assert evaluate(model, source.train)["top5"] == 50


@pytest.mark.parametrize("training", [True, False])
def test_keeps_the_networks_mode_and_statistics(source, new_teacher, training):
    model = new_teacher()
    model.net.train(training)
    before = model.digest
    evaluate(model, source.test)
    assert model.net.training is training
    assert model.digest == before


def test_view_spec_determines_the_image_size(source, teacher):
    smaller = ViewSpec(kind="crop", size=(4, 4), crops=2)
    assert evaluate(teacher, source.train, view_spec=smaller)["loss"] != evaluate(teacher, source.train)["loss"]


def test_rejects_labels_outside_the_models_classes(source, new_teacher):
    model = new_teacher()
    model.classes = 3
    with pytest.raises(CheckpointError, match="label 3"):
        evaluate(model, source.train)
    assert np.max(source.train.labels) == 3
