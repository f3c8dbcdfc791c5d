"""C-ViViT as ECHOPulse trained it: a clip of ultrasound as a grid of codes in time, rows and columns.

"ECHOPULSE: ECG Controlled Echocardiograms Video Generation" (Li et al., 2024, arXiv 2410.03143), whose
tokenizer is that of "Phenaki: Variable Length Video Generation From Open Domain Textual Description"
(Villegas et al., 2022, arXiv 2210.02399). The first frame and every later pair of frames are cut into
patches; one transformer attends within a step of time, a second one along time; codes are directions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isqrt
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ..nn.cpu.linear import linear
from ..nn.vision_transformer import patchify, unpatchify
from ..quantizers import CosineQuantizer
from ..registry import Entry, register, register_family
from ..tokenizer import TrainingOutput
from .grid import GridTokenizer
from .ranges import require_between, require_color, require_depths, require_multiple, require_sizes

T = TypeVar("T")
SCALE = 8.0  # of products of unit vectors, in attention
SLOPE = 0.1  # of the leaky ReLU
DECAY = 0.8  # of the codebook's running means
COMMITMENT = 0.25
TRAINING = (  # arguments of the original that do not change what is encoded and decoded
    *("use_vgg_and_gan", "vgg", "discr_base_dim", "discr_attn_res_layers", "use_hinge_loss"),
    *("attn_dropout", "ff_dropout", "use_discr"),
)
PARTS = (  # of the tokenizer in a checkpoint; others are networks of losses
    *("spatial_rel_pos_bias.", "to_patch_emb_first_frame.", "to_patch_emb.", "enc_spatial_transformer."),
    *("enc_temporal_transformer.", "vq.", "dec_spatial_transformer.", "dec_temporal_transformer."),
    *("to_pixels_first_frame.", "to_pixels."),
)
MARK = "spatial_rel_pos_bias.net.0.0.weight"


@dataclass(frozen=True)
class CViViTConfig:
    """The original's arguments, and the `frames` of the videos that it was trained for."""

    dim: int = 512
    codebook_size: int = 8192
    codebook_dim: int = 32
    image_size: int = 128
    patch_size: int = 8
    temporal_patch_size: int = 2
    spatial_depth: int = 4
    temporal_depth: int = 4
    dim_head: int = 64
    heads: int = 8
    ff_mult: float = 4.0
    channels: int = 3
    frames: int = 11

    def __post_init__(self) -> None:
        require_color(self, "channels")
        require_sizes(self, "dim", "codebook_size", "codebook_dim", "image_size", "patch_size", "frames")
        require_sizes(self, "temporal_patch_size", "dim_head", "heads")
        require_depths(self, "spatial_depth", "temporal_depth")
        require_between(self, ["ff_mult"], 0.1, 64)
        require_multiple(self, "image_size", "patch_size")
        if (self.frames - 1) % self.temporal_patch_size:
            raise ValueError(
                f"frames is {self.frames}; it is one and a multiple of temporal_patch_size, "
                f"{self.temporal_patch_size}, more"
            )


class ScaledNorm(nn.Module):
    """Layer norm whose offset is a buffer of zeros in the checkpoint."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.register_buffer("beta", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class CosineAttention(nn.Module):
    """Attention of unit queries and keys, each scaled per channel; keys and values are of the input itself,
    only queries of its norm."""

    def __init__(self, config: CViViTConfig) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads = config.heads
        self.norm, self.context_norm = ScaledNorm(config.dim), nn.Module()
        # Parity: a norm that the checkpoint has and nothing uses.
        self.context_norm.register_buffer("gamma", torch.ones(config.dim))
        self.context_norm.register_buffer("beta", torch.zeros(config.dim))
        self.q_scale = nn.Parameter(torch.ones(config.dim_head))
        self.k_scale = nn.Parameter(torch.ones(config.dim_head))
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_kv = nn.Linear(config.dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[B, N, D] → [B, N, D]; `bias` [h, N, N] is added to the scores."""
        rows = [
            linear(self.norm(x), self.to_q.weight, None),
            # Parity: without the norm.
            *linear(x, self.to_kv.weight, None).chunk(2, -1),
        ]
        query, key, value = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in rows)
        query, key = F.normalize(query, dim=-1) * self.q_scale, F.normalize(key, dim=-1) * self.k_scale
        attended = F.scaled_dot_product_attention(query, key, value, bias, scale=SCALE)
        return linear(attended.transpose(1, 2).flatten(2), self.to_out.weight, None)


