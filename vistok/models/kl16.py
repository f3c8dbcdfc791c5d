"""KL-16: the f16 KL autoencoder of MAR, whose latents xAR and other continuous generators write.

The network is that of latent diffusion ("High-Resolution Image Synthesis with Latent Diffusion Models",
Rombach et al., 2022, arXiv 2112.10752) with 16 channels, trained for "Autoregressive Image Generation without
Vector Quantization" (Li et al., 2024, arXiv 2406.11838). KARL distils the same network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..quantizers import GaussianQuantizer
from ..registry import Entry, register, register_family
from ..tokenizer import TrainingOutput
from .grid import GridTokenizer
from .karl.bases import GridDecoder, GridEncoder
from .karl.config import VAE_SCALE
from .ranges import require_between, require_depths, require_multiple, require_sizes


@dataclass(frozen=True)
class KL16Config:
    """The original's configuration under its own names.

    Published generators predict latents times `scale`; tokens are not scaled.
    """

    embed_dim: int = 16
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    image_size: int = 256
    scale: float = VAE_SCALE

    def __post_init__(self) -> None:
        require_sizes(self, "embed_dim", "ch", "z_channels", "image_size")
        require_depths(self, "ch_mult", "num_res_blocks")
        require_between(self, ["scale"], 1e-6, 1e6)
        if len(self.ch_mult) > 10:
            raise ValueError(f"ch_mult has {len(self.ch_mult)} levels; it takes up to 10")
        require_multiple(self, "image_size", "factor")

    @property
    def factor(self) -> int:
        """Side of the square of pixels that a token stands for."""
        return 2 ** (len(self.ch_mult) - 1)

    # What the networks, which KARL has as well, read.
    base = "vae"

    @property
    def base_widths(self) -> list[int]:
        """Channels of every level, from the image's side inwards."""
        return [self.ch * multiplier for multiplier in self.ch_mult]

    @property
    def base_res_blocks(self) -> int:
        """Residual blocks per level of the encoder; the decoder has one more."""
        return self.num_res_blocks

    @property
    def base_channels(self) -> int:
        """Channels between the networks and the 1×1 convolutions beside them."""
        return self.z_channels


@register_family("kl16")
class KL16(GridTokenizer):
    """The KL autoencoder; see the module. Tokens hold `latents` [B, h·w, C], row by row; images have any size
    divisible by 16.

    `encode` takes the mean of the posterior and training a sample of it.
    """

    config_class = KL16Config
    checkpoint_ignores = ("loss.*",)

    def __init__(self, config: KL16Config) -> None:
        super().__init__(config)
        self.image_size, self.factor = config.image_size, config.factor
        self.num_tokens = (config.image_size // config.factor) ** 2
        self.encoder, self.decoder = GridEncoder(config), GridDecoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.quantizer = GaussianQuantizer(config.embed_dim)

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of KL16Config; `double_z`, which the original states as
        well, is true: latents have a mean and a variance."""
        if (double := config.pop("double_z", True)) is not True:
            raise ValueError(f"double_z is {double!r}; a KL autoencoder has true, a mean and a variance")
        return super().create(**config)

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by attention in the encoder's levels and the convolutions around the latents. Shapes
        give the network; scale and image size are as published."""
        levels = 0
        while f"encoder.down.{levels}.block.0.conv1.weight" in shapes:
            levels += 1
        own = {
            f"encoder.down.{levels - 1}.attn.0.q.weight",
            "quant_conv.weight",
            "post_quant_conv.weight",
            "decoder.conv_in.weight",
        }
        if not own <= shapes.keys():
            return None
        base = shapes["encoder.conv_in.weight"][0]
        blocks = 0
        while f"encoder.down.0.block.{blocks}.conv1.weight" in shapes:
            blocks += 1
        widths = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)]
        return {
            "embed_dim": shapes["post_quant_conv.weight"][1],
            "ch": base,
            "ch_mult": tuple(width // base for width in widths),
            "num_res_blocks": blocks,
            "z_channels": shapes["decoder.conv_in.weight"][1],
        }

    def moments(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → means, then log-variances, [B, 2C, h, w]."""
        return self.quant_conv(self.encoder(2 * images - 1))

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → means, then log-variances, [B, h·w, 2C], row by row."""
        return self.moments(images).flatten(2).transpose(1, 2)

    def draw(self, grid: Tensor) -> Tensor:
        """Latents [B, C, h, w] → images [B, 3, 16h, 16w], not clamped."""
        return (self.decoder(self.post_quant_conv(grid)) + 1) / 2

    def normalised(self, latents: Tensor) -> Tensor:
        """Latents of tokens → those that published generators predict."""
        return latents * self.config.scale

    def denormalised(self, latents: Tensor) -> Tensor:
        """Latents that published generators predict → those of tokens."""
        return latents / self.config.scale

    def forward(self, images: Tensor) -> TrainingOutput:
        """Training pass with a sample of the posterior; images may have any size divisible by 16."""
        quantized = self.quantizer(self.latents(images))
        pixels = self.pixels(quantized.latents, grid=self.grid_of(images))
        return TrainingOutput(pixels, quantized.codes, quantized.losses)


register(
    Entry(
        name="kl16",
        family="kl16",
        config={},
        repo="xwen99/mar-vae-kl16",
        file="kl16.ckpt",
        license="MIT",
        paper="MAR (arXiv 2406.11838)",
        parameters=66.5,
        figures={"rFID": 0.53},
        notes="licence of MAR's code; a copy on the hub of the weights that MAR's authors host elsewhere; "
        "trained on ImageNet; rFID at 256 px; tokenizer of xAR",
        verified="means and deviations 2.2e-6, images 9.2e-6",
    )
)
