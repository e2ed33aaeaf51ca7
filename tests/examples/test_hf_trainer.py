"""The Hugging Face example against the loss computed in float64, text by text and token by token."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers and accelerate (pip install 'kdfast[examples]')")
pytest.importorskip("accelerate", reason="needs transformers and accelerate (pip install 'kdfast[examples]')")

from transformers import TrainingArguments

import kdfast
from kdfast.examples import hf_trainer
from kdfast.examples._texts import VOCABULARY, language_model, make_corpus

# kd_loss warns that float64 uses the reference implementation.
pytestmark = pytest.mark.filterwarnings("ignore:kdfast. kd_loss on cpu falls back to reference:RuntimeWarning")

K, ALPHA, TEMPERATURE, RATE = 6, 0.7, 2.0, 0.5


@pytest.fixture(scope="module")
def corpus():
    samples = make_corpus(4, seed=1)
    assert len({len(sample.tokens) for sample in samples}) == 4, "the tests need texts of different lengths"
    return samples


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(1)
    return language_model(32, 2, std=0.3).eval()


@pytest.fixture
def make_trainer(corpus, teacher, tmp_path):
    def make(dtype=torch.float64, alpha=ALPHA, k=K, **settings):
        torch.manual_seed(2)
        model = language_model(16, 1, std=0.1).to(dtype)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, max_steps=1, max_grad_norm=0, save_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False, **settings,
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        return hf_trainer.DistillTrainer(
            model=model, args=arguments, train_dataset=corpus, data_collator=hf_trainer.collate,
            teacher=hf_trainer.cache_topk(teacher, corpus, k, TEMPERATURE), alpha=alpha, temperature=TEMPERATURE,
            optimizers=(optimizer, constant),
        )  # fmt: skip

    return make


def expected_loss(model, teacher, corpus, k=K, alpha=ALPHA):
    """Return the sum over the predicted tokens and their number, without padding, table and flattening."""
    total, count = 0, 0
    for sample in corpus:
        tokens = sample.tokens
        student = model(input_ids=tokens[None]).logits[0].double()
        with torch.no_grad():
            target = teacher(input_ids=tokens[None]).logits[0].half().double()
        for s in range(len(tokens) - 1):
            ce = -student[s].log_softmax(0)[tokens[s + 1]]
            p, q = (student[s] / TEMPERATURE).softmax(0), (target[s] / TEMPERATURE).softmax(0)
            top = target[s].topk(k).indices
            others = [i for i in range(VOCABULARY) if i not in set(top.tolist())]
            p = torch.cat([p[top], p[others].sum()[None]])
            q = torch.cat([q[top], q[others].sum()[None]])
            kl = sum(b * (b.log() - a.log()) for a, b in zip(p, q, strict=True) if b > 0)
            total = total + (1 - alpha) * ce + alpha * TEMPERATURE**2 * kl
            count += 1
    return total, count


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("k", [6, VOCABULARY])
def test_loss_is_the_one_written_expected_loss(make_trainer, corpus, teacher, alpha, k):
    trainer = make_trainer(alpha=alpha, k=k)
    model = trainer.model.eval()
    expected, count = expected_loss(model, teacher, corpus, k, alpha)
    batch = hf_trainer.collate(corpus)
    assert int((batch["labels"] != -100).sum()) == count
    loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(count))
    mean, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert outputs.logits.shape == (*batch["labels"].shape, VOCABULARY)
    torch.testing.assert_close(loss, expected / count, rtol=1e-6, atol=1e-8)  # the table has float16 and float32 parts
    torch.testing.assert_close(mean, expected / count, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-7), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (1, 4), (2, 2)])
def test_update_does_not_depend_on_accumulation(make_trainer, corpus, teacher, dtype, tolerance, batch, accumulation):
    trainer = make_trainer(dtype, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    loss, count = expected_loss(trainer.model.train(), teacher, corpus)
    gradients = torch.autograd.grad(loss / count, list(trainer.model.parameters()))
    reported = trainer.train().training_loss

    assert trainer.state.global_step == 1
    assert reported == pytest.approx(loss.item() / count, rel=1e-5)
    assert max(float(g.abs().max()) for g in gradients) > 0.05
    for (name, after), gradient in zip(trainer.model.named_parameters(), gradients, strict=True):
        moved = (before[name] - after.detach()) / RATE
        torch.testing.assert_close(moved, gradient, rtol=1e-5, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_mean_of_batch_means_would_differ(make_trainer, corpus, teacher):
    trainer = make_trainer()
    total, count = expected_loss(trainer.model, teacher, corpus)
    means = [trainer.compute_loss(trainer.model, hf_trainer.collate([sample])) for sample in corpus]
    assert abs((total / count - sum(means) / len(means)).item()) > 1e-3


def test_padding_does_not_contribute(make_trainer, corpus):
    trainer = make_trainer(torch.float32)
    batch = hf_trainer.collate(corpus)
    padding = batch["attention_mask"] == 0
    assert 0.1 < float(padding.float().mean()) < 0.9

    def loss_and_gradients(batch):
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        outputs.logits.retain_grad()
        return loss, outputs.logits.grad_fn, torch.autograd.grad(loss, [outputs.logits, *trainer.model.parameters()])

    loss, _, (logits_gradient, *gradients) = loss_and_gradients(batch)
    predicts = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    assert (logits_gradient[~predicts] == 0).all()
    assert (logits_gradient[predicts].abs().sum(1) > 0).all()

    other = {**batch, "input_ids": batch["input_ids"].clone(), "rows": batch["rows"].clone()}
    other["input_ids"][padding] = 17
    other["rows"][padding] = 10**9
    changed, _, (_, *changed_gradients) = loss_and_gradients(other)
    torch.testing.assert_close(changed, loss, rtol=1e-6, atol=0)
    for a, b in zip(changed_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_each_token_has_its_row_in_table(corpus, teacher):
    table = hf_trainer.cache_topk(teacher, corpus, K, TEMPERATURE)
    assert isinstance(table, kdfast.TopKTeacher)
    assert table.values.shape == (sum(len(sample.tokens) for sample in corpus), K)
    last = corpus[-1]
    logits = teacher(input_ids=last.tokens[None]).logits[0].detach()
    assert torch.equal(table.classes[last.first_row :, 0].long(), logits.argmax(1))


def test_training_lowers_the_loss():
    result = hf_trainer.main(steps=40)
    assert result.after < 0.8 * result.before


SCRIPT = """
import sys, torch
from transformers import TrainingArguments
from kdfast.examples import hf_trainer
from kdfast.examples._texts import language_model, make_corpus

