"""Invalid arguments of `linear_kd_loss`: one line that names the argument, its value, and what to pass."""

from __future__ import annotations

import pytest
import torch

import kdfast
from kdfast.errors import BackendUnavailable, ShapeError

N, H, V = 4, 3, 6

BAD = {
    "hidden 1-D": ({"hidden": torch.randn(3)}, ShapeError, r"`hidden` has shape \(3,\)"),
    "hidden list": ({"hidden": [[1.0]]}, TypeError, "`hidden` is list"),
    "hidden int": ({"hidden": torch.ones(N, H, dtype=torch.int64)}, TypeError, "`hidden` is torch.int64"),
    "two dtypes": ({"hidden": torch.randn(N, H).bfloat16()}, TypeError, "use torch.autocast"),
    "weight 1-D": ({"weight": torch.randn(3)}, ShapeError, r"`weight` has shape \(3,\)"),
    "another width": ({"weight": torch.randn(V, H + 1)}, ShapeError, r"`weight` has shape \(6, 4\): must be \(V, 3\)"),
    "no classes": ({"weight": torch.randn(0, H)}, ShapeError, "at least one class"),
    "bias": ({"bias": torch.randn(V + 1)}, ShapeError, r"`bias` has shape \(7,\): must be \(6,\)"),
    "bias dtype": ({"bias": torch.randn(V).half()}, TypeError, "`bias` is torch.float16"),
    "labels": ({"labels": torch.zeros(5, dtype=torch.int64)}, ShapeError, r"`labels` has shape \(5,\)"),
    "label": ({"labels": torch.tensor([0, 1, 6, 0])}, IndexError, r"`labels\[2\]` is 6"),
    "no labels": ({"labels": None}, ShapeError, "`labels` are None"),
    "teacher": ({"teacher": torch.randn(N, V + 1)}, ShapeError, "`teacher` has 7 classes"),
    "list of two tensors": ({"teacher": [torch.randn(N, 2), torch.randn(V, 2)]}, TypeError, "`teacher` is list: pass"),
    "pair with a softcap": (
        {"teacher": (torch.randn(N, 2), torch.randn(V, 2), None, 30.0)}, TypeError, "a LinearTeacher"
    ),
    "group": ({"group": 0}, TypeError, "`group` is 0: pass a process group"),
    "teacher rows": ({"teacher": torch.randn(N + 1, V)}, ShapeError, "pass `rows`"),
    "row": ({"rows": torch.tensor([0, 1, 2, 9])}, IndexError, r"`rows\[3\]` is 9"),
    "teacher of other classes": (
        {"teacher": (torch.randn(N, 2), torch.randn(V - 1, 2))}, ShapeError, "`teacher.weight` has 5 classes"
    ),
    "teacher of another width": (
        {"teacher": (torch.randn(N, 2), torch.randn(V, 3))}, ShapeError, r"`teacher.weight` has shape \(6, 3\)"
    ),
    "trained teacher": (
        {"teacher": (torch.randn(N, 2), torch.randn(V, 2, requires_grad=True))}, TypeError, r"pass weight.detach\(\)"
    ),
    "top-k and jsd": (
        {"teacher": kdfast.topk_teacher(torch.randn(N, V), 2, 4.0), "divergence": "jsd"},
        ShapeError,
        "TopKTeacher.*or divergence='forward'",
    ),
    "probabilities of hidden states": (
        {"teacher": (torch.randn(N, 2), torch.randn(V, 2)), "teacher_kind": "probs"}, ShapeError, "`teacher_kind`"
    ),
    "divergence": ({"divergence": "kl"}, ShapeError, "pass 'forward', 'reverse' or 'jsd'"),
    "beta": ({"divergence": "jsd", "beta": 1.0}, ShapeError, "for 0 pass divergence='forward', for 1 'reverse'"),
    "alpha": ({"alpha": 1.5}, ShapeError, "`alpha` is 1.5"),
    "temperature": ({"temperature": 0.0}, ShapeError, "`temperature` is 0.0"),
    "softcap": ({"softcap": 0.0}, ShapeError, "`softcap` is 0.0"),
    "scale": ({"logit_scale": -1}, ShapeError, "`logit_scale` is -1"),
    "chunk": ({"chunk": 0}, ShapeError, "`chunk` is 0"),
    "chunk name": ({"chunk": "large"}, TypeError, "`chunk` is 'large'"),
    "memory": ({"memory": "high"}, ShapeError, "pass 'fast' or 'low'"),
    "reduction": ({"reduction": "max"}, ShapeError, "`reduction` is 'max'"),
    "num_items": ({"num_items": 0}, ShapeError, "`num_items` is 0"),
    "num_items of a sum": ({"num_items": 3, "reduction": "sum"}, ShapeError, "omit one"),
    "weights": ({"weights": torch.ones(N, requires_grad=True)}, TypeError, "reduction='none'"),
    "class weights": ({"class_weights": -torch.ones(V)}, ShapeError, r"`class_weights\[0\]` is -1"),
    "backend": ({"backend": "cuda"}, BackendUnavailable, "there is no such implementation"),
    "DTensor": ({"weight": type("DTensor", (torch.Tensor,), {})(V, H)}, TypeError, r"full_tensor\(\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_rejected(name):
    changes, kind, message = BAD[name]
    arguments = {
        "hidden": torch.randn(N, H), "weight": torch.randn(V, H), "labels": torch.zeros(N, dtype=torch.int64),
        "teacher": torch.randn(N, V),
    }  # fmt: skip
    with pytest.raises(kind, match=message) as caught:
        kdfast.linear_kd_loss(**{**arguments, **changes})
    assert "\n" not in str(caught.value)


def test_a_bad_label_is_named_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(torch, "mm", None)
    labels = torch.zeros(300, dtype=torch.int64)
    labels[299] = V
    with pytest.raises(IndexError, match=r"`labels\[299\]` is 6"):
        kdfast.linear_kd_loss(torch.randn(300, H), torch.randn(V, H), labels, torch.randn(300, V))
