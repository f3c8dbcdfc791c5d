"""What residual and product quantizers share: several parts, each with its own codebooks."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from .base import Quantizer


class CompositeQuantizer(Quantizer):
    """A quantizer made of `parts`, each with indices of its own; codes are indices [B, K, Q].

    Raises ValueError when there are no parts, or for parts whose codes are bits or continuous.
    """

    def __init__(self, parts: Sequence[Quantizer]) -> None:
        super().__init__()
        if not parts or any(part.kind != "indices" for part in parts):
            names = ", ".join(f"{type(part).__name__} ({part.kind})" for part in parts) or "none"
            raise ValueError(f"{type(self).__name__} takes one or more quantizers with indices; got {names}")
        self.parts = nn.ModuleList(parts)
        self.codebook_sizes = tuple(size for part in parts for size in part.codebook_sizes)

    def join(self, codes: Sequence[Tensor]) -> Tensor:
        """Codes of the parts, [B, K] or [B, K, q] with several codebooks → [B, K, Q]."""
        columns = [
            code if len(part.codebook_sizes) > 1 else code.unsqueeze(-1)
            for part, code in zip(self.parts, codes, strict=True)
        ]
        return torch.cat(columns, -1)

    def split(self, codes: Tensor) -> list[Tensor]:
        """Undo `join`. Codes that end early, after a whole part, give the codes of the first parts."""
        widths = [len(part.codebook_sizes) for part in self.parts]
        ends = list(accumulate(widths))
        if codes.shape[-1] not in ends:
            raise ValueError(
                f"codes have {codes.shape[-1]} codebooks; this {type(self).__name__} has {ends[-1]}"
            )
        widths = widths[: ends.index(codes.shape[-1]) + 1]
        columns = codes.split(widths, -1)
        return [c.squeeze(-1) if width == 1 else c for c, width in zip(columns, widths, strict=True)]
