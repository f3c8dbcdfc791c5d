"""Pre-norm transformer blocks in the key layout of timm's vision transformers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu.linear import linear
from .vision_transformer import Attend

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

    def forward(self, x: Tensor, attend: Attend = F.scaled_dot_product_attention) -> Tensor:
        """[B, N, D] → [B, N, D]; `attend` is attention within the heads."""
        bias = self.qkv.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        rows = linear(x, self.qkv.weight, bias).chunk(3, -1)
        heads = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in rows)  # [B, h, N, d]
        attended = attend(*heads).transpose(1, 2).flatten(2)
        return linear(attended, self.proj.weight, self.proj.bias)


class ViTMLP(nn.Module):
    """Linear, erf GELU, linear; keys `fc1` and `fc2`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        hidden = linear(x, self.fc1.weight, self.fc1.bias)
        hidden = F.gelu(hidden) if torch.is_grad_enabled() else torch.ops.aten.gelu_(hidden)
        return linear(hidden, self.fc2.weight, self.fc2.bias)


class ViTBlock(nn.Module):
    """`x += attn(norm1(x)); x += mlp(norm2(x))`; keys norm1, attn, norm2, mlp.

    `hidden` is the inner width of the MLP, or the feed-forward module itself.
    """

    def __init__(self, width: int, heads: int, hidden: int | nn.Module, *, key_bias: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, EPSILON), nn.LayerNorm(width, EPSILON)
        self.attn = ViTAttention(width, heads, key_bias=key_bias)
        self.mlp = hidden if isinstance(hidden, nn.Module) else ViTMLP(width, hidden)

    def forward(self, x: Tensor, attend: Attend = F.scaled_dot_product_attention) -> Tensor:
        """[B, N, D] → [B, N, D]; `attend` is attention within the heads."""
        x = x + self.attn(self.norm1(x), attend)
        return x + self.mlp(self.norm2(x))


class ScaledViTBlock(ViTBlock):
    """The same with a scale per channel on what each branch adds, as DINOv2 has it; keys ls1 and ls2."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__(width, heads, hidden)
        self.ls1, self.ls2 = nn.Module(), nn.Module()
        for scale in (self.ls1, self.ls2):
            scale.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor, attend: Attend = F.scaled_dot_product_attention) -> Tensor:
        """[B, N, D] → [B, N, D]; `attend` is attention within the heads."""
        x = x + self.ls1.gamma * self.attn(self.norm1(x), attend)
        return x + self.ls2.gamma * self.mlp(self.norm2(x))
