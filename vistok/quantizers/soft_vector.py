"""Soft vector quantization: each latent becomes a mixture of codebook rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantized
from .continuous import ContinuousLatents


class SoftVectorQuantizer(ContinuousLatents):
    """SoftVQ (Chen et al., "SoftVQ-VAE: Efficient 1-Dimensional Continuous Tokenizer", 2024, arXiv
    2412.10958, section 3.2).

    Latents [B, K, D] are cut into `num_codebooks` runs of tokens of equal length, each with a codebook of its
    own. A latent becomes the sum of its codebook's rows, weighted by the softmax of their products with it
    over `tau`; with `l2_norm` latents and rows are unit vectors. Codes are these sums, so that they are
    continuous, and products are in float32 or better.

    Loss of a training forward, where `entropy_weight` is above 0: `entropy` = weight · (mean entropy of each
    latent's assignment - entropy of the mean assignment), nats, over the softmax of products at
    `entropy_temperature`. It moves latents only; rows learn from the sums.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        num_codebooks: int = 1,
        tau: float = 0.07,
        l2_norm: bool = True,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        super().__init__(dim)
        self.tau, self.l2_norm = tau, l2_norm
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        rows = torch.empty(num_codebooks, codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        self.embedding = nn.Parameter(F.normalize(rows, dim=-1) if l2_norm else rows)

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, K, D] → mixtures of rows [B, K, D].

        ValueError for another number of channels, and for a K that is not a multiple of the codebooks.
        """
        return self._mixed(latents)[0]

    def decode(self, codes: Tensor) -> Tensor:
        """Mixtures [B, K, D] as they are; ValueError for another number of channels."""
        return super().encode(codes)

    def forward(self, latents: Tensor) -> Quantized:
        """Mixtures with a gradient, as latents and codes, and the entropy."""
        mixed, products = self._mixed(latents)
        losses = {}
        if self.entropy_weight:
            losses["entropy"] = self.entropy_weight * self._entropy(products)
        return Quantized(mixed, mixed, losses)

    def _mixed(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mixtures [B, K, D], and products of latents with the rows of their codebook [B, n, K / n, V]."""
        latents, books = super().encode(latents), len(self.embedding)
        if latents.shape[1] % books:
            raise ValueError(
                f"{latents.shape[1]} latents per image were given; they share {books} codebooks, so their "
                f"number is a multiple of {books}"
            )
        wide = torch.promote_types(torch.promote_types(latents.dtype, self.embedding.dtype), torch.float32)
        with torch.autocast(latents.device.type, enabled=False):
            rows, x = self.embedding.to(wide), latents.to(wide)
            if self.l2_norm:
                rows, x = F.normalize(rows, dim=-1), F.normalize(x, dim=-1)
            x = x.unflatten(1, (books, latents.shape[1] // books))  # [B, n, K / n, D]
            products = x @ rows.detach().mT
            mixed = (products / self.tau).softmax(-1) @ rows
        return mixed.flatten(1, 2).to(latents.dtype), products

    def _entropy(self, products: Tensor) -> Tensor:
        """The entropy loss of all assignments, whichever their codebook."""
        log_p = (products / self.entropy_temperature).flatten(0, -2).log_softmax(-1)
        mean = log_p.exp().mean(0)
        each = -(log_p.exp() * log_p).sum(-1).mean()
        return each + (mean * (mean + 1e-6).log()).sum()
