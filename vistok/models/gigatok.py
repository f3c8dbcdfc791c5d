"""GigaTok: 256 tokens per image from a CNN, a transformer that pools its map, and both again backwards.

"GigaTok: Scaling Visual Tokenizers to 3 Billion Parameters for Autoregressive Image Generation" (Xiong et
al., 2025, arXiv 2504.08736). A CNN makes a 16×16 map; transformer blocks whose queries start as pools of
the map, coarse to fine, read it into a sequence of tokens (VQ); blocks whose queries are grid cells read the
tokens; a CNN draws, its norms set by the statistics of the grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ..configuration import build
from ..nested_config import section
from ..nn.convolution import ResidualBlock, group_norm
from ..nn.cpu.batching import in_chunks
from ..nn.cpu.linear import linear
from ..nn.transformer import Attention, initialise
from ..quantizers import VectorQuantizer
from ..registry import Entry, register, register_family
from ..tokenizer import Tokenizer, TrainingOutput
from .ranges import require_between, require_depths, require_sizes

SIZES = {  # width, blocks, heads
    "small": (512, 6, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "xl": (1280, 36, 20),
    "xxl": (1536, 48, 24),
}
USAGE_WINDOW = 65_536  # codes whose usage training reports
ENTROPY_OFFSET = 1e-5
FIXED = {  # what every published configuration has
    "multi_level_query_init": True,
    "adaptive_gn": True,
    "d2s_up": True,
    "use_attn": False,
    "use_qk_norm": False,
    "last_level_2d_query_init": False,
    "multi_level_2d_query_init": False,
}


@dataclass(frozen=True)
class GigaTokConfig:
    """`model.init_args` of the original's configuration under its own names, the image's side, and sizes
    that all published models share."""

    codebook_size: int = 16_384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    commit_loss_beta: float = 0.25
    entropy_loss_ratio: float = 0.0
    encoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    encoder_size: str = "small"
    decoder_size: str = "small"
    num_latent_tokens: int = 256
    z_channels: int = 256
    rot: bool = True
    distill_depth: int | None = 3
    """The decoder block, counted from 1, whose grid is compared with DINOv2 in training; None: none."""
    out_inner_dim: int = 768
    hidden_channels: int = 128
    image_size: int = 256
    encoder_layers: int | None = None
    decoder_layers: int | None = None

    def __post_init__(self) -> None:
        require_sizes(self, "codebook_size", "codebook_embed_dim", "num_latent_tokens", "z_channels")
        require_sizes(self, "out_inner_dim", "hidden_channels", "image_size")
        require_depths(self, "encoder_ch_mult", "decoder_ch_mult")
        require_between(self, ["commit_loss_beta", "entropy_loss_ratio"], 0, 1e6)
        for name in ("encoder_layers", "decoder_layers", "distill_depth"):
            if getattr(self, name) is not None:
                require_depths(self, name)
        for name in ("encoder_size", "decoder_size"):
            if getattr(self, name) not in SIZES:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is {', '.join(SIZES)}")
        if len(self.encoder_ch_mult) != len(self.decoder_ch_mult):
            raise ValueError(
                f"encoder_ch_mult has {len(self.encoder_ch_mult)} levels and decoder_ch_mult "
                f"{len(self.decoder_ch_mult)}; they are as many"
            )
        factor = 2 ** (len(self.encoder_ch_mult) - 1)
        if self.image_size % factor:
            raise ValueError(f"image_size is {self.image_size}; it is a multiple of {factor}, a cell's side")
        tokens, side = self.num_latent_tokens, self.side
        if tokens < 2 or tokens & (tokens - 1) or self.pools[-1][0] > side or self.pools[-1][1] > side:
            raise ValueError(
                f"num_latent_tokens is {tokens}; it is a power of two from 2 whose half are cells of the "
                f"{side}×{side} grid"
            )
        if self.rot and not self.codebook_l2_norm:
            raise ValueError("rot needs codebook_l2_norm: it turns unit vectors; set rot=False")
        if self.distill_depth is not None and self.distill_depth > self.depth("decoder"):
            raise ValueError(
                f"distill_depth is {self.distill_depth}; the decoder has {self.depth('decoder')} blocks"
            )

    @property
    def side(self) -> int:
        """Cells per side of the CNN's map."""
        return self.image_size // 2 ** (len(self.encoder_ch_mult) - 1)

    @property
    def pools(self) -> list[tuple[int, int]]:
        """Rows and columns of the pools that the queries start from: 1×1 twice, then twice as many cells each
        time, up to half the tokens."""
        pools = [(1, 1), (1, 1)]
        while sum(rows * columns for rows, columns in pools) < self.num_latent_tokens:
            rows, columns = pools[-1]
            pools.append((rows, 2 * columns) if rows == columns else (2 * rows, columns))
        return pools

    def depth(self, part: str) -> int:
        """Blocks of the "encoder" or "decoder"."""
        stated = getattr(self, f"{part}_layers")
        return SIZES[getattr(self, f"{part}_size")][1] if stated is None else stated

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "GigaTokConfig":
        """Read field names, or the original's nested configuration, whose other keys are ignored.

        Raises ValueError for variants of the original that were never published.
        """
        if "model" not in values:
            return build(cls, values, "gigatok")
        arguments = dict(section(section(values, "model"), "init_args"))
        for name, value in FIXED.items():
            if arguments.get(name, value) != value:
                raise ValueError(
                    f"the configuration's {name} is {arguments[name]!r}; this version has {value}"
                )
        if (size := arguments.get("model_size")) is not None:
            arguments |= {"encoder_size": size, "decoder_size": size}
        known = {field.name for field in fields(cls)}
        return build(
            cls, {name: value for name, value in arguments.items() if name in known}, "model.init_args"
        )


