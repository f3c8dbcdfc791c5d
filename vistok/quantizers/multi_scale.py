"""Multi-scale residual quantization: a square grid of latents as grids of codes, from 1×1 up to its own."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantized, Quantizer
from .usage import HitStatistics

BLEND = 0.5  # weight of the convolution in what a scale adds


class ScaleConvolutions(nn.Module):
    """The 3×3 convolutions after upsampling: one for all scales (`shared` 1), one per scale (0), or `shared`
    of them, of which each scale takes the nearest."""

    def __init__(self, channels: int, scales: int, shared: int) -> None:
        super().__init__()
        count = shared or scales
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(count)]
        if shared == 1:
            self.qresi = convolutions[0]
        elif shared:
            self.qresi_ls = nn.ModuleList(convolutions)
        else:
            for number, convolution in enumerate(convolutions):
                self.add_module(str(number), convolution)
        edge = 1 / 3 / count if count == 4 else 1 / 2 / count
        ticks = np.linspace(edge, 1 - edge, count)
        self.numbers = [int(np.abs(ticks - scale / max(1, scales - 1)).argmin()) for scale in range(scales)]

    def forward(self, x: Tensor, scale: int) -> Tensor:
        """[B, C, s, s] of scale number `scale` → the same, half of it convolved."""
        convolutions = list(self.modules_in_order())
        return x.mul(1 - BLEND) + convolutions[self.numbers[scale]](x).mul(BLEND)

    def modules_in_order(self) -> list[nn.Conv2d]:
        """The convolutions by number."""
        return [module for module in self.modules() if isinstance(module, nn.Conv2d)]


class _MultiScale(HitStatistics, Quantizer):
    """What both kinds share: the loop over scales. `sides` are those of the grids of codes, the last is the
    latents' own."""

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        sides: Sequence[int],
        *,
        commitment_cost: float = 0.25,
        shared_convolutions: int = 4,
        dropout: float = 0.0,
        first_dropped: int = 3,
    ) -> None:
        super().__init__()
        if not sides or list(sides) != sorted(sides) or sides[0] < 1:
            raise ValueError(f"sides are {list(sides)}; they are sides of grids of codes, in rising order")
        if not 0 <= dropout <= 1 or (dropout and not 1 <= first_dropped <= len(sides)):
            raise ValueError(
                f"dropout is {dropout} and first_dropped {first_dropped}; they are a share of the images and "
                f"1 to {len(sides)} scales"
            )
        self.codebook_sizes = (codebook_size,)
        self.dim, self.sides = dim, tuple(sides)
        self.commitment_cost, self.dropout, self.first_dropped = commitment_cost, dropout, first_dropped
        self.quant_resi = ScaleConvolutions(dim, len(sides), shared_convolutions)
        self.start_hits(len(sides), codebook_size)

    @property
    def num_codes(self) -> int:
        """Codes per image, of all scales."""
        return sum(side**2 for side in self.sides)

    def _nearest(self, grid: Tensor, scale: int) -> Tensor:
        """Codes [B, p, p] of a grid [B, C, p, p]."""
        raise NotImplementedError

    def _rows(self, codes: Tensor, scale: int) -> Tensor:
        """Codes [B, p, p] → what they stand for at a scale, [B, p, p, C]."""
        raise NotImplementedError

    def _start(self, latents: Tensor) -> Tensor:
        """Latents [B, K, C] as the grid [B, C, s, s] that is quantized, in float32 or wider."""
        side = self.sides[-1]
        if latents.ndim != 3 or latents.shape[1:] != (side**2, self.dim):
            raise ValueError(
                f"latents have shape {list(latents.shape)}; this quantizer takes [B, {side**2}, {self.dim}]"
            )
        wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
        return wide.transpose(1, 2).unflatten(2, (side, side))

    def added(self, codes: Tensor, scale: int) -> Tensor:
        """What the codes [B, p, p] of a scale add to the grid, [B, C, s, s]."""
        grid, side = self._rows(codes, scale).movedim(-1, 1), self.sides[-1]
        if self.sides[scale] != side:
            grid = F.interpolate(grid, (side, side), mode="bicubic")
        return self.quant_resi(grid, scale)

    def _reduced(self, grid: Tensor, scale: int) -> Tensor:
        """The grid [B, C, s, s] at the side of a scale."""
        side = self.sides[scale]
        return grid if grid.shape[-1] == side else F.interpolate(grid, (side, side), mode="area")

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, K, C] → indices [B, n], scale by scale, row by row."""
        with torch.autocast(latents.device.type, enabled=False):
            rest, codes = self._start(latents.detach()), []
            for scale in range(len(self.sides)):
                codes.append(self._nearest(self._reduced(rest, scale), scale))
                rest = rest - self.added(codes[-1], scale).to(rest.dtype)
        return torch.cat([each.flatten(1) for each in codes], 1)

    def split(self, codes: Tensor) -> list[Tensor]:
        """Indices [B, n] of all scales, or of the first ones → a grid [B, p, p] per scale."""
        grids, used = [], 0
        for side in self.sides:
            if used == codes.shape[1]:
                break
            grids.append(codes[:, used : used + side**2])
            used += side**2
        if used != codes.shape[1] or not grids:
            raise ValueError(
                f"codes have {codes.shape[1]} per image; {self.num_codes} are those of all scales, and fewer "
                f"end with a scale of sides {', '.join(map(str, self.sides))}"
            )
        return [grid.unflatten(1, (side, side)) for grid, side in zip(grids, self.sides, strict=False)]

    def decode(self, codes: Tensor) -> Tensor:
        """Indices [B, n] of all scales, or of the first ones → latents [B, K, C]."""
        grid = sum(self.added(each, scale) for scale, each in enumerate(self.split(codes)))
        return grid.flatten(2).transpose(1, 2)

    def generator_inputs(self, codes: Tensor) -> Tensor:
        """Indices [B, n] → the inputs of a next-scale generator [B, n - 1, C]: the grid so far at the side of
        each scale but the first (VAR, arXiv 2404.02905, algorithm 2)."""
        grid, inputs = 0, []
        for scale, each in enumerate(self.split(codes)[:-1]):
            grid = grid + self.added(each, scale)
            inputs.append(self._reduced(grid, scale + 1).flatten(2))
        return torch.cat(inputs, 2).transpose(1, 2)

    def draw_depths(self, batch: int) -> Tensor:
        """How many first scales each image of a batch keeps in training [B]: a random number from
        `first_dropped` for the first `dropout` of them, all for the others."""
        depths = torch.full((batch,), len(self.sides))
        dropped = int(batch * self.dropout)
        depths[:dropped] = torch.randint(self.first_dropped, len(self.sides) + 1, (dropped,))
        return depths

    def forward(self, latents: Tensor, depths: Tensor | None = None) -> Quantized:
        """Straight-through sum of the scales, codes, and losses; in training mode images keep their first
        `depths` [B] scales, drawn unless given."""
        with torch.autocast(latents.device.type, enabled=False):
            grid = self._start(latents)
            if depths is None and self.training:
                depths = self.draw_depths(len(grid))
            rest, total = grid.detach(), torch.zeros_like(grid)
            codes, terms = [], []
            for scale in range(len(self.sides)):
                codes.append(self._nearest(self._reduced(rest, scale), scale))
                if self.training:
                    self.count_hits(codes[-1], scale)
                added = self.added(codes[-1], scale).to(grid.dtype)
                rest = rest - added.detach()
                mask = grid.new_ones(len(grid)) if depths is None else (scale < depths).to(grid)
                before, total = total, total + mask.view(-1, 1, 1, 1) * added
                terms.append(self._terms(grid, before, total, mask, scale))
            losses = self._losses(terms)
            passed = grid + (total - grid).detach()
        latents_out = passed.flatten(2).transpose(1, 2).to(latents.dtype)
        return Quantized(latents_out, torch.cat([each.flatten(1) for each in codes], 1), losses)

    def _terms(
        self, grid: Tensor, before: Tensor, total: Tensor, mask: Tensor, scale: int
    ) -> dict[str, Tensor]:
        """Losses of one scale, of which images outside `mask` [B] take no part."""
        weight = mask.view(-1, 1, 1, 1) / mask.mean()
        return {
            "codebook": (weight * (total - grid.detach()).square()).mean(),
            "commitment": self.commitment_cost * (weight * (total.detach() - grid).square()).mean(),
        }

    def _losses(self, terms: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        raise NotImplementedError


class MultiScaleVectorQuantizer(_MultiScale):
    """Residual VQ over scales, with one codebook (VAR: Tian et al., "Visual Autoregressive Modeling", 2024,
    arXiv 2404.02905, algorithm 1; ImageFolder, arXiv 2410.01756).

    With `l2_norm` codes are chosen by cosine, and added as they are stored. In training the first `dropout`
    share of a batch keeps a random number of scales, from `first_dropped` (ImageFolder's quantizer dropout).
    Losses: `codebook`, the mean over scales, and `commitment`, their sum.
    """

    def __init__(
        self, codebook_size: int, dim: int, sides: Sequence[int], *, l2_norm: bool = True, **settings
    ) -> None:
        super().__init__(codebook_size, dim, sides, **settings)
        self.l2_norm = l2_norm
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    def _nearest(self, grid: Tensor, scale: int) -> Tensor:
        rows = grid.movedim(1, -1)
        codebook = self.embedding.weight.detach().to(rows.dtype)
        if self.l2_norm:
            return (F.normalize(rows, dim=-1) @ F.normalize(codebook, dim=-1).T).argmax(-1)
        distances = torch.addmm(codebook.square().sum(-1), rows.flatten(0, -2), codebook.T, alpha=-2.0)
        return distances.argmin(-1).view(rows.shape[:-1])

    def _rows(self, codes: Tensor, scale: int) -> Tensor:
        return self.embedding(codes)

    def _losses(self, terms: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        # Parity: the codebook loss is divided by the number of scales, the commitment loss is not.
        return {
            "codebook": sum(term["codebook"] for term in terms) / len(terms),
            "commitment": sum(term["commitment"] for term in terms),
        }


class MultiScaleBinaryQuantizer(_MultiScale):
    """Residual binary spherical quantization over scales: each channel of a unit latent becomes its sign
    (BSQ: Zhao et al., 2024, arXiv 2406.07548; XQ-GAN, arXiv 2412.01762). No codebook.

    Channel j is bit j of the index, the first the least significant; a bit stands for ±scale^k / √bits at
    scale number k. Losses are means over scales, `entropy` with weight `entropy_weight`: how undecided each
    bit is, less how evenly it is used, nats.
    """

    def __init__(
        self,
        bits: int,
        sides: Sequence[int],
        *,
        normalise: bool = True,
        scale: float = 1.0,
        entropy_weight: float = 0.1,
        **settings,
    ) -> None:
        if not 1 <= bits <= 30:
            raise ValueError(f"bits is {bits}; indices have 1 to 30 bits")
        super().__init__(2**bits, bits, sides, **settings)
        self.normalise, self.entropy_weight = normalise, entropy_weight
        steps = [scale**number / math.sqrt(bits) for number in range(len(sides))]
        self.register_buffer("scaler", torch.tensor(steps))
        self.register_buffer("_places", 2 ** torch.arange(bits), persistent=False)

    def _start(self, latents: Tensor) -> Tensor:
        grid = super()._start(latents)
        return F.normalize(grid, dim=1) if self.normalise else grid

    def _nearest(self, grid: Tensor, scale: int) -> Tensor:
        return ((grid.movedim(1, -1) > 0) * self._places).sum(-1)

    def _rows(self, codes: Tensor, scale: int) -> Tensor:
        signs = 2 * (codes.unsqueeze(-1).bitwise_and(self._places) != 0).to(self.scaler.dtype) - 1
        return signs * self.scaler[scale]

    def _terms(
        self, grid: Tensor, before: Tensor, total: Tensor, mask: Tensor, scale: int
    ) -> dict[str, Tensor]:
        terms = super()._terms(grid, before, total, mask, scale)
        # Parity: the mask is used as an index, which repeats the first two images.
        rest = (grid - before.detach())[mask.long()]
        probability = torch.sigmoid(-4 * rest * self.scaler[scale])  # [B, C, s, s]
        each = _binary_entropy(probability).sum(1).mean()
        mean = _binary_entropy(probability.mean((0, 2, 3))).sum()
        return terms | {"entropy": self.entropy_weight / mask.mean() * (each - mean)}

    def _losses(self, terms: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: sum(term[name] for term in terms) / len(terms) for name in terms[0]}


def _binary_entropy(p: Tensor) -> Tensor:
    return -p * (p + 1e-8).log() - (1 - p) * (1 - p + 1e-8).log()
