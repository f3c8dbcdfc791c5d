"""ELM's binary autoencoder: 16×16 pixels → 16, 20 or 24 bits, convolutional.

"ELM: Elucidating the design space of language models for image generation" (Liu et al., 2024, arXiv
2410.16257). A VQGAN whose codebook is a sum of the embeddings of set bits (Binary Latent Diffusion, arXiv
2304.04820).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.convolution import GridAttention, group_norm
from ..nn.cpu.batching import in_chunks
from ..nn.cpu.upsample import upsample_conv
from ..quantizers import BinaryQuantizer
from ..registry import Entry, register, register_family
from ..tokenizer import TrainingOutput
from .grid import GridTokenizer
from .ranges import require_between, require_color, require_depths, require_sizes

IGNORED = {"quantizer": "binary", "use_tanh": False, "gen_mul": 1.0}
"""Fields of the original's configuration that no published weights change."""


@dataclass(frozen=True)
class ELMConfig:
    """The published network; field names are the original's."""

    n_channels: int = 3
    nf: int = 128
    res_blocks: int = 2
    codebook_size: int = 16
    """Bits per token."""
    emb_dim: int = 256
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    img_size: int = 256
    attn_resolutions: tuple[int, ...] = (16,)
    deterministic: bool = False
    """Whether training forwards take the likelier bit; otherwise they draw it."""
    norm_first: bool = True
    code_weight: float = 0.0

    def __post_init__(self) -> None:
        require_color(self, "n_channels")
        require_sizes(self, "nf", "codebook_size", "emb_dim", "img_size")
        require_depths(self, "ch_mult", "res_blocks")
        require_between(self, ["code_weight"], 0, 1e6)
        factor = 2 ** (len(self.ch_mult) - 1)
        if self.img_size % factor:
            raise ValueError(f"img_size is {self.img_size}; it is a multiple of {factor}, a token's side")

    @property
    def widths(self) -> list[int]:
        """Channels of every level, from the image's side inwards."""
        return [self.nf * multiplier for multiplier in self.ch_mult]

    def attends(self, level: int) -> bool:
        """Whether blocks of a level (0 is the image's) are followed by attention; by the trained size."""
        return self.img_size // 2**level in self.attn_resolutions


class Block(nn.Module):
    """Two normalised 3×3 convolutions beside a shortcut, whose 1×1 convolution is there even where it is not
    used."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels_in), group_norm(channels_out)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_out = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_out(x) if x.shape[1] != h.shape[1] else x)


class Halve(nn.Module):
    """A convolution of stride 2 after a row and a column of zeros; its key is `conv`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Nearest upsampling and a convolution; its key is `conv`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, 2H, 2W]."""
        return upsample_conv(x, self.conv).contiguous()


class ELMEncoder(nn.Module):
    """Images [B, 3, H, W] in [0, 1] → [B, D, H/16, W/16]."""

    def __init__(self, config: ELMConfig) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(config.n_channels, config.nf, 3, padding=1)]
        before, last = config.nf, len(config.widths) - 1
        for level, width in enumerate(config.widths):
            for _ in range(config.res_blocks):
                blocks.append(Block(before, width))
                before = width
                if config.attends(level):
                    blocks.append(GridAttention(width))
            if level < last:
                blocks.append(Halve(width))
        blocks += [Block(before, before), GridAttention(before), Block(before, before)]
        # Parity: no activation stands between the last norm and the convolution.
        blocks += [group_norm(before), nn.Conv2d(before, config.emb_dim, 3, padding=1)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, D, h, w]."""
        x = images
        for block in self.blocks:
            x = block(x)
        return x


class ELMGenerator(nn.Module):
    """Sums of embeddings [B, D, h, w] → images [B, 3, 16h, 16w], not clamped."""

    def __init__(self, config: ELMConfig) -> None:
        super().__init__()
        before = config.widths[-1]
        self.factor = 2 ** (len(config.widths) - 1)
        blocks: list[nn.Module] = [group_norm(config.emb_dim)] if config.norm_first else []
        blocks.append(nn.Conv2d(config.emb_dim, before, 3, padding=1))
        blocks += [Block(before, before), GridAttention(before), Block(before, before)]
        for level in reversed(range(len(config.widths))):
            width = config.widths[level]
            for _ in range(config.res_blocks):
                blocks.append(Block(before, width))
                before = width
                if config.attends(level):
                    blocks.append(GridAttention(width))
            if level:
                blocks.append(Double(width))
        blocks += [group_norm(before), nn.Conv2d(before, config.n_channels, 3, padding=1)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, grid: Tensor) -> Tensor:
        """[B, D, h, w] → [B, 3, 16h, 16w]."""
        return in_chunks(self._draw, grid, grid.shape[2] * grid.shape[3] * self.factor**2)

    def _draw(self, grid: Tensor) -> Tensor:
        x = grid.contiguous()
        for block in self.blocks:
            x = block(x)
        return x


