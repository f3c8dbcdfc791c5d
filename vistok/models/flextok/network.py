"""FlexTok's two transformers: VAE latents → ordered registers, and registers → the velocity of a flow over
latents."""

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.cpu.linear import linear
from .config import FlexTokConfig

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

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Add to patches [B, height · width, D] the positions of the table's first rows and columns.

        ValueError for a grid larger than the table.
        """
        rows, columns = self.posembs.shape[2:]
        if height > rows or width > columns:
            raise ValueError(
                f"a grid of {height}×{width} patches was given; the position table has {rows}×{columns}: "
                "give smaller images"
            )
        return x + self.posembs[:, :, :height, :width].flatten(2).transpose(1, 2)


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
    """Separate projections without bias; queries and keys are normalised per head."""

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
    """Pre-norm block: patches attend to patches, a register to patches and to registers up to itself."""

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

        No register attends to a later one, so the first n are computed without the others.
        """
        parts = self.module_dict
        grid = (side // self.patch_size for side in latents.shape[2:])
        x = parts["enc_patch_emb"](patchify(latents, self.patch_size))
        x = parts["enc_posemb_module"](x, *grid)
        patches = x.shape[1]
        registers = parts["enc_register_module"].values[:num_tokens].expand(len(x), -1, -1)
        x = torch.cat([x, registers], 1)
        mask = register_mask(patches, num_tokens, x.device)
        blocks = parts["enc_transformer"].blocks
        for depth, block in enumerate(blocks):
            x = block(x, patches, mask, registers_only=depth == len(blocks) - 1)
        return parts["enc_to_latents"](_normalise(x[:, -num_tokens:]))


def register_mask(patches: int, registers: int, device: torch.device | None = None) -> Tensor:
    """Mask of the patches and registers that each register attends to, bool [n, P + n]."""
    return torch.ones(registers, patches + registers, dtype=torch.bool, device=device).tril(patches)


# Decoder ----------------------------------------------------------------------------------------------------


class Conditions(NamedTuple):
    """Conditions of the decoder: register rows [B, W, D], and what is added to the logits of their keys [B,
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
        """The modulations of one time, shared by all images: M = 1."""
        rows = slice(index, index + 1)
        return Modulations([block[rows] for block in self.blocks], self.head[rows])


class Layout(NamedTuple):
    """Places of sequences in flat rows [1, T, D]: for each number of registers, B images of patches and
    registers.

    Sequences of several lengths go through a layer as one matrix; only attention separates them.
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
    """Block modulated by the time (adaLN), separately for patches and registers; full attention."""

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
        """Conditions of images without tokens: one row that stands for all registers."""
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
        """Noised latents [B, C, h, w] at M = 1 shared time or one each → a velocity [b, C, h, w] for each of
        the `conditions`.

        Each is of b images: all of them, or at a shared time the next b, after the last from the first again.
        All velocities come from one pass, each at its own sequence length.
        """
        parts = self.module_dict
        embed = parts["dec_noise_patch_emb"]
        x = patchify(noised.to(embed.patch_proj.weight.dtype), self.patch_size)
        height, width = (side // self.patch_size for side in noised.shape[2:])
        patches = parts["dec_patches_posemb_module"](embed(x), height, width)  # [B, P, D]
        batch = len(conditions[0].registers)
        layout = Layout(batch, patches.shape[1], tuple(each.registers.shape[1] for each in conditions))
        groups = zip(cycle(patches.split(batch)), conditions, strict=False)
        x = layout.join([torch.cat([group, each.registers], 1) for group, each in groups])
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
        x = x.view(len(conditions), batch, *patches.shape[1:])
        x = parts["dec_to_patches"](x, modulations.head)
        return unpatchify(x, self.patch_size, height).chunk(len(conditions))
