"""The losses of other trainers, written out from their formulas, and the arguments of `kd_loss` that stand for them.

Megatron-LM's offline distillation and NVIDIA's Model Optimizer, in whose words the classes that a teacher leaves out
are a "ghost token"; verl; TRL; Liger-Kernel, whose losses are run where it is installed.
"""

from __future__ import annotations

import pytest
import torch

import kdfast

pytestmark = pytest.mark.filterwarnings("ignore:kdfast. kd_loss on cpu falls back to reference:RuntimeWarning")

N, V, H, K = 7, 60, 5, 6
PATHS = ["kd_loss", "linear_kd_loss"]


@pytest.fixture
def operands():
    """Hidden states, the last layer and a peaked teacher, in float64."""
    hidden, weight = torch.randn(N, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_(), 3 * torch.randn(N, V, dtype=torch.float64)


def ours(path, hidden, weight, teacher, **options):
    """The loss of each row, without a term of labels and without the factor T^2, which none of the others has."""
    options = {"alpha": 1.0, "t_squared": False, "reduction": "none", **options}
    if path == "kd_loss":
        return kdfast.kd_loss(hidden @ weight.t(), None, teacher, **options)
    if "direction" in options:
        options["divergence"] = options.pop("direction")
    return kdfast.linear_kd_loss(hidden, weight, None, teacher, **options)


def assert_same(found, expected, inputs, rtol=1e-5, atol=1e-6):
    """Compare losses and gradients; tails of top-k teachers are float32."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    up = torch.linspace(0.5, 2, N, dtype=torch.float64)
    pairs = (torch.autograd.grad(x, inputs, up, retain_graph=True) for x in (found, expected))
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def with_ghost(logp):
    """Log-probabilities (N, k) with that of all other classes as one more, (N, k + 1)."""
    return torch.cat([logp, torch.log1p(-logp.exp().sum(1, keepdim=True))], 1)


def divergence(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0, 3.7])
def test_model_optimizers_top_k_with_a_ghost_token(operands, path, direction, temperature):
    """TopLogitsKLLoss: the k largest logits of a teacher that runs along, at temperature T; `reverse` swaps them."""
    hidden, weight, teacher = operands
    top = teacher.topk(K, 1).indices
    log_q = with_ghost((teacher / temperature).log_softmax(1).gather(1, top))
    log_p = with_ghost((hidden @ weight.t() / temperature).log_softmax(1).gather(1, top))
    expected = divergence(log_q, log_p) if direction == "forward" else divergence(log_p, log_q)
    topk = kdfast.topk_teacher(teacher, K, temperature)
    found = ours(path, hidden, weight, topk, temperature=temperature, direction=direction)
    assert_same(found, expected, operands[:2])


@pytest.mark.parametrize("path", PATHS)
def test_megatron_lms_stored_top_k_with_a_ghost_token(operands, path):
    """topk_kl_div: log-probabilities that another run stored at temperature 1, in float16; 1e-6 bounds the rest."""
    hidden, weight, teacher = operands
    values, ids = teacher.log_softmax(1).topk(K, 1)
    values = values.half()
    stored, eps = values.double(), 1e-6
    log_p = (hidden @ weight.t()).log_softmax(1).gather(1, ids)
    rest = (1 - stored.exp().sum(1)).clamp_min(eps).log(), (1 - log_p.exp().sum(1) + eps).log()
    expected = divergence(stored, log_p) + rest[0].exp() * (rest[0] - rest[1])
    topk = kdfast.TopKTeacher.from_logprobs(values, ids, temperature=1.0)
    # Its share of 1e-6 in the student's rest is all that differs.
    assert_same(ours(path, hidden, weight, topk, temperature=1.0), expected, operands[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_nucleus_within_the_top_k_with_a_ghost_token(operands, path):
    """Both also cut the k classes where those before hold the share top_p, and add their mass to the ghost token."""
    hidden, weight, teacher = operands
    values, ids = teacher.log_softmax(1).topk(K, 1)
    keep = values.exp().cumsum(1) - values.exp() < 0.8
    keep[:, :2] = True  # at least two
    assert not keep.all()
    log_p = (hidden @ weight.t()).log_softmax(1).gather(1, ids)
    rests = [torch.log1p(-(keep * x.exp()).sum(1)) for x in (values, log_p)]
    expected = (keep * values.exp() * (values - log_p)).sum(1) + rests[0].exp() * (rests[0] - rests[1])
    topk = kdfast.TopKTeacher.from_logprobs(values.masked_fill(~keep, -torch.inf), ids, temperature=1.0)
    assert_same(ours(path, hidden, weight, topk, temperature=1.0), expected, operands[:2])


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_softmax_over_the_top_k_alone(operands, direction):
    """Model Optimizer's earlier TopKLogitsKLLoss, and TRL's top-k without a tail: both softmaxes are over k classes."""
    hidden, weight, teacher = operands
    values, ids = teacher.topk(K, 1)
    logits = (hidden @ weight.t()).gather(1, ids)
    log_q, log_p = (values / 2).log_softmax(1), (logits / 2).log_softmax(1)
    expected = divergence(log_q, log_p) if direction == "forward" else divergence(log_p, log_q)
    found = kdfast.kd_loss(
        logits, None, values, alpha=1.0, temperature=2.0, t_squared=False, reduction="none", direction=direction
    )
    assert_same(found, expected, operands[:2])


@pytest.mark.parametrize("path", PATHS)
def test_verls_sum_over_the_top_k(operands, path):
    """forward_kl_topk without its clamp: sum_k q (log q - log p), which may be negative and is no divergence.

    It is P (D + log P) for the mass P of the k classes and the divergence D without a tail: the same gradients.
    """
    hidden, weight, teacher = operands
    values, ids = teacher.log_softmax(1).topk(K, 1)
    expected = divergence(values, (hidden @ weight.t()).log_softmax(1).gather(1, ids))
    topk = kdfast.TopKTeacher.from_logprobs(values, ids, temperature=1.0, tail=False)
    mass = values.exp().sum(1)
    found = ours(path, hidden, weight, topk, temperature=1.0, weights=mass) + mass * mass.log()
    assert_same(found, expected, operands[:2])


def divergence_of(beta):
    """The arguments for beta of generalized knowledge distillation: 0 is forward KL, 1 is reverse KL."""
    named = {0.0: {"direction": "forward"}, 1.0: {"direction": "reverse"}}
    return named.get(beta, {"divergence": "jsd", "jsd_beta": beta})


def generalized_jsd(z, t, beta):
    log_p, log_q = z.log_softmax(1), t.log_softmax(1)
    if beta in (0.0, 1.0):
        return divergence(log_q, log_p) if beta == 0 else divergence(log_p, log_q)
    log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    return beta * divergence(log_q, log_m) + (1 - beta) * divergence(log_p, log_m)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_generalized_jsd_of_trl(operands, beta):
    hidden, weight, teacher = operands
    logits = hidden @ weight.t()
    expected = generalized_jsd(logits / 2, teacher / 2, beta)
    found = ours("kd_loss", hidden, weight, teacher, temperature=2.0, **divergence_of(beta))
    assert_same(found, expected, operands[:2])
    gkd = pytest.importorskip("trl.experimental.gkd")
    theirs = gkd.GKDTrainer.generalized_jsd_loss(logits[None], teacher[None], None, beta, 2.0)
    torch.testing.assert_close(theirs / N, found.mean(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_generalized_jsd_of_liger_kernel(operands, beta):
    hidden, weight, teacher = operands
    found = ours("kd_loss", hidden, weight, teacher, temperature=1.0, **divergence_of(beta))
    assert_same(found, generalized_jsd(hidden @ weight.t(), teacher, beta), operands[:2])
    jsd = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    theirs = jsd.LigerFusedLinearJSDFunction.distillation_loss_fn(hidden @ weight.t(), teacher, beta)
    torch.testing.assert_close(theirs / N, found.mean(), rtol=1e-6, atol=1e-9)