class ReadingAttention(Attention):
    """Attention whose queries, keys and values come from different rows."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries [B, N, D] over keys and values [B, M, D] → [B, N, D]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        rows = [
            linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
        x = F.scaled_dot_product_attention(*rows).transpose(1, 2).flatten(2)
        return linear(x, self.out_proj.weight, self.out_proj.bias)


class ReadingBlock(nn.Module):
    """Pre-norm block: queries attend to each other, then to a memory, then an MLP (as in DETR, arXiv
    2005.12872): positions are added to queries and keys, never to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = ReadingAttention(width, heads)
        self.multihead_attn = ReadingAttention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor, places: Tensor, memory_keys: Tensor) -> Tensor:
        """Queries [B, N, D] at `places` [N, D] read the memory [B, M, D], whose keys carry its positions."""
        y = self.norm1(x)
        x = x + self.self_attn(y + places, y + places, y)
        x = x + self.multihead_attn(self.norm2(x) + places, memory_keys, memory)
        hidden = F.gelu(linear(self.norm3(x), self.linear1.weight, self.linear1.bias))
        return x + linear(hidden, self.linear2.weight, self.linear2.bias)


class GigaTokEncoder(nn.Module):
    """The CNN: images [B, 3, H, W] in [-1, 1] → a map [B, C, h, w]."""

    def __init__(self, config: GigaTokConfig) -> None:
        super().__init__()
        widths = [config.hidden_channels * multiplier for multiplier in config.encoder_ch_mult]
        self.conv_in = nn.Conv2d(3, config.hidden_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for depth, (before, width) in enumerate(pairwise([config.hidden_channels, *widths])):
            level = nn.Module()
            level.res = nn.Sequential(ResidualBlock(before, width), ResidualBlock(width, width))
            if depth < len(widths) - 1:
                level.downsample = nn.Module()
                level.downsample.conv = nn.Conv2d(width, width, 3, stride=2)
            self.conv_blocks.append(level)
        self.mid = nn.Sequential(*(ResidualBlock(widths[-1], widths[-1]) for _ in range(2)))
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, C, h, w]."""
        x = self.conv_in(images)
        for level in self.conv_blocks:
            x = level.res(x)
            if hasattr(level, "downsample"):
                x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Reader(nn.Module):
    """Blocks that read a memory of one layout into rows of the other."""

    def __init__(self, config: GigaTokConfig, size: str, layers: int) -> None:
        super().__init__()
        width, _, heads = SIZES[size]
        scale = width**-0.5
        self.positional_embedding = nn.Parameter(scale * torch.randn(config.side**2, 1, width))
        self.latent_token_positional_embedding = nn.Parameter(
            scale * torch.randn(config.num_latent_tokens, 1, width)
        )
        self.ln_pre = nn.LayerNorm(config.z_channels)
        self.transformer = nn.ModuleList(ReadingBlock(width, heads) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)

    def read(self, x: Tensor, memory: Tensor, places: Tensor, memory_places: Tensor) -> Tensor:
        """Rows [B, N, D] after all blocks and the last norm."""
        keys = memory + memory_places.squeeze(1)
        for block in self.transformer:
            x = block(x, memory, places.squeeze(1), keys)
        return self.ln_post(x)


class GridToTokens(Reader):
    """A map [B, C, h, w] → tokens [B, K, C]."""

    def __init__(self, config: GigaTokConfig) -> None:
        super().__init__(config, config.encoder_size, config.depth("encoder"))
        width = self.ln_post.normalized_shape[0]
        self.pools = config.pools
        self.encoder_embed = nn.Linear(config.z_channels, width)
        self.global_proj = nn.Linear(width, width)
        self.conv_out = nn.Conv2d(width, config.z_channels, 1)

    def queries(self, memory: Tensor, side: int) -> Tensor:
        """Pools of the memory [B, h·w, D], coarse to fine, projected: [B, K, D]."""
        grid = memory.transpose(1, 2).unflatten(2, (side, side))
        pools = [F.adaptive_avg_pool2d(grid, pool).flatten(2) for pool in self.pools]
        return self.global_proj(torch.cat(pools, 2).transpose(1, 2))

    def forward(self, grid: Tensor) -> Tensor:
        """[B, C, h, w] → [B, K, C]."""
        memory = self.encoder_embed(self.ln_pre(grid.flatten(2).transpose(1, 2)))
        x = self.queries(memory, grid.shape[2])
        x = self.read(x, memory, self.latent_token_positional_embedding, self.positional_embedding)
        return linear(x, self.conv_out.weight.flatten(1), self.conv_out.bias)


class TokensToGrid(Reader):
    """Tokens [B, K, C] → a grid [B, C, h, w]."""

    def __init__(self, config: GigaTokConfig) -> None:
        super().__init__(config, config.decoder_size, config.depth("decoder"))
        width = self.ln_post.normalized_shape[0]
        self.side = config.side
        self.decoder_embed = nn.Linear(config.z_channels, width)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)
        if config.distill_depth is not None:
            self.distill_mlp = nn.Sequential(
                nn.Linear(width, 4 * width),
                nn.SiLU(),
                nn.Linear(4 * width, 4 * width),
                nn.SiLU(),
                nn.Linear(4 * width, config.out_inner_dim),
            )

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, K, C] → [B, C, h, w]."""
        memory = self.decoder_embed(self.ln_pre(tokens))
        x = memory[:, :1].expand(-1, self.side**2, -1)
        x = self.read(x, memory, self.positional_embedding, self.latent_token_positional_embedding)
        return self.conv_out(x.transpose(1, 2).unflatten(2, (self.side, self.side)))


