"""TRL's trainer with linear_kd_loss against the loss computed in float64 on the answers only."""

import pytest
import torch

pytest.importorskip("datasets", reason="needs trl and datasets (pip install trl)")
pytest.importorskip("trl", reason="needs trl and datasets (pip install trl)")

from trl import SFTConfig

from kdfast.examples._texts import language_model, make_corpus
from kdfast.examples.text import sft
from kdfast.examples.text.trainer import cache_tokens

# TRL sets an option that Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

ALPHA, T, RATE, K = 0.7, 1.0, 0.5, 6


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (1, 4)])
def test_update_is_that_of_the_answers(tmp_path, cached, batch, accumulation):
    texts = [sample.tokens for sample in make_corpus(4, seed=1)]
    torch.manual_seed(1)
    teacher, student = language_model(32, 2, std=0.3).eval(), language_model(16, 1, std=0.3)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=1, max_grad_norm=0, save_strategy="no",
        report_to="none", disable_tqdm=True, dataloader_pin_memory=False, bf16=False, max_length=None,
        completion_only_loss=True, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
    trainer = sft.DistillSFTTrainer(
        model=student, args=arguments, train_dataset=sft.prompts(texts), processing_class=sft.tokenizer(),
        teacher=cache_tokens(teacher, texts, K, tmp_path / "tokens") if cached else teacher,
        loss={"alpha": ALPHA, "temperature": T},
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    total, count = 0, 0
    for text in texts:
        p, q = (m(input_ids=text[None]).logits[0, 1:-1].double().log_softmax(1) for m in (student, teacher))
        total = total - (1 - ALPHA) * p.gather(1, text[2:, None]).sum()
        if cached:
            top = q.topk(K).indices
            p, q = (torch.cat([x.gather(1, top), x.exp().scatter(1, top, 0).sum(1).log()[:, None]], 1) for x in (p, q))
        total, count = total + ALPHA * (q.exp() * (q - p)).sum(), count + len(text) - 2
    gradients = torch.autograd.grad(total / count, list(student.parameters()))
    loss = trainer.train().training_loss
    close = {"rtol": 5e-3, "atol": 5e-3} if cached else {"rtol": 1e-4, "atol": 1e-5}  # the cache is float16
    assert loss == pytest.approx(total.item() / count, rel=close["rtol"])
    for (name, after), gradient in zip(student.named_parameters(), gradients, strict=True):
        moved = (before[name] - after.detach()) / RATE
        torch.testing.assert_close(moved, gradient, **close, msg=lambda m, name=name: f"{name}: {m}")
