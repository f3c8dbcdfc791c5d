"""MingTok's three stages: images to latents, latents to features, features to pixels."""

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.cpu.linear import linear
from ...nn.vision_transformer import Attend
from ...nn.vit import EPSILON, ViTBlock
from .config import HEAD, EncoderConfig, MingTokConfig, SemanticConfig, hidden_width

causal: Attend = partial(F.scaled_dot_product_attention, is_causal=True)


class SwiGLU(nn.Module):
    """Gated feed-forward layer `w3(silu(a) * b)`, a and b the halves of `w12(x)`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        gate, value = linear(x, self.w12.weight, self.w12.bias).chunk(2, -1)
        return linear(F.silu(gate) * value, self.w3.weight, self.w3.bias)


def _blocks(width: int, depth: int, feedforward: str) -> nn.ModuleList:
    """The blocks of a stage; the original keeps them in one chunk, so that keys have an index 0 more."""

    def block() -> ViTBlock:
        gated = feedforward != "mlp"
        return ViTBlock(width, width // HEAD, SwiGLU(width, hidden_width(width)) if gated else 4 * width)

    return nn.ModuleList([nn.ModuleList(block() for _ in range(depth))])


class LowLevelEncoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] → [B, h·w + 1, C]: a latent per patch, then the class token's."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.side = config.side
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, config.side**2 + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.blocks = _blocks(width, config.depth, config.ffn_layer)
        self.out_norm = nn.LayerNorm(width, EPSILON)
        self.out_proj = nn.Linear(width, config.out_dim)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Positions of a grid of that many cells, the class token's last [1, rows·columns + 1, D]."""
        if (rows, columns) == (self.side, self.side):
            return self.pos_embed
        table = self.pos_embed[:, :-1].transpose(1, 2).unflatten(2, (self.side, self.side))
        wide = table.to(torch.promote_types(table.dtype, torch.float32))
        # Parity: resized by factors with a tenth of a cell more, not by sizes, which moves every sample.
        factors = ((rows + 0.1) / self.side, (columns + 0.1) / self.side)
        wide = F.interpolate(wide, scale_factor=factors, mode="bicubic")
        return torch.cat([wide.flatten(2).transpose(1, 2).to(table.dtype), self.pos_embed[:, -1:]], 1)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        grid = self.patch_embed.proj(images)  # [B, D, h, w]
        x = torch.cat([grid.flatten(2).transpose(1, 2), self.cls_token.expand(len(grid), -1, -1)], 1)
        x = x + self.positions(*grid.shape[2:])
        for block in self.blocks[0]:
            x = block(x)
        latents = linear(F.gelu(self.out_norm(x)), self.out_proj.weight, self.out_proj.bias)
        # Each latent channel is added to the mean of as many neighbouring channels.
        return latents + x.unflatten(-1, (latents.shape[-1], -1)).mean(-1)


class SemanticDecoder(nn.Module):
    """Latents as the encoder gives them [B, N, C] → features [B, N, D], each from the latents up to its own.

    There are no positions: order enters by the causal mask alone.
    """

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.repeats = config.embed_dim // config.in_dim
        self.in_proj = nn.Linear(config.in_dim, config.embed_dim)
        self.blocks = _blocks(config.embed_dim, config.decoder_depth, config.ffn_layer)
        self.norm = nn.LayerNorm(config.embed_dim, EPSILON)

    def forward(self, latents: Tensor, attends: Iterable[Attend] | None = None) -> Tensor:
        """See the class; `attends` has the attention of every block."""
        x = linear(latents, self.in_proj.weight, self.in_proj.bias)
        x = x + latents.repeat_interleave(self.repeats, -1)
        blocks = self.blocks[0]
        for block, attend in zip(blocks, attends or [causal] * len(blocks), strict=True):
            x = block(x, attend)
        return self.norm(x)


class FeatureStream:
    """Features of latents that come a few at a time, as a generator makes them.

    The keys and values of the latents so far are kept, so that each call computes its own latents only.
    """

    def __init__(self, decoder: SemanticDecoder, scale: float, mean: float) -> None:
        self.decoder, self.scale, self.mean = decoder, scale, mean
        self._kept: list[tuple[Tensor, Tensor] | None] = [None] * len(decoder.blocks[0])

    def __len__(self) -> int:
        """Number of latents so far."""
        return 0 if self._kept[0] is None else self._kept[0][0].shape[2]

    def __call__(self, latents: Tensor) -> Tensor:
        """The next latents of every image [B, n, C], normalised, → their features [B, n, D].

        Raises ValueError for another number of images or channels than before.
        """
        channels = self.decoder.in_proj.in_features
        if latents.ndim != 3 or latents.shape[2] != channels or not latents.shape[1]:
            raise ValueError(
                f"latents have shape {list(latents.shape)}; this stream takes one or more per image: "
                f"[B, n, {channels}]"
            )
        if len(self) and len(latents) != len(self._kept[0][0]):
            raise ValueError(
                f"latents of {len(latents)} images follow those of {len(self._kept[0][0])}; begin another "
                "stream for other images"
            )
        attends = [partial(self._attend, number) for number in range(len(self._kept))]
        return self.decoder(latents * self.scale + self.mean, attends)

    def _attend(self, number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of block `number` over all latents so far and the new ones up to each one's own."""
        past = 0
        if (kept := self._kept[number]) is not None:
            past = kept[0].shape[2]
            key, value = (torch.cat(pair, 2) for pair in zip(kept, (key, value), strict=True))
        self._kept[number] = (key, value)
        if query.shape[2] == 1:
            return F.scaled_dot_product_attention(query, key, value)
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(past)
        return F.scaled_dot_product_attention(query, key, value, mask)


class PixelDecoder(nn.Module):
    """Finer tokens [B, n, D] → patches [B, n, p·p·3], each (row, column, colour); without positions."""

    def __init__(self, config: MingTokConfig) -> None:
        super().__init__()
        stage = config.pixel_decoder
        self.blocks = _blocks(stage.embed_dim, stage.decoder_depth, "mlp")
        self.norm = nn.LayerNorm(stage.embed_dim, EPSILON)
        self.head = nn.Linear(stage.embed_dim, 3 * stage.patch_size**2)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        for block in self.blocks[0]:
            x = block(x)
        return linear(self.norm(x), self.head.weight, self.head.bias)


def split_tokens(x: Tensor, rows: int, columns: int, split: int) -> Tensor:
    """Tokens of a grid [B, rows·columns, split²·D], each (row, column, channel) of its finer tokens → those,
    row by row of the finer grid [B, rows·columns·split², D]."""
    x = x.unflatten(2, (split, split, -1)).unflatten(1, (rows, columns))  # [B, h, w, r, r, D]
    return x.transpose(2, 3).flatten(1, 4)
