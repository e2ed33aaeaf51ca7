"""`linear_kd_loss` inside autograd: graphs, checkpointing, autocast, torch.compile, meta tensors, memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kdfast
from kdfast.ops.kd_loss.linear import autograd
from kdfast.ops.kd_loss.linear.validation import make_linear_call

N, H, V = 10, 6, 40


def operands(dtype=torch.float32, n=N):
    hidden = torch.randn(n, H).to(dtype).requires_grad_()
    weight = torch.randn(V, H).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (n,)), torch.randn(n, V)


@pytest.fixture(params=["fast", "low"])
def memory(request):
    return request.param


def gradients(loss, inputs, **options):
    return torch.autograd.grad(loss, inputs, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_second_derivatives_raise(memory, dtype):
    hidden, weight, labels, teacher = operands(dtype)
    loss = kdfast.linear_kd_loss(hidden, weight, labels, teacher, memory=memory)
    grad, _ = gradients(loss, (hidden, weight), create_graph=True)
    with pytest.raises(RuntimeError, match="linear_kd_loss can be differentiated only once: pass backend='reference'"):
        grad.sum().backward()
    twice = kdfast.linear_kd_loss(hidden, weight, labels, teacher, memory=memory, backend="reference")
    gradients(gradients(twice, hidden, create_graph=True)[0].sum(), weight)


def test_a_retained_graph_gives_the_same_gradients_again(memory):
    hidden, weight, labels, teacher = operands()
    loss = kdfast.linear_kd_loss(hidden, weight, labels, teacher, memory=memory)
    first = gradients(3 * loss, (hidden, weight), retain_graph=True)
    kept = [x.clone() for x in first]
    second = gradients(3 * loss, (hidden, weight))
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(loss, hidden)


def test_gradients_accumulate_over_micro_batches(memory):
    hidden, weight, labels, teacher = operands()
    whole = gradients(kdfast.linear_kd_loss(hidden, weight, labels, teacher), weight)[0]
    for part in (slice(0, 3), slice(3, N)):
        kdfast.linear_kd_loss(hidden[part], weight, labels[part], teacher[part], num_items=N, memory=memory).backward()
    torch.testing.assert_close(weight.grad, whole)


def test_tied_weights_get_both_gradients():
    table = torch.randn(V, H, requires_grad=True)
    labels, teacher = torch.randint(0, V, (N,)), torch.randn(N, V)
    tokens = torch.randint(0, V, (N,))
    loss = kdfast.linear_kd_loss(table[tokens], table, labels, teacher)
    other = kdfast.kd_loss(table[tokens] @ table.T, labels, teacher)
    torch.testing.assert_close(gradients(loss, table), gradients(other, table), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(memory, reentrant):
    hidden, weight, labels, teacher = operands()

    def loss(h):
        return kdfast.linear_kd_loss(torch.tanh(h), weight, labels, teacher, memory=memory)

    plain = gradients(loss(hidden), (hidden, weight))
    checkpoint(loss, hidden, use_reentrant=reentrant).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), plain)


def test_saved_tensors_may_be_moved(memory):
    hidden, weight, labels, teacher = operands()
    plain = gradients(kdfast.linear_kd_loss(hidden, weight, labels, teacher), (hidden, weight))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(force=True), torch.as_tensor):
        loss = kdfast.linear_kd_loss(hidden, weight, labels, teacher, memory=memory)
    torch.testing.assert_close(gradients(loss, (hidden, weight)), plain)


def test_changed_inputs_of_a_late_gradient_are_reported():
    hidden, weight, labels, teacher = operands()
    loss = kdfast.linear_kd_loss(hidden, weight, labels, teacher, memory="low")
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_computes_in_half_precision_and_sums_in_float32(memory):
    hidden, weight, labels, teacher = operands(n=300)
    with torch.autocast("cpu", torch.bfloat16):
        loss = kdfast.linear_kd_loss(hidden, weight, labels, teacher, memory=memory, chunk=64)
    got = gradients(loss, (hidden, weight))
    assert [x.dtype for x in got] == [torch.float32, torch.float32]
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = kdfast.linear_kd_loss(*exact, labels, teacher)
    assert abs(float(loss.detach()) - float(expected.detach())) < 0.01
    for a, b in zip(got, gradients(expected, exact), strict=True):
        assert (a.double() - b).norm() < 0.01 * b.norm()


def test_float16_gradients_survive_a_loss_scale(memory):
    hidden, weight, labels, teacher = operands(torch.float16, n=512)
    loss = kdfast.linear_kd_loss(hidden, weight, labels, teacher, memory=memory)
    scale = 2.0**12
    got = [x.double() / scale for x in gradients(loss * scale, (hidden, weight))]
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    for a, b in zip(got, gradients(kdfast.linear_kd_loss(*exact, labels, teacher), exact), strict=True):
        assert (a - b).norm() < 2e-3 * b.norm()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(memory, dynamic, no_poison):
    def loss(h, w, y, t):
        return kdfast.linear_kd_loss(torch.tanh(h), w, y, t, memory=memory) * 2

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (10, 13) if dynamic else (10,):
        hidden, weight, labels, teacher = operands(n=n)
        labels[2] = -100
        got, expected = compiled(hidden, weight, labels, teacher), loss(hidden, weight, labels, teacher)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(gradients(got, (hidden, weight)), gradients(expected, (hidden, weight)))


@pytest.mark.slow  # the compiler takes several seconds
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_compiles_a_layer_and_its_loss(memory, dynamic, no_poison):
    torch._dynamo.reset()
    _, weight, _, teacher = operands(n=13)
    topk = kdfast.topk_teacher(teacher, 4, 2.0)
    of_hidden = (torch.randn(13, 5), torch.randn(V, 5))
    inner = torch.randn(H, H, requires_grad=True)

    def loss(x, y, t):
        hidden = torch.nn.functional.gelu(x @ inner)  # the compiler fuses what surrounds the loss
        first = kdfast.linear_kd_loss(hidden, weight, y, t * 1.5, memory=memory, alpha=0.3)
        rows = torch.arange(x.shape[0])
        second = kdfast.linear_kd_loss(hidden, weight, y, topk, rows, temperature=2.0, memory=memory, reduction="none")
        third = kdfast.linear_kd_loss(hidden, weight, y, of_hidden, rows, divergence="jsd", memory=memory)
        return first + second.square().mean() + third

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="inductor")
    for n in (13, 9):
        x, labels = torch.randn(n, H, requires_grad=True), torch.randint(0, V, (n,))
        labels[2] = -100
        inputs = (x, inner, weight)
        got, expected = compiled(x, labels, teacher[:n]), loss(x, labels, teacher[:n])
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(gradients(got, inputs), gradients(expected, inputs))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, labels, teacher[:n]), expected.detach())


def test_fake_and_meta_tensors(memory, no_poison):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden, weight, labels, teacher = operands()
        loss = kdfast.linear_kd_loss(hidden, weight, labels, teacher, memory=memory)
        loss.backward()
    assert loss.shape == ()
    assert weight.grad.shape == weight.shape
    with torch.device("meta"):
        hidden, weight, labels, teacher = operands()
        loss = kdfast.linear_kd_loss(hidden, weight, labels, teacher, memory=memory, reduction="none")
        gradients(loss.sum(), (hidden, weight))
    assert loss.shape == (N,)


def test_operators_pass_pytorchs_own_checks(no_poison):
    hidden, weight, labels, teacher = operands()
    options = dict.fromkeys(("bias", "class_weights", "weights", "softcap", "num_items"))
    options |= {
        "alpha": 0.5, "temperature": 4.0, "t_squared": True, "divergence": "forward", "beta": 0.5, "memory": "fast",
        "label_smoothing": 0.0, "teacher_kind": "logits", "ignore_index": -100, "logit_scale": 1.0,
        "reduction": "mean", "chunk": "auto",
    }  # fmt: skip
    call, _ = make_linear_call(hidden, weight, labels, teacher, None, options)
    for now in ((True, True, False), (False, False, False)):
        torch.library.opcheck(autograd.linear_kd_loss_op, (*call, "native", *now, True, True, False))


def test_transforms_are_refused():
    hidden, weight, labels, teacher = operands()
    with pytest.raises(RuntimeError, match=r"no torch\.func transforms: pass backend='reference'"):
        torch.func.grad(lambda h: kdfast.linear_kd_loss(h, weight, labels, teacher))(hidden)
    got = torch.func.grad(lambda h: kdfast.linear_kd_loss(h, weight, labels, teacher, backend="reference"))(hidden)
    expected = gradients(kdfast.linear_kd_loss(hidden, weight, labels, teacher), hidden)[0]
    torch.testing.assert_close(got, expected)


def test_batched_incoming_gradients(memory):
    hidden, weight, labels, teacher = operands()
    loss = kdfast.linear_kd_loss(hidden, weight, labels, teacher, memory=memory)
    factors = torch.tensor([1.0, -2.0, 3.0])
    if memory == "low":
        with pytest.raises(RuntimeError, match="cannot take is_grads_batched=True: pass backend='reference'"):
            gradients(loss, weight, grad_outputs=factors, is_grads_batched=True)
        return
    got = gradients(loss, weight, grad_outputs=factors, is_grads_batched=True, retain_graph=True)[0]
    one = gradients(loss, weight)[0]
    torch.testing.assert_close(got, torch.stack([x * one for x in factors]))


def test_inputs_are_not_written():
    hidden, weight, labels, teacher = operands()
    copies = [x.detach().clone() for x in (hidden, weight, labels, teacher)]
    kdfast.linear_kd_loss(hidden, weight, labels, teacher, softcap=3.0).backward()
    for x, copy in zip((hidden, weight, labels, teacher), copies, strict=True):
        assert torch.equal(x.detach(), copy)


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_logits_of_all_rows_never_exist(memory, form, no_poison, monkeypatch):
    n, v, chunk = 512, 3000, 32
    hidden, weight = torch.randn(n, 4, requires_grad=True), torch.randn(v, 4, requires_grad=True)
    labels = torch.randint(0, v, (n,))
    teacher = torch.randn(n, v) if form == "logits" else (torch.randn(n, 3), torch.randn(v, 3))
    given = {x.untyped_storage().data_ptr() for x in (teacher if form == "hidden" else [teacher])}
    sizes = set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                    sizes.add(x.untyped_storage().nbytes() // x.itemsize)
            return out

    def traced(*args):
        with Sizes():
            return compute(*args)

    compute = autograd.compute
    monkeypatch.setattr(autograd, "compute", traced)
    kdfast.linear_kd_loss(hidden, weight, labels, teacher, chunk=chunk, memory=memory).backward()
    assert max(sizes) == chunk * v
