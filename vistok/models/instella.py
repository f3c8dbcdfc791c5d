"""Instella-T2I's tokenizer: an image of any size as 128 tokens of 64 bits, decodable at any size.

Wang et al., "Instella-T2I: Pushing the Limits of 1D Discrete Latent Space Image Generation", 2025, arXiv
2506.21022. A ViT reads patches beside learned latent tokens and halves its grid midway; every latent becomes
bits (`vistok.quantizers.BinaryQuantizer`); a second ViT draws mask tokens from them and doubles its grid
midway. There are no position embeddings but a rotary one over (token, row, column).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ..nn.cpu.linear import linear
from ..quantizers import BinaryQuantizer, Quantized
from ..registry import Entry, register, register_family
from ..tokenizer import Tokenizer, TrainingOutput
from ..tokens import Tokens
from .image_sizes import Size, batches_by_size, image_sizes, in_order, read_sizes, rows_by_size
from .ranges import LARGEST_SIZE, require_between, require_color, require_depths, require_sizes

EPS = 1e-6
ROTARY_BASE = 10000.0
REPA_FIELDS = ("use_repa", "repa_dim", "repa_index")


@dataclass(frozen=True)
class InstellaConfig:
    """The original's own field names, then those of vistok (from `image_size` on).

    `downsample_idx` and `upsample_idx` are the blocks, counted from 0, after which the grid is halved and
    doubled. `image_size` is the side of decoded images when none is asked for. `scale`, in pixels, stretches
    the rows and columns of every grid to those of a square image of that side, as the published samplers do
    whatever the size; with None they are the grid's own. `rope_id_dtype` "bfloat16" rounds coordinates as the
    original does when its weights are bfloat16. `code_weight` and `entropy_weight` are BinaryQuantizer's.
    """

    in_channels: int = 3
    encoder_layers: int = 12
    encoder_head_dim: int = 64
    encoder_num_heads: int = 12
    patch_size: int = 16
    num_latent_tkns: int = 128
    axes_dims_rope: tuple[int, int, int] = (8, 28, 28)
    downsample_idx: tuple[int, ...] = (7,)
    decoder_layers: int = 16
    decoder_head_dim: int = 64
    decoder_num_heads: int = 16
    upsample_idx: tuple[int, ...] = (7,)
    codebook_size: int = 64
    train_temp: float = 0.1
    image_size: int = 1024
    scale: int | None = 1024
    rope_id_dtype: Literal["float32", "bfloat16"] = "float32"
    code_weight: float = 0.1
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        require_color(self, "in_channels")
        require_sizes(self, "encoder_head_dim", "encoder_num_heads", "decoder_head_dim", "decoder_num_heads")
        require_sizes(self, "patch_size", "num_latent_tkns", "codebook_size", "image_size")
        require_depths(self, "encoder_layers", "decoder_layers")
        require_between(self, ["train_temp"], 1e-6, 1e6)
        require_between(self, ["code_weight", "entropy_weight"], 0, 1e6)
        axes = self.axes_dims_rope
        if len(axes) != 3 or any(axis % 2 or axis < 2 for axis in axes):
            raise ValueError(f"axes_dims_rope is {axes}; it is three even numbers: token, row, column")
        for side, indices in (("encoder", self.downsample_idx), ("decoder", self.upsample_idx)):
            layers, head_dim = getattr(self, f"{side}_layers"), getattr(self, f"{side}_head_dim")
            if sum(axes) != head_dim:
                raise ValueError(
                    f"axes_dims_rope {axes} sum to {sum(axes)}, but {side}_head_dim is {head_dim}; make them "
                    "equal"
                )
            if list(indices) != sorted(set(indices)) or not all(0 <= index < layers for index in indices):
                raise ValueError(
                    f"the {side} resizes after blocks {list(indices)}; give rising block numbers below "
                    f"{layers}"
                )
        if len(self.downsample_idx) > 8 or len(self.upsample_idx) > 8:
            raise ValueError("the grid is resized more than 8 times; give at most 8 block numbers")
        factor = max(self.encoder_factor, self.decoder_factor)
        if self.scale is not None and not factor <= self.scale <= LARGEST_SIZE:
            raise ValueError(
                f"scale is {self.scale}; it is a side in pixels of {factor} or more, or null for the grid's "
                "own coordinates"
            )
        if self.image_size < factor or self.image_size % factor:
            raise ValueError(
                f"image_size is {self.image_size}; give a multiple of {factor}, the patch size times the "
                "resizing"
            )

    @property
    def encoder_factor(self) -> int:
        """Sides of encoded images are multiples of this."""
        return self.patch_size * 2 ** len(self.downsample_idx)

    @property
    def decoder_factor(self) -> int:
        """Sides of decoded images are multiples of this."""
        return self.patch_size * 2 ** len(self.upsample_idx)


# Blocks -----------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + 1e-6), in float32 or better, rounded to x's dtype and then weighted."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        wide = x.float() if x.dtype.itemsize < 4 else x
        return self.weight * F.rms_norm(wide, self.weight.shape, eps=EPS).to(x.dtype)


class Rotary:
    """Cosines and sines [N, head dim] float32 for latent tokens (i, 0, 0) and a grid's (0, row, column)."""

    def __init__(self, config: InstellaConfig) -> None:
        self.axes, self.num_latents = config.axes_dims_rope, config.num_latent_tkns
        self.id_dtype = getattr(torch, config.rope_id_dtype)

    def __call__(
        self, height: int, width: int, scale: float | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Tables for a grid of `height`×`width`; `scale` is the side, in patches, it is stretched to."""
        token = torch.arange(self.num_latents, dtype=torch.float32, device=device)
        rows, columns = (_coordinates(count, scale, device) for count in (height, width))
        zeros = token.new_zeros(self.num_latents)
        places = [
            torch.cat([token, token.new_zeros(height * width)]),
            torch.cat([zeros, rows.repeat_interleave(width)]),
            torch.cat([zeros, columns.repeat(height)]),
        ]
        angles = []
        for place, axis in zip(places, self.axes, strict=True):
            powers = torch.arange(0, axis, 2, dtype=torch.float64, device=device) / axis
            angles.append(place.to(self.id_dtype).double().unsqueeze(-1) * ROTARY_BASE**-powers)
        # Parity: every angle twice, side by side, although `_rotate` pairs channel i with i + head dim / 2.
        # The two disagree, and the published weights were trained with that.
        table = torch.cat(angles, -1).repeat_interleave(2, -1)
        return table.cos().float(), table.sin().float()


def _coordinates(count: int, scale: float | None, device: torch.device) -> Tensor:
    """Rows or columns of a grid: their numbers, or spread evenly from 0 to scale - 1."""
    places = torch.arange(count, dtype=torch.float32, device=device)
    return places if scale is None else places / max(count - 1, 1) * (scale - 1)


def _rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [B, h, N, d], in float32 or better."""
    cos, sin = table
    wide = x.float() if x.dtype.itemsize < 4 else x
    first, second = wide.chunk(2, -1)
    return wide * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    """Full self-attention with normalised, then rotated queries and keys; no biases."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(dim, dim, bias=False))
        self.norm_q, self.norm_k = RMSNorm(dim // heads), RMSNorm(dim // heads)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], rows: slice) -> Tensor:
        """x [B, N, D] → the `rows` of it that the caller keeps, [B, len(rows), D]."""
        query = self._heads(x[:, rows], self.q_proj)
        key, value = self._heads(x, self.k_proj), self._heads(x, self.v_proj)
        query = _rotate(self.norm_q(query), tuple(part[rows] for part in table)).to(value.dtype)
        key = _rotate(self.norm_k(key), table).to(value.dtype)
        out = F.scaled_dot_product_attention(query, key, value)
        return linear(out.transpose(1, 2).flatten(2), self.o_proj.weight, None)

    def _heads(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return linear(x, layer.weight, None).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, h, N, d]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), four times as wide inside; no biases."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, 4 * dim, bias=False)
        self.up_proj = nn.Linear(dim, 4 * dim, bias=False)
        self.down_proj = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        hidden = F.silu(linear(x, self.gate_proj.weight, None)) * linear(x, self.up_proj.weight, None)
        return linear(hidden, self.down_proj.weight, None)


class Block(nn.Module):
    """Pre-norm residual block: attention, then SwiGLU."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.mlp = SwiGLU(dim)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(dim), RMSNorm(dim)
        self.attn = Attention(dim, heads)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], rows: slice = slice(None)) -> Tensor:
        """[B, N, D] → [B, N, D], or only the `rows` of it."""
        x = x[:, rows] + self.attn(self.input_layernorm(x), table, rows)
        x = x + self.mlp(self.post_attention_layernorm(x))
        # Parity: half precision overflows here, and the original clips.
        return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