class AdaptiveNorm(nn.Module):
    """Group norm whose scale and offset follow from the statistics of the tokens' grid."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.groups = group_norm(channels).num_groups
        self.gamma, self.beta = nn.Linear(condition, channels), nn.Linear(condition, channels)

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        """[B, C, H, W], and the grid [B, E, h, w] → [B, C, H, W]."""
        cells = grid.flatten(2)
        mean = cells.mean(2)
        variance = (cells - mean.unsqueeze(2)).square().sum(2) / (cells.shape[2] - 1)
        scale = self.gamma((variance + 1e-6).sqrt())[..., None, None]
        offset = self.beta(mean)[..., None, None]
        return F.group_norm(x, self.groups, eps=1e-6) * scale + offset


class GigaTokDecoder(nn.Module):
    """The CNN: a grid [B, C, h, w] → images [B, 3, H, W] in about [-1, 1], not clamped."""

    def __init__(self, config: GigaTokConfig) -> None:
        super().__init__()
        widths = [config.hidden_channels * multiplier for multiplier in reversed(config.decoder_ch_mult)]
        self.factor = config.image_size // config.side
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = nn.Sequential(*(ResidualBlock(widths[0], widths[0]) for _ in range(2)))
        self.adaptive, self.conv_blocks = nn.ModuleList(), nn.ModuleList()
        for depth, (before, width) in enumerate(pairwise([widths[0], *widths])):
            self.adaptive.append(AdaptiveNorm(before, config.z_channels))
            level = nn.Module()
            blocks = [ResidualBlock(before, width), *(ResidualBlock(width, width) for _ in range(2))]
            level.res = nn.Sequential(*blocks)
            if depth < len(widths) - 1:
                level.upsample = nn.Module()
                level.upsample.conv1 = nn.Conv2d(width, 4 * width, 3, padding=1)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, grid: Tensor) -> Tensor:
        """[B, C, h, w] → [B, 3, H, W]."""
        return in_chunks(self._draw, grid, grid.shape[2] * grid.shape[3] * self.factor**2)

    def _draw(self, grid: Tensor) -> Tensor:
        x = self.mid(self.conv_in(grid))
        for norm, level in zip(self.adaptive, self.conv_blocks, strict=True):
            x = level.res(norm(x, grid))
            if hasattr(level, "upsample"):
                x = depth_to_space(level.upsample.conv1(x))
        return self.conv_out(F.silu(self.norm_out(x)))


def depth_to_space(x: Tensor) -> Tensor:
    """[B, 4 C, H, W] → [B, C, 2 H, 2 W]."""
    # Parity: the place inside the 2×2 block is the slowest part of the channel, not the fastest.
    x = x.unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2)  # [B, C, H, 2, W, 2]
    return x.flatten(4, 5).flatten(2, 3)


@register_family("gigatok")
class GigaTok(Tokenizer):
    """GigaTok in all its published sizes; see the module."""

    config_class = GigaTokConfig

    def __init__(self, config: GigaTokConfig) -> None:
        super().__init__(config)
        self.image_size, self.num_tokens = config.image_size, config.num_latent_tokens
        self.encoder, self.s2to1encoder = GigaTokEncoder(config), GridToTokens(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.quantize = VectorQuantizer(
            config.codebook_size,
            config.codebook_embed_dim,
            l2_norm=config.codebook_l2_norm,
            commitment_cost=config.commit_loss_beta,
            entropy_weight=config.entropy_loss_ratio,
            entropy_offset=ENTROPY_OFFSET,
            rotation=config.rot,
            usage_window=USAGE_WINDOW,
        )
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)
        self.s1to2decoder, self.decoder = TokensToGrid(config), GigaTokDecoder(config)
        for part in (self.encoder, self.s2to1encoder, self.s1to2decoder, self.decoder):
            part.apply(initialise)

    @property
    def quantizer(self) -> VectorQuantizer:
        """The bottleneck; its key in checkpoints is `quantize`."""
        return self.quantize

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of GigaTokConfig, or from the original's nested
        configuration."""
        return cls(GigaTokConfig.parse(config))

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Everything follows from keys and shapes but `rot` and the weights of losses, which do not change
        what is encoded and decoded."""
        if "s2to1encoder.global_proj.weight" not in shapes or "decoder.adaptive.0.gamma.weight" not in shapes:
            return None
        return config if config and "model" in config else _config_from_shapes(shapes)

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → [B, K, D]."""
        tokens = self.s2to1encoder(self.encoder(2 * images - 1))
        return linear(tokens, self.quant_conv.weight.flatten(1), self.quant_conv.bias)

    def pixels(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Latents [B, K, D] → images [B, 3, H, W], not clamped."""
        return (self.decoder(self.grid(latents)) + 1) / 2

    def grid(self, latents: Tensor) -> Tensor:
        """Latents [B, K, D] → the grid that the CNN draws, [B, C, h, w]."""
        return self.s1to2decoder(
            linear(latents, self.post_quant_conv.weight.flatten(1), self.post_quant_conv.bias)
        )

    def forward(self, images: Tensor) -> TrainingOutput:
        """Training pass: images, codes, and the quantizer's losses."""
        quantized = self.quantize(self.latents(images))
        return TrainingOutput(self.pixels(quantized.latents), quantized.codes, quantized.losses)


def _config_from_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    def count(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})

    hidden = shapes["encoder.conv_in.weight"][0]

    def multipliers(part: str) -> list[int]:
        levels = range(count(f"{part}.conv_blocks."))
        return [shapes[f"{part}.conv_blocks.{i}.res.0.conv2.weight"][0] // hidden for i in levels]

    widths = {width: name for name, (width, _, _) in SIZES.items()}
    cells, _, encoder_width = shapes["s2to1encoder.positional_embedding"]
    levels = multipliers("encoder")
    distilled, layers = "s1to2decoder.distill_mlp.4.weight", count("s1to2decoder.transformer.")
    return {
        "codebook_size": shapes["quantize.embedding.weight"][0],
        "codebook_embed_dim": shapes["quantize.embedding.weight"][1],
        "encoder_ch_mult": levels,
        "decoder_ch_mult": multipliers("decoder")[::-1],
        "encoder_size": widths.get(encoder_width),
        "decoder_size": widths.get(shapes["s1to2decoder.positional_embedding"][2]),
        "num_latent_tokens": shapes["s2to1encoder.latent_token_positional_embedding"][0],
        "z_channels": shapes["encoder.conv_out.weight"][0],
        "hidden_channels": hidden,
        "image_size": round(cells**0.5) * 2 ** (len(levels) - 1),
        "encoder_layers": count("s2to1encoder.transformer."),
        "decoder_layers": layers,
        # Shapes do not show the depth; published models have 3.
        "distill_depth": min(3, layers) if distilled in shapes else None,
        "out_inner_dim": shapes[distilled][0] if distilled in shapes else 768,
    }


def _rows() -> list[Entry]:
    table = [  # name, encoder, decoder, file, M parameters, rFID, further configuration
        ("s-s", "small", "small", "VQ_SS256_e100.pt", 136.1, 1.01, {}),
        ("s-b", "small", "base", "VQ_SB256_e200.pt", 232.4, 0.89, {}),
        ("b-l", "base", "large", "VQ_BL256_e200.pt", 621.6, 0.81, {}),
        ("b-l-dino-disc", "base", "large", "VQ_BL256_dino_disc.pt", 621.6, 0.51, {}),
        ("xl-xxl", "xl", "xxl", "VQ_XLXXL256_e300.pt", 2894.0, 0.79, {"entropy_loss_ratio": 0.005}),
    ]
    verified = {
        "s-s": "codes equal, latents 8.5e-6, images 4.9e-6",
        "b-l": "codes equal, latents 8.1e-6, images 3.1e-6",
    }
    return [
        Entry(
            name=f"gigatok-{name}",
            family="gigatok",
            config={"encoder_size": encoder, "decoder_size": decoder, **rest},
            repo="https://github.com/SilentView/GigaTok",
            file=file,
            license="MIT",
            paper="GigaTok (arXiv 2504.08736)",
            parameters=parameters,
            figures={"rFID": rfid},
            notes="licence of the code, none is stated for the weights; trained on ImageNet",
            verified=verified.get(name, ""),
        )
        for name, encoder, decoder, file, parameters, rfid, rest in table
    ]


register(*_rows())
