"""The memory of large gradients is reused, and never while anything else refers to it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kdfast
from kdfast.ops.kd_loss import gradient_buffer

SHAPE = (512, 1024)  # 2 MiB of float32


@pytest.fixture(autouse=True)
def clean():
    gradient_buffer.release()
    yield
    gradient_buffer.release()


def fresh():
    return gradient_buffer.new_gradient(torch.zeros(()), SHAPE)


def test_reuses_freed_memory():
    first = fresh()
    address = first.data_ptr()
    del first
    second = fresh()
    assert second.data_ptr() == address
    assert second.shape == SHAPE
    assert second.is_contiguous()
    assert not second.requires_grad


HOLDERS = {
    "the tensor": lambda x: x,
    "a view": lambda x: x[3:4],
    "a detached one": lambda x: x.detach(),
    "numpy": lambda x: x.numpy(),
    "dlpack": torch.utils.dlpack.to_dlpack,
    "its storage": lambda x: x.untyped_storage(),
    "a graph": lambda x: (torch.ones((), requires_grad=True) * x).grad_fn,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_does_not_reuse_memory_with_another_owner(holder):
    tensor = fresh()
    address = tensor.data_ptr()
    held = HOLDERS[holder](tensor)
    del tensor
    assert fresh().data_ptr() != address
    del held


def test_does_not_reuse_shared_memory():
    """torch.multiprocessing moves a tensor sent through a queue to shared memory, which the receiver keeps reading."""
    tensor = fresh()
    tensor.share_memory_()
    address = tensor.data_ptr()
    del tensor
    assert fresh().data_ptr() != address


def test_keeps_one_storage_within_the_size_limits():
    for elements in (gradient_buffer.MIN_BYTES // 4 - 1, gradient_buffer.MAX_BYTES // 4 + 1):
        gradient_buffer.new_gradient(torch.zeros(()), (elements,))
        assert gradient_buffer._kept == []
    fresh()
    assert len(gradient_buffer._kept) == 1
    for rows in (SHAPE[0] + 1, SHAPE[0] - 1):
        other = gradient_buffer.new_gradient(torch.zeros(()), (rows, SHAPE[1]))
        assert other.untyped_storage().nbytes() == other.nbytes, "torch.save would write the whole storage"
        del other
    assert len(gradient_buffer._kept) == 1, "at most one storage is kept"


def test_gradients_of_two_calls_do_not_share_memory():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(SHAPE, generator=generator)
    labels = torch.randint(SHAPE[1], SHAPE[:1], generator=generator)
    inputs = [torch.randn(SHAPE, generator=generator).requires_grad_() for _ in range(3)]
    grads = [torch.autograd.grad(kdfast.kd_loss(z, labels, teacher), z)[0] for z in inputs]
    again = [torch.autograd.grad(kdfast.kd_loss(z, labels, teacher), z)[0].clone() for z in inputs]
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def test_saved_gradients_keep_their_values():
    """Gradients kept from earlier steps, as for an exponential average or a comparison, are never overwritten."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(SHAPE, generator=generator)
    labels = torch.randint(SHAPE[1], SHAPE[:1], generator=generator)
    kept = []
    for _ in range(4):
        z = torch.randn(SHAPE, generator=generator).requires_grad_()
        kdfast.kd_loss(z, labels, teacher).backward()
        kept.append((z.grad, z.grad.clone()))
    assert all(torch.equal(grad, copy) for grad, copy in kept)


def test_threads_never_share_memory():
    teacher = torch.randn(SHAPE)
    labels = torch.randint(SHAPE[1], SHAPE[:1])
    inputs = [torch.randn(SHAPE) for _ in range(4)]
    expected = [
        torch.autograd.grad(kdfast.kd_loss(x := z.clone().requires_grad_(), labels, teacher), x) for z in inputs
    ]

    def train(i):
        for _ in range(20):
            x = inputs[i].clone().requires_grad_()
            (grad,) = torch.autograd.grad(kdfast.kd_loss(x, labels, teacher), x)
            if not torch.equal(grad, expected[i][0]):
                return False
        return True

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert all(pool.map(train, range(len(inputs))))


def test_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("KDFAST_REUSE_GRADIENT", "0")
    fresh()
    assert gradient_buffer._kept == []
