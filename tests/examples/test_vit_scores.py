"""Scores of the vision transformer against autograd and against the changed labels."""

import pytest
import torch
from torch.nn import functional

pytest.importorskip("transformers", reason="needs transformers (pip install 'kdfast[examples]')")

from kdfast.examples import vit_scores


def test_scores_match_autograd():
    model = vit_scores.make_model(width=16, layers=1).double().eval()
    images, labels = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.randint(0, 10, (5,))
    scores = vit_scores.compute_scores(model, images, labels, batch_size=2)
    for i in range(5):
        loss = functional.cross_entropy(model(pixel_values=images[i : i + 1]).logits, labels[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        torch.testing.assert_close(scores[i], norm, rtol=1e-10, atol=0)


def test_finds_wrong_labels(capsys):
    result = vit_scores.main()
    assert result.auc > 0.93
    assert result.precision > 0.35  # 0.05 by chance
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["sample", "label", "true", "label", "gradient", "norm"]
    assert "50 of 1000 labels are wrong" in lines[-1]
