"""Pre-norm vision transformers with separate query, key and value weights, under the keys that SigLIP2,
DINOv2 and ViT-MAE have in transformers' checkpoints.

One computation, three layouts of keys: a layer class only names its parts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu.linear import linear

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values [B, h, N, d] → [B, h, N, d]."""


@dataclass(frozen=True)
class Sizes:
    """Width, number of layers, heads and hidden width of the MLP; the epsilon of its norms, and whether GELU
    is the tanh approximation."""

    width: int
    layers: int
    heads: int
    mlp: int
    epsilon: float
    tanh: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not a multiple of {self.heads} heads; choose heads that divide it"
            )


class Layer(nn.Module):
    """Pre-norm block: `x += s₁ out(attention(norm₁ x)); x += s₂ fc₂(gelu(fc₁(norm₂ x)))`.

    `names` are the paths of norm₁, query, key, value, out, norm₂, fc₁ and fc₂ in the checkpoint; `scales`
    those of s₁ and s₂, which are 1 where there are none.
    """

    names: ClassVar[tuple[str, ...]]
    scales: ClassVar[tuple[str, ...]] = ()

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, mlp = sizes.width, sizes.mlp
        self.heads, self.approximate = sizes.heads, "tanh" if sizes.tanh else "none"
        norm1, *attention, norm2, first, second = self.names
        self._place(norm1, nn.LayerNorm(width, sizes.epsilon))
        for name in attention:
            self._place(name, nn.Linear(width, width))
        self._place(norm2, nn.LayerNorm(width, sizes.epsilon))
        self._place(first, nn.Linear(width, mlp))
        self._place(second, nn.Linear(mlp, width))
        for name in self.scales:
            self._place(name, nn.Parameter(torch.ones(width)))

    def _place(self, path: str, part: nn.Module | nn.Parameter) -> None:
        """Set a part at a dotted path, with empty modules on the way."""
        owner: nn.Module = self
        *outer, last = path.split(".")
        for name in outer:
            if not hasattr(owner, name):
                setattr(owner, name, nn.Module())
            owner = getattr(owner, name)
        setattr(owner, last, part)

    def forward(
        self, x: Tensor, attend: Attend = F.scaled_dot_product_attention, rows: slice | None = None
    ) -> Tensor:
        """[B, N, D] → [B, N, D], or only the `rows` of it; `attend` is attention within that layer."""
        norm1, query, key, value, out, norm2, first, second = map(self.get_submodule, self.names)
        y = norm1(x)
        asking = y if rows is None else y[:, rows]
        heads = (
            linear(each, part.weight, part.bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each, part in ((asking, query), (y, key), (y, value))
        )
        attended = linear(attend(*heads).transpose(1, 2).flatten(2), out.weight, out.bias)
        x = (x if rows is None else x[:, rows]) + self._scaled(0, attended)
        hidden = self._gelu(linear(norm2(x), first.weight, first.bias))
        return x + self._scaled(1, linear(hidden, second.weight, second.bias))

    def _scaled(self, number: int, x: Tensor) -> Tensor:
        return self.get_parameter(self.scales[number]) * x if self.scales else x

    def _gelu(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.gelu(x, approximate=self.approximate)
        # The hidden layer is the largest thing in memory.
        return torch.ops.aten.gelu_(x, approximate=self.approximate)


class SiglipLayer(Layer):
    """A layer under the keys of SigLIP and SigLIP2."""

    names = (
        *("layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        *("layer_norm2", "mlp.fc1", "mlp.fc2"),
    )


_ATTENTION = (
    *("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attention.output.dense",
)


class ViTLayer(Layer):
    """A layer under the keys of ViT and ViT-MAE."""

    names = ("layernorm_before", *_ATTENTION, "layernorm_after", "intermediate.dense", "output.dense")


class DinoLayer(Layer):
    """A layer under the keys of DINOv2, whose branches are scaled per channel."""

    names = ("norm1", *_ATTENTION, "norm2", "mlp.fc1", "mlp.fc2")
    scales = ("layer_scale1.lambda1", "layer_scale2.lambda1")


class SiglipTransformer(nn.Module):
    """The SigLIP2 vision transformer without its pooling head: a position table, layers and a last norm.

    `patches` is the patch embedding, or None for a stack that reads no images; `table` the number of
    positions, a square. Without `affine` the last norm has neither weight nor bias.
    """

    def __init__(
        self, sizes: Sizes, table: int, patches: nn.Module | None = None, *, affine: bool = True
    ) -> None:
        super().__init__()
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        if patches is not None:
            self.embeddings.patch_embedding = patches
        self.embeddings.position_embedding = nn.Embedding(table, sizes.width)
        self.encoder.layers = nn.ModuleList(SiglipLayer(sizes) for _ in range(sizes.layers))
        self.post_layernorm = nn.LayerNorm(sizes.width, sizes.epsilon, elementwise_affine=affine)

    @property
    def table(self) -> Tensor:
        """The position table [1, n, D], row by row of a square grid."""
        return self.embeddings.position_embedding.weight.unsqueeze(0)

    def forward(
        self, x: Tensor, attend: Attend = F.scaled_dot_product_attention, rows: slice | None = None
    ) -> Tensor:
        """Embedded rows [B, N, D] → [B, N, D], or only the `rows` of it."""
        return self.post_layernorm(run_layers(self.encoder.layers, x, attend, rows))


class ClassTokenTransformer(nn.Module):
    """DINOv2 with registers (arXiv 2309.16588) or the encoder of a masked autoencoder (arXiv 2111.06377).

    The class token comes first and has the first position; `registers` follow it without positions. The last
    norm has neither weight nor bias. `table` is the number of positions of patches, a square; `antialias` is
    how it is resized to another grid.
    """

    def __init__(
        self, layer: type[Layer], sizes: Sizes, patch: int, table: int, registers: int, *, antialias: bool
    ) -> None:
        super().__init__()
        width = sizes.width
        self.antialias = antialias
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        if registers:
            self.embeddings.register_tokens = nn.Parameter(0.02 * torch.randn(1, registers, width))
        self.embeddings.position_embeddings = nn.Parameter(0.02 * torch.randn(1, 1 + table, width))
        self.embeddings.patch_embeddings = nn.Module()
        self.embeddings.patch_embeddings.projection = nn.Conv2d(3, width, patch, patch)
        self.encoder.layer = nn.ModuleList(layer(sizes) for _ in range(sizes.layers))
        self.layernorm = nn.LayerNorm(width, sizes.epsilon, elementwise_affine=False)
        self.prefix = 1 + registers

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → the rows of their patches [B, N, D]."""
        parts = self.embeddings
        grid = parts.patch_embeddings.projection(images)  # [B, D, h, w]
        first, places = parts.position_embeddings[:, :1], parts.position_embeddings[:, 1:]
        places = resize_table(places, *grid.shape[2:], mode="bicubic", antialias=self.antialias)
        beginning = parts.cls_token + first
        if self.prefix > 1:
            beginning = torch.cat([beginning, parts.register_tokens], 1)
        x = grid.flatten(2).transpose(1, 2) + places
        x = torch.cat([beginning.expand(len(x), -1, -1), x], 1)
        return self.layernorm(run_layers(self.encoder.layer, x, rows=slice(self.prefix, None)))


def run_layers(
    layers: nn.ModuleList,
    x: Tensor,
    attend: Attend = F.scaled_dot_product_attention,
    rows: slice | None = None,
) -> Tensor:
    """[B, N, D] through all layers → [B, N, D], or only the `rows` of it, which the last layer computes
    alone."""
    last = len(layers) - 1
    for number, layer in enumerate(layers):
        x = layer(x, attend, rows if number == last else None)
    return x


def resize_table(table: Tensor, rows: int, columns: int, *, mode: str, antialias: bool) -> Tensor:
    """A position table [1, n, D] of a square grid for one of `rows` and `columns`: [1, rows·columns, D].

    It is resized in float32 or better, `align_corners` off, and returned as it is where the grid is the same.
    """
    side = math.isqrt(table.shape[1])
    if (rows, columns) == (side, side):
        return table
    grid = table.transpose(1, 2).unflatten(2, (side, side))
    grid = grid.to(torch.promote_types(table.dtype, torch.float32))
    grid = F.interpolate(grid, (rows, columns), mode=mode, antialias=antialias)
    return grid.flatten(2).transpose(1, 2).to(table.dtype)


def unpatchify(x: Tensor, rows: int, columns: int) -> Tensor:
    """Rows [B, h·w, p·p·3], each a patch in the order (row, column, colour) → images [B, 3, h·p, w·p]."""
    side = math.isqrt(x.shape[2] // 3)
    x = x.unflatten(2, (side, side, 3)).unflatten(1, (rows, columns))  # [B, h, w, p, p, 3]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def patchify(images: Tensor, side: int) -> Tensor:
    """Images [B, 3, h·p, w·p] → patches of `side` pixels [B, h·w, p·p·3], each (row, column, colour)."""
    x = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, 3, h, p, w, p]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
