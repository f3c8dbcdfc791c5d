"""Pre-norm transformer blocks on `scaled_dot_product_attention`, in the CLIP/TiTok key layout."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu.linear import linear


class Attention(nn.Module):
    """Multi-head self-attention with the parameter layout of `torch.nn.MultiheadAttention`.

    Keys are `in_proj_weight` [3D, D] (query, key, value in that order), `in_proj_bias` and `out_proj.*`, so
    checkpoints written with the torch module load as they are. Batch-first throughout.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(
                f"width {dim} is not a multiple of {heads} heads; choose heads that divide the width"
            )
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, rows: slice | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend over all of x [B, N, D], or where `mask` (broadcast to [B, h, N, N]) is True; return only
        the `rows` asked for (all by default)."""
        dim = x.shape[-1]
        if rows is None:
            query, key, value = linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            # Rows that are not returned need keys and values but no queries.
            query = linear(x[:, rows], self.in_proj_weight[:dim], self.in_proj_bias[:dim])
            key, value = linear(x, self.in_proj_weight[dim:], self.in_proj_bias[dim:]).chunk(2, dim=-1)
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731  [B, h, N, d]
        out = F.scaled_dot_product_attention(split(query), split(key), split(value), mask)
        return linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)


class MLP(nn.Module):
    """Linear, erf GELU, linear; keys `c_fc` and `c_proj`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(dim, hidden)
        self.c_proj = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._layers(x, F.gelu)
        # The hidden layer is the largest thing in memory: activate it in place, and on a CPU for few images
        # at a time.
        parts = x.split(4) if x.device.type == "cpu" and len(x) > 4 else (x,)
        parts = [self._layers(part, torch.ops.aten.gelu_) for part in parts]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _layers(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = activation(linear(x, self.c_fc.weight, self.c_fc.bias))
        return linear(hidden, self.c_proj.weight, self.c_proj.bias)


class Block(nn.Module):
    """Pre-norm residual block: `x += attn(ln_1(x)); x += mlp(ln_2(x))`."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, rows: slice | None = None, mask: Tensor | None = None) -> Tensor:
        """[B, N, D] → [B, N, D], or only the `rows` of it; `mask` as in `Attention`."""
        attended = self.attn(self.ln_1(x), rows, mask)
        x = (x if rows is None else x[:, rows]) + attended
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.ModuleList):
    """A stack of blocks; `rows` names the rows of the result that the caller keeps.

    The last block then computes queries and MLP for those rows alone, with the values unchanged.
    """

    def __init__(self, dim: int, depth: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__(Block(dim, heads, mlp_ratio) for _ in range(depth))

    def forward(self, x: Tensor, rows: slice | None = None, mask: Tensor | None = None) -> Tensor:
        """[B, N, D] → [B, N or len(rows), D]; `mask` as in `Attention`."""
        last = len(self) - 1
        for depth, block in enumerate(self):
            x = block(x, rows if depth == last else None, mask)
        return x


def initialise(module: nn.Module) -> None:
    """Truncated normal weights, zero biases, as TiTok and GigaTok; packed attention weights keep Xavier."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
