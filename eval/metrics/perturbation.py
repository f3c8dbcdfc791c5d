"""The perturbation of pFID: tokens replaced by codes near them, as the errors of a generator would.

"Robust Latent Matters: Boosting Image Generation with Sampling Error Synthesis" (2025, arXiv 2503.08354): a
token becomes, with probability alpha, one of its delta nearest codes (the first of which is its own). Nearest
is measured from the code that the token has, so that tokens alone are enough: Euclidean between codebook rows
or between the decoded points of a level grid, Hamming between bits. Every codebook of a token is perturbed on
its own.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from itertools import chain, combinations, islice
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.karl.quantizer import PlacedQuantizer
from ...quantizers import (
    BinaryQuantizer,
    FiniteScalarQuantizer,
    GaussianQuantizer,
    LookupFreeQuantizer,
    MultiScaleBinaryQuantizer,
    MultiScaleVectorQuantizer,
    Quantizer,
    SharedResidualQuantizer,
    VectorQuantizer,
)
from ...quantizers.composite import CompositeQuantizer
from ...tokens import Tokens
from .metric import Metric

ALPHAS = (0.9, 0.8, 0.7, 0.6, 0.5)
DELTAS = (200, 280, 360)
LARGEST_TABLE = 2**20  # codes of a level grid whose neighbours are cached


@dataclass(frozen=True)
class Cell:
    """One setting of the grid, and its number, which seeds its draws."""

    index: int
    alpha: float
    delta: int


def grid(alphas: Sequence[float] = ALPHAS, deltas: Sequence[int] = DELTAS) -> list[Cell]:
    """All pairs of a probability (0 to 1) and a neighbourhood size (1 and up); ValueError for others."""
    for name, values in (("alpha", alphas), ("delta", deltas)):
        if not values:
            raise ValueError(f"the grid of pFID has no {name}: give at least one")
    if wrong := [alpha for alpha in alphas if not 0 <= alpha <= 1]:
        raise ValueError(f"pFID alpha {wrong[0]} is not a probability; give numbers from 0 to 1")
    if wrong := [delta for delta in deltas if delta < 1]:
        raise ValueError(f"pFID delta {wrong[0]} is not a number of codes; give 1 (the code itself) or more")
    pairs = [(float(alpha), int(delta)) for alpha in alphas for delta in deltas]
    return [Cell(index, alpha, delta) for index, (alpha, delta) in enumerate(pairs)]


@dataclass(frozen=True)
class Perturbed:
    """Tokens after the perturbation, the number of changed codes, and the number of codes."""

    tokens: Tokens
    changed: int
    total: int


class Perturbation:
    """Perturbs the tokens of one quantizer, whose neighbours are computed once, at construction.

    Raises ValueError for continuous codes and for neighbourhoods larger than a codebook.
    """

    def __init__(self, quantizer: Quantizer, cells: Sequence[Cell], seed: int = 0) -> None:
        self.kind, self.seed = quantizer.kind, seed
        self.neighbours = neighbours(quantizer, max(cell.delta for cell in cells))

    def __call__(self, tokens: Tokens, cell: Cell, images: Sequence[int]) -> Perturbed:
        """Perturb the tokens of B images, which have these numbers in their data set.

        Draws depend on the seed, the cell and the image's number, not on the batch or process it is in.
        """
        codes = getattr(tokens, self.kind)  # [B, K], [B, K, Q], or bits [B, K, D]
        table = codes.unsqueeze(-1) if codes.ndim == 2 else codes
        shape = (table.shape[1], self.neighbours.columns)
        offsets = np.zeros((len(images), *shape), np.int64)
        for row, image in enumerate(images):
            offsets[row] = ranks(self.seed, cell, int(image), shape)
        picked = self.neighbours.pick(table, torch.from_numpy(offsets).to(codes.device))
        present = torch.ones(table.shape[:2], dtype=torch.bool, device=codes.device)
        if tokens.lengths is not None:
            present = torch.arange(table.shape[1], device=codes.device) < tokens.lengths[:, None]
        differs = picked != table
        if self.kind == "bits":  # a token's bits are one code
            differs = differs.any(-1, keepdim=True)
        return Perturbed(
            dataclasses.replace(tokens, **{self.kind: picked.view_as(codes)}),
            changed=int((differs & present[..., None]).sum()),
            total=int(present.sum()) * self.neighbours.columns,
        )


class ChangedCodes:
    """Counts over cells: how many codes changed, and how many there were."""

    def __init__(self, cells: int) -> None:
        self.counts = torch.zeros(cells, 2, dtype=torch.int64)

    def update(self, cell: Cell, perturbed: Perturbed) -> None:
        """Add a batch."""
        self.counts[cell.index] += torch.tensor([perturbed.changed, perturbed.total])

    def share(self, cell: Cell) -> float:
        """Share of codes that changed, about alpha · (1 - 1 / delta)."""
        changed, total = self.counts[cell.index].tolist()
        return changed / max(total, 1)

    def state_dict(self) -> dict[str, Tensor]:
        """The counts."""
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state returned by `state_dict`."""
        self.counts.copy_(state["counts"])

    def merge(self, other: "ChangedCodes") -> None:
        """Add the codes of other images."""
        self.counts += other.counts


