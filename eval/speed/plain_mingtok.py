"""A straightforward MingTok on a tokenizer's own weights: the baseline of its speed.

Linear layers and attention op by op, with materialised attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.mingtok import MingTok
from ...models.mingtok.network import SwiGLU, split_tokens
from ...nn.vision_transformer import unpatchify
from ...nn.vit import ViTBlock


class PlainMingTok(nn.Module):
    """`encode` and `decode` of a MingTok tokenizer on the same parameters, unoptimised."""

    def __init__(self, tokenizer: MingTok) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → normalised latents [B, N, C]."""
        encoder = self.tokenizer.low_level_encoder
        grid = encoder.patch_embed.proj(2 * images - 1)
        x = torch.cat([grid.flatten(2).transpose(1, 2), encoder.cls_token.expand(len(grid), -1, -1)], 1)
        x = x + encoder.positions(*grid.shape[2:])
        for block in encoder.blocks[0]:
            x = _block(block, x)
        latents = encoder.out_proj(F.gelu(encoder.out_norm(x)))
        latents = latents + x.reshape(*x.shape[:2], latents.shape[2], -1).mean(-1)
        return self.tokenizer.normalised(latents[:, :-1])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents of a square [B, N, C] → images [B, 3, H, W] in [0, 1]."""
        model, decoder = self.tokenizer, self.tokenizer.semantic_decoder
        raw = latents * model.config.scaling_factor + model.config.mean
        x = decoder.in_proj(raw) + raw.repeat_interleave(decoder.repeats, -1)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), device=x.device).triu(1)
        for block in decoder.blocks[0]:
            x = _block(block, x, mask)
        side, split = round(x.shape[1] ** 0.5), model.config.split
        x = split_tokens(model.sem_to_pix(decoder.norm(x)), side, side, split)
        for block in model.pixel_decoder.blocks[0]:
            x = _block(block, x)
        patches = model.pixel_decoder.head(model.pixel_decoder.norm(x))
        return ((unpatchify(patches, side * split, side * split) + 1) / 2).clamp(0, 1)


def _block(block: ViTBlock, x: Tensor, mask: Tensor | None = None) -> Tensor:
    attn, mlp = block.attn, block.mlp
    rows = attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    query, key, value = (y.reshape(*y.shape[:2], attn.heads, -1).permute(0, 2, 1, 3) for y in rows)
    scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    scores = scores if mask is None else scores + mask
    x = x + attn.proj((scores.softmax(-1) @ value).permute(0, 2, 1, 3).reshape(x.shape))
    y = block.norm2(x)
    if isinstance(mlp, SwiGLU):
        gate, hidden = mlp.w12(y).chunk(2, dim=-1)
        return x + mlp.w3(F.silu(gate) * hidden)
    return x + mlp.fc2(F.gelu(mlp.fc1(y)))


baseline = PlainMingTok
