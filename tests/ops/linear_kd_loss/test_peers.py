"""The chunked losses of other libraries give the same loss and gradients, with the arguments that stand for theirs."""

from __future__ import annotations

import pytest
import torch

import kdfast

N, H, K, V = 12, 6, 5, 30


def operands():
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels = torch.randint(0, V, (N,))
    labels[::3] = -100
    return hidden, weight, labels, torch.randn(N, K), torch.randn(V, K)


def divergence_of(beta):
    """The arguments for beta of generalized knowledge distillation: 0 is forward KL, 1 is reverse KL."""
    return {0.0: {"divergence": "forward"}, 1.0: {"divergence": "reverse"}}.get(
        beta, {"divergence": "jsd", "beta": beta}
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_liger_kernel(beta, temperature):
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    hidden, weight, labels, of_teacher, teacher_weight = operands()
    liger = chunked.LigerFusedLinearJSDLoss(0.4, 0.6, beta, temperature=temperature, compiled=False, chunk_size=5)
    theirs = liger(hidden, weight, of_teacher, teacher_weight, labels)
    ours = kdfast.linear_kd_loss(
        hidden, weight, labels, (of_teacher, teacher_weight), alpha=0.6, temperature=temperature, t_squared=False,
        **divergence_of(beta),
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for x, y in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_trl(beta):
    kernels = pytest.importorskip("trl.kernels.chunked_divergence", exc_type=ImportError)
    hidden, weight, _, of_teacher, teacher_weight = operands()
    arguments = (hidden, weight, None, of_teacher, teacher_weight, None, beta, 2.0, 0.7, 5.0, 1.2, 4.0)
    theirs = kernels.ChunkedDivergenceFunction.apply(*arguments)[0].mean()
    teacher = kdfast.LinearTeacher(of_teacher, teacher_weight, None, softcap=4.0, logit_scale=1.2)
    ours = kdfast.linear_kd_loss(
        hidden, weight, None, teacher, alpha=1.0, temperature=2.0, t_squared=False, softcap=5.0, logit_scale=0.7,
        **divergence_of(beta),
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for x, y in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
