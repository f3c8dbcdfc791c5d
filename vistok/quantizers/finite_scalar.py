"""Finite scalar quantization: each channel rounds to a few levels, and the code is their mixed-radix
number."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Quantized, Quantizer


class FiniteScalarQuantizer(Quantizer):
    """FSQ (Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023, arXiv 2309.15505).

    `levels` gives the number of values of each of the D channels; the codebook size is their product. It may
    also be one such row per token [K, D], all with the same product, so that tokens that carry more energy
    round more finely; a channel with one level is not used. Latents are unbounded floats; decoded latents lie
    on a grid in [-1, 1]. No parameters, no losses.
    """

    def __init__(self, levels: Sequence[int] | Sequence[Sequence[int]]) -> None:
        super().__init__()
        table = torch.tensor(levels, dtype=torch.int64, device="cpu")  # values are read, also under "meta"
        if table.ndim not in (1, 2) or not table.numel() or table.min() < 1:
            raise ValueError(f"levels={levels!r}: give one row of positive counts, or one such row per token")
        sizes = sorted({math.prod(row) for row in table.reshape(-1, table.shape[-1]).tolist()})
        if len(sizes) > 1:
            raise ValueError(f"tokens have codebooks of sizes {sizes}; every row must have the same product")
        if sizes[0] > 2**63:
            raise ValueError(
                f"levels={levels!r} make {sizes[0]} codes, more than an int64 index can number (2**63); "
                "quantize groups of channels with ProductQuantizer"
            )
        self.codebook_sizes = (sizes[0],)
        table = table.to(torch.get_default_device())
        radix = table.cumprod(-1) // table
        self.register_buffer("_levels", table, persistent=False)
        self.register_buffer("_radix", radix, persistent=False)

    @property
    def used(self) -> Tensor:
        """Mask of the channels with more than one level: bool [D] or [K, D]."""
        return self._levels > 1

    def _rows(self, table: Tensor, count: int) -> Tensor:
        """The table for the first `count` tokens."""
        if table.ndim == 1:
            return table
        if count > len(table):
            raise ValueError(f"{count} tokens were given; this quantizer has levels for {len(table)}")
        return table[:count]

    def bound(self, latents: Tensor) -> Tensor:
        """Latents [B, K, D] squashed to the span of the levels (paper, section 3.1): what `encode` rounds."""
        if latents.shape[-1] != self._levels.shape[-1]:
            raise ValueError(
                f"latents have {latents.shape[-1]} channels; the levels need {self._levels.shape[-1]}"
            )
        latents = (
            latents.float() if latents.dtype.itemsize < 4 else latents
        )  # half precision misplaces boundaries
        levels = self._rows(self._levels, latents.shape[-2] if latents.ndim > 1 else 1)
        half = ((levels - 1) * (1 + 1e-3) / 2).to(latents.dtype)
        offset = torch.where(levels % 2 == 0, 0.5, 0.0).to(
            latents.dtype
        )  # even counts sit half a step off centre
        shift = (offset / half.clamp_min(0.5)).atanh()
        return (latents + shift).tanh() * half - offset

    def _digits(self, latents: Tensor) -> Tensor:
        """Signed integer digits as floats, with a straight-through gradient."""
        bounded = self.bound(latents)
        return bounded + (bounded.round() - bounded).detach()

    def expand(self, latents: Tensor) -> Tensor:
        """Decoded latents [B, K, D] → the unbounded values at the centres of their cells (the outer cells at
        95%).

        The inverse of the squashing before rounding: the input for a linear decoder of the original latents.
        """
        levels = self._rows(self._levels, latents.shape[-2])
        half = ((levels - 1) / 2).clamp_min(0.5).to(latents.dtype)
        offset = torch.where(levels % 2 == 0, 0.5, 0.0).to(latents.dtype)
        centres = (latents * (levels // 2) + offset) / half
        return torch.atanh(0.95 * centres.clamp(-1, 1)) * (levels > 1)

    def _codes(self, digits: Tensor) -> Tensor:
        count = digits.shape[-2] if digits.ndim > 1 else 1
        unsigned = digits.detach().round().long() + self._rows(self._levels, count) // 2
        return (unsigned * self._rows(self._radix, count)).sum(-1)

    def _half_width(self, count: int) -> Tensor:
        return (self._rows(self._levels, count) // 2).clamp_min(1)

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, K, D] → indices int64 [B, K], in 0 … prod(levels) - 1."""
        return self._codes(self._digits(latents.detach()))

    def decode(self, codes: Tensor) -> Tensor:
        """Indices int64 [B, K] → grid points float32 [B, K, D] in [-1, 1]."""
        count = codes.shape[-1] if codes.ndim else 1
        levels = self._rows(self._levels, count)
        digits = codes.unsqueeze(-1) // self._rows(self._radix, count) % levels - levels // 2
        return digits / self._half_width(count)

    def forward(self, latents: Tensor) -> Quantized:
        """Straight-through rounding; `losses` is empty."""
        digits = self._digits(latents)
        half_width = self._half_width(digits.shape[-2] if digits.ndim > 1 else 1)
        return Quantized((digits / half_width).to(latents.dtype), self._codes(digits))
