"""Residual quantization: each codebook encodes the remainder of the ones before it."""

import torch
from torch import Tensor

from .base import Quantized, Quantizer
from .composite import CompositeQuantizer


class ResidualQuantizer(CompositeQuantizer):
    """RQ (Lee et al., "Autoregressive Image Generation using Residual Quantization", 2022, arXiv 2203.01941,
    section 3.1).

    `parts` quantize latents of one width; their decoded latents add up. Codes are indices [B, K, Q], and
    `decode` also takes the first codebooks alone: a coarser latent. Losses are the parts' losses summed by
    name; the gradient passes straight through to the latents, once. Vector quantizers with `clustering`
    revive their dead codes, each on its own residuals.

        quantizer = ResidualQuantizer([VectorQuantizer(1024, 32) for _ in range(4)])
        codes = quantizer.encode(torch.randn(2, 64, 32))  # [2, 64, 4]
    """

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, K, D] → indices int64 [B, K, Q]."""
        residual, codes = _at_least_float32(latents.detach()), []
        with torch.autocast(latents.device.type, enabled=False):
            for part in self.parts:
                codes.append(part.encode(residual))
                residual = residual - part.decode(codes[-1]).to(residual.dtype)
        return self.join(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Indices [B, K, Q], or only the first of the Q → latents [B, K, D]."""
        columns = self.split(codes)
        parts: list[Quantizer] = list(self.parts)[: len(columns)]
        return torch.stack([part.decode(code) for part, code in zip(parts, columns, strict=True)]).sum(0)

    def forward(self, latents: Tensor) -> Quantized:
        """Straight-through sum of all parts, their codes, and their losses summed by name."""
        codes: list[Tensor] = []
        losses: dict[str, Tensor] = {}
        wide = _at_least_float32(latents)
        total = torch.zeros_like(wide)
        with torch.autocast(latents.device.type, enabled=False):
            for part in self.parts:
                result: Quantized = part(wide - total)
                total = total + result.latents.detach()
                codes.append(result.codes)
                for name, loss in result.losses.items():
                    losses[name] = losses[name] + loss if name in losses else loss
            passed = total + (wide - wide.detach())
        return Quantized(passed.to(latents.dtype), self.join(codes), losses)


def _at_least_float32(latents: Tensor) -> Tensor:
    """Latents in float32 or better: in half precision the later residuals are rounding errors."""
    return latents.float() if latents.dtype.itemsize < 4 else latents
