"""RAE's networks: three frozen encoders and one decoder."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.cpu.linear import linear
from ...nn.vision_transformer import (
    ClassTokenTransformer,
    DinoLayer,
    SiglipTransformer,
    Sizes,
    ViTLayer,
    resize_table,
    run_layers,
    unpatchify,
)
from .config import DECODER_EPSILON, KINDS, RAEConfig


class RAEEncoder(nn.Module):
    """Normalised images [B, 3, S, S] → features [B, N, D], the last norm without weight and bias."""

    def __init__(self, config: RAEConfig) -> None:
        super().__init__()
        kind = KINDS[config.encoder_type]
        sizes = Sizes(
            config.encoder_hidden_size,
            config.encoder_num_hidden_layers,
            config.encoder_num_attention_heads,
            config.encoder_intermediate_size,
            kind.epsilon,
            tanh=kind.activation != "gelu",
        )
        patch = config.encoder_patch_size
        table = (config.encoder_image_size // patch) ** 2
        if config.encoder_type == "siglip2":
            patches = nn.Conv2d(3, sizes.width, patch, patch)
            network: nn.Module = SiglipTransformer(sizes, table, patches, affine=False)
        else:
            dino = config.encoder_type == "dinov2"
            network = ClassTokenTransformer(
                DinoLayer if dino else ViTLayer,
                sizes,
                patch,
                table,
                config.num_register_tokens,
                antialias=dino,
            )
        self.attribute = kind.attribute
        setattr(self, kind.attribute, network)

    @property
    def network(self) -> SiglipTransformer | ClassTokenTransformer:
        """The vision transformer; its key in checkpoints is `encoder` or `model`."""
        return getattr(self, self.attribute)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, N, D]."""
        network = self.network
        if isinstance(network, ClassTokenTransformer):
            return network(images)
        x = network.embeddings.patch_embedding(images)  # [B, D, h, w]
        places = resize_table(network.table, *x.shape[2:], mode="bicubic", antialias=False)
        return network(x.flatten(2).transpose(1, 2) + places)


class RAEDecoder(nn.Module):
    """Features [B, N, C] → images [B, 3, H, W] in the encoder's normalisation, always of the same size."""

    def __init__(self, config: RAEConfig) -> None:
        super().__init__()
        sizes = Sizes(
            config.decoder_hidden_size,
            config.decoder_num_hidden_layers,
            config.decoder_num_attention_heads,
            config.decoder_intermediate_size,
            DECODER_EPSILON,
        )
        self.grid = config.grid
        self.decoder_embed = nn.Linear(config.encoder_hidden_size, sizes.width)
        self.trainable_cls_token = nn.Parameter(0.02 * torch.randn(1, 1, sizes.width))
        self.register_buffer("decoder_pos_embed", wave_table(config.grid, sizes.width))
        self.decoder_layers = nn.ModuleList(ViTLayer(sizes) for _ in range(sizes.layers))
        self.decoder_norm = nn.LayerNorm(sizes.width, sizes.epsilon)
        self.decoder_pred = nn.Linear(sizes.width, 3 * config.decoder_patch_size**2)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, N, C] → [B, 3, H, W]; a square of another number of rows is resized (bilinear) to the grid."""
        x = linear(latents, self.decoder_embed.weight, self.decoder_embed.bias)
        side = math.isqrt(x.shape[1])
        if side**2 != x.shape[1]:
            raise ValueError(f"latents have {x.shape[1]} rows; they fill a square, such as {self.grid**2}")
        if side != self.grid:
            cells = x.transpose(1, 2).unflatten(2, (side, side))
            cells = cells.to(torch.promote_types(x.dtype, torch.float32))
            cells = F.interpolate(cells, (self.grid, self.grid), mode="bilinear")
            x = cells.flatten(2).transpose(1, 2).to(x.dtype)
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], 1) + self.decoder_pos_embed
        x = self.decoder_norm(run_layers(self.decoder_layers, x, rows=slice(1, None)))
        return unpatchify(linear(x, self.decoder_pred.weight, self.decoder_pred.bias), self.grid, self.grid)


def wave_table(side: int, width: int) -> Tensor:
    """Positions of a class token, zeros, and of a grid of `side` cells: sines and cosines, [1, 1 + side²,
    width]."""
    with torch.device("cpu"):
        place = torch.arange(side, dtype=torch.float64)
        rate = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
        waves = torch.outer(place, rate)
        axis = torch.cat([waves.sin(), waves.cos()], 1)  # [side, width / 2]
        # The first half of the channels holds the column, the second the row.
        columns, rows = axis.expand(side, -1, -1), axis.unsqueeze(1).expand(-1, side, -1)
        grid = torch.cat([columns, rows], 2).flatten(0, 1)
        table = torch.cat([torch.zeros(1, width), grid.float()]).unsqueeze(0)
    return table.to(torch.get_default_device())