class GatedGELU(nn.Module):
    """The first half of the channels times GELU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 D] → [..., D]."""
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)


class PositionGenerator(nn.Module):
    """A depthwise convolution over time, rows and columns, which sees no later step than its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dsconv = nn.Conv3d(width, width, 3, groups=width)

    def forward(self, x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Rows of all sequences, in order, [M, N, D] → the same; `shape` is (batch, steps, rows, columns)."""
        # Parity: the order of the rows stays as it is. It is (batch, steps, rows, columns) for sequences in
        # space; those along time are (batch, rows, columns, steps), so that their neighbours are scrambled.
        video = x.reshape(*shape, x.shape[-1]).permute(0, 4, 1, 2, 3)  # [B, D, t, h, w]
        video = self.dsconv(F.pad(video, (1, 1, 1, 1, 2, 0)))
        return video.permute(0, 2, 3, 4, 1).reshape(x.shape)


class Transformer(nn.Module):
    """Layers of convolution, attention and a gated feed-forward network, each added to its input."""

    def __init__(self, config: CViViTConfig, depth: int) -> None:
        super().__init__()
        hidden = int(config.ff_mult * 2 / 3 * config.dim)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            feedforward = nn.Sequential(
                nn.LayerNorm(config.dim),
                nn.Linear(config.dim, 2 * hidden, bias=False),
                GatedGELU(),
                nn.Identity(),  # numbers of keys as published
                nn.Linear(hidden, config.dim, bias=False),
            )
            parts = {"0": PositionGenerator(config.dim), "1": CosineAttention(config), "3": feedforward}
            self.layers.append(nn.ModuleDict(parts))
        self.norm_out = ScaledNorm(config.dim)

    def forward(self, x: Tensor, shape: tuple[int, int, int, int], bias: Tensor | None = None) -> Tensor:
        """Sequences [M, N, D] → [M, N, D]; `shape` is (batch, steps, rows, columns)."""
        for layer in self.layers:
            x = x + layer["0"](x, shape)
            x = x + layer["1"](x, bias)
            x = x + layer["3"](x)
        return self.norm_out(x)


class OffsetBias(nn.Module):
    """A bias per head for each pair of cells, computed from the offset between them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()

        def layer(before: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(before, width), nn.LeakyReLU(SLOPE))

        self.net = nn.ModuleList([layer(2), layer(width), nn.Linear(width, heads)])

    def forward(self, rows: int, columns: int) -> Tensor:
        """Biases [h, N, N] of a grid of N = rows · columns cells."""
        weight = self.net[2].weight
        down, across = (
            torch.arange(1 - side, side, device=weight.device, dtype=torch.float32)
            for side in (rows, columns)
        )
        offsets = torch.stack(torch.meshgrid(down, across, indexing="ij"), -1)
        x = (offsets.sign() * (offsets.abs() + 1).log()).to(weight.dtype)
        for layer in self.net:
            x = layer(x)  # [2 rows - 1, 2 columns - 1, h]
        cells = torch.arange(rows * columns, device=weight.device)
        row, column = cells // columns, cells % columns
        # [N, N] each: the offset of the first cell from the second, counted from the smallest.
        return x[row[:, None] - row + rows - 1, column[:, None] - column + columns - 1].permute(2, 0, 1)


def _patch_embedding(pixels: int, width: int) -> nn.Sequential:
    """Norm, linear, norm, under the numbers that follow the original's rearrangement."""
    parts = (nn.Identity(), nn.LayerNorm(pixels), nn.Linear(pixels, width), nn.LayerNorm(width))
    return nn.Sequential(*parts)


