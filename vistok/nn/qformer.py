"""The Q-Former: learned queries that attend to each other and read an image's features.

BLIP-2 (Li et al., 2023, arXiv 2301.12597, section 3.1), without its text branch: a post-norm BERT whose even
layers have cross-attention. Keys are those of BERT (`bert.encoder.layer.N.attention.self.query`, …), with
the queries' feed-forward layers as `intermediate_query` and `output_query`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu.linear import linear

EPSILON = 1e-12  # of every layer norm
TEXT_BRANCH = (
    *("bert.embeddings.word_embeddings.*", "bert.embeddings.position_embeddings.*", "cls.*"),
    *(f"bert.encoder.layer.{number}.{part}.*" for number in ("[0-9]", "[0-9][0-9]") for part in
      ("intermediate", "output")),
)  # fmt: skip
"""Patterns of the keys of a Q-Former's text branch in checkpoints."""
POSITIONS = "bert.embeddings.position_ids"
"""Key of a table of places that checkpoints may hold and queries do not use."""


class Residual(nn.Module):
    """BERT's end of a part: LayerNorm(dense(x) + what went into the part)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, width), nn.LayerNorm(width, EPSILON)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """[B, N, inputs] and [B, N, width] → [B, N, width]."""
        return self.LayerNorm(linear(x, self.dense.weight, self.dense.bias) + residual)


class Reading(nn.Module):
    """Multi-head attention from queries to a memory; keys query, key, value."""

    def __init__(self, width: int, heads: int, memory_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key, self.value = (nn.Linear(memory_width, width) for _ in range(2))

    def split(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Apply a linear layer to [B, N, D] and give each head its part: [B, h, N, d]."""
        return linear(x, layer.weight, layer.bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        """Queries [B, K, D] read a memory [B, N, M] → [B, K, D]; `causal`: query j reads rows 0 to j."""
        query, key = self.split(self.query, x), self.split(self.key, memory)
        value = self.split(self.value, memory)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return attended.transpose(1, 2).flatten(2)


class QFormerAttention(nn.Module):
    """A `reading` under the key `self`, and BERT's residual and norm as `output`."""

    def __init__(self, reading: Reading, width: int) -> None:
        super().__init__()
        self.self, self.output = reading, Residual(width, width)

    def forward(self, x: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        """Queries [B, K, D] read a memory [B, N, M] → [B, K, D]."""
        return self.output(self.self(x, memory, causal), x)


class QFormerLayer(nn.Module):
    """Attention among the queries, cross-attention if there is a `reading` for it, and the feed-forward
    part."""

    def __init__(self, width: int, heads: int, reading: Reading | None) -> None:
        super().__init__()
        self.attention = QFormerAttention(Reading(width, heads, width), width)
        if reading is not None:
            self.crossattention = QFormerAttention(reading, width)
        self.intermediate_query = nn.Module()
        self.intermediate_query.dense = nn.Linear(width, 4 * width)
        self.output_query = Residual(4 * width, width)

    def forward(self, x: Tensor, memory: Tensor, causal: bool) -> Tensor:
        """Queries [B, K, D] and features [B, N, M] → [B, K, D]."""
        x = self.attention(x, x, causal)
        if hasattr(self, "crossattention"):
            x = self.crossattention(x, memory)
        dense = self.intermediate_query.dense
        return self.output_query(F.gelu(linear(x, dense.weight, dense.bias)), x)


class QFormer(nn.Module):
    """Learned queries [B, K, D] that read features [B, N, M], in `layers` of which the even ones read.

    `causal`: query j depends on queries 0 to j only. `reading` makes a
    cross-attention from its width, heads and memory's width.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        memory_width: int,
        *,
        causal: bool,
        positions: int = 512,
        reading: Callable[[int, int, int], Reading] = Reading,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.bert = nn.Module()
        self.bert.embeddings, self.bert.encoder = nn.Module(), nn.Module()
        self.bert.embeddings.register_buffer("position_ids", torch.arange(positions)[None])
        self.bert.embeddings.LayerNorm = nn.LayerNorm(width, EPSILON)
        self.bert.encoder.layer = nn.ModuleList(
            QFormerLayer(width, heads, None if depth % 2 else reading(width, heads, memory_width))
            for depth in range(layers)
        )

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Queries [B, K, D] and features [B, N, M] → [B, K, D]."""
        x = self.bert.embeddings.LayerNorm(queries)
        for layer in self.bert.encoder.layer:
            x = layer(x, memory, self.causal)
        return x


def initialise(module: nn.Module) -> None:
    """Normal weights of deviation 0.02 and zero biases, as BERT."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