folder = sys.argv[1]
corpus = make_corpus(4, seed=1)
arguments = TrainingArguments(
    output_dir=folder, use_cpu=True, ddp_backend="gloo", max_steps=1, max_grad_norm=0, save_strategy="no",
    report_to="none", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
    per_device_train_batch_size=1, gradient_accumulation_steps=2,
)
torch.manual_seed(1)
teacher = hf_trainer.cache_topk(language_model(32, 2, std=0.3), corpus, 6, 2.0)
torch.manual_seed(2)
model = language_model(16, 1, std=0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
trainer = hf_trainer.DistillTrainer(
    model=model, args=arguments, train_dataset=corpus, data_collator=hf_trainer.collate, teacher=teacher, alpha=0.7,
    temperature=2.0, optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
)
trainer.train()
if trainer.is_world_process_zero():
    assert trainer.args.world_size == 2
    torch.save(model.state_dict(), folder + "/weights.pt")
"""


@pytest.mark.slow
def test_two_processes_compute_same_update(make_trainer, corpus, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    trainer = make_trainer(torch.float32, per_device_train_batch_size=4)
    trainer.train()
    for name, weight in torch.load(tmp_path / "weights.pt").items():
        torch.testing.assert_close(weight, trainer.model.state_dict()[name], rtol=1e-5, atol=1e-6)
