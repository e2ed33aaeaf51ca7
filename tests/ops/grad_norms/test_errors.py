"""Errors of grad_norms, which name the layer or argument concerned."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import kdfast
from kdfast.errors import BackendUnavailable, DataError, ShapeError, UsageError

N, CLASSES = 4, 3
X, Y = torch.randn(N, 5), torch.tensor([0, 1, 2, 0])


def net():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, CLASSES))


@pytest.mark.parametrize("trainable", [True, False])
def test_rejects_batch_statistics(trainable):
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES))
    model[1].requires_grad_(trainable)
    with pytest.raises(UsageError, match=r"layer '1' \(BatchNorm1d\).*call model.eval\(\)"):
        kdfast.grad_norms(model, X, Y)
    model.eval()
    assert kdfast.grad_norms(model, X, Y).shape == (N,)
    no_buffers = nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, CLASSES)).eval()
    with pytest.raises(UsageError, match="layer '0'"):
        kdfast.grad_norms(no_buffers, X, Y)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X, torch.tensor([0, 1, 3, 0]), DataError, r"`labels\[2\]` is 3: must be in \[0, 3\)"),
        (X, torch.tensor([0, -1, 2, 0]), DataError, r"`labels\[1\]` is -1: .* or `ignore_index`"),
        (X, Y[:3], ShapeError, r"`labels` has 3 entries, and `inputs` of shape \(4, 5\) has 4 .* one label per sample"),
        (X, Y.float(), ShapeError, "`labels` has dtype torch.float32: must be int64"),
        (X, Y.to("meta"), UsageError, "`labels` is on meta"),
        (X, None, UsageError, "`labels` is None"),
        (X, -torch.rand(N, CLASSES), DataError, "`labels` has an entry that is negative"),
        (X, torch.rand(N, 2), ShapeError, r"`labels` has shape \(4, 2\): pass \(4, 3\) probabilities"),
        (X.clone().fill_(float("nan")), Y, DataError, "`inputs` contains values that are not finite"),
        (X.to("meta"), Y, UsageError, "`inputs` is on meta, the model on cpu"),
        ((X, X * float("inf")), Y, DataError, r"`inputs\[1\]` contains"),
        ({"input": X * float("inf")}, Y, DataError, r"`inputs\['input'\]` contains"),
        (["no tensor"], Y, UsageError, "`inputs` is a list without tensors"),
        (X.unsqueeze(1), Y, ShapeError, r"logits have shape \(4, 1, 3\)"),
    ],
)
def test_rejects_bad_inputs_and_labels(x, y, error, message):
    with pytest.raises(error, match=message):
        kdfast.grad_norms(net(), x, y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "hinge"}, UsageError, "`loss` is 'hinge'"),
        ({"fallback": "skip"}, UsageError, "`fallback` is 'skip': choose one of error, vmap, loop"),
        ({"method": "fast"}, UsageError, "`method` is 'fast': choose one of auto"),
        ({"loss": "kd"}, UsageError, "`teacher` is None: loss='kd' needs the teacher"),
        ({"loss": "kd", "teacher": torch.zeros(N, 2)}, ShapeError, r"`teacher` has shape \(4, 2\)"),
        ({"loss": "kd", "teacher": torch.zeros(N, CLASSES, device="meta")}, UsageError, "`teacher` is on meta"),
        (
            {"loss": "kd", "teacher": torch.zeros(2, CLASSES), "rows": torch.tensor([0, 1, 2, 0])},
            DataError,
            r"`rows\[2\]` is 2: must be in \[0, 2\)",
        ),
        (
            {"loss": "kd", "teacher": torch.zeros(2, CLASSES), "rows": Y[:2]},
            ShapeError,
            r"`rows` is .* pass int64 \(4,\)",
        ),
        ({"batch_dim": -1}, UsageError, "`batch_dim` is -1"),
        ({"batch_dim": 1.0}, UsageError, "`batch_dim` is 1.0"),
        (
            {"loss": lambda out, y: F.cross_entropy(out, y)},
            ShapeError,
            r"`loss` returned shape \(\): must return a tensor \(N,\)",
        ),
        ({"loss": lambda out, y: out.sum(1)[:2]}, ShapeError, "`labels` has 4 entries for 2 losses"),
        ({"loss": lambda out, y: out.sum(1, keepdim=True)}, ShapeError, r"`loss` returned shape \(4, 1\)"),
        ({"loss": lambda out, y: out.sum(1) * float("nan")}, DataError, "loss of sample 0 is nan"),
        ({"loss": lambda out, y: out.sum(1).detach()}, UsageError, "does not depend on any trainable parameter"),
        ({"teacher": torch.randn(N, CLASSES)}, UsageError, "`teacher` is given, and `loss` is 'cross_entropy'"),
        (
            {"teacher": torch.randn(N, CLASSES), "loss": lambda out, y: out.sum(1)},
            UsageError,
            "`teacher` is given, and `loss` is a function, without one: pass loss='kd'",
        ),
        ({"backend": "cuda"}, BackendUnavailable, "grad_norms on cpu cannot use it"),
    ],
)
def test_rejects_bad_options(options, error, message):
    model = nn.Sequential(nn.Conv1d(5, 6, 1), nn.Flatten(), nn.Linear(6, CLASSES))
    with pytest.raises(error, match=message):
        kdfast.grad_norms(model, X.unsqueeze(2), Y, **options)


def test_curvature_rejects_a_teacher_that_the_loss_does_not_use():
    with pytest.raises(UsageError, match="`teacher` is given"):
        kdfast.network_hvp(net(), X, Y, torch.zeros(57), teacher=torch.randn(N, CLASSES))


def test_accepts_tensors_of_inference_mode():
    with torch.inference_mode():
        x, y, teacher = X.clone(), Y.clone(), torch.zeros(N, CLASSES)
    model = net()
    assert torch.equal(kdfast.grad_norms(model, (x,), y), kdfast.grad_norms(model, X, Y))
    found = kdfast.grad_norms(model, x, y, loss="kd", teacher=teacher)
    assert torch.equal(found, kdfast.grad_norms(model, X, Y, loss="kd", teacher=torch.zeros(N, CLASSES)))
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    assert torch.equal(kdfast.network_hvp(model, x, y, v), kdfast.network_hvp(model, X, Y, v))


def test_rejects_model_without_logits_or_trainable_parameters():
    class ReturnsList(nn.Sequential):
        def forward(self, x):
            return [super().forward(x)]

    with pytest.raises(UsageError, match="returned list without logits"):
        kdfast.grad_norms(ReturnsList(nn.Linear(5, CLASSES)), X, Y)
    with pytest.raises(UsageError, match="no trainable parameter"):
        kdfast.grad_norms(net().requires_grad_(False), X, Y)


def test_rejects_a_loss_with_another_number_of_samples():
    model = nn.Linear(5, CLASSES)
    with pytest.raises(ShapeError, match="there are 2 losses for 4 samples in dimension 0"):
        kdfast.grad_norms(model, X, None, loss=lambda out, y: out.sum(1)[:2])


def test_rejects_input_changed_in_place_after_the_call():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, CLASSES)

        def forward(self, x):
            x = x * 1.0
            y = self.first(x)
            x.mul_(2)
            return self.second(y)

    with pytest.raises(UsageError, match="layer 'first': its input was changed in place"):
        kdfast.grad_norms(InPlace(), X, Y)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_rejects_layer_inside_reentrant_checkpoint():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, CLASSES)

        def forward(self, x):
            return self.second(checkpoint(self.first, x, use_reentrant=True))

    with pytest.raises(UsageError, match="layer 'first' ran without gradients"):
        kdfast.grad_norms(Checkpointed(), X, Y)


def test_rejects_embedding_with_scale_grad_by_freq():
    model = nn.Sequential(nn.Embedding(4, 5, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(10, CLASSES))
    with pytest.raises(UsageError, match="layer '0': scale_grad_by_freq=True"):
        kdfast.grad_norms(model, torch.randint(0, 4, (N, 2)), Y)


def test_rejects_embedding_that_rescales_its_weights():
    model = nn.Sequential(nn.Embedding(4, 5, max_norm=1.0), nn.Flatten(), nn.Linear(10, CLASSES))
    before = model[0].weight.clone()
    with pytest.raises(UsageError, match=r"layer '0' \(Embedding\) rescales its weights .* set its max_norm to None"):
        kdfast.grad_norms(model, torch.randint(0, 4, (N, 2)), Y)
    assert torch.equal(model[0].weight, before)


def test_rejects_parameters_inside_reentrant_checkpoint():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.rand(5)), nn.Linear(5, CLASSES)

        def forward(self, x):
            x = x.clone().requires_grad_()
            return self.head(checkpoint(lambda v: v * self.scale, x, use_reentrant=True))

    with pytest.raises(UsageError, match=r"'scale' is used inside a reentrant checkpoint.* use_reentrant=False"):
        kdfast.grad_norms(Checkpointed(), X, Y)


class DTensor(torch.Tensor):
    """Stands for a tensor that is split over processes."""


class Split(TwoTensor):
    """Holds its values in other tensors, as a DTensor does, and has no address."""


SPLIT = {
    "inputs": lambda model, values: kdfast.grad_norms(model, Split(X, X), Y),
    "labels": lambda model, values: kdfast.grad_norms(model, X, Split(Y, Y)),
    "metric['0.weight']": lambda model, values: kdfast.grad_norms(model, X, Y, metric=values),
    "vectors['0.weight']": lambda model, values: kdfast.grad_dots(model, X, Y, values),
    "inputs, Fisher": lambda model, values: kdfast.fisher_diagonal(model, [(Split(X, X), Y)]),
    "inputs, curvature": lambda model, values: kdfast.NetworkCurvature(model, Split(X, X), Y),
    "labels, curvature": lambda model, values: kdfast.NetworkCurvature(model, X, Split(Y, Y)),
}


@pytest.mark.parametrize("name", SPLIT)
def test_rejects_tensors_whose_values_are_elsewhere(name):
    model = net()
    values = {key: Split(torch.ones_like(p), torch.ones_like(p)) for key, p in model.named_parameters()}
    with pytest.raises(UsageError, match=rf"`{re.escape(name.split(',')[0])}` is a Split, .*pass a plain tensor"):
        SPLIT[name](model, values)


@pytest.mark.parametrize("function", ["grad_norms", "network_hvp", "NetworkCurvature"])
def test_rejects_parameters_that_are_split_over_processes(function):
    model = net()
    model[0]._parameters["weight"] = model[0].weight.detach().as_subclass(DTensor).requires_grad_()
    more = [torch.zeros(1)] if function == "network_hvp" else []
    with pytest.raises(UsageError, match=r"'0\.weight' is split over processes .*full_state_dict=True"):
        getattr(kdfast, function)(model, X, Y, *more)