class Downsample(nn.Module):
    """3×3 convolution of stride 2, beside the mean of every 2×2 cells."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] → [B, C, h/2, w/2]."""
        return self.conv(x) + F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """3×3 convolution to four cells for one, beside the cell repeated."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 4 * dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] → [B, C, 2h, 2w]."""
        return F.pixel_shuffle(self.conv(x), 2) + F.interpolate(x, scale_factor=2.0, mode="nearest")


def _resized(x: Tensor, layer: nn.Module, height: int, width: int) -> Tensor:
    """`layer` on a row-major grid [B, height·width, C], flat again."""
    grid = x.transpose(1, 2).unflatten(2, (height, width))
    return layer(grid).flatten(2).transpose(1, 2)


# Encoder and decoder ----------------------------------------------------------------------------------------


class InstellaEncoder(nn.Module):
    """Images → latents: a ViT over latent tokens and patches that halves its grid; the latent tokens stay."""

    def __init__(self, config: InstellaConfig) -> None:
        super().__init__()
        self.patch_size, self.scale = config.patch_size, config.scale
        self.downsample_idx, self.rotary = config.downsample_idx, Rotary(config)
        width = config.encoder_num_heads * config.encoder_head_dim
        self.latent_tokens = nn.Parameter(0.02 * torch.randn(1, config.num_latent_tkns, width))
        self.patch_embedder = nn.Conv2d(config.in_channels, width, self.patch_size, self.patch_size)
        self.transformer_blocks = nn.ModuleList(
            Block(width, config.encoder_num_heads) for _ in range(config.encoder_layers)
        )
        self.down_layers = nn.ModuleList(Downsample(width) for _ in self.downsample_idx)
        self.norm_out = RMSNorm(width)
        self.proj_out = nn.Linear(width, width)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] → latents [B, K, D]."""
        grid = self.patch_embedder(images)
        height, width = grid.shape[2:]
        scale = None if self.scale is None else self.scale / self.patch_size
        latents = self.latent_tokens.expand(len(images), -1, -1)
        count = latents.shape[1]
        x = torch.cat([latents, grid.flatten(2).transpose(1, 2)], 1)
        table = self.rotary(height, width, scale, x.device)
        down_layers = dict(zip(self.downsample_idx, self.down_layers, strict=True))
        last = len(self.transformer_blocks) - 1
        for depth, block in enumerate(self.transformer_blocks):
            x = block(x, table, rows=slice(count if depth == last else None))
            if depth in down_layers and depth < last:
                small = _resized(x[:, count:], down_layers[depth], height, width)
                x = torch.cat([x[:, :count], small], 1)
                height, width = height // 2, width // 2
                # Parity: an odd scale loses half a patch.
                scale = None if scale is None else scale // 2
                table = self.rotary(height, width, scale, x.device)
        return self.proj_out(self.norm_out(x))


class InstellaDecoder(nn.Module):
    """Latents → features of patches: a ViT over latents and mask tokens that doubles its grid."""

    def __init__(self, config: InstellaConfig) -> None:
        super().__init__()
        self.patch_size, self.scale = config.patch_size, config.scale
        self.upsample_idx, self.rotary = config.upsample_idx, Rotary(config)
        width = config.decoder_num_heads * config.decoder_head_dim
        latent_width = config.encoder_num_heads * config.encoder_head_dim
        self.mask_tokens = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.input_layer = nn.Sequential(RMSNorm(latent_width), nn.Linear(latent_width, width))
        self.transformer_blocks = nn.ModuleList(
            Block(width, config.decoder_num_heads) for _ in range(config.decoder_layers)
        )
        self.up_layers = nn.ModuleList(Upsample(width) for _ in self.upsample_idx)
        self.norm_out = RMSNorm(width)

    def forward(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents [B, K, D] → features [B, height·width, D'] of a grid of that many patches, row by row."""
        factor = 2 ** len(self.upsample_idx)
        height, width = height // factor, width // factor
        scale = None if self.scale is None else self.scale / self.patch_size
        if scale is not None and factor > 1:
            scale //= factor  # Parity: as in the encoder
        x = self.input_layer(latents)
        count = x.shape[1]
        x = torch.cat([x, self.mask_tokens.expand(len(x), height * width, -1)], 1)
        table = self.rotary(height, width, scale, x.device)
        up_layers = dict(zip(self.upsample_idx, self.up_layers, strict=True))
        last = len(self.transformer_blocks) - 1
        for depth, block in enumerate(self.transformer_blocks):
            if depth < last:
                x = block(x, table)
            else:
                x, count = block(x, table, rows=slice(count, None)), 0
            if depth in up_layers:
                large = _resized(x[:, count:], up_layers[depth], height, width)
                x = torch.cat([x[:, :count], large], 1)
                height, width = 2 * height, 2 * width
                scale = None if scale is None else 2 * scale
                table = self.rotary(height, width, scale, x.device)
        return self.norm_out(x)


