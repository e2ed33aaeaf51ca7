"""Parts of the language-model example: texts of random tokens, and networks with random weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY = 64


class Sample(NamedTuple):
    """A text of the corpus: its tokens (S,) int64, and the row of the first one in the teacher's table."""

    tokens: Tensor
    first_row: int


def make_corpus(count: int, seed: int = 0) -> list[Sample]:
    """Generate random texts of 4 to 20 tokens."""
    generator = torch.Generator().manual_seed(seed)
    corpus, row = [], 0
    for length in torch.randint(4, 21, (count,), generator=generator).tolist():
        corpus.append(Sample(torch.randint(VOCABULARY, (length,), generator=generator), row))
        row += length
    return corpus


def language_model(width: int, layers: int, std: float = 0.02) -> GPT2LMHeadModel:
    """Build a GPT-2 without dropout and with random weights of standard deviation ``std``."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=width, n_layer=layers, n_head=2, initializer_range=std,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
        )
    )  # fmt: skip
