import copy

import numpy as np
import pytest
import torch

from kdfast.data.views import Normalization, ViewSpec
from kdfast.errors import CheckpointError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.teacher.evaluate import ECE_BINS, evaluate, evaluate_in_detail


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


def probabilities(model, split) -> np.ndarray:
    """Probabilities (N, C) in float64."""
    x = torch.from_numpy(split.images).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.normalization.mean, model.normalization.std))
    with torch.no_grad():
        return copy.deepcopy(model.net).double()((x - mean) / std).softmax(1).numpy()


def test_classes_and_calibration_match_a_plain_loop(source, teacher):
    split = source.train
    found, p = evaluate_in_detail(teacher, split, batch_size=7), probabilities(teacher, split)
    right, confidence = p.argmax(1) == split.labels, p.max(1)
    for label, accuracy in enumerate(found["per_class"]):
        assert accuracy == pytest.approx(100 * right[split.labels == label].mean())
    gap = 0.0
    for low in range(ECE_BINS):
        inside = (confidence > low / ECE_BINS) & (confidence <= (low + 1) / ECE_BINS)
        if inside.any():
            gap += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found["calibration"]["bins"] == ECE_BINS == 15
    assert found["calibration"]["ece"] == pytest.approx(100 * gap, abs=1e-3)
    assert found["calibration"]["confidence"] == pytest.approx(100 * confidence.mean(), abs=1e-3)
    assert "agreement" not in found


def test_the_calibration_error_of_a_constant_prediction_is_known(source):
    """Four classes of equal size; class 0 is predicted with probability 0.7, so that the error is 0.7 - 0.25."""
    model = Model(build_net("resnet8", 4), "resnet8", 4, tuple("abcd"), Normalization((0.5,) * 3, (0.2,) * 3))
    with torch.no_grad():
        model.net.fc.weight.zero_()
        model.net.fc.bias.copy_(torch.tensor([0.7, 0.1, 0.1, 0.1]).log())
    found = evaluate_in_detail(model, source.train)
    assert found["calibration"]["ece"] == pytest.approx(45, abs=1e-4)
    assert found["per_class"] == [100, 0, 0, 0]


def test_agreement_counts_equal_predictions(source, teacher, new_teacher):
    split, other = source.train, new_teacher()
    with torch.no_grad():
        other.net.fc.bias[2] += 1.0
    expected = (probabilities(teacher, split).argmax(1) == probabilities(other, split).argmax(1)).mean()
    assert 0 < expected < 1
    assert evaluate_in_detail(teacher, split, teacher=other)["agreement"] == pytest.approx(100 * expected)
    assert evaluate_in_detail(teacher, split, teacher=teacher)["agreement"] == 100


def test_a_teacher_of_other_classes_is_refused(source, teacher):
    other = Model(build_net("resnet8", 5), "resnet8", 5, tuple("abcde"), teacher.normalization)
    with pytest.raises(CheckpointError, match="the teacher has 5 classes, but resnet8 has 4"):
        evaluate_in_detail(teacher, source.train, teacher=other)


def test_a_class_without_images_has_no_accuracy(source):
    model = Model(build_net("resnet8", 9), "resnet8", 9, tuple("abcdefghi"), Normalization((0.5,) * 3, (0.2,) * 3))
    assert evaluate_in_detail(model, source.train)["per_class"][4:] == [None] * 5