class GridBinaryQuantizer(BinaryQuantizer):
    """The binary quantizer with weights in the layout of 1×1 convolutions and of an embedding table."""

    def __init__(self, num_bits: int, dim: int, *, drawn: bool, code_weight: float) -> None:
        super().__init__(num_bits, dim, temperature=1.0 if drawn else 0.0, code_weight=code_weight)
        self.proj = nn.Sequential(nn.Conv2d(dim, num_bits, 1))
        del self.embed
        self.embed = nn.Embedding(num_bits, dim)

    @property
    def rows(self) -> Tensor:
        """The embeddings of the bits [num_bits, dim]."""
        return self.embed.weight

    @staticmethod
    def code_loss(probability: Tensor) -> Tensor:
        """The mean of s(1 - s), where s is the sigmoid of the probability."""
        # Parity: the sigmoid is taken a second time.
        return BinaryQuantizer.code_loss(probability.sigmoid())


@register_family("elm")
class ELM(GridTokenizer):
    """ELM's binary autoencoder; tokens are bits, bool [B, h·w, n], row by row. Images of any size divisible
    by 16; see the module."""

    config_class = ELMConfig
    checkpoint_ignores = ("generator.logsigma.*",)

    def __init__(self, config: ELMConfig) -> None:
        super().__init__(config)
        self.image_size, self.factor = config.img_size, 2 ** (len(config.ch_mult) - 1)
        self.num_tokens = (config.img_size // self.factor) ** 2
        self.encoder, self.generator = ELMEncoder(config), ELMGenerator(config)
        self.quantize = GridBinaryQuantizer(
            config.codebook_size,
            config.emb_dim,
            drawn=not config.deterministic,
            code_weight=config.code_weight,
        )

    @property
    def quantizer(self) -> GridBinaryQuantizer:
        """The bottleneck; its key in checkpoints is `quantize`."""
        return self.quantize

    @classmethod
    def create(cls, **config: Any) -> "ELM":
        """Build with fresh weights from the fields of ELMConfig. Fields of the original that published
        weights do not change are accepted at their values; ValueError for others."""
        for name, value in IGNORED.items():
            if (stated := config.pop(name, value)) != value:
                raise ValueError(f"{name} is {stated!r}; this version has the published {value!r}")
        for name in ("beta", "token_each"):  # of losses, and of the language model
            config.pop(name, None)
        return super().create(**config)

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by its flat list of blocks; beside the number of bits everything is as published."""
        own = {"encoder.blocks.1.conv_out.weight", "quantize.proj.0.weight", "generator.blocks.1.weight"}
        if not own <= shapes.keys():
            return None
        return {"codebook_size": shapes["quantize.proj.0.weight"][0]}

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → [B, H/16 · W/16, D], row by row."""
        return self.encoder(images).flatten(2).transpose(1, 2)

    def draw(self, grid: Tensor) -> Tensor:
        """Sums of embeddings [B, D, h, w] → images [B, 3, 16h, 16w], not clamped."""
        return self.generator(grid)

    def forward(self, images: Tensor) -> TrainingOutput:
        """Training pass; images may have any size divisible by 16."""
        quantized = self.quantize(self.latents(images))
        grid = images.shape[2] // self.factor, images.shape[3] // self.factor
        return TrainingOutput(self.pixels(quantized.latents, grid=grid), quantized.codes, quantized.losses)


register(
    *(
        Entry(
            name=name,
            family="elm",
            config={"codebook_size": bits, "deterministic": deterministic},
            repo="xuantonglll/ELM",
            file=f"{file}.pth",
            license="none stated",
            paper="ELM (arXiv 2410.16257)",
            parameters=65.4,
            notes="no licence stated, so all rights are reserved; trained on ImageNet",
            verified=verified,
        )
        for name, bits, deterministic, file, verified in (
            ("elm-bae16", 16, False, "bae_16", "bits equal, images within float16's tolerance"),
            ("elm-bae16-deter", 16, True, "bae_16_deter", ""),
            ("elm-bae20", 20, False, "bae_20", ""),
            ("elm-bae24", 24, False, "bae_24", ""),
        )
    )
)