def ranks(seed: int, cell: Cell, image: int, shape: tuple[int, ...]) -> np.ndarray:
    """Which neighbour each code of one image takes: int64 of `shape`, 0 (its own) to delta - 1.

    A cell has one stream of random numbers, in which every image has its place.
    """
    stream = np.random.Philox(np.random.SeedSequence((seed, cell.index)))
    stream.advance(image << 32)  # steps of four numbers each
    uniform, place = np.random.Generator(stream).random((2, *shape))
    # 1 - uniform is never 0: alpha 0 changes nothing, and alpha 1 leaves nothing out.
    return np.where(1 - uniform > cell.alpha, 0, (place * cell.delta).astype(np.int64))


# Neighbours -------------------------------------------------------------------------------------------------


class Neighbours(Protocol):
    """The nearest codes of every code; `columns` is how many codes of a token are perturbed."""

    columns: int

    def pick(self, codes: Tensor, ranks: Tensor) -> Tensor:
        """Codes [B, K, Q] (or bits [B, K, D]) and ranks int64 [B, K, columns] → codes of the same shape."""


@singledispatch
def neighbours(quantizer: Quantizer, count: int) -> Neighbours:
    """The `count` nearest codes of every code of a quantizer, itself first.

    Raises ValueError for continuous codes, quantizers that are not this library's, and counts larger than
    a codebook.
    """
    if quantizer.kind == "latents":
        raise ValueError("pFID replaces codes by codes near them; this tokenizer's latents are continuous")
    raise ValueError(f"pFID has no distance between the codes of a {type(quantizer).__name__}")


@neighbours.register
def _(quantizer: VectorQuantizer, count: int) -> Neighbours:
    _check(count, quantizer.codebook_sizes[0])
    rows = quantizer.decode(
        torch.arange(quantizer.codebook_sizes[0], device=quantizer.embedding.weight.device)
    )
    return _Listed(nearest_rows(rows.detach(), count).to(rows.device))


@neighbours.register
def _(quantizer: FiniteScalarQuantizer, count: int) -> Neighbours:
    _check(count, quantizer.codebook_sizes[0])
    return _OnGrid(quantizer._levels, count)


@neighbours.register
def _(quantizer: LookupFreeQuantizer, count: int) -> Neighbours:
    flips = nearest_flips(quantizer.num_bits, count)
    return _Flipped((flips.long() << torch.arange(quantizer.num_bits)).sum(-1, keepdim=True))


@neighbours.register
def _(quantizer: BinaryQuantizer, count: int) -> Neighbours:
    return _Flipped(nearest_flips(len(quantizer.rows), count))