@register_family("cvivit")
class CViViT(GridTokenizer):
    """ECHOPulse's C-ViViT; see the module.

    Videos are [B, T, 3, H, W] in [0, 1] with T = 1 + 2n frames at the published sizes, so that an image is a
    video of one frame; sides are multiples of 8 pixels, and 128 is what the model was trained for. The `grid`
    of tokens is (1 + n, H / 8, W / 8). Bare codes are those of squares of `image_size`.
    """

    config_class = CViViTConfig
    modality = "video"

    def __init__(self, config: CViViTConfig) -> None:
        super().__init__(config)
        self.image_size, self.factor = config.image_size, config.patch_size
        self.frame_multiple = config.temporal_patch_size
        self.num_tokens = (1 + (config.frames - 1) // self.frame_multiple) * self._cells
        first = 3 * config.patch_size**2
        later = first * config.temporal_patch_size
        self.spatial_rel_pos_bias = OffsetBias(config.dim, config.heads)
        self.to_patch_emb_first_frame = _patch_embedding(first, config.dim)
        self.to_patch_emb = _patch_embedding(later, config.dim)
        self.enc_spatial_transformer = Transformer(config, config.spatial_depth)
        self.enc_temporal_transformer = Transformer(config, config.temporal_depth)
        self.vq = CosineQuantizer(
            config.codebook_size, config.codebook_dim, config.dim, commitment_cost=COMMITMENT, decay=DECAY
        )
        self.dec_spatial_transformer = Transformer(config, config.spatial_depth)
        self.dec_temporal_transformer = Transformer(config, config.temporal_depth)
        self.to_pixels_first_frame = nn.Sequential(nn.Linear(config.dim, first))
        self.to_pixels = nn.Sequential(nn.Linear(config.dim, later))

    @property
    def quantizer(self) -> CosineQuantizer:
        """The bottleneck; its key in checkpoints is `vq`."""
        return self.vq

    @property
    def _cells(self) -> int:
        """Tokens per step of time, at `image_size`."""
        return (self.image_size // self.factor) ** 2

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of CViViTConfig; the original's arguments for training are
        accepted and change nothing."""
        return super().create(**{name: value for name, value in config.items() if name not in TRAINING})

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by the bias of offsets, also inside a generator's checkpoint.

        All follows from shapes but `image_size` and `frames`, which only state what the model was trained
        for: `config` may have them, else they are those of the published model in patches.
        """
        own = select_tokenizer(shapes)
        if MARK not in own or "vq._codebook.embed" not in own:
            return None
        known = {field.name for field in fields(cls.config_class)}
        stated = {name: value for name, value in (config or {}).items() if name in known}
        return _config_from_shapes(own) | stated

    @classmethod
    def rename_keys(cls, tensors: Mapping[str, T]) -> dict[str, T]:
        """The tokenizer's tensors alone, from the checkpoint of a training or of the generator."""
        return select_tokenizer(tensors)

    # Sizes --------------------------------------------------------------------------------------------------

    def grid_of(self, images: Tensor) -> tuple[int, ...]:
        """Steps of time, rows and columns of videos [B, T, 3, H, W]."""
        return 1 + (images.shape[1] - 1) // self.frame_multiple, *super().grid_of(images)

    def check_num_tokens(self, num_tokens: int | None) -> int:
        """Accept any number of steps; tokens that carry their `grid` may have other rows and columns."""
        if num_tokens is None:
            return self.num_tokens
        if num_tokens < 1 or num_tokens % self._cells:
            raise ValueError(
                f"{self.label} has {self._cells} tokens per step of time at {self.image_size}×"
                f"{self.image_size} pixels; {num_tokens} is not a multiple of that. For another size give "
                "Tokens with their grid"
            )
        return num_tokens

    # Videos ↔ tokens ----------------------------------------------------------------------------------------

    def latents(self, images: Tensor) -> Tensor:
        """Videos [B, T, 3, H, W] in [0, 1] → [B, K, D], step by step and row by row."""
        batch, (steps, rows, columns) = len(images), self.grid_of(images)
        shape = (batch, steps, rows, columns)
        x = self.patches(images).flatten(0, 1)
        x = self.enc_spatial_transformer(x, shape, self.spatial_rel_pos_bias(rows, columns))
        x = x.unflatten(0, (batch, steps)).transpose(1, 2)  # [B, h · w, t, D]
        x = self.enc_temporal_transformer(x.flatten(0, 1), shape)
        return x.unflatten(0, (batch, rows * columns)).transpose(1, 2).flatten(1, 2)

    def patches(self, videos: Tensor) -> Tensor:
        """Videos [B, T, 3, H, W] → their patches, embedded [B, t, h · w, D]."""
        first = self.to_patch_emb_first_frame(self._ordered(patchify(videos[:, 0], self.factor), 1))
        if videos.shape[1] == 1:
            return first.unsqueeze(1)
        batch, frames = len(videos), self.frame_multiple
        steps = (videos.shape[1] - 1) // frames
        rows = patchify(videos[:, 1:].flatten(0, 1), self.factor)
        rows = rows.unflatten(0, (batch * steps, frames)).transpose(1, 2).flatten(2)  # [B t, N, p · …]
        rows = self.to_patch_emb(self._ordered(rows, frames))
        return torch.cat([first.unsqueeze(1), rows.unflatten(0, (batch, steps))], 1)

    def _ordered(self, rows: Tensor, frames: int) -> Tensor:
        """Patches (frame, row, column, colour) [B, N, …] → (colour, frame, row, column), as published."""
        return rows.unflatten(2, (frames, self.factor**2, 3)).permute(0, 1, 4, 2, 3).flatten(2)

    def pixels(
        self, latents: Tensor, lengths: Tensor | None = None, *, grid: tuple[int, ...] | None = None
    ) -> Tensor:
        """Latents of a `grid` of (t, h, w), by default of squares of `image_size`, [B, K, D] → videos
        [B, T, 3, H, W], not clamped."""
        side = isqrt(self._cells)
        steps, rows, columns = grid or (latents.shape[1] // self._cells, side, side)
        shape = (len(latents), steps, rows, columns)
        x = latents.unflatten(1, (steps, rows * columns)).transpose(1, 2)  # [B, h · w, t, D]
        x = self.dec_temporal_transformer(x.flatten(0, 1), shape)
        x = x.unflatten(0, (len(latents), rows * columns)).transpose(1, 2)  # [B, t, h · w, D]
        x = self.dec_spatial_transformer(x.flatten(0, 1), shape, self.spatial_rel_pos_bias(rows, columns))
        x = x.unflatten(0, (len(latents), steps))
        first = self._drawn(self.to_pixels_first_frame(x[:, 0]), 1, rows, columns)
        if steps == 1:
            return first
        later = self.to_pixels(x[:, 1:].flatten(0, 1))
        later = self._drawn(later, self.frame_multiple, rows, columns)  # [B t, p, 3, H, W]
        return torch.cat([first, later.unflatten(0, (len(latents), steps - 1)).flatten(1, 2)], 1)

    def _drawn(self, rows: Tensor, frames: int, height: int, width: int) -> Tensor:
        """Patches (colour, frame, row, column) [M, N, …] → frames [M, p, 3, H, W]."""
        rows = rows.unflatten(2, (3, frames, self.factor**2)).permute(3, 0, 1, 4, 2)  # [p, M, N, p², 3]
        drawn = unpatchify(rows.flatten(3).flatten(0, 1), height, width)
        return drawn.unflatten(0, (frames, rows.shape[1])).transpose(0, 1)

    def forward(self, images: Tensor) -> TrainingOutput:
        """Training pass: videos, codes and the commitment. (ECHOPulse's own losses: ten times the squared
        error, LPIPS of every frame, squared error of I3D's features, an adversarial loss.)"""
        quantized = self.vq(self.latents(images))
        drawn = self.pixels(quantized.latents, grid=self.grid_of(images))
        return TrainingOutput(drawn, quantized.codes, quantized.losses)


def select_tokenizer(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tokenizer's entries of a checkpoint, under its own keys; all entries where it has none."""
    marks = [key for key in tensors if key.endswith(MARK)]
    if len(marks) != 1:
        return dict(tensors)
    prefix = marks[0].removesuffix(MARK)
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return {key: value for key, value in own.items() if key.startswith(PARTS)}


def _config_from_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    def depth(name: str) -> int:
        prefix = f"enc_{name}_transformer.layers."
        return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})

    dim, first = shapes["to_patch_emb_first_frame.2.weight"]
    later = shapes["to_patch_emb.2.weight"][1]
    _, codes, channels = shapes["vq._codebook.embed"]
    hidden = shapes["enc_spatial_transformer.layers.0.3.4.weight"][1]
    patch = isqrt(first // 3)
    return {
        "dim": dim,
        "codebook_size": codes,
        "codebook_dim": channels,
        "image_size": 16 * patch,
        "patch_size": patch,
        "temporal_patch_size": later // first,
        "spatial_depth": depth("spatial"),
        "temporal_depth": depth("temporal"),
        "dim_head": shapes["enc_spatial_transformer.layers.0.1.q_scale"][0],
        "heads": shapes["spatial_rel_pos_bias.net.2.weight"][0],
        "ff_mult": (hidden + 0.5) * 1.5 / dim,
        "frames": 1 + 5 * (later // first),
    }


register(
    Entry(
        name="cvivit-echopulse",
        family="cvivit",
        config={},
        repo="https://huggingface.co/datasets/Levi980623/ECHOTest",
        file="pytorch_model.bin",
        license="none stated",
        paper="ECHOPulse (arXiv 2410.03143)",
        parameters=52.0,
        figures={"MSE": 2.89e-3, "MAE": 2.92e-2},
        notes="clips of 11 frames of 128 px as 1,536 tokens; errors on Echo-Dynamic (5.02e-3 and 4.08e-2 if "
        "trained on natural videos only)",
        verified="codes equal, latents 5.0e-6, videos 5.8e-6",
    )
)
