"""Parts of the language-model example: 31 of Shakespeare's sonnets, byte by byte, and a small transformer."""

from __future__ import annotations

from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 128  # ASCII
TEXT = "sonnets.txt"  # in the public domain


def load_texts(length: int = 64, count: int | None = None) -> Tensor:
    """Return pieces of the sonnets, of ``length`` predicted bytes and the one before, int64 (S, length + 1)."""
    text = torch.frombuffer(bytearray(files("kdfast.examples").joinpath(TEXT).read_bytes()), dtype=torch.uint8).long()
    pieces = (len(text) - 1) // length
    return text[: pieces * length + 1].unfold(0, length + 1, length)[:count]


class CausalLM(nn.Module):
    """A transformer that predicts the next byte.

    Args:
        width: Size of a hidden state.
        layers: Number of blocks.
        length: Most bytes of a text.
        heads: Heads of attention; ``width`` is a multiple.
    """

    def __init__(self, width: int, layers: int, length: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the inputs of the last layer, (B, L, width), of tokens (B, L)."""
        x = self.embed(tokens) + self.place[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next tokens, (B, L, V), of tokens (B, L)."""
        logits: Tensor = self.head(self.hidden(tokens))
        return logits


class Block(nn.Module):
    """Attention to the bytes before, then two layers on each byte."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mix = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the next hidden states, (B, L, width)."""
        b, length, width = x.shape
        parts = self.mix(self.norms[0](x)).view(b, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.join(attended.transpose(1, 2).reshape(b, length, width))
        out: Tensor = x + self.layers(self.norms[1](x))
        return out
