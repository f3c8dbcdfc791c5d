"""MaskGIT-VQGAN: 16×16 pixels → one of 1024 codes, fully convolutional.

The tokenizer of MaskGIT (Chang et al., 2022, arXiv 2202.04200) in the PyTorch port whose weights TiTok uses
twice: as the teacher of its first training stage and, inside its checkpoints, as the pixel decoder of the
second.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ..nn.cpu.batching import in_chunks
from ..nn.cpu.upsample import upsample_conv
from ..quantizers import VectorQuantizer
from ..registry import Entry, register, register_family
from .grid import GridTokenizer
from .ranges import require_color, require_depths, require_sizes

GROUPS = 32  # of every group norm


@dataclass(frozen=True)
class MaskGITVQGANConfig:
    """The published network; field names are the original's."""

    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    hidden_channels: int = 128
    num_channels: int = 3
    num_res_blocks: int = 2
    z_channels: int = 256
    num_embeddings: int = 1024
    embedding_dim: int = 256
    image_size: int = 256

    def __post_init__(self) -> None:
        require_color(self, "num_channels")
        require_sizes(self, "hidden_channels", "z_channels", "num_embeddings", "embedding_dim", "image_size")
        require_depths(self, "channel_mult", "num_res_blocks")
        if len(self.channel_mult) > 10:
            raise ValueError(f"channel_mult has {len(self.channel_mult)} levels; it takes up to 10")
        if any(width % GROUPS for width in self.widths):
            raise ValueError(
                f"hidden_channels {self.hidden_channels} times channel_mult {self.channel_mult} are not "
                f"multiples of {GROUPS}, the groups of every norm"
            )
        factor = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % factor:
            raise ValueError(
                f"image_size is {self.image_size}; it must be a multiple of {factor}, a code's side"
            )
        if self.z_channels != self.embedding_dim:
            raise ValueError(
                f"z_channels {self.z_channels} and embedding_dim {self.embedding_dim} differ; the encoder's "
                "output is looked up as it is, so they must be equal"
            )

    @property
    def widths(self) -> list[int]:
        """Channels of every level, from the image's side inwards."""
        return [self.hidden_channels * multiplier for multiplier in self.channel_mult]


def _silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that is used nowhere else: in place where autograd allows."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """Two normalised 3×3 convolutions; keys norm1, conv1, norm2, conv2, nin_shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_out, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H, W]."""
        h = self.conv1(_silu(self.norm1(x)))
        h = self.conv2(_silu(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            # Parity: the shortcut convolves the block's output and the block's input is dropped, as in the
            # JAX original.
            x = self.nin_shortcut(h)
        return x + h if torch.is_grad_enabled() else h.add_(x)


class Level(nn.Module):
    """The residual blocks of one resolution (`block.N`) and, in the decoder, the convolution after
    upsampling."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, upsample: bool = False) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.block = nn.Sequential(*(ResidualBlock(a, b) for a, b in pairwise(widths)))
        if upsample:
            self.upsample_conv = nn.Conv2d(channels_out, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H, W], twice the side where the level upsamples."""
        x = self.block(x)
        return upsample_conv(x, self.upsample_conv) if hasattr(self, "upsample_conv") else x


class Encoder(nn.Module):
    """Images [B, 3, H, W] in [0, 1] → features [B, 256, H/16, W/16]."""

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.num_channels, widths[0], 3, padding=1, bias=False)
        inputs = [widths[0], *widths[:-1]]
        self.down = nn.ModuleList(
            Level(a, b, config.num_res_blocks) for a, b in zip(inputs, widths, strict=True)
        )
        self.mid = nn.Sequential(
            *(ResidualBlock(widths[-1], widths[-1]) for _ in range(config.num_res_blocks))
        )
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, 256, H/16, W/16]."""
        x = self.conv_in(images.contiguous(memory_format=torch.channels_last))
        for depth, level in enumerate(self.down):
            x = level(x if depth == 0 else F.avg_pool2d(x, 2))
        return self.conv_out(_silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features [B, 256, h, w] → images [B, 3, 16h, 16w], not clamped."""

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = nn.Sequential(
            *(ResidualBlock(widths[-1], widths[-1]) for _ in range(config.num_res_blocks))
        )
        inputs = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Level(a, b, config.num_res_blocks, upsample=depth > 0)
            for depth, (a, b) in enumerate(zip(inputs, widths, strict=True))
        )
        self.norm_out = nn.GroupNorm(GROUPS, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.num_channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, 256, h, w] → [B, 3, 16h, 16w]."""
        cells = features.shape[2] * features.shape[3]
        return in_chunks(self._decode, features, cells * 4 ** (len(self.up) - 1))

    def _decode(self, features: Tensor) -> Tensor:
        x = self.mid(self.conv_in(features.contiguous(memory_format=torch.channels_last)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(_silu(self.norm_out(x))).contiguous()


@register_family("maskgit-vqgan")
class MaskGITVQGAN(GridTokenizer):
    """The two-dimensional f16 tokenizer: tokens are the row-major grid of codes, any size divisible by 16."""

    config_class = MaskGITVQGANConfig

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__(config)
        self.image_size = config.image_size
        self.factor = 2 ** (len(config.channel_mult) - 1)
        self.num_tokens = (config.image_size // self.factor) ** 2
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config.num_embeddings, config.embedding_dim)

    @property
    def quantizer(self) -> VectorQuantizer:
        """The codebook; its key in checkpoints is `quantize`."""
        return self.quantize

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights; `num_resolutions`, which the original states as well, must agree."""
        levels = config.pop("num_resolutions", None)
        model = super().create(**config)
        if levels is not None and levels != len(model.config.channel_mult):
            raise ValueError(
                f"num_resolutions={levels} does not match channel_mult={model.config.channel_mult}"
            )
        return model

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by its residual levels; what shapes do not show is as published."""
        own = {"encoder.down.0.block.0.conv1.weight", "encoder.mid.0.conv1.weight"}
        return {} if own <= shapes.keys() and "latent_tokens" not in shapes else None

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → [B, H/16 · W/16, 256], row by row."""
        return self.encoder(images).flatten(2).transpose(1, 2)

    def draw(self, grid: Tensor) -> Tensor:
        """Latents [B, 256, h, w] → images [B, 3, 16h, 16w], not clamped."""
        return self.decoder(grid)


register(
    Entry(
        name="maskgit-vqgan",
        family="maskgit-vqgan",
        config={},
        repo="fun-research/TiTok",
        file="maskgit-vqgan-imagenet-f16-256.bin",
        license="Apache-2.0",
        paper="MaskGIT (arXiv 2202.04200)",
        parameters=54.5,
        notes="2-D grid of 256 tokens; teacher and pixel decoder of TiTok, tokenizer of RAR",
        verified="codes equal, latents 1.6e-5, images 4.5e-5",
    )
)
