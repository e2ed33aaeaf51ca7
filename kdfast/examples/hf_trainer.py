"""kd_loss in Hugging Face's Trainer: a causal language model learns from the cached top-k logits of a larger one.

    python -m kdfast.examples.hf_trainer

Needs ``transformers`` and ``accelerate`` (``pip install 'kdfast[examples]'``); downloads nothing, since both models
have random weights. The teacher processes the corpus once. Its table stores k classes for each of the corpus's M
tokens: values (M, k), class ids (M, k) and the probability mass of the other classes (M,). A batch contains the rows of
its tokens in that table.
"""

from __future__ import annotations

import tempfile
from typing import Any, NamedTuple

import torch
import typer
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

import kdfast
from kdfast.examples._texts import Sample, language_model, make_corpus

__all__ = ["DistillTrainer", "Result", "cache_topk", "collate", "main"]

IGNORE = -100


class Result(NamedTuple):
    """Loss per token, averaged over batches of the corpus, before and after training."""

    before: float
    after: float


@torch.no_grad()
def cache_topk(teacher: GPT2LMHeadModel, corpus: list[Sample], k: int, temperature: float) -> kdfast.TopKTeacher:
    """Store the teacher's k most probable next tokens at each token of the corpus, text by text, in float16."""
    teacher.eval()
    logits = [teacher(input_ids=sample.tokens[None]).logits[0].half() for sample in corpus]
    return kdfast.topk_teacher(torch.cat(logits), k, temperature)


def collate(samples: list[Sample]) -> dict[str, Tensor]:
    """Pad to the longest text; ignored positions have the label -100."""
    tokens = [sample.tokens for sample in samples]
    rows = [sample.first_row + torch.arange(len(sample.tokens)) for sample in samples]
    labels = pad_sequence(tokens, batch_first=True, padding_value=IGNORE)
    labels[:, 0] = IGNORE  # no position predicts the first token, and Trainer counts the labels that are not ignored
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True),
        "labels": labels,
        "rows": pad_sequence(rows, batch_first=True),
    }


class DistillTrainer(Trainer):
    """Trainer whose loss is ``kdfast.kd_loss`` with a table of cached top-k logits.

    Args:
        teacher: The table.
        alpha: Weight of the teacher, as in ``kdfast.kd_loss``.
        temperature: As in ``kdfast.kd_loss``; it must be the one that ``cache_topk`` was called with.
        **trainer: As in ``transformers.Trainer``.
    """

    def __init__(self, *, teacher: kdfast.TopKTeacher, alpha: float, temperature: float, **trainer: Any) -> None:
        super().__init__(**trainer)
        self.teacher = kdfast.TopKTeacher(*(part.to(self.args.device) for part in teacher))
        self.distill: dict[str, Any] = {"alpha": alpha, "temperature": temperature, "ignore_index": IGNORE}
        # Makes Trainer pass the number of labels in all accumulated batches to compute_loss.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss over tokens, or the sum divided by ``num_items_in_batch``, the tokens of an update."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        # Position s predicts token s + 1. Shifting the labels instead of the logits avoids a copy of (B, S, V).
        targets = functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
        logits, rows = outputs.logits.flatten(0, 1), inputs["rows"].flatten()
        if num_items_in_batch is None:
            loss = kdfast.kd_loss(logits, targets, self.teacher, rows, **self.distill)
        else:
            loss = kdfast.kd_loss(logits, targets, self.teacher, rows, reduction="sum", **self.distill)
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:  # counts are summed over processes, gradients are averaged
                loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss


def main(steps: int = 40, k: int = 16, alpha: float = 0.9, temperature: float = 2.0, texts: int = 64) -> Result:
    """Distill a small GPT-2 from a larger one, and print the loss before and after.

    Args:
        steps: Number of updates, each with 2 batches of 8 texts.
        k: Classes cached per token.
        alpha: Weight of the teacher, as in ``kdfast.kd_loss``.
        temperature: As in ``kdfast.kd_loss``.
        texts: Texts in the corpus.

    Returns:
        Both losses.
    """
    torch.manual_seed(0)
    corpus = make_corpus(texts)
    teacher = cache_topk(language_model(width=64, layers=3, std=0.2), corpus, k, temperature)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, learning_rate=5e-3, per_device_train_batch_size=8,
            gradient_accumulation_steps=2, save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,  # the loss needs "rows", which is not an argument of the model
        )  # fmt: skip
        trainer = DistillTrainer(
            model=language_model(width=16, layers=1), args=arguments, train_dataset=corpus, eval_dataset=corpus,
            data_collator=collate, teacher=teacher, alpha=alpha, temperature=temperature,
        )  # fmt: skip
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        result = Result(before, trainer.evaluate()["eval_loss"])
    print(result)
    return result


if __name__ == "__main__":
    typer.run(main)
