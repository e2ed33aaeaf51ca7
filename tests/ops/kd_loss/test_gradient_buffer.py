"""Memory of large gradients is used again, and never while somebody still looks at it."""

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


def test_freed_memory_is_used_again():
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
def test_memory_that_somebody_holds_is_left_alone(holder):
    tensor = fresh()
    address = tensor.data_ptr()
    held = HOLDERS[holder](tensor)
    del tensor
    assert fresh().data_ptr() != address
    del held


def test_memory_that_another_process_holds_is_left_alone():
    """torch.multiprocessing moves what goes through a queue to shared memory, and the receiver goes on reading it."""
    tensor = fresh()
    tensor.share_memory_()
    address = tensor.data_ptr()
    del tensor
    assert fresh().data_ptr() != address


def test_only_middling_sizes_are_kept():
    for elements in (gradient_buffer.MIN_BYTES // 4 - 1, gradient_buffer.MAX_BYTES // 4 + 1):
        gradient_buffer.new_gradient(torch.zeros(()), (elements,))
        assert gradient_buffer._kept == []
    fresh()
    assert len(gradient_buffer._kept) == 1
    for rows in (SHAPE[0] + 1, SHAPE[0] - 1):
        other = gradient_buffer.new_gradient(torch.zeros(()), (rows, SHAPE[1]))
        assert other.untyped_storage().nbytes() == other.nbytes, "torch.save would write what is too much of it"
        del other
    assert len(gradient_buffer._kept) == 1, "at most one piece"


def test_gradients_of_two_calls_do_not_share_memory():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(SHAPE, generator=generator)
    labels = torch.randint(SHAPE[1], SHAPE[:1], generator=generator)
    inputs = [torch.randn(SHAPE, generator=generator).requires_grad_() for _ in range(3)]
    grads = [torch.autograd.grad(kdfast.kd_loss(z, labels, teacher), z)[0] for z in inputs]
    again = [torch.autograd.grad(kdfast.kd_loss(z, labels, teacher), z)[0].clone() for z in inputs]
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
