"""The protocol every quantizer follows."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from .usage import bit_entropy, codebook_usage, perplexity


@dataclass
class Quantized:
    """Result of a training forward.

    `latents` [B, K, D] carry the gradient back to the encoder, `codes` are what `encode` would give, and
    `losses` are scalars by name, weights included: training minimises their sum.
    """

    latents: Tensor
    codes: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module):
    """Base of all quantizers: `encode`, `decode`, and `forward` for training.

    `kind` names the field of `Tokens` that the codes fill; `codebook_sizes` has one entry per codebook and is
    None for bits and for continuous codes.
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

    def usage(self, codes: Tensor) -> dict[str, Tensor]:
        """How much of the code space these codes use: scalars by name, measured over all of them.

        Bits: `bit_entropy`, in bits, the mean over the K·D bits of a token grid, 1 at best. Indices:
        `codebook_usage` (share of the codebook that occurs, 0..1) and `perplexity` (1..codebook size), means
        over the codebooks. Continuous codes: nothing.
        """
        if self.kind == "latents":
            return {}
        if self.kind == "bits":
            return {"bit_entropy": bit_entropy(codes).mean()}
        return {
            "codebook_usage": codebook_usage(codes, self.codebook_sizes).mean(),
            "perplexity": perplexity(codes, self.codebook_sizes).mean(),
        }
