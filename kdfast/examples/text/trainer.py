"""linear_kd_loss in Hugging Face's Trainer: a causal language model is distilled without logits of all tokens.

    python -m kdfast.examples.text.trainer

Needs ``transformers`` and ``accelerate`` (``pip install 'kdfast[examples]'``); downloads nothing, since both models
have random weights. The loss is computed inside the student's ``forward``, so that wrappers such as
DistributedDataParallel see an ordinary call. The teacher is either a second model, whose hidden states are computed
with each batch, or a ``kdfast.TokenTeacher``, a cache of its most probable tokens.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Trainer, TrainingArguments

import kdfast
from kdfast.examples._texts import VOCABULARY, language_model, make_corpus

__all__ = ["DistillTrainer", "Distillation", "Result", "TeacherCollator", "cache_tokens", "main", "pad"]

IGNORE = -100
Batch = dict[str, Any]


class Result(NamedTuple):
    """Loss per token, averaged over batches of the corpus, before and after training."""

    before: float
    after: float


class TeacherCollator:
    """Adds the rows of a cached teacher to the batches of another collator.

    The cached rows of a text are the predictions of its last tokens: of all tokens, of all but the first, or of those
    of an answer. Tokens without one get the label -100.

    Args:
        collate: Makes a batch with ``input_ids``, ``attention_mask`` and ``labels`` of samples without "number".
        cache: The teacher, or None if it is a model.
        temperature: The one of the loss.
    """

    def __init__(self, collate: Callable[..., Any], cache: kdfast.TokenTeacher | None, temperature: float) -> None:
        self.collate, self.cache, self.temperature = collate, cache, temperature
        self.lengths = {} if cache is None else dict(zip(cache.numbers.tolist(), cache.lengths.tolist(), strict=True))

    def __call__(self, samples: list[Mapping[str, Any]]) -> Batch:
        """Return the batch; a sample's "number" is that of its text in the cache."""
        batch = dict(self.collate([{k: v for k, v in sample.items() if k != "number"} for sample in samples]))
        labels = batch["labels"]
        labels[:, 0] = (
            IGNORE  # no position predicts the first token, and Trainer counts the labels that are not ignored
        )
        if self.cache is None:
            return batch
        if any("number" not in sample for sample in samples):
            raise ValueError('a sample has no "number", that of its text in the cache: add it, and do not pack texts')
        numbers = [int(sample["number"]) for sample in samples]
        found = self.cache.lookup(numbers, self.temperature)
        rows, known = torch.zeros_like(labels), torch.zeros_like(labels, dtype=torch.bool)
        for i, number in enumerate(numbers):
            columns, count = batch["attention_mask"][i].nonzero().squeeze(1), self.lengths[number]
            if count > len(columns):
                raise ValueError(f"text {number} has {len(columns)} tokens, and {count} in the cache: do not cut texts")
            columns = columns[len(columns) - count :]
            tokens, cached = batch["input_ids"][i, columns], found.labels[i, :count]
            if ((cached != tokens) & (cached != IGNORE)).any():
                raise ValueError(
                    f"text {number} has other tokens in the cache: were its numbers or its tokenizer others?"
                )
            rows[i, columns], known[i, columns] = found.rows[i, :count], found.mask[i, :count]
        return {
            **batch, "labels": labels.masked_fill(~known, IGNORE), "rows": rows, "teacher": tuple(found.teacher)
        }  # fmt: skip


def hidden_states(model: PreTrainedModel, inputs: Batch) -> Tensor:
    """Return what the last layer of a causal language model gets, one row per token: (B S, H)."""
    states: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    return states.flatten(0, 1)


