"""Residual quantization of a sampled latent set, scale by scale, where a scale is a number of tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantized
from .gaussian import DiagonalGaussian
from .shared_residual import SharedResidualQuantizer


class VariationalResidualQuantizer(SharedResidualQuantizer):
    """VAT's quantizer (Zhang et al., "3D representation in 512-Byte: Variational tokenizer is the key for
    autoregressive 3D generation", 2024, arXiv 2412.02202), from the paper: no code was published.

    Latents are moments [B, N, 2D] of N tokens. Their mean (in training a sample) is quantized over `scales`:
    each averages what is left down to as many tokens, takes the nearest rows of one codebook, and spreads
    them linearly over the N places again; the scales add up. `codes` are indices [B, n_1 + … + n_S]; the
    first scales alone are a coarser shape. The codebook moves by running means, and unused rows restart.

    Losses of a forward: `kl` (sum over tokens and channels, mean over the batch, times `kl_weight`) and
    `commitment` (mean over scales, times `commitment_cost`). `dropout` is the share of samples that keep a
    random number of first scales in training.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        num_latents: int,
        scales: Sequence[int],
        *,
        kl_weight: float = 1e-4,
        commitment_cost: float = 0.25,
        dropout: float = 0.5,
        decay: float = 0.99,
    ) -> None:
        super().__init__(codebook_size, dim, 1, decay=decay, restart_unused=True, moves_each_depth=False)
        rising = list(scales) == sorted(scales) and scales and scales[0] >= 1 and scales[-1] <= num_latents
        if not rising:
            raise ValueError(
                f"scales are {list(scales)}; they are numbers of tokens in rising order, from 1 to "
                f"{num_latents}, the number of latents"
            )
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout}; it is a share of the samples, 0 to 1")
        self.num_latents, self.scales = num_latents, tuple(scales)
        self.kl_weight, self.commitment_cost, self.dropout = kl_weight, commitment_cost, dropout
        book = nn.Module()
        book.register_buffer("weight", torch.randn(codebook_size, dim))
        book.register_buffer("counts", torch.ones(codebook_size))
        book.register_buffer("sums", book.weight.clone())
        self.codebooks = nn.ModuleList([book])

    def books(self) -> nn.ModuleList:
        """The one codebook of all scales."""
        return self.codebooks

    def tables(self, book: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, running counts and running sums of the codebook."""
        return book.weight, book.counts, book.sums

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of codes after each scale: those of a prefix that decodes."""
        return tuple(sum(self.scales[: number + 1]) for number in range(len(self.scales)))

    def encode(self, latents: Tensor) -> Tensor:
        """Moments [B, N, 2D] → indices [B, n], of the means."""
        with torch.autocast(latents.device.type, enabled=False):
            rest, codes = self._moments(latents.detach()).mean, []
            for count in self.scales:
                codes.append(self._nearest(self._reduced(rest, count)))
                rest = rest - self._spread(self._rows(rest)[codes[-1]])
        return torch.cat(codes, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Indices [B, n] of all scales, or of the first ones → latents [B, N, D]."""
        if codes.shape[1] not in self.lengths:
            raise ValueError(
                f"codes have {codes.shape[1]} per sample; whole scales end at "
                f"{', '.join(map(str, self.lengths))}"
            )
        scales = self.scales[: self.lengths.index(codes.shape[1]) + 1]
        return sum(self._spread(F.embedding(part, self.rows)) for part in codes.split(scales, 1))

    def forward(self, latents: Tensor, depths: Tensor | None = None) -> Quantized:
        """Straight-through sum of the scales, codes and losses; `depths` [B] is how many first scales each
        sample keeps, in training drawn unless given."""
        with torch.autocast(latents.device.type, enabled=False):
            posterior = self._moments(latents)
            wide = posterior.sample() if self.training else posterior.mean
            if depths is None and self.training:
                depths = self._draw_depths(len(wide), wide.device)
            total, codes, distances = torch.zeros_like(wide), [], []
            rest = wide.detach()
            for number, count in enumerate(self.scales):
                reduced = self._reduced(rest, count)
                codes.append(self._nearest(reduced))
                added = self._spread(self._rows(wide)[codes[-1]])
                rest = rest - added
                if self.training:
                    self._count(reduced.reshape(-1, self.dim), codes[-1].flatten())
                if depths is not None:
                    added = added * (number < depths).to(added)[:, None, None]
                total = total + added
                distances.append((wide - total).square().mean())
            if self.training:
                self._move()
            passed = wide + (total - wide).detach()
        losses = {
            "kl": self.kl_weight * posterior.kl().sum() / max(1, len(wide)),
            "commitment": self.commitment_cost * torch.stack(distances).mean(),
        }
        return Quantized(passed.to(latents.dtype), torch.cat(codes, 1), losses)

    def _moments(self, latents: Tensor) -> DiagonalGaussian:
        if latents.ndim != 3 or latents.shape[1:] != (self.num_latents, 2 * self.dim):
            raise ValueError(
                f"latents have shape {list(latents.shape)}; this quantizer takes moments "
                f"[B, {self.num_latents}, {2 * self.dim}]"
            )
        return DiagonalGaussian(latents.to(torch.promote_types(latents.dtype, torch.float32)))

    def _draw_depths(self, batch: int, device: torch.device) -> Tensor:
        count = len(self.scales)
        drawn = torch.randint(1, count + 1, (batch,), device=device)
        return torch.where(torch.rand(batch, device=device) < self.dropout, drawn, count)

    def _reduced(self, x: Tensor, count: int) -> Tensor:
        """Means over the places, [B, N, D] → [B, count, D]."""
        return F.adaptive_avg_pool1d(x.transpose(1, 2), count).transpose(1, 2)

    def _spread(self, x: Tensor) -> Tensor:
        """Linear in between, [B, count, D] → [B, N, D]."""
        return F.interpolate(x.transpose(1, 2), self.num_latents, mode="linear").transpose(1, 2)
