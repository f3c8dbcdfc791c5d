"""Codes of tokens that carry their place."""

import torch
from torch import Tensor

from ...quantizers import Quantized, Quantizer, VectorQuantizer
from .config import PLACE_DIGIT


class PlacedQuantizer(Quantizer):
    """Codes of latents that carry their place: [B, K, D + 2], D values and two digits of the place.

    With a codebook they become indices [B, K, 2], (code, place); without one they are the codes themselves.
    """

    def __init__(self, inner: VectorQuantizer | None, dim: int, places: int) -> None:
        super().__init__()
        self.inner, self.dim, self.places = inner, dim, places
        self.kind = "indices" if inner else "latents"
        self.codebook_sizes = (*inner.codebook_sizes, places) if inner else None

    def join(self, values: Tensor, places: Tensor) -> Tensor:
        """Values [B, K, D] and places int64 [B, K] → latents [B, K, D + 2]."""
        digits = torch.stack([places // PLACE_DIGIT, places % PLACE_DIGIT], -1)
        return torch.cat([values, digits.to(values)], -1)

    def split(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, K, D + 2] → values [B, K, D] and places int64 [B, K].

        Raises ValueError for another width and for places that do not exist.
        """
        if latents.shape[-1] != self.dim + 2:
            raise ValueError(
                f"latents have {latents.shape[-1]} channels; these tokens have {self.dim + 2}: "
                f"{self.dim} values and the two digits (base {PLACE_DIGIT}) of the place"
            )
        high, low = latents[..., self.dim :].detach().float().round().long().unbind(-1)
        places = PLACE_DIGIT * high + low
        outside = (places < 0) | (places >= self.places)
        if not torch.compiler.is_compiling() and bool(outside.any()):
            raise ValueError(
                f"place {int(places[outside][0])} is outside 0..{self.places - 1}: the last two channels of "
                f"a latent are the digits (base {PLACE_DIGIT}) of its place"
            )
        return latents[..., : self.dim], places

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, K, D + 2] → indices [B, K, 2], or the latents."""
        if self.inner is None:
            return latents
        values, places = self.split(latents)
        return torch.stack([self.inner.encode(values), places], -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Indices [B, K, 2], or latents → latents [B, K, D + 2]."""
        if self.inner is None:
            self.split(codes)  # refuses places that do not exist
            return codes
        if codes.ndim != 3 or codes.shape[-1] != 2:
            raise ValueError(
                f"codes have shape {list(codes.shape)}; these tokens are [B, K, 2]: (code, place among "
                f"{self.places})"
            )
        return self.join(self.inner.decode(codes[..., 0]), codes[..., 1])

    def forward(self, latents: Tensor) -> Quantized:
        """Straight-through values, places as they are; the codebook's losses, or none."""
        if self.inner is None:
            return Quantized(latents, latents)
        values, places = self.split(latents)
        quantized = self.inner(values)
        codes = torch.stack([quantized.codes, places], -1)
        return Quantized(self.join(quantized.latents, places), codes, quantized.losses)
