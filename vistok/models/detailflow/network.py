"""DetailFlow's encoder and decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.cpu.linear import linear
from ...nn.vision_transformer import SiglipTransformer, patchify, resize_table, unpatchify
from .config import DetailFlowConfig


class DetailFlowEncoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] → latent tokens [B, K, D]."""

    def __init__(self, config: DetailFlowConfig) -> None:
        super().__init__()
        sizes, count = config.sizes("encoder"), config.num_latent_tokens
        for name in ("latent_tokens", "refined_tokens", "latent_pos_embed"):
            setattr(self, name, nn.Parameter(0.02 * torch.randn(1, count, sizes.width)))
        self.patch = config.enc_patch_size
        patches = nn.Linear(3 * self.patch**2, sizes.width)
        self.visual_model = SiglipTransformer(sizes, config.num_patches, patches)
        place = torch.arange(count)
        group = place // config.group_size * config.group_size + config.group_size - 1
        last = torch.where(place < config.first, place, group)  # the last latent token that each one sees
        self.register_buffer("visible", place <= last[:, None], persistent=False)  # [N, N]

    def forward(self, images: Tensor, count: int, prefix: Tensor | None = None) -> Tensor:
        """The first `count` latent tokens, [B, K, D]; in a second pass `prefix` [B, k, D] stands at the
        places of the first ones, and the others start from other tokens than in the first pass."""
        model = self.visual_model
        rows, columns = (side // self.patch for side in images.shape[2:])
        weight = model.embeddings.patch_embedding
        patches = linear(patchify(images, self.patch), weight.weight, weight.bias)
        patches = patches + resize_table(model.table, rows, columns, mode="bilinear", antialias=True)
        if prefix is None:
            latents = self.latent_tokens[:, :count].expand(len(images), -1, -1)
        else:
            others = self.refined_tokens[:, prefix.shape[1] : count].expand(len(images), -1, -1)
            latents = torch.cat([prefix, others], 1)
        latents = latents + self.latent_pos_embed[:, :count]
        cells = rows * columns
        visible = F.pad(self.visible[:count, :count], (cells, 0), value=True)  # [K, h·w + K]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            latent = F.scaled_dot_product_attention(query[:, :, -count:], key, value, attn_mask=visible)
            if query.shape[2] == count:
                return latent
            # Patches see patches alone, so no prefix depends on the tokens behind it.
            own = (each[:, :, :cells] for each in (query, key, value))
            return torch.cat([F.scaled_dot_product_attention(*own), latent], 2)

        return model(torch.cat([patches, latents], 1), attend, slice(cells, None))


class DetailFlowDecoder(nn.Module):
    """The first latents [B, t, D] → images [B, 3, S, S] in about [-1, 1], not clamped."""

    def __init__(self, config: DetailFlowConfig) -> None:
        super().__init__()
        sizes = config.sizes("decoder")
        self.latent_pos_embed = nn.Parameter(0.02 * torch.randn(1, config.num_latent_tokens, sizes.width))
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, sizes.width))
        self.patch = config.dec_patch_size
        self.visual_model = SiglipTransformer(sizes, config.num_patches)
        self.to_pixel = nn.Module()
        self.to_pixel.model = nn.Linear(sizes.width, 3 * self.patch**2)

    def forward(self, latents: Tensor, side: int) -> Tensor:
        """[B, t, D] → [B, 3, S, S] for a `side` S of whole patches."""
        grid = side // self.patch
        places = resize_table(self.visual_model.table, grid, grid, mode="bilinear", antialias=True)
        cells = (self.mask_token + places).expand(len(latents), -1, -1)
        x = torch.cat([cells, latents + self.latent_pos_embed[:, : latents.shape[1]]], 1)
        x = self.visual_model(x, rows=slice(grid**2))
        return unpatchify(linear(x, self.to_pixel.model.weight, self.to_pixel.model.bias), grid, grid)
