import pytest
import torch

import kdfast
from kdfast.examples import plain_loop


def test_student_learns_from_teacher_alone():
    result = plain_loop.main(epochs=6, alpha=1.0, keep=1.0)  # without labels, wrong rows would give accuracy 0.1
    assert result.accuracy > 0.8


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_student_learns_from_subset(amp):
    result = plain_loop.main(amp=amp)
    assert result.last_loss < 0.1 * result.first_loss
    assert result.accuracy > 0.7


def test_loss_reads_float16_logits_without_conversion(monkeypatch):
    calls = []
    original = kdfast.kd_loss

    def record(logits, *args, **kwargs):
        loss = original(logits, *args, **kwargs)
        calls.append((logits.dtype, loss.dtype))
        return loss

    monkeypatch.setattr(kdfast, "kd_loss", record, raising=False)
    plain_loop.main(epochs=1, amp="fp16")
    assert set(calls) == {(torch.float16, torch.float32)}


@pytest.mark.slow
def test_compiled_student_reaches_same_loss():
    plain, compiled = plain_loop.main(epochs=3, amp="none"), plain_loop.main(epochs=3, amp="none", compile_model=True)
    assert compiled.last_loss == pytest.approx(plain.last_loss, rel=1e-3)
