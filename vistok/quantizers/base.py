"""The protocol every quantizer follows."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn


@dataclass
class Quantized:
    """What a training forward returns.

    `latents` [B, K, D] carry the gradient back to the encoder, `codes` are what `encode` would give, and
    `losses` are unreduced-over-weight scalars by name: their sum is what the quantizer asks to be minimised.
    """

    latents: Tensor
    codes: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module):
    """Base of all quantizers: `encode`, `decode`, and `forward` for training.

    `kind` says which field of `Tokens` the codes fill; `codebook_sizes` has one entry per codebook and is
    None for continuous codes.
    """

    kind: Literal["indices", "bits", "latents"] = "indices"
    codebook_sizes: tuple[int, ...] | None = None

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, K, D] → codes."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Codes → latents [B, K, D]."""
        raise NotImplementedError

    def forward(self, latents: Tensor) -> Quantized:
        """Latents [B, K, D] → quantized latents with a gradient, codes and losses by name."""
        raise NotImplementedError
