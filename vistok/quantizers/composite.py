"""Several quantizers as one: residual (one after the other) and product (side by side)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .base import Quantized, Quantizer


class _Composite(Quantizer):
    """Parts with indices; codes are all their codebooks side by side, [B, K, Q]."""

    def __init__(self, parts: Sequence[Quantizer]) -> None:
        super().__init__()
        if not parts or any(part.kind != "indices" for part in parts):
            given = ", ".join(f"{type(part).__name__} ({part.kind})" for part in parts) or "none"
            raise ValueError(f"{type(self).__name__} takes one quantizer with indices or more; got {given}")
        self.parts = nn.ModuleList(parts)
        self.codebook_sizes = tuple(size for part in parts for size in part.codebook_sizes)

    def _join(self, codes: Sequence[Tensor]) -> Tensor:
        """Codes of the parts, [..., Q] where they have several codebooks and [...] otherwise → [..., Q]."""
        columns = [
            code if len(part.codebook_sizes) > 1 else code.unsqueeze(-1)
            for part, code in zip(self.parts, codes, strict=True)
        ]
        return torch.cat(columns, -1)

    def _split(self, codes: Tensor) -> list[Tensor]:
        """Undo `_join`; of the first parts only, when codes have fewer codebooks."""
        ends, total = [], 0
        for part in self.parts:
            total += len(part.codebook_sizes)
            ends.append(total)
        if codes.shape[-1] not in ends:
            raise ValueError(
                f"codes have {codes.shape[-1]} codebooks; this {type(self).__name__} has {total}"
            )
        widths = [
            len(part.codebook_sizes) for part, end in zip(self.parts, ends, strict=True)
            if end <= codes.shape[-1]
        ]  # fmt: skip
        return [
            column.squeeze(-1) if width == 1 else column
            for column, width in zip(codes.split(widths, -1), widths, strict=True)
        ]

    def _run(self, latents: Tensor, step: Callable[[Tensor], Quantized]) -> Quantized:
        """`step` on latents in float32 or better, outside autocast, back in their own dtype."""
        with torch.autocast(latents.device.type, enabled=False):
            result = step(latents.float() if latents.dtype.itemsize < 4 else latents)
        return Quantized(result.latents.to(latents.dtype), result.codes, result.losses)


class ResidualQuantizer(_Composite):
    """Each part quantizes what the ones before it left over; the latents are the sum (Lee et al.,
    "Autoregressive Image Generation using Residual Quantization", 2022, arXiv 2203.01941, section 3.1).

    `parts` quantize latents of one width; the same module several times is a shared codebook. Codes are
    indices [B, K, Q]; `decode` also takes the first codebooks alone, a coarser latent. Losses are the sums of
    the parts' losses by name; the gradient passes straight through all parts at once. A part with codebook
    `clustering` revives its dead codes on its own residuals.

        quantizer = ResidualQuantizer([VectorQuantizer(1024, 32) for _ in range(4)])
        codes = quantizer.encode(torch.randn(2, 64, 32))  # [2, 64, 4]
    """

    def _residual(self, latents: Tensor, quantize: Callable[[Quantizer, Tensor], tuple[Tensor, Tensor]]):
        total, codes = torch.zeros_like(latents), []
        for part in self.parts:
            code, value = quantize(part, latents - total)
            total = total + value.detach().to(latents.dtype)
            codes.append(code)
        return total, self._join(codes)

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, K, D] → indices int64 [B, K, Q]."""

        def quantize(part: Quantizer, residual: Tensor) -> tuple[Tensor, Tensor]:
            code = part.encode(residual)
            return code, part.decode(code)

        def step(wide: Tensor) -> Quantized:
            return Quantized(*self._residual(wide.detach(), quantize))

        return self._run(latents, step).codes

    def decode(self, codes: Tensor) -> Tensor:
        """Indices [B, K, Q], or the first codebooks of them → latents [B, K, D]."""
        columns = self._split(codes)
        return sum(part.decode(column) for part, column in zip(self.parts, columns, strict=False))

    def forward(self, latents: Tensor) -> Quantized:
        """Straight-through sum, codes, and the parts' losses summed by name."""
        losses: dict[str, Tensor] = {}

        def quantize(part: Quantizer, residual: Tensor) -> tuple[Tensor, Tensor]:
            result = part(residual)
            for name, loss in result.losses.items():
                losses[name] = losses.get(name, 0) + loss
            return result.codes, result.latents

        def step(wide: Tensor) -> Quantized:
            total, codes = self._residual(wide, quantize)
            return Quantized(wide + (total - wide).detach(), codes, losses)

        return self._run(latents, step)


class ProductQuantizer(_Composite):
    """Latents split into as many equal runs of channels as there are parts, each quantized by its own (Jégou
    et al., "Product Quantization for Nearest Neighbor Search", TPAMI 2011).

    Codes are indices [B, K, Q]; losses are the parts' means by name.

        quantizer = ProductQuantizer([VectorQuantizer(256, 8) for _ in range(4)])
        codes = quantizer.encode(torch.randn(2, 64, 32))  # [2, 64, 4]
    """

    def _chunks(self, latents: Tensor) -> tuple[Tensor, ...]:
        count = len(self.parts)
        if latents.shape[-1] % count:
            raise ValueError(f"latents have {latents.shape[-1]} channels; {count} parts need a multiple")
        return latents.chunk(count, -1)

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, K, D] → indices int64 [B, K, Q]."""
        chunks = self._chunks(latents)
        return self._join([part.encode(chunk) for part, chunk in zip(self.parts, chunks, strict=True)])

    def decode(self, codes: Tensor) -> Tensor:
        """Indices [B, K, Q] → latents [B, K, D]."""
        columns = self._split(codes)
        return torch.cat([p.decode(column) for p, column in zip(self.parts, columns, strict=True)], -1)

    def forward(self, latents: Tensor) -> Quantized:
        """Each part's own gradient and codes; losses averaged over the parts."""
        ...