def last_layer(model: PreTrainedModel) -> dict[str, Any]:
    """Return the layer that makes the logits, as arguments of ``linear_kd_loss``."""
    layer, config = model.get_output_embeddings(), model.config
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)  # Cohere, Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return {"weight": layer.weight, "bias": getattr(layer, "bias", None), "softcap": softcap, "logit_scale": scale}


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Raise ValueError if the logits are not those of `last_layer`."""
    training = model.training
    tokens = torch.arange(3, device=model.device).unsqueeze(0)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = model.eval()(**inputs).logits[0].float()
    layer = last_layer(model)
    logits = functional.linear(hidden_states(model, inputs), layer["weight"], layer["bias"]).float()
    logits = logits * layer["logit_scale"]
    if cap := layer["softcap"]:
        logits = cap * torch.tanh(logits / cap)
    model.train(training)
    if not torch.allclose(logits, expected, rtol=0.05, atol=0.05 * float(expected.abs().max())):
        raise ValueError(f"{type(model).__name__} changes the logits of its last layer: extend `last_layer` by how")


def add_loss(model: PreTrainedModel) -> None:
    """Let ``model(**inputs, linear_loss=arguments)`` return ``linear_kd_loss`` instead of logits."""
    check_logits(model)
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, linear_loss: Batch | None = None, **inputs: Any) -> Any:
        if linear_loss is None:
            return plain(*args, **inputs)
        return kdfast.linear_kd_loss(hidden_states(model, inputs), **last_layer(model), **linear_loss)

    model.forward = forward


def predicted(x: Tensor, last: int) -> Tensor:
    """Return the entries (B, S) of the token that each position predicts, flattened; the last one predicts none."""
    # Shifting these instead of the hidden states avoids a copy of them.
    return functional.pad(x[:, 1:], (0, 1), value=last).flatten()


class Distillation:
    """The part of a trainer that distills: put it before ``Trainer``, or a subclass of it, among the bases.

    Args:
        *args: As in the trainer.
        teacher: A causal language model with the student's tokens, or a cache of one; then each sample has a "number".
        loss: Arguments of ``kdfast.linear_kd_loss``, at least ``alpha`` and ``temperature``.
        **trainer: As in the trainer.
    """

    # Of the trainer.
    model: Any
    args: Any
    data_collator: Any
    _signature_columns: Any

    def __init__(
        self, *args: Any, teacher: PreTrainedModel | kdfast.TokenTeacher, loss: dict[str, Any], **trainer: Any
    ) -> None:
        super().__init__(*args, **trainer)
        self.loss, self.teacher, cache = loss, None, None
        if isinstance(teacher, kdfast.TokenTeacher):
            cache = teacher
        else:
            self.teacher = teacher.to(self.args.device).requires_grad_(False).eval()
            check_logits(self.teacher)
        self.data_collator = TeacherCollator(self.data_collator, cache, loss["temperature"])
        # Makes Trainer pass the number of labels in all accumulated batches to compute_loss.
        self.model_accepts_loss_kwargs = True
        add_loss(self.model)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if "number" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "number"]

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss over tokens, or the sum divided by ``num_items_in_batch``, the tokens of an update."""
        tokens = {key: value for key, value in inputs.items() if key not in ("labels", "rows", "teacher")}
        arguments = {**self.loss, "labels": predicted(inputs["labels"], IGNORE), "num_items": num_items_in_batch}
        if self.teacher is None:
            arguments |= {"teacher": kdfast.TopKTeacher(*inputs["teacher"]), "rows": predicted(inputs["rows"], 0)}
        else:
            with torch.no_grad():
                hidden = hidden_states(self.teacher, tokens)
            arguments["teacher"] = kdfast.LinearTeacher(hidden, **last_layer(self.teacher))
        loss = model(**tokens, linear_loss=arguments)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.args.world_size  # counts are summed over processes, gradients are averaged
        return (loss, {"loss": loss}) if return_outputs else loss


class DistillTrainer(Distillation, Trainer):
    """Trainer that distills; arguments as in `Distillation`."""


def pad(samples: list[Mapping[str, Any]]) -> Batch:
    """Pad to the longest text; padding has the label -100."""
    tokens = [torch.as_tensor(sample["input_ids"]) for sample in samples]
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True),
        "labels": pad_sequence(tokens, batch_first=True, padding_value=IGNORE),
    }


@torch.no_grad()
def cache_tokens(teacher: PreTrainedModel, texts: list[Tensor], k: int, folder: str | Path) -> kdfast.TokenTeacher:
    """Store the teacher's k most probable tokens at each token of the texts but the first."""
    teacher.eval()
    with kdfast.TokenWriter(folder, vocabulary=VOCABULARY) as writer:
        for text in texts[writer.done :]:
            logp = teacher(input_ids=text[None]).logits[0, :-1].log_softmax(-1)
            writer.add(*logp.topk(k), labels=text[1:])
    return kdfast.TokenTeacher.open(folder)


def main(steps: int = 40, k: int = 0, alpha: float = 0.9, temperature: float = 1.0, texts: int = 64) -> Result:
    """Distill a small GPT-2 from a larger one, and print the loss before and after.

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
    samples = [{"input_ids": tokens, "number": number} for number, tokens in enumerate(corpus)]
    model = language_model(width=64, layers=3, std=0.2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, learning_rate=5e-3, per_device_train_batch_size=8,
            gradient_accumulation_steps=2, save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        trainer = DistillTrainer(
            model=language_model(width=16, layers=1), args=arguments, train_dataset=samples, eval_dataset=samples,
            data_collator=pad, teacher=cache_tokens(model, corpus, k, f"{folder}/tokens") if k else model,
            loss={"alpha": alpha, "temperature": temperature},
        )  # fmt: skip
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        result = Result(before, trainer.evaluate()["eval_loss"])
    print(result)
    return result


if __name__ == "__main__":
    typer.run(main)
