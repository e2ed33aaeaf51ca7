import pytest
import torch

import kdfast
from kdfast.examples import plain_loop


def test_a_teacher_alone_suffices_when_each_sample_gets_its_own_row():
    result = plain_loop.main(epochs=6, alpha=1.0, keep=1.0)  # labels play no part: wrong rows would leave chance, 0.1
    assert result.accuracy > 0.8


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_the_student_learns_from_a_subset(amp):
    result = plain_loop.main(amp=amp)
    assert result.last_loss < 0.1 * result.first_loss
    assert result.accuracy > 0.7


def test_the_loss_takes_float16_logits_as_they_are(monkeypatch):
    calls = []
    real = kdfast.kd_loss

    def watched(logits, *args, **kwargs):
        loss = real(logits, *args, **kwargs)
        calls.append((logits.dtype, loss.dtype))
        return loss

    monkeypatch.setattr(kdfast, "kd_loss", watched, raising=False)
    plain_loop.main(epochs=1, amp="fp16")
    assert set(calls) == {(torch.float16, torch.float32)}


@pytest.mark.slow
def test_a_compiled_student_learns_alike():
    plain, compiled = plain_loop.main(epochs=3, amp="none"), plain_loop.main(epochs=3, amp="none", compile_model=True)
    assert compiled.last_loss == pytest.approx(plain.last_loss, rel=1e-3)
