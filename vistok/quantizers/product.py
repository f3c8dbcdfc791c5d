"""Product quantization: the channels in equal runs, each with a codebook of its own."""

from typing import Any

import torch
from torch import Tensor

from .base import Quantized
from .composite import CompositeQuantizer


class ProductQuantizer(CompositeQuantizer):
    """PQ (Jégou et al., "Product Quantization for Nearest Neighbor Search", TPAMI 2011).

    Latents are split into as many equal runs of channels as there are `parts`, and each part quantizes its
    own. Codes are indices [B, K, Q]; losses are the parts' losses averaged by name; gradients are the parts'.

        quantizer = ProductQuantizer([VectorQuantizer(256, 8) for _ in range(4)])
        codes = quantizer.encode(torch.randn(2, 64, 32))  # [2, 64, 4]
    """

    def _runs(self, latents: Tensor) -> tuple[Tensor, ...]:
        count = len(self.parts)
        if latents.shape[-1] % count:
            raise ValueError(
                f"latents have {latents.shape[-1]} channels; {count} parts need a multiple of {count}"
            )
        return latents.chunk(count, -1)

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, K, D] → indices int64 [B, K, Q]."""
        runs = self._runs(latents)
        return self.join([part.encode(run) for part, run in zip(self.parts, runs, strict=True)])

    def decode(self, codes: Tensor) -> Tensor:
        """Indices [B, K, Q] → latents [B, K, D]."""
        count = len(self.codebook_sizes)
        if codes.shape[-1] != count:
            raise ValueError(f"codes have {codes.shape[-1]} codebooks; this ProductQuantizer has {count}")
        columns = self.split(codes)
        return torch.cat([part.decode(code) for part, code in zip(self.parts, columns, strict=True)], -1)

    def forward(self, latents: Tensor, *shared: Any) -> Quantized:
        """Every part's own latents and codes; losses averaged over the parts by name. Parts get the `shared`
        arguments as well."""
        results = [part(run, *shared) for part, run in zip(self.parts, self._runs(latents), strict=True)]
        names = dict.fromkeys(name for result in results for name in result.losses)
        losses = {
            name: torch.stack([r.losses[name] for r in results if name in r.losses]).sum() / len(results)
            for name in names
        }
        passed = torch.cat([result.latents for result in results], -1)
        return Quantized(passed, self.join([result.codes for result in results]), losses)
