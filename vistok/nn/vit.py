"""Pre-norm transformer blocks in the key layout of timm's vision transformers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu.linear import linear

EPSILON = 1e-6  # of every layer norm


class ViTAttention(nn.Module):
    """Multi-head self-attention; keys `qkv` and `proj`.

    Without `key_bias` queries and values have biases of their own, `q_bias` and `v_bias`, and keys have none
    (BEiT, arXiv 2106.08254; EVA, arXiv 2211.07636).
    """

    def __init__(self, width: int, heads: int, *, key_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=key_bias)
        if not key_bias:
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        bias = self.qkv.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        rows = linear(x, self.qkv.weight, bias).chunk(3, -1)
        heads = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in rows)  # [B, h, N, d]
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return linear(attended, self.proj.weight, self.proj.bias)


class ViTBlock(nn.Module):
    """`x += attn(norm1(x)); x += mlp(norm2(x))` with erf GELU; keys norm1, attn, norm2, mlp.fc1, mlp.fc2."""

    def __init__(self, width: int, heads: int, hidden: int, *, key_bias: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, EPSILON), nn.LayerNorm(width, EPSILON)
        self.attn = ViTAttention(width, heads, key_bias=key_bias)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        x = x + self.attn(self.norm1(x))
        hidden = linear(self.norm2(x), self.mlp.fc1.weight, self.mlp.fc1.bias)
        hidden = F.gelu(hidden) if torch.is_grad_enabled() else torch.ops.aten.gelu_(hidden)
        return x + linear(hidden, self.mlp.fc2.weight, self.mlp.fc2.bias)