@neighbours.register
def _(quantizer: MultiScaleVectorQuantizer, count: int) -> Neighbours:
    # Every scale is perturbed by itself, by the rows as codes are compared.
    _check(count, quantizer.codebook_sizes[0])
    rows = quantizer.embedding.weight.detach()
    rows = F.normalize(rows, dim=-1) if quantizer.l2_norm else rows
    return _Listed(nearest_rows(rows, count).to(rows.device))


@neighbours.register
def _(quantizer: MultiScaleBinaryQuantizer, count: int) -> Neighbours:
    flips = nearest_flips(quantizer.dim, count)
    return _Flipped((flips.long() << torch.arange(quantizer.dim)).sum(-1, keepdim=True))


@neighbours.register
def _(quantizer: SharedResidualQuantizer, count: int) -> Neighbours:
    # Every depth is perturbed by itself, among the rows of the one codebook.
    _check(count, quantizer.codebook_sizes[0])
    rows = quantizer.rows.detach()
    return _Listed(nearest_rows(rows, count).to(rows.device), columns=len(quantizer.codebook_sizes))


@neighbours.register
def _(quantizer: CompositeQuantizer, count: int) -> Neighbours:
    return _SideBySide([neighbours(part, count) for part in quantizer.parts])


@neighbours.register
def _(quantizer: PlacedQuantizer, count: int) -> Neighbours:
    return _SideBySide([neighbours(quantizer.inner or GaussianQuantizer(quantizer.dim), count)])


@dataclass
class _Listed:
    """A table [V, count] of neighbours."""

    table: Tensor
    columns: int = 1

    def pick(self, codes: Tensor, ranks: Tensor) -> Tensor:
        return self.table[codes, ranks]


class _OnGrid:
    """Neighbours in a level grid, found when a code first occurs; `levels` [D], or [K, D] by token."""

    columns = 1

    def __init__(self, levels: Tensor, count: int) -> None:
        self.levels, self.count = levels, count
        self.tables: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def pick(self, codes: Tensor, ranks: Tensor) -> Tensor:
        picked = torch.empty_like(codes)
        rows = self.levels if self.levels.ndim == 2 else self.levels.expand(codes.shape[1], -1)
        kinds, kind_of = rows[: codes.shape[1]].to(codes.device).unique(dim=0, return_inverse=True)
        for kind, levels in enumerate(kinds.tolist()):
            tokens = kind_of == kind
            picked[:, tokens] = self._among(codes[:, tokens], ranks[:, tokens], tuple(levels))
        return picked

    def _among(self, codes: Tensor, ranks: Tensor, levels: tuple[int, ...]) -> Tensor:
        size = math.prod(levels)
        if size > LARGEST_TABLE:
            unique, codes = codes.unique(return_inverse=True)
            return nearest_levels(unique, levels, self.count)[codes, ranks]
        if levels not in self.tables:
            self.tables[levels] = (
                torch.empty(size, self.count, dtype=torch.int32, device=codes.device),
                torch.zeros(size, dtype=torch.bool, device=codes.device),
            )
        table, known = self.tables[levels]
        new = codes[~known[codes]].unique()
        if len(new):
            table[new] = nearest_levels(new, levels, self.count).int()
            known[new] = True
        return table[codes, ranks].long()


@dataclass
class _Flipped:
    """Bits, as booleans or as the binary number they make; neighbours differ by `flips` [count, D or 1]."""

    flips: Tensor
    columns: int = 1

    def pick(self, codes: Tensor, ranks: Tensor) -> Tensor:
        return codes ^ self.flips.to(codes.device)[ranks[..., 0]]


@dataclass
class _SideBySide:
    """The first codebooks of a token, each with its own neighbours; codebooks beyond them stay."""

    parts: list[Neighbours]

    @property
    def columns(self) -> int:
        return sum(part.columns for part in self.parts)

    def pick(self, codes: Tensor, ranks: Tensor) -> Tensor:
        widths = [part.columns for part in self.parts]
        rest = codes[..., self.columns :]
        columns = zip(
            self.parts, codes[..., : self.columns].split(widths, -1), ranks.split(widths, -1), strict=True
        )
        return torch.cat([*(part.pick(code, rank) for part, code, rank in columns), rest], -1)


