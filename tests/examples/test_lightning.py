import pytest

pytest.importorskip("lightning", reason="needs lightning (pip install 'kdfast[examples]')")

import torch

from kdfast.examples import lightning as example
from kdfast.examples._digits import mlp

# Lightning recommends more loader workers, and uses a deprecated torch name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_logged_terms_add_up_and_student_learns(precision):
    alpha, temperature = 0.8, 3.0
    result = example.main(epochs=3, alpha=alpha, temperature=temperature, precision=precision)
    assert result.accuracy > 0.7
    assert result.loss == pytest.approx((1 - alpha) * result.ce + alpha * temperature**2 * result.kl, rel=1e-4)
    assert result.kl > 0


def test_logged_terms_have_no_graph(monkeypatch):
    logged = {}
    log_dict = example.DistilledModule.log_dict

    def record(self, values):
        logged.update(values)
        log_dict(self, values)

    monkeypatch.setattr(example.DistilledModule, "log_dict", record)
    example.main(epochs=1)
    assert set(logged) == {"loss", "ce", "kl"}
    assert not logged["ce"].requires_grad
    assert not logged["kl"].requires_grad


def test_cached_logits_are_a_buffer_outside_checkpoints():
    module = example.DistilledModule(mlp(4), torch.zeros(7, 10, dtype=torch.float16))
    assert "teacher_logits" in dict(module.named_buffers())
    assert not any("teacher" in name for name in module.state_dict())
