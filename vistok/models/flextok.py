"""FlexTok: a 256×256 image as 1 to 256 ordered tokens of 64,000 codes, decoded by a rectified flow.

Bachmann et al., "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length", 2025, arXiv
2502.13967. A transformer reads the latents of a VAE into registers, of which each sees only those before it;
finite scalar quantization makes each an index. Another transformer draws VAE latents from noise, given any
prefix of the tokens: few tell it what the picture is about, many what it looks like.

    tokens = tokenizer.encode(images)                        # 256 each; num_tokens=32 costs less
    sweep = Tokens.cat([tokens.prefix(k) for k in (1, 16, 256)])
    pictures = tokenizer.decode(sweep, steps=20, guidance=7.5, generator=torch.Generator().manual_seed(1))

The published weights are not open source: Apple's licence allows research use only.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint, registry
from ..nn import flow
from ..nn.linear import linear
from ..nn.upsample import upsample_conv
from ..quantizers import FiniteScalarQuantizer
from ..registry import Entry, register, register_family
from ..tokenizer import Tokenizer, TrainingOutput
from ..tokens import Tokens

STEPS, GUIDANCE = 20, 7.5  # the authors' recommendation, with normalized guidance
LICENSE = "apple-amlr (not open source: research only)"
VAES = {f"flextok-vae-c{channels}": f"EPFL-VILAB/flextok_vae_c{channels}" for channels in (4, 8, 16)}
VAE_FILE = "diffusion_pytorch_model.safetensors"

KeptTokens = Literal["uniform", "pow2", "uniform_pow2"]
Times = Literal["mode", "logit_normal", "stratified"]


@dataclass(frozen=True)
class FlexTokConfig:
    """Sizes and constants of encoder, decoder, quantizer and VAE; the defaults are the d12-d12 sizes."""

    encoder_dim: int = 768
    encoder_depth: int = 12
    decoder_dim: int = 768
    decoder_depth: int = 12
    head_dim: int = 64
    num_tokens: int = 256
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    latent_channels: int = 16
    latent_size: int = 32
    """Side of the VAE's latents, in latent pixels."""
    patch_size: int = 2
    frequency_embedding_size: int = 256
    max_timestep: float = 1.0
    """Scale of the time features; times themselves are always in [0, 1]."""
    vae: bool = True
    """Whether the checkpoint holds the VAE; without it, `attach_vae`."""
    vae_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    vae_layers_per_block: int = 2
    vae_norm_num_groups: int = 32
    vae_scaling_factor: float | None = None
    """Factor on the VAE's latents; None takes that of the VAE's own configuration."""
    vae_source: str | None = None
    """Hub repository whose config.json has that factor."""
    sample_posterior: bool = False
    """Whether training samples the VAE's posterior; `encode` always takes its mean."""
    kept_tokens: KeptTokens = "pow2"
    """In training: how many tokens nested dropout keeps."""
    null_probability: float = 0.2
    """In training: the share of images whose tokens are hidden from the decoder."""
    times: Times = "mode"
    """In training: how times are drawn."""
    mode_scale: float = 0.25

    def __post_init__(self) -> None:
        for name in ("levels", "vae_block_out_channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for side in ("encoder_dim", "decoder_dim"):
            if getattr(self, side) % self.head_dim or getattr(self, side) % 4:
                raise ValueError(
                    f"{side} is {getattr(self, side)}; it must be a multiple of head_dim {self.head_dim} "
                    "and of 4"
                )
        if self.latent_size % self.patch_size:
            raise ValueError(
                f"latent_size {self.latent_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.num_tokens < 1 or self.max_timestep <= 0:
            raise ValueError(
                f"num_tokens {self.num_tokens} and max_timestep {self.max_timestep} must be positive"
            )
        for name, choices in (("kept_tokens", KeptTokens), ("times", Times)):
            if getattr(self, name) not in choices.__args__:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it is one of {', '.join(choices.__args__)}"
                )

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.latent_size * 2 ** (len(self.vae_block_out_channels) - 1)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "FlexTokConfig":
        """From field names, or from the original's graph of modules (`vae`, `encoder`, `decoder`, …).

        ValueError names every module, class or argument of a graph that is not the published model's.
        """
        values = values["config"] if isinstance(values.get("config"), Mapping) else values
        if isinstance(values.get("encoder"), Mapping):
            return cls(**_fields_of_graph(values))
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"FlexTok has no configuration field {', '.join(unknown)}; it has {', '.join(sorted(known))}"
            )
        return cls(**values)


# Layers -----------------------------------------------------------------------------------------------------