# The searches -----------------------------------------------------------------------------------------------


def nearest_rows(rows: Tensor, count: int, chunk: int = 1024) -> Tensor:
    """Codebook rows [V, D] → int64 [V, count], the nearest rows of each: itself, then by Euclidean distance.

    Computed in float64, `chunk` rows at a time; equally near rows come in their order.
    """
    rows = (rows.cpu() if rows.device.type == "mps" else rows).double()  # MPS has no float64
    norms = rows.square().sum(-1)
    neighbours = []
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        distances = torch.addmm(
            norms, part, rows.T, alpha=-2.0
        )  # without the part's own norm, which does not affect the ranking
        own = torch.arange(start, start + len(part), device=rows.device)
        distances.scatter_(1, own[:, None], -math.inf)
        neighbours.append(distances.sort(stable=True).indices[:, :count])
    return torch.cat(neighbours)


def nearest_levels(codes: Tensor, levels: Sequence[int], count: int, chunk: int = 256) -> Tensor:
    """Codes int64 [N] of a level grid → int64 [N, count], their nearest codes, themselves first.

    Distance is Euclidean between decoded points, whose channels have steps of 1 / (levels // 2); it is
    computed in integers, and equally near codes come in the order of their numbers. Channel by channel only
    the best `count` beginnings are kept, so that large codebooks can be searched as well.
    """
    half = [max(level // 2, 1) for level in levels]
    steps = [math.lcm(*half) // width for width in half]
    furthest = sum(((level - 1) * step) ** 2 for level, step in zip(levels, steps, strict=True))
    if (furthest + 1) * math.prod(levels) >= 2**63:
        raise ValueError(
            f"pFID cannot rank the neighbours in a grid of levels {tuple(levels)}: too many codes"
        )
    return torch.cat([_nearest_levels(part, levels, steps, count) for part in codes.split(chunk)])


def _nearest_levels(codes: Tensor, levels: Sequence[int], steps: Sequence[int], count: int) -> Tensor:
    radix = 1
    distance = torch.zeros(len(codes), 1, dtype=torch.int64, device=codes.device)
    candidates = torch.zeros_like(distance)
    for level, step in zip(levels, steps, strict=True):
        digits = torch.arange(level, device=codes.device)
        own = codes // radix % level
        away = ((digits - own[:, None]) * step).square()  # [N, level]
        distance = (distance[:, :, None] + away[:, None]).flatten(1)
        candidates = (candidates[:, :, None] + digits * radix).flatten(1)
        radix *= level
        # One number per candidate, no two equal: the order does not depend on how ties are broken.
        keys, order = (distance * radix + candidates).topk(min(count, candidates.shape[1]), largest=False)
        distance, candidates = keys // radix, candidates.gather(1, order)
    return candidates


def nearest_flips(num_bits: int, count: int) -> Tensor:
    """Bool [count, num_bits]: which bits to flip for the Hamming-nearest codes, none first, then one, two, …

    Among patterns with the same number of flips, those of the first bits come first.
    """
    _check(count, 2**num_bits)
    patterns = chain.from_iterable(combinations(range(num_bits), flips) for flips in range(num_bits + 1))
    table = torch.zeros(count, num_bits, dtype=torch.bool)
    for row, pattern in enumerate(islice(patterns, count)):
        table[row, list(pattern)] = True
    return table


def _check(count: int, size: int) -> None:
    if count > size:
        raise ValueError(
            f"pFID delta {count} is more than the {size} codes of the tokenizer; give {size} or less"
        )


METRICS = (
    Metric(
        "pfid",
        "pFID",
        style=".3f",
        better="lower",
        needs="torch-fidelity's InceptionV3, discrete codes",
        option="--pfid",
        card=True,
        rank=12,
    ),
)
