"""Vector quantization by directions, with a codebook that running means move."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantized, Quantizer

EPSILON = 1e-5  # of the smoothed counts


class CosineQuantizer(Quantizer):
    """Codes of projected latents by cosine similarity, under the keys of vector-quantize-pytorch.

    Latents [..., D] are projected to `codebook_dim` channels, normalised, and become the index of the row of
    the codebook with the largest product (ViT-VQGAN, "Vector-quantized Image Modeling with Improved VQGAN",
    2021, arXiv 2110.04627, section 3.1); rows are projected back. Products are in float32 or better.

    Loss of a training forward: `commitment`, the mean squared distance of the normalised latents to their
    rows times `commitment_cost`; the gradient passes straight through. In training mode every forward moves
    the rows to the running mean (`decay`) of the normalised latents that chose them (van den Oord et al.,
    2017, arXiv 1711.00937, appendix A.1).
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        dim: int,
        *,
        commitment_cost: float = 0.25,
        decay: float = 0.8,
    ) -> None:
        super().__init__()
        self.codebook_sizes = (codebook_size,)
        self.commitment_cost, self.decay = commitment_cost, decay
        self.project_in, self.project_out = nn.Linear(dim, codebook_dim), nn.Linear(codebook_dim, dim)
        rows = F.normalize(torch.randn(1, codebook_size, codebook_dim), dim=-1)
        self._codebook = nn.Module()
        self._codebook.register_buffer("initted", torch.ones(1))
        self._codebook.register_buffer("cluster_size", torch.zeros(1, codebook_size))
        self._codebook.register_buffer("embed_avg", rows.clone())
        self._codebook.register_buffer("embed", rows)

    @property
    def rows(self) -> Tensor:
        """The codebook [V, C]."""
        return self._codebook.embed[0]

    def compared(self, latents: Tensor) -> Tensor:
        """Latents [..., D] as they are compared with rows: projected unit vectors [..., C]."""
        projected = self.project_in(latents)
        return F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=-1)

    def similarities(self, latents: Tensor) -> Tensor:
        """Products [..., V] of latents [..., D] with all rows."""
        compared = self.compared(latents)
        with torch.autocast(latents.device.type, enabled=False):
            return compared @ self.rows.to(compared.dtype).T

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [..., D] → indices int64 [...] (the first row on ties)."""
        return self.similarities(latents.detach()).argmax(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Indices int64 [...] → latents [..., D]."""
        return self.project_out(F.embedding(codes, self.rows))

    def forward(self, latents: Tensor) -> Quantized:
        """Straight-through latents, their codes and the commitment; training mode moves the codebook."""
        with torch.autocast(latents.device.type, enabled=False):
            compared = self.compared(latents)
            codes = (compared.detach() @ self.rows.to(compared.dtype).T).argmax(-1)
            rows = F.embedding(codes, self.rows).to(compared.dtype)
            losses = {"commitment": self.commitment_cost * F.mse_loss(compared, rows)}
            if self.training:
                self._move(compared.detach().flatten(0, -2), codes.flatten())
            straight = compared + (rows - compared).detach()
        return Quantized(self.project_out(straight.to(latents.dtype)), codes, losses)

    @torch.no_grad()
    def _move(self, latents: Tensor, codes: Tensor) -> None:
        """Move rows to the running means of the unit vectors [N, C] that chose them."""
        book = self._codebook
        counts, sums = book.cluster_size[0], book.embed_avg[0]
        chosen = torch.bincount(codes, minlength=len(counts)).to(counts)
        added = torch.zeros_like(sums).index_add_(0, codes, latents.to(sums.dtype))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for statistic in (chosen, added):
                torch.distributed.all_reduce(statistic)
        counts.lerp_(chosen, 1 - self.decay)
        sums.lerp_(added, 1 - self.decay)
        total = counts.sum()
        smoothed = (counts + EPSILON) / (total + len(counts) * EPSILON) * total
        book.embed[0] = F.normalize(sums / smoothed.clamp_min(EPSILON).unsqueeze(1), dim=-1)