# The tokenizer ----------------------------------------------------------------------------------------------


@register_family("instella")
class Instella(Tokenizer):
    """The binary autoencoder; see the module. Tokens hold `bits`, bool [B, 128, 64].

    Sides of images are multiples of 32 pixels at the published sizes, not necessarily equal, and a list may
    hold images of several sizes. The bits do not hold the size of their image: `decode(tokens, size=512)`
    decodes to any, or to one per image.
    """

    config_class = InstellaConfig
    sized = True
    checkpoint_ignores = ("decoder.repa_proj.*",)  # feature alignment, in training only

    def __init__(self, config: InstellaConfig) -> None:
        super().__init__(config)
        self.image_size, self.num_tokens = config.image_size, config.num_latent_tkns
        self.encoder = InstellaEncoder(config)
        self.decoder = InstellaDecoder(config)
        self.quantizer = BinaryQuantizer(
            config.codebook_size,
            config.encoder_num_heads * config.encoder_head_dim,
            temperature=config.train_temp,
            code_weight=config.code_weight,
            entropy_weight=config.entropy_weight,
        )
        width = config.decoder_num_heads * config.decoder_head_dim
        self.to_pixel = nn.Linear(width, config.in_channels * config.patch_size**2)

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of InstellaConfig.

        The original's `use_repa`, `repa_dim` and `repa_index` are accepted and change nothing: they describe
        a training-only head that published weights do not have.
        """
        return super().create(**{name: value for name, value in config.items() if name not in REPA_FIELDS})

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Widths and depths follow from shapes; the place where the grid is resized does not: block 7 unless
        `config` states another."""
        if "quantizer.embed" not in shapes or "encoder.latent_tokens" not in shapes:
            return None
        known = {field.name for field in fields(cls.config_class)}
        settings = {name: value for name, value in (config or {}).items() if name in known}
        return _config_from_shapes(shapes) | settings

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → [B, K, D], before the projection to bits."""
        return self.encoder(2 * images - 1)

    def pixels(
        self, latents: Tensor, lengths: Tensor | None = None, size: int | tuple[int, int] | None = None
    ) -> Tensor:
        """Sums of embeddings [B, K, D] → images [B, 3, H, W], not clamped; `size` as in `decode`."""
        height, width = self._grid(size)
        patch = self.config.patch_size
        x = self.to_pixel(self.decoder(latents, height, width))
        # Parity: channels are (patch row, patch column, colour) with the colour fastest.
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))  # [B, h, w, p, p, 3]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3) / 2 + 0.5

    @torch.no_grad()
    def encode(
        self,
        images: Tensor | Sequence[Tensor],
        num_tokens: int | None = None,
        *,
        target_psnr: float | None = None,
    ) -> Any:
        """Images [B, 3, H, W] in [0, 1], or a list of [3, H, W] of several sizes, → tokens. Raises ValueError
        as `Tokenizer.encode`."""
        if not isinstance(images, list | tuple):
            return super().encode(images, num_tokens, target_psnr=target_psnr)
        if not images:
            images = torch.empty(0, 3, self.image_size, self.image_size)
            return super().encode(images, num_tokens, target_psnr=target_psnr)
        batches, order = batches_by_size(images, self.check_images)
        parts = [super(Instella, self).encode(b, num_tokens, target_psnr=target_psnr) for b in batches]
        return Tokens.cat(parts)[order]

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens | Tensor,
        *,
        size: int | Size | list[Size] | None = None,
        condition: Any = None,
        steps: int | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tokens (or bare bits [B, K, D]) → images [B, 3, H, W] in [0, 1].

        `size`: side, or (height, width), in pixels; multiples of 32 for the published configuration, which
        was trained for 512, 768 and 1024. Without it, squares of `image_size`. A list holds one (height,
        width) per image, and a list of images [3, H, W] comes back. The other options are those of stochastic
        decoders and refused.
        """
        sizes = read_sizes(size, len(tokens)) if isinstance(size, list) else [size]
        for each in sizes:
            self._grid(each)
        self.check_decoding(condition=condition, steps=steps, guidance=guidance)
        latents, _ = self.dequantize(tokens)
        if not isinstance(size, list):
            return self.pixels(latents, size=size).clamp(0, 1)
        rows = rows_by_size(sizes)
        parts = {each: self.pixels(latents[places], size=each).clamp(0, 1) for each, places in rows.items()}
        return in_order(parts, rows)

    def reconstruct(
        self, images: Tensor | Sequence[Tensor], num_tokens: int | None = None, **options: Any
    ) -> Any:
        """Images → tokens → images of the same size, or of another `size`; a list for a list."""
        tokens = self.encode(images, num_tokens)
        size = tuple(images.shape[2:]) if isinstance(images, Tensor) else image_sizes(images)
        return self.decode(tokens, **{"size": size} | options)

    def forward(self, images: Tensor, size: int | tuple[int, int] | None = None) -> TrainingOutput:
        """Training pass, by default at the images' own size."""
        quantized: Quantized = self.quantizer(self.latents(images))
        decoded = self.pixels(quantized.latents, size=tuple(images.shape[2:]) if size is None else size)
        return TrainingOutput(decoded, quantized.codes, quantized.losses)

    @property
    def size_multiple(self) -> int:
        """Sides of images are multiples of this, in pixels, so that the grid can be halved."""
        return self.config.encoder_factor

    def _grid(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """Rows and columns of patches of a decoded image."""
        size = self.image_size if size is None else size
        height, width = (size, size) if isinstance(size, int) else size
        factor, patch = self.config.decoder_factor, self.config.patch_size
        if height < factor or width < factor or height % factor or width % factor:
            raise ValueError(
                f"size={size} was asked for; {self.label} decodes to sides that are multiples of {factor}: "
                "give a side, or (height, width), in pixels"
            )
        return height // patch, width // patch


def _config_from_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    def count(prefix: str) -> int:
        return len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})

    config: dict[str, Any] = {}
    for side, resize in (("encoder", "down"), ("decoder", "up")):
        head_dim = shapes[f"{side}.transformer_blocks.0.attn.norm_q.weight"][0]
        config[f"{side}_layers"] = count(f"{side}.transformer_blocks.")
        config[f"{side}_head_dim"] = head_dim
        config[f"{side}_num_heads"] = shapes[f"{side}.norm_out.weight"][0] // head_dim
        config[f"{resize}sample_idx"] = (7,) if count(f"{side}.{resize}_layers.") else ()
    _, config["in_channels"], config["patch_size"], _ = shapes["encoder.patch_embedder.weight"]
    config["num_latent_tkns"] = shapes["encoder.latent_tokens"][1]
    config["codebook_size"] = shapes["quantizer.embed"][0]
    return config


register(
    Entry(
        name="instella-bae",
        family="instella",
        config={},
        repo="amd/Instella-T2I",
        file="bae/model.safetensors",
        license="research-only RAIL-MS",
        paper="Instella-T2I (arXiv 2506.21022)",
        parameters=427.75,
        notes="128 tokens of 64 bits (1 KiB) per image, decoded at 512, 768 or 1024 pixels; with the paper's "
        "generators on these bits GenEval 0.46 (autoregressive), 0.64 (diffusion)",
        verified="bits equal, logits 1.4e-5, images 7.8e-6",
    )
)
