"""The transformers of KARL, and what they return."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.cpu.linear import linear
from ...nn.transformer import Attention, Transformer
from .config import HALTED, KarlConfig


class MaskableTransformer(Transformer):
    """A transformer that can leave out padding: no row attends to one that is not `present`."""

    def forward(self, x: Tensor, rows: slice | None = None, present: Tensor | None = None) -> Tensor:
        """[B, N, D] and `present` bool [B, N] → [B, N or len(rows), D]."""
        if present is None:
            return super().forward(x, rows)
        for block in self:
            x = x + _attend(block.attn, block.ln_1(x), present[:, None, None, :])
            x = x + block.mlp(block.ln_2(x))
        return x if rows is None else x[:, rows]


def _attend(attention: Attention, x: Tensor, mask: Tensor) -> Tensor:
    query, key, value = (
        part.unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # [B, h, N, d]
        for part in linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    )
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


class DistillationEncoder(nn.Module):
    """The blocks of the encoder; everything around them has keys of its own at the top."""

    def __init__(self, config: KarlConfig) -> None:
        super().__init__()
        self.transformer = Transformer(config.encoder_width, config.encoder_layers, config.encoder_heads)


class DistillationDecoder(nn.Module):
    """Blocks over grid and tokens; only the grid comes out, as [B, N, outputs]."""

    def __init__(self, config: KarlConfig, outputs: int) -> None:
        super().__init__()
        width = config.decoder_width
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = MaskableTransformer(width, config.decoder_layers, config.decoder_heads)
        self.ln_post = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, outputs))

    def forward(self, grid: Tensor, tokens: Tensor, present: Tensor | None = None) -> Tensor:
        """Grid [B, N, W], tokens [B, K, W] and which of them are there, bool [B, K] → [B, N, outputs]."""
        cells = grid.shape[1]
        if present is not None:
            present = F.pad(present, (cells, 0), value=True)
        x = self.ln_pre(torch.cat([grid, tokens], 1))
        return self.ffn(self.ln_post(self.transformer(x, slice(cells), present)))


@dataclass
class Analysis:
    """The encoder's output for B images with T tokens offered per image.

    `hidden` [B, T, W] are the tokens before any projection, `halt_logits` [B, T] the logits of not being
    needed, `values` [B, T, D] the tokens before quantization.
    """

    hidden: Tensor
    halt_logits: Tensor
    values: Tensor

    @property
    def active(self) -> Tensor:
        """Mask of the kept tokens, bool [B, T]."""
        return self.halt_logits.sigmoid() <= HALTED


@dataclass
class TrainingPass:
    """One of the two passes of a training step: the `bins` it was conditioned on [B], its `losses` by name,
    images [B, 3, H, W], their mean absolute `error` [B] (no gradient) and `codes` of all T tokens."""

    bins: Tensor
    losses: dict[str, Tensor]
    images: Tensor
    error: Tensor
    codes: Tensor