def sincos_table(dim: int, size: int) -> Tensor:
    """Positions of a square grid, [1, D, size, size]: sin and cos of the row, then of the column."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(size)[:, None] * frequencies  # [size, D/4]
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [size, D/2]
    rows = waves[:, None].expand(-1, size, -1)
    return torch.cat([rows, rows.transpose(0, 1)], 2).movedim(2, 0)[None].contiguous()


def timestep_features(times: Tensor, max_timestep: float, size: int = 256) -> Tensor:
    """Times [M] in [0, 1] → [M, size]: cosines, then sines, of t · 1000/max_timestep at falling
    frequencies."""
    half = size // 2
    # The period's base equals the number of features, 256, in every published model.
    frequencies = torch.exp(-math.log(256) * torch.arange(half, device=times.device) / half)
    angles = times.float()[:, None] * (frequencies * (1000 / max_timestep))
    return torch.cat([angles.cos(), angles.sin()], 1)


def patchify(x: Tensor, size: int) -> Tensor:
    """[B, C, H, W] → [B, H/size · W/size, size · size · C]: row, column, channel, the channel fastest."""
    if x.shape[2] % size or x.shape[3] % size:
        raise ValueError(f"latents of {x.shape[2]}×{x.shape[3]} do not divide into patches of {size}×{size}")
    x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, C, h, p, w, p]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(x: Tensor, size: int, height: int) -> Tensor:
    """The inverse of `patchify` for a grid of `height` rows: [B, P, size · size · C] → [B, C, H, W]."""
    x = x.unflatten(2, (size, size, -1)).unflatten(1, (height, -1))  # [B, h, w, p, p, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _normalise(x: Tensor) -> Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


def _in_place() -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


class Projection(nn.Module):
    """A linear layer under the key that its owner's class has in the checkpoint (`proj` or `patch_proj`)."""

    def __init__(self, dim_in: int, dim_out: int, key: str = "proj") -> None:
        super().__init__()
        self.key = key
        setattr(self, key, nn.Linear(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D']."""
        layer = getattr(self, self.key)
        return linear(x, layer.weight, layer.bias)


class GridPositions(nn.Module):
    """The sine table of a grid; stored in checkpoints (`posembs`) but never trained."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.register_buffer("posembs", sincos_table(dim, size))

    def forward(self, x: Tensor) -> Tensor:
        """Patches [B, P, D] of the whole grid, with positions added."""
        return x + self.posembs.flatten(2).transpose(1, 2)


class Vectors(nn.Module):
    """Learned vectors under one key of the checkpoint."""

    def __init__(self, key: str, *shape: int) -> None:
        super().__init__()
        self.key = key
        setattr(self, key, nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02)))

    @property
    def values(self) -> Tensor:
        """The vectors, in their stored shape."""
        return getattr(self, self.key)


class TimeEmbedding(nn.Module):
    """Times [M] → [M, D]."""

    def __init__(self, dim: int, frequencies: int, max_timestep: float) -> None:
        super().__init__()
        self.frequencies, self.max_timestep = frequencies, max_timestep
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, times: Tensor) -> Tensor:
        """[M] in [0, 1] → [M, D]."""
        features = timestep_features(times, self.max_timestep, self.frequencies)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    """Separate projections without bias; queries and keys are normalised a head."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        for name in ("wq", "wk", "wv", "proj"):
            setattr(self, name, nn.Linear(dim, dim, bias=False))

    def heads(self, x: Tensor, name: Literal["wq", "wk", "wv"]) -> Tensor:
        """[B, N, D] → queries, keys or values [B, N, h, d]."""
        x = linear(x, getattr(self, name).weight, None).unflatten(-1, (-1, self.head_dim))
        return x if name == "wv" else _normalise(x)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Heads [B, N, h, d] → [B, N, D], before the output projection."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        # 8/d, which is d^-0.5 only for heads of 64.
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=8 / self.head_dim)
        return out.transpose(1, 2).flatten(2)

    def project(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        return linear(x, self.proj.weight, None)


class GatedMLP(nn.Module):
    """fc2(SiLU(fc1 x) · fc3 x) without biases."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(2 * int(4 * dim) / 3)
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.fc3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        gate, hidden = linear(x, self.fc1.weight, None), linear(x, self.fc3.weight, None)
        hidden = hidden.mul_(F.silu(gate, inplace=True)) if _in_place() else hidden * F.silu(gate)
        return linear(hidden, self.fc2.weight, None)


# Encoder ----------------------------------------------------------------------------------------------------


class EncoderBlock(nn.Module):
    """Pre-norm block in which patches see patches, and a register sees patches and registers up to itself."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(dim, head_dim), GatedMLP(dim)

    def forward(self, x: Tensor, patches: int, mask: Tensor, registers_only: bool = False) -> Tensor:
        """x [B, P + n, D], mask bool [n, P + n] → the same shape, or [B, n, D] with `registers_only`."""
        normed = _normalise(x)
        key, value = self.attn.heads(normed, "wk"), self.attn.heads(normed, "wv")
        if registers_only:
            x = x[:, patches:]
            attended = self.attn.attend(self.attn.heads(normed[:, patches:], "wq"), key, value, mask)
        else:
            query = self.attn.heads(normed, "wq")
            of_patches = self.attn.attend(*(each[:, :patches] for each in (query, key, value)))
            attended = torch.cat([of_patches, self.attn.attend(query[:, patches:], key, value, mask)], 1)
        x = x + self.attn.project(attended)
        return x + self.mlp(_normalise(x))


class FlexTokEncoder(nn.Module):
    """VAE latents → ordered registers."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        self.patch_size, dim = config.patch_size, config.encoder_dim
        trunk = nn.Module()
        trunk.blocks = nn.ModuleList(EncoderBlock(dim, config.head_dim) for _ in range(config.encoder_depth))
        self.module_dict = nn.ModuleDict(
            {
                "enc_patch_emb": Projection(
                    config.latent_channels * self.patch_size**2, dim, key="patch_proj"
                ),
                "enc_posemb_module": GridPositions(dim, config.latent_size // self.patch_size),
                "enc_register_module": Vectors("registers", config.num_tokens, dim),
                "enc_transformer": trunk,
                "enc_to_latents": Projection(dim, len(config.levels)),
            }
        )

    def forward(self, latents: Tensor, num_tokens: int) -> Tensor:
        """VAE latents [B, C, h, w] → the first `num_tokens` registers [B, n, len(levels)], unbounded.

        No register sees a later one, so the first n are computed without the others.
        """
        parts = self.module_dict
        x = parts["enc_posemb_module"](parts["enc_patch_emb"](patchify(latents, self.patch_size)))
        patches = x.shape[1]
        registers = parts["enc_register_module"].values[:num_tokens].expand(len(x), -1, -1)
        x = torch.cat([x, registers], 1)
        mask = register_mask(patches, num_tokens, x.device)
        blocks = parts["enc_transformer"].blocks
        for depth, block in enumerate(blocks):
            x = block(x, patches, mask, registers_only=depth == len(blocks) - 1)
        return parts["enc_to_latents"](_normalise(x[:, -num_tokens:]))


def register_mask(patches: int, registers: int, device: torch.device | None = None) -> Tensor:
    """Which patches and registers each register attends to, bool [n, P + n]."""
    return torch.ones(registers, patches + registers, dtype=torch.bool, device=device).tril(patches)


# Decoder ----------------------------------------------------------------------------------------------------


class Conditions(NamedTuple):
    """What the decoder is told: register rows [B, W, D], and what is added to the logits of their keys [B,
    W].

    Equal rows are one row: attention over n equal keys is attention over one with ln(n) added to its logit. A
    row that is only padding has -inf.
    """

    registers: Tensor
    key_bias: Tensor | None


class Modulations(NamedTuple):
    """Shifts, scales (with 1 added) and gates of M times: of the blocks [M, 2, 6, D], of the head [M, 2,
    D]."""

    blocks: list[Tensor]
    head: Tensor

    def at(self, index: int) -> "Modulations":
        """Those of one time, shared by all images: M = 1."""
        rows = slice(index, index + 1)
        return Modulations([block[rows] for block in self.blocks], self.head[rows])


class Layout(NamedTuple):
    """Where sequences lie in flat rows [1, T, D]: for each number of registers, B images of patches and
    registers.

    Sequences of several lengths go through a layer as one matrix; only attention tells them apart.
    """

    batch: int
    patches: int
    registers: tuple[int, ...]

    def split(self, flat: Tensor) -> list[Tensor]:
        """[1, T, …] → for each number of registers W a view [B, P + W, …]."""
        sizes = [self.batch * (self.patches + width) for width in self.registers]
        return [part.unflatten(0, (self.batch, -1)) for part in flat[0].split(sizes)]

    @staticmethod
    def join(parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        flat = [part.flatten(0, 1) for part in parts]
        return (torch.cat(flat) if len(flat) > 1 else flat[0])[None]

    def only_patches(self, flat: Tensor) -> Tensor:
        """The patch rows, [1, T', …]."""
        return self.join([part[:, : self.patches] for part in self.split(flat)])

    def rows(self, modulation: Tensor) -> Tensor:
        """Modulation [M, 2, D] of patches and registers, M times or one → one row for each of T, [1, T,
        D]."""
        image = torch.arange(self.batch, device=modulation.device)[:, None] % len(modulation)
        kinds = [
            torch.arange(self.patches + width, device=image.device) >= self.patches
            for width in self.registers
        ]
        index = torch.cat([(2 * image + kind).flatten() for kind in kinds])
        return modulation.flatten(0, 1)[index][None]

    def scale(self, x: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
        """addend + factor · x, into x where autograd allows; x [1, T, D], factor [M, 2, D], addend either."""
        whole = addend.shape == x.shape and addend.shape[1] != 2
        if not _in_place():
            return torch.addcmul(addend if whole else self.rows(addend), x, self.rows(factor))
        addends = self.split(addend) if whole else [None] * len(self.registers)
        for part, added in zip(self.split(x), addends, strict=True):
            for kind, rows in enumerate((slice(self.patches), slice(self.patches, None))):
                piece = part[:, rows]
                term = added[:, rows] if whole else addend[:, kind, None]
                torch.addcmul(term, piece, factor[:, kind, None], out=piece)
        return x


class DecoderBlock(nn.Module):
    """Block modulated by the time (adaLN), differently for patches and for registers; all see all."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(dim, head_dim), GatedMLP(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 12 * dim))

    def modulation(self, time: Tensor) -> Tensor:
        """Time embeddings [M, D] → [M, 2, 6, D]: for patches, for registers; two gates, then shift and scale
        twice."""
        return _add_to_scales(self.adaLN_modulation(time).unflatten(1, (2, 6, -1)), (3, 5))

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        modulation: Tensor,
        masks: Sequence[Tensor | None],
        patches_only: bool = False,
    ) -> Tensor:
        """Flat rows [1, T, D] and [M, 2, 6, D] → [1, T, D], or with `patches_only` the patch rows."""
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = modulation.unbind(2)
        normed = layout.scale(_normalise(x), scale_attn, shift_attn)
        key, value = (layout.split(self.attn.heads(normed, name)) for name in ("wk", "wv"))
        if patches_only:
            x, normed = layout.only_patches(x), layout.only_patches(normed)
            layout = layout._replace(registers=(0,) * len(layout.registers))
        query = layout.split(self.attn.heads(normed, "wq"))
        attended = layout.join(
            [self.attn.attend(*heads, mask) for *heads, mask in zip(query, key, value, masks, strict=True)]
        )
        x = layout.scale(self.attn.project(attended), gate_attn, x)
        return layout.scale(self.mlp(layout.scale(_normalise(x), scale_mlp, shift_mlp)), gate_mlp, x)


class PatchHead(nn.Module):
    """Patch rows → velocity patches, modulated by the time."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim_out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def modulation(self, time: Tensor) -> Tensor:
        """Time embeddings [M, D] → shift and scale [M, 2, D]."""
        return _add_to_scales(self.adaLN_modulation(time).unflatten(1, (2, -1)), (1,))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Patch rows [G, B, P, D] and [M, 2, D] → [G · B, P, D']."""
        shift, scale = modulation[:, :1], modulation[:, 1:]
        x = torch.addcmul(shift, _normalise(x), scale).flatten(0, 1)
        return linear(x, self.proj.weight, self.proj.bias)


def _add_to_scales(modulation: Tensor, positions: Sequence[int]) -> Tensor:
    """1 added to the entries of the last axis but one that are scales."""
    one = torch.zeros(modulation.shape[-2], 1, device=modulation.device, dtype=modulation.dtype)
    one[list(positions)] = 1
    return modulation + one


class FlexTokDecoder(nn.Module):
    """Velocity of the flow over VAE latents, given ordered registers."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        self.patch_size, self.num_tokens, dim = config.patch_size, config.num_tokens, config.decoder_dim
        grid, patch = config.latent_size // self.patch_size, config.latent_channels * self.patch_size**2
        trunk = nn.Module()
        trunk.blocks = nn.ModuleList(DecoderBlock(dim, config.head_dim) for _ in range(config.decoder_depth))
        self.module_dict = nn.ModuleDict(
            {
                "dec_from_latents": Projection(len(config.levels), dim),
                "dec_registers_posemb_module": Vectors("posembs", 1, 1, dim, config.num_tokens),
                "dec_nested_dropout": Vectors("dropout_mask_token", dim),
                "dec_latent_dropout": Vectors("nullcond", dim),
                "dec_noise_patch_emb": Projection(patch, dim, key="patch_proj"),
                "dec_patches_posemb_module": GridPositions(dim, grid),
                "dec_time_embedder": TimeEmbedding(dim, config.frequency_embedding_size, config.max_timestep),
                "dec_transformer": trunk,
                "dec_to_patches": PatchHead(dim, patch),
            }
        )

    def conditions(
        self, latents: Tensor, lengths: Tensor | None = None, null: Tensor | None = None
    ) -> Conditions:
        """Quantized latents [B, K, len(levels)], of which each image has the first `lengths` [B] (all by
        default).

        The tokens an image lacks are one row that stands for all of them; an image flagged in `null` bool [B]
        has none. None of this depends on the time.
        """
        parts, total, count = self.module_dict, self.num_tokens, latents.shape[1]
        positions = parts["dec_registers_posemb_module"].values[0, 0].T
        x = parts["dec_from_latents"](latents) + positions[:count]
        if lengths is None and null is None and count == total:
            return Conditions(x, None)
        if lengths is None:
            lengths = torch.full((len(x),), count, device=x.device)
        width = min(count + 1, total)
        x = F.pad(x, (0, 0, 0, width - count))
        row, lengths = torch.arange(width, device=x.device), lengths[:, None]  # [W], [B, 1]
        x = torch.where((row < lengths)[..., None], x, parts["dec_nested_dropout"].values)
        absent = (total - lengths).to(x.dtype).log()  # of no absent token: -inf, and no such row
        bias = torch.where(row == lengths, absent, torch.where(row < lengths, 0.0, -torch.inf))
        if null is not None:
            x = torch.where(null[:, None, None], parts["dec_latent_dropout"].values, x)
            alone = torch.full_like(bias, -torch.inf)
            alone[:, 0] = math.log(total)
            bias = torch.where(null[:, None], alone, bias)
        return Conditions(x, bias)

    def unconditional(self, batch: int) -> Conditions:
        """Of images about which nothing is said: one row that stands for all registers."""
        null = self.module_dict["dec_latent_dropout"].values
        bias = torch.full((batch, 1), math.log(self.num_tokens), device=null.device, dtype=null.dtype)
        return Conditions(null.expand(batch, 1, -1), bias)

    def modulations(self, times: Tensor) -> Modulations:
        """Times [M] in [0, 1] → all that depends on the time alone."""
        embedded = self.module_dict["dec_time_embedder"](times)
        blocks = [block.modulation(embedded) for block in self.module_dict["dec_transformer"].blocks]
        return Modulations(blocks, self.module_dict["dec_to_patches"].modulation(embedded))

    def forward(
        self, noised: Tensor, modulations: Modulations, conditions: Sequence[Conditions]
    ) -> tuple[Tensor, ...]:
        """Noised latents [B, C, h, w] at M = 1 shared time or one each → a velocity [B, C, h, w] for each of
        the `conditions`.

        Conditional and unconditional velocities come from one pass, each at its own sequence length.
        """
        parts = self.module_dict
        embed = parts["dec_noise_patch_emb"]
        x = patchify(noised.to(embed.patch_proj.weight.dtype), self.patch_size)
        patches = parts["dec_patches_posemb_module"](embed(x))  # [B, P, D]
        layout = Layout(*patches.shape[:2], tuple(each.registers.shape[1] for each in conditions))
        x = layout.join([torch.cat([patches, each.registers], 1) for each in conditions])
        masks = [
            None
            if each.key_bias is None
            else F.pad(each.key_bias, (layout.patches, 0)).to(x.dtype)[:, None, None]
            for each in conditions
        ]
        blocks = parts["dec_transformer"].blocks
        for depth, block in enumerate(blocks):
            last = depth == len(blocks) - 1
            x = block(x, layout, modulations.blocks[depth], masks, patches_only=last)
        x = x.view(len(conditions), *patches.shape)
        x = parts["dec_to_patches"](x, modulations.head)
        return unpatchify(x, self.patch_size, noised.shape[2] // self.patch_size).chunk(len(conditions))


# VAE --------------------------------------------------------------------------------------------------------


def _autoencoder_class() -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError("FlexTok's VAE is diffusers' AutoencoderKL: pip install diffusers") from error
    return AutoencoderKL


class FoldedUpsample(nn.Module):
    """A VAE decoder's upsampling, with its convolution at the low resolution; key `conv`."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """[B, C, h, w] → [B, C, 2h, 2w]."""
        return upsample_conv(x, self.conv)


class FlexTokVAE(nn.Module):
    """diffusers' AutoencoderKL under the key `vae`, frozen; latents are times a scaling factor."""

    def __init__(
        self, autoencoder: nn.Module, scaling_factor: float | None, source: str | None = None
    ) -> None:
        super().__init__()
        self.vae, self._scaling_factor, self.source = autoencoder, scaling_factor, source
        for module in autoencoder.modules():
            if isinstance(module, nn.SiLU):
                module.inplace = True  # of normalised features, which nobody else holds
        for block in autoencoder.decoder.up_blocks:
            if block.upsamplers is not None:
                block.upsamplers[0] = FoldedUpsample(block.upsamplers[0].conv)

    @property
    def scaling_factor(self) -> float:
        """Factor on the latents; read from the VAE's repository where the checkpoint does not say it."""
        if self._scaling_factor is None:
            config = _hub_config(self.source) if self.source else {"scaling_factor": 1.0}  # fresh weights
            if not config.get("scaling_factor"):
                raise ValueError(
                    f"neither the tokenizer's configuration nor {self.source}'s has the VAE's "
                    "scaling_factor: give config={…, 'vae': {…, 'scaling_factor': …}}"
                )
            self._scaling_factor = float(config["scaling_factor"])
        return self._scaling_factor

    def posterior(self, images: Tensor) -> Any:
        """Images [B, 3, H, W] in [-1, 1] → the distribution of unscaled latents [B, C, h, w]."""
        moments = self._each(lambda x: self.vae.encode(x).latent_dist.parameters, images)
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        return DiagonalGaussianDistribution(moments)

    def encode(self, images: Tensor, sample: bool = False) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] → scaled latents [B, C, h, w]: the posterior's mean, or a sample."""
        posterior = self.posterior(images)
        return (posterior.sample() if sample else posterior.mode()) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] → images [B, 3, H, W] in about [-1, 1]."""
        return self._each(lambda x: self.vae.decode(x).sample, latents / self.scaling_factor)

    def _each(self, run: Any, x: Tensor) -> Tensor:
        """In the VAE's own precision also under autocast; on a CPU one image at a time, which fits its
        cache."""
        weight = self.vae.encoder.conv_in.weight
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(weight.dtype)
            if x.device.type != "cpu":
                return run(x)
            if not weight.is_contiguous(memory_format=torch.channels_last):
                self.vae.to(memory_format=torch.channels_last)
            x = x.contiguous(memory_format=torch.channels_last)
            return torch.cat([run(image) for image in x.split(1)]).contiguous() if len(x) > 1 else run(x)


def _hub_config(repo: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        return checkpoint.read_config(Path(hf_hub_download(repo, checkpoint.CONFIG_NAME)))
    except Exception as error:  # the client raises many kinds for "no network" and "no such repository"
        raise FileNotFoundError(
            f"the VAE's scaling_factor is in {checkpoint.CONFIG_NAME} of the hub repository {repo!r}, "
            f"which the hub did not give ({type(error).__name__}). Give it in the tokenizer's configuration"
        ) from error


def load_vae(source: str | Path) -> nn.Module:
    """An AutoencoderKL by short name (flextok-vae-c4, -c8, -c16), hub repository, folder or weights file.

    Raises FileNotFoundError, and ValueError for what is no AutoencoderKL.
    """
    from accelerate import init_empty_weights

    name = VAES.get(str(source), str(source))
    if Path(name).expanduser().exists() or isinstance(source, Path) or name.count("/") != 1:
        located = checkpoint.locate(name)
        beside = located.weights.parent / checkpoint.CONFIG_NAME
        config = located.config or (checkpoint.read_config(beside) if beside.is_file() else None)
    else:
        located = checkpoint.fetch(name, VAE_FILE)
        config = located.config
    state = {_current_name(key): value for key, value in checkpoint.read(located.weights).items()}
    kind = (config or {}).get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL" or "decoder.conv_in.weight" not in state:
        raise ValueError(
            f"{source} ({kind}, keys such as {next(iter(state), None)}) is no AutoencoderKL of diffusers, "
            f"which FlexTok takes: {', '.join(VAES)}"
        )
    if config is None:
        config = _vae_config(FlexTokConfig(latent_channels=state["decoder.conv_in.weight"].shape[1]))
    with init_empty_weights(include_buffers=False):
        model = _autoencoder_class().from_config(config)
    checkpoint.load_strictly(model, state, source=located.weights)
    return model


def _current_name(key: str) -> str:
    """The key of an attention layer in current diffusers; files from before 0.18 have other names."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        if ".attentions." in key:
            key = key.replace(f".{old}.", f".{new}.")
    return key


def _vae_config(config: FlexTokConfig) -> dict[str, Any]:
    """What AutoencoderKL is built with."""
    levels = len(config.vae_block_out_channels)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.vae_block_out_channels,
        "layers_per_block": config.vae_layers_per_block,
        "norm_num_groups": config.vae_norm_num_groups,
        "latent_channels": config.latent_channels,
        "sample_size": config.image_size,
        "scaling_factor": config.vae_scaling_factor or 1.0,
    }


# The tokenizer ----------------------------------------------------------------------------------------------


@register_family("flextok")
class FlexTok(Tokenizer):
    """FlexTok in its published sizes and any other; see the module.

    A state dict holds the VAE (`vae.vae.*`), encoder and decoder under the published keys. With
    `config.vae=False` there is no VAE in it: attach one with `attach_vae`.
    """

    config_class = FlexTokConfig
    ordered = True

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__(config)
        self.image_size, self.num_tokens = config.image_size, config.num_tokens
        self.quantizer = FiniteScalarQuantizer(config.levels)
        if config.vae:
            autoencoder = _autoencoder_class()(**_vae_config(config))
            self.vae = FlexTokVAE(autoencoder, config.vae_scaling_factor, config.vae_source)
        self.encoder, self.decoder = FlexTokEncoder(config), FlexTokDecoder(config)
        for side in (self.encoder, self.decoder):
            for name, module in side.named_modules():
                if isinstance(module, nn.Linear):
                    silent = "adaLN_modulation" in name or name.rsplit(".", 1)[0].endswith(
                        ("enc_to_latents", "dec_to_patches")
                    )
                    (nn.init.zeros_ if silent else nn.init.xavier_uniform_)(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    # Building and loading -----------------------------------------------------------------------------------

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of FlexTokConfig, or from the original's graph of
        modules."""
        return cls(FlexTokConfig.parse(config))

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """By its registers. Keys do not tell the time scale and the VAE's factor: ValueError without a
        config."""
        if "encoder.module_dict.enc_register_module.registers" not in shapes:
            return None
        if not config:
            raise ValueError(
                "these FlexTok weights come without the configuration that has max_timestep and the VAE's "
                "scaling factor: give config='path/to/config.json', or load them with "
                "FlexTok.from_pretrained, which reads it from the head of a .safetensors file"
            )
        parsed = FlexTokConfig.parse(config)
        has_vae = any(key.startswith("vae.") for key in shapes)
        return {field.name: getattr(parsed, field.name) for field in fields(parsed)} | {"vae": has_vae}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        weights: str | Path | None = None,
        config: Mapping[str, Any] | str | Path | None = None,
        **options: Any,
    ) -> Self:
        """As every tokenizer's; the configuration that travels with published weights wins over the
        registry's.

        It is config.json, or the head of the .safetensors file. A published name warns of its licence once.
        """
        entry = registry.entries().get(str(source))
        if entry is not None and entry.family == cls.family:
            warnings.warn(f"{entry.name}: {entry.license}", stacklevel=2)
            path, repo = weights, entry.repo
        else:
            path, repo = weights if weights is not None else source, str(source)
        if config is None:
            if path is not None and Path(path).expanduser().exists():
                located = checkpoint.locate(path)
                config = located.config or _header_config(located.weights)
            elif path is None or repo.count("/") == 1:
                hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
                located = checkpoint.fetch(repo, None if entry is None else entry.file, **hub)
                config = located.config or _header_config(located.weights)
        return super().from_pretrained(source, weights=weights, config=config, **options)

    def attach_vae(self, source: nn.Module | str | Path, scaling_factor: float | None = None) -> None:
        """Give weights without a VAE theirs: an AutoencoderKL, its name (flextok-vae-c16), repository or
        path.

        Its latents are multiplied by `scaling_factor`, else by the tokenizer's own configuration's, else by
        the VAE's. ValueError for another kind of model, and for latents of another shape than the
        tokenizer's.
        """
        if self.config.vae:
            raise ValueError(
                f"{self.label} has its VAE in its checkpoint; only weights without one take another"
            )
        autoencoder = copy.deepcopy(source) if isinstance(source, nn.Module) else load_vae(source)
        if not isinstance(autoencoder, _autoencoder_class()):
            raise ValueError(
                f"a {type(autoencoder).__name__} was given; FlexTok takes a diffusers AutoencoderKL"
            )
        found = autoencoder.config
        factor = 2 ** (len(found.block_out_channels) - 1)
        wanted = (self.config.latent_channels, self.image_size // self.config.latent_size)
        if (found.latent_channels, factor) != wanted:
            raise ValueError(
                f"this VAE has {found.latent_channels} latent channels at 1/{factor} of the image's side; "
                f"{self.label} takes {wanted[0]} channels at 1/{wanted[1]}, as flextok-vae-c{wanted[0]} has"
            )
        scale = scaling_factor or self.config.vae_scaling_factor or found.scaling_factor
        self.add_companion("vae", FlexTokVAE(autoencoder, scale))

    @property
    def autoencoder(self) -> FlexTokVAE:
        """The VAE, of the checkpoint or attached; ValueError if there is none."""
        found = self.vae if self.config.vae else self.companion("vae")
        if found is None:
            name = f"flextok-vae-c{self.config.latent_channels}"
            raise ValueError(
                f"these {self.label} weights hold no VAE; attach the one they were trained with: "
                f"tokenizer.attach_vae({name!r}), or give the path of its weights"
            )
        return found

    # Images → tokens ----------------------------------------------------------------------------------------

    def latents(self, images: Tensor, num_tokens: int | None = None) -> Tensor:
        """Images [B, 3, H, W] → the first `num_tokens` (default: all) unquantized latents [B, K, D]."""
        with torch.no_grad():
            encoded = self.autoencoder.encode(2 * images - 1).to(self.dtype)
        return self.encoder(encoded, num_tokens or self.num_tokens)

    @torch.no_grad()
    def encode(self, images: Tensor, num_tokens: int | None = None, **quality: Any) -> Any:
        """Images [B, 3, H, W] in [0, 1] → their first `num_tokens` tokens; fewer cost less.

        Any number gives a prefix of the full code. The VAE's posterior is taken at its mean. In bfloat16 some
        indices differ from float32's. `quality` are every ordered tokenizer's options (`target_psnr`).
        """
        if quality:
            return super().encode(images, num_tokens, **quality)
        count, images = self.check_num_tokens(num_tokens), self.check_images(images)
        if not len(images):
            return self.as_tokens(torch.zeros(0, count, dtype=torch.int64, device=self.device))
        return self.as_tokens(self.quantizer.encode(self.latents(images, count)))

    # Tokens → images ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens | Tensor,
        *,
        steps: int | None = None,
        guidance: flow.Guidance | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        normalized: bool = True,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Tokens (or bare codes [B, K]) of any length → images [B, 3, H, W] in [0, 1].

        The picture is drawn from noise in `steps` Euler steps (20). `guidance` (7.5) is a scale, 1 for none,
        or a function of the time in [0, 1]; `normalized` guidance is adaptive projected guidance (arXiv
        2410.02416), otherwise classifier-free guidance.

        One `generator` gives every image the noise it would have alone, so that neither neighbours nor the
        place in the batch matter and prefixes of one image share their noise; a list has one generator an
        image. None is seed 0: the same tokens give the same picture. `noise` [B, C, h, w] takes the
        generator's place. ValueError for lengths of 0 or beyond the maximum.
        """
        latents, lengths = self.dequantize(tokens)
        images = self.pixels(
            latents,
            lengths,
            steps=steps,
            guidance=guidance,
            generator=generator,
            normalized=normalized,
            noise=noise,
        )
        return images.clamp(0, 1)

    def pixels(self, latents: Tensor, lengths: Tensor | None = None, **options: Any) -> Tensor:
        """Quantized latents [B, K, D] → images [B, 3, H, W], not clamped; `options` are those of `decode`."""
        sampled = self.sample(latents, lengths, **options)
        if not len(sampled):
            return sampled.new_zeros(0, 3, self.image_size, self.image_size, dtype=self.dtype)
        return (self.autoencoder.decode(sampled).to(self.dtype) + 1) / 2

    def sample(
        self,
        latents: Tensor,
        lengths: Tensor | None = None,
        *,
        steps: int | None = None,
        guidance: flow.Guidance | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        normalized: bool = True,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Quantized latents [B, K, D] → VAE latents [B, C, h, w]; see `decode`."""
        steps = STEPS if steps is None else steps
        guidance = GUIDANCE if guidance is None else guidance
        if not (callable(guidance) or (isinstance(guidance, (int, float)) and math.isfinite(guidance))):
            raise ValueError(f"guidance is a finite number or a function of the time; got {guidance!r}")
        if lengths is not None and bool((lengths < 1).any()):
            raise ValueError(
                f"{self.label} decodes 1 to {self.num_tokens} tokens an image; an image here has none"
            )
        batch = len(latents)
        x = self._noise(batch, generator, noise)
        if not batch:
            return x
        conditional = self.decoder.conditions(latents.to(self.dtype), lengths)
        both = [conditional, self.decoder.unconditional(batch)]
        upcoming: Iterator[Modulations] = iter(())

        def velocity(step: int, x: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
            nonlocal upcoming
            modulations = next(upcoming, None)
            if modulations is None:  # some steps at once, so that each layer's weights are read once for all
                ahead = range(step, min(step + 32, steps))
                times = torch.tensor([(steps - each) / steps for each in ahead], device=x.device)
                computed = self.decoder.modulations(times)
                upcoming = (computed.at(index) for index in range(len(ahead)))
                modulations = next(upcoming)
            found = self.decoder(x, modulations, both if guided else both[:1])
            return found[0], found[1] if guided else None

        return flow.sample(velocity, x, steps, guidance, normalized=normalized)

    def _noise(
        self,
        batch: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        noise: Tensor | None,
    ) -> Tensor:
        """Initial noise [B, C, h, w] in at least float32."""
        shape = (self.config.latent_channels, self.config.latent_size, self.config.latent_size)
        dtype = torch.promote_types(self.dtype, torch.float32)
        if noise is not None:
            if generator is not None or noise.shape != (batch, *shape):
                raise ValueError(
                    f"noise of shape {list(noise.shape)} was given; {list((batch, *shape))} is "
                    "needed, without a generator beside it"
                )
            return noise.to(self.device, dtype)
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        shared = isinstance(generator, torch.Generator)
        generators = [generator] if shared else list(generator)
        if not shared and len(generators) != batch:
            raise ValueError(
                f"{len(generators)} generators were given for {batch} images; give one, or one each"
            )
        drawn = torch.empty(batch, *shape, device=self.device, dtype=dtype)
        for image, each in enumerate(generators):
            rows = slice(None) if shared else image
            drawn[rows] = torch.randn(shape, generator=each, device=each.device).to(drawn)
        return drawn

    # Training -----------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> TrainingOutput:
        """One step of flow matching with nested dropout; `lengths` [B] fixes how many tokens each image
        keeps.

        Times, noise, lengths and hidden conditions are drawn as the configuration says. `losses["flow"]` is
        the mean squared error of the velocity; `images` of the result are the VAE latents [B, C, h, w] it
        points to.
        """
        config, batch, device = self.config, len(images), images.device
        with torch.no_grad():
            clean = self.autoencoder.encode(2 * images - 1, sample=config.sample_posterior).to(self.dtype)
        quantized = self.quantizer(self.encoder(clean, self.num_tokens))
        if lengths is None:
            lengths = draw_lengths(batch, self.num_tokens, config.kept_tokens).to(device)
        if config.times == "mode":
            times = flow.mode_times(torch.rand(batch, device=device), config.mode_scale)
        elif config.times == "stratified":
            times = flow.stratified_times(torch.rand(batch, device=device))
        else:
            times = flow.logit_normal_times(torch.randn(batch, device=device))
        noise = torch.randn_like(clean)
        null = torch.rand(batch, device=device) < config.null_probability
        conditions = self.decoder.conditions(quantized.latents, lengths, null)
        noised = flow.noised(clean, noise, times.to(clean.dtype))
        (velocity,) = self.decoder(noised, self.decoder.modulations(times), [conditions])
        drawn = noised - times.to(clean.dtype).view(-1, 1, 1, 1) * velocity
        loss = F.mse_loss(velocity.float(), (noise - clean).float())
        return TrainingOutput(drawn, quantized.codes, quantized.losses | {"flow": loss})


_HUB_OPTIONS = ("revision", "cache_dir", "local_files_only")


# Nested dropout ---------------------------------------------------------------------------------------------


def powers_of_two(maximum: int) -> Tensor:
    """1, 2, 4, … up to `maximum`, int64."""
    return 2 ** torch.arange(maximum.bit_length())


def round_up_to_power(counts: Tensor, maximum: int) -> Tensor:
    """Numbers of tokens in 1 … maximum → the next power of two, at most `maximum`."""
    powers = powers_of_two(maximum).to(counts.device)
    return powers[torch.searchsorted(powers, counts).clamp(max=len(powers) - 1)].maximum(counts)


def draw_lengths(batch: int, maximum: int, mode: KeptTokens) -> Tensor:
    """How many tokens each image keeps in a training step, int64 [B]."""
    if mode == "pow2":
        powers = powers_of_two(maximum)
        return powers[torch.randint(len(powers), (batch,))]
    counts = torch.randint(1, maximum + 1, (batch,))
    return counts if mode == "uniform" else round_up_to_power(counts, maximum)


# The original's configuration -------------------------------------------------------------------------------

# Section or module, its class, and its arguments: @field fills a field of FlexTokConfig (? may be absent), *
# says that nothing here depends on it, anything else is the only value that is known.
_GRAPH = """
vae StableDiffusionVAE latent_channels=@latent_channels scaling_factor=@vae_scaling_factor?
    sample_posterior=@sample_posterior? hf_hub_path=@vae_source? dtype_override=* force_vae_encode=*
encoder.enc_patch_emb PatchEmbedder channels_in=@latent_channels patch_sizes=@patch_size dim=@encoder_dim
    flatten_patches=False
encoder.enc_posemb_module PositionalEmbeddingAdder dim=@encoder_dim max_sizes=@grid posemb_type=sincos
    posemb_scaling=absolute
encoder.enc_register_module Registers1D dim=@encoder_dim n_min=@num_tokens n_max=@num_tokens
    ordering_mode=nested size_sampling_mode=*
encoder.enc_seq_packer BlockWiseSequencePacker mask_mode=causal_last pad_to_multiple=*
encoder.enc_transformer FlexTransformer dim=@encoder_dim depth=@encoder_depth
encoder.enc_to_latents LinearHead dim=@encoder_dim dim_out=@code_dim use_mup_readout=False dtype_override=*
decoder.dec_from_latents LinearLayer dim_in=@code_dim dim=@decoder_dim
decoder.dec_registers_posemb_module PositionalEmbeddingAdder dim=@decoder_dim max_sizes=@num_tokens
    posemb_type=learnable_sum posemb_scaling=absolute
decoder.dec_nested_dropout MaskedNestedDropout dim=@decoder_dim size_sampling_mode=@kept_tokens?
decoder.dec_latent_dropout LearnedNullCond dim=@decoder_dim dropout_prob=@null_probability?
decoder.dec_noise_patch_emb PatchEmbedder channels_in=@latent_channels patch_sizes=@patch_size
    dim=@decoder_dim flatten_patches=False
decoder.dec_patches_posemb_module PositionalEmbeddingAdder dim=@decoder_dim max_sizes=@grid
    posemb_type=sincos posemb_scaling=absolute
decoder.dec_seq_packer BlockWiseSequencePacker mask_mode=full per_subseq_embs=True pad_to_multiple=*
decoder.dec_time_embedder TimestepEmbedder dim=@decoder_dim max_timestep=@max_timestep
    frequency_embedding_size=@frequency_embedding_size?
decoder.dec_transformer FlexTransformer dim=@decoder_dim depth=@decoder_depth adaLN_expansion=2
    intermediate_layers=*
decoder.dec_to_patches ToPatchesLinearHead dim=@decoder_dim channels_out=@latent_channels
    patch_sizes=@patch_size use_mup_readout=False dtype_override=*
regularizer FSQ levels=@levels packed_call=*
flow_matching_noise_module MinRFNoiseModule ln=@ln? stratisfied=@stratisfied? mode_scale=@mode_scale?
pipeline MinRFPipeline out_channels=@latent_channels
"""
_TRAINING_ONLY = (
    *("drop", "drop_path_rate", "drop_quant_p", "dropout_prob", "corrupt_*", "frozen", "ln", "stratisfied"),
    *("mode_scale", "use_act_checkpoint", "compile_*", "weight_init_style", "zero_init_*", "*_init*"),
)
_WIRING = ("_target_", "_partial_", "*_key", "*_keys")


def _known_modules() -> dict[str, tuple[str, dict[str, str]]]:
    """The table above: where → class and arguments."""
    table = {}
    for line in _GRAPH.replace("\n    ", " ").strip().splitlines():
        where, kind, *arguments = line.split()
        table[where] = (kind, dict(argument.split("=") for argument in arguments))
    return table


def _fields_of_graph(graph: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of FlexTokConfig from the original's nested configuration; anything else in it is an error."""
    known, found = _known_modules(), {}
    sections = [name for name in graph if name in {where.partition(".")[0] for where in known}]
    nodes = {name: graph[name] for name in sections if name not in ("encoder", "decoder")}
    for side in ("encoder", "decoder"):
        modules = (graph.get(side) or {}).get("module_dict")
        if not isinstance(modules, Mapping):
            raise ValueError(f"the configuration's {side} has no module_dict; a published one has")
        nodes |= {f"{side}.{name}": node for name, node in modules.items()}
    missing = [where for where in known if where not in nodes and where != "flow_matching_noise_module"]
    if missing:
        raise ValueError(f"the configuration lacks {', '.join(missing)}")
    for where, node in nodes.items():
        if where in known:
            _read(where, node, *known[where], found)
        else:
            _check_moves(where, node)
    if found.pop("code_dim") != len(found["levels"]):
        raise ValueError(f"encoder and decoder do not have one channel for each of levels={found['levels']}")
    if found.get("vae_scaling_factor") is None and not found.get("vae_source"):
        raise ValueError("the configuration's vae has neither scaling_factor nor hf_hub_path to take it from")
    found["latent_size"] = found.pop("grid") * found["patch_size"]
    logit_normal, stratified = found.pop("ln", False), found.pop("stratisfied", False)
    found["times"] = ("stratified" if stratified else "logit_normal") if logit_normal else "mode"
    return {name: value for name, value in found.items() if value is not None}


def _class_of(where: str, node: Any) -> str:
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise ValueError(f"the configuration's {where} names no class (_target_)")
    return node["_target_"].rsplit(".", 1)[-1]


def _check_moves(where: str, node: Any) -> None:
    """ValueError unless a module only moves axes or cuts sequences, as the published graph's do."""
    kind = _class_of(where, node)
    if kind == "PerSampleOp":
        kind = _class_of(f"{where}.per_sample_op", node.get("per_sample_op"))
    if kind not in ("SequenceUnpacker", "channels_first_to_last", "channels_last_to_first"):
        raise ValueError(
            f"the configuration has a module {where} ({node['_target_']}, {kind}) that this version does not "
            "know; it builds the published 1D tokenizers"
        )


def _read(where: str, node: Any, kind: str, arguments: Mapping[str, str], found: dict[str, Any]) -> None:
    """Check one module's class and arguments, and put its fields into `found`."""
    if _class_of(where, node) != kind:
        raise ValueError(
            f"the configuration's {where} is {node['_target_']}; this version knows {kind} there"
        )
    for name, value in node.items():
        if name not in arguments:
            if not any(fnmatch(name, pattern) for pattern in (*_WIRING, *_TRAINING_ONLY)):
                raise ValueError(
                    f"the configuration's {where} has an argument {name}, unknown to this version"
                )
            continue
        rule = arguments[name]
        if rule.startswith("@"):
            target = rule.strip("@?")
            if target == "levels":
                value = tuple(value)
            elif isinstance(value, list) and value and all(each == value[0] for each in value):
                value = value[0]  # squares
            if found.setdefault(target, value) != value or isinstance(value, list):
                raise ValueError(
                    f"the configuration's {where} has {name}={value}; elsewhere it is {found[target]}, and "
                    "grids are square"
                )
        elif rule not in ("*", str(value)):
            raise ValueError(f"the configuration's {where} has {name}={value!r}; this version knows {rule}")
    missing = [n for n, rule in arguments.items() if rule[0] == "@" and rule[-1] != "?" and n not in node]
    if missing:
        raise ValueError(f"the configuration's {where} lacks {', '.join(missing)}")


def _header_config(path: Path) -> dict[str, Any] | None:
    """The configuration in the head of a .safetensors file, whose sections are Python literals."""
    import ast

    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    config: dict[str, Any] = {}
    for name, text in header.items():
        try:
            config[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            config[name] = text
    return config if isinstance(config.get("encoder"), Mapping) else None


def _rows() -> list[Entry]:
    table = [  # name, data, depths of encoder and decoder, M parameters, rFID as the paper is quoted
        ("d12-d12-in1k", "ImageNet-1k", 12, 12, 341.7, 4.20),
        ("d18-d18-in1k", "ImageNet-1k", 18, 18, 949.7, 1.61),
        ("d18-d28-in1k", "ImageNet-1k", 18, 28, 2540.9, 1.45),
        ("d18-d28-dfn", "DFN", 18, 28, 2540.9, None),
    ]
    return [
        Entry(
            name=f"flextok-{name}",
            family="flextok",
            config={
                "encoder_dim": 64 * encoder,
                "encoder_depth": encoder,
                "decoder_dim": 64 * decoder,
                "decoder_depth": decoder,
            },
            repo=f"EPFL-VILAB/flextok_{name.replace('-', '_')}",
            license=LICENSE,
            paper="FlexTok (arXiv 2502.13967)",
            parameters=parameters,
            figures={} if rfid is None else {"rFID": rfid},
            notes=f"any prefix of 256 tokens, stochastic decoder, trained on {data}",
        )
        for name, data, encoder, decoder, parameters, rfid in table
    ]


register(*_rows())
