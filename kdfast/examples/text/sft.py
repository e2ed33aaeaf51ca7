"""linear_kd_loss in TRL's SFTTrainer: the answers of chats or prompts are distilled, without logits of all tokens.

    python -m kdfast.examples.text.sft

Needs ``trl`` and ``datasets``; downloads nothing, since both models have random weights. All that is particular to
distillation is in ``kdfast.examples.text.trainer``; chat templates, masks of prompts and packing are TRL's. A packed
batch needs a model as the teacher: texts in a cache have numbers, and packing joins texts.
"""

from __future__ import annotations

import tempfile

import torch
import typer
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from kdfast.examples._texts import VOCABULARY, language_model, make_corpus
from kdfast.examples.text.trainer import Distillation, Result, cache_tokens

__all__ = ["DistillSFTTrainer", "main", "prompts", "tokenizer"]


class DistillSFTTrainer(Distillation, SFTTrainer):
    """SFTTrainer that distills; arguments as in `Distillation`."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of as many words as the models have tokens."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        unk_token="w0", pad_token="w0", eos_token="w0",
    )  # fmt: skip


def prompts(texts: list[torch.Tensor]) -> Dataset:
    """Return texts whose first two tokens are the prompt, already tokenized, with their numbers."""
    return Dataset.from_dict(
        {
            "input_ids": [text.tolist() for text in texts],
            "completion_mask": [[0, 0] + [1] * (len(text) - 2) for text in texts],
            "number": list(range(len(texts))),
        }
    )


def main(steps: int = 40, k: int = 0, alpha: float = 0.9, temperature: float = 1.0, texts: int = 64) -> Result:
    """Distill a small GPT-2 from a larger one on the ends of texts, and print the loss before and after.

    Args:
        steps: Number of updates, each with 2 batches of 8 texts.
        k: Classes cached per token; 0 computes the teacher's hidden states with each batch.
        alpha: Weight of the teacher, as in ``kdfast.linear_kd_loss``.
        temperature: As in ``kdfast.linear_kd_loss``.
        texts: Texts in the corpus.

    Returns:
        Both losses.
    """
    torch.manual_seed(0)
    corpus = [sample.tokens for sample in make_corpus(texts)]
    data, model = prompts(corpus), language_model(width=64, layers=3, std=0.2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, max_steps=steps, learning_rate=5e-3, per_device_train_batch_size=8, max_length=None,
            gradient_accumulation_steps=2, save_strategy="no", report_to="none", disable_tqdm=True, bf16=False,
            dataloader_pin_memory=torch.cuda.is_available(), completion_only_loss=True,
        )  # fmt: skip
        trainer = DistillSFTTrainer(
            model=language_model(width=16, layers=1), args=arguments, train_dataset=data, eval_dataset=data,
            processing_class=tokenizer(), loss={"alpha": alpha, "temperature": temperature},
            teacher=cache_tokens(model, corpus, k, f"{folder}/tokens") if k else model,
        )  # fmt: skip
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        result = Result(before, trainer.evaluate()["eval_loss"])
    print(result)
    return result


if __name__ == "__main__":
    typer.run(main)
