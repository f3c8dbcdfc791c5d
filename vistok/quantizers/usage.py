"""How much of a code space is used: pure functions of codes, for logs, tests and evaluation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def bit_entropy(bits: Tensor) -> Tensor:
    """Entropy of each bit over the batch: bool [B, …] → float [...] in 0..1 bits.

    A bit that is the same in every image has 0, one that is set in half of them 1. Over B images the estimate
    is about 0.72 / B too low; 32 images or more separate 0.9 from 1.
    """
    share = bits.float().mean(0)
    return (torch.special.entr(share) + torch.special.entr(1 - share)) / torch.log(share.new_tensor(2.0))


def codebook_usage(indices: Tensor, codebook_sizes: Sequence[int]) -> Tensor:
    """Share of each codebook that occurs among the indices int64 [B, K] or [B, K, Q]: float [Q] in 0..1."""
    used = [column.unique().numel() / size for column, size in _columns(indices, codebook_sizes)]
    return torch.tensor(used, device=indices.device)


def perplexity(indices: Tensor, codebook_sizes: Sequence[int]) -> Tensor:
    """Exponential of the entropy of each codebook's indices [B, K] or [B, K, Q]: float [Q], 1..its size."""
    values = []
    for column, _ in _columns(indices, codebook_sizes):
        counts = column.unique(return_counts=True)[1]  # counting rows needs no table of the codebook's size
        values.append(torch.special.entr(counts / max(column.numel(), 1)).sum().exp())
    return torch.stack(values)


class HitStatistics(nn.Module):
    """Mixin of quantizers that keep a running mean of how often each code is chosen, in the buffer
    `ema_vocab_hit_SV` (VAR, arXiv 2404.02905, and its successors)."""

    def start_hits(self, *shape: int) -> None:
        """Begin to count: codes of one kind [V], or of several scales [S, V]."""
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(shape))
        self._hit_updates = 0

    @torch.no_grad()
    def count_hits(self, codes: Tensor, scale: int | None = None) -> None:
        """Add the codes of one batch, of a scale where there are several."""
        row = self.ema_vocab_hit_SV if scale is None else self.ema_vocab_hit_SV[scale]
        hits = torch.bincount(codes.flatten(), minlength=len(row)).to(row)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(hits)
        # Parity: updates are counted over all scales, so only the first scale starts as its first hits.
        if self._hit_updates == 0:
            row.copy_(hits)
        else:
            row.lerp_(hits, 0.1 if self._hit_updates < 100 else 0.01)
        self._hit_updates += 1

    def hit_usage(self, vectors: int) -> Tensor:
        """The share of codes, per scale where there are several, that are chosen at least 0.08 times as often
        as if all of `vectors` latents per update were spread evenly: 0..1."""
        return (self.ema_vocab_hit_SV >= 0.08 * vectors / self.ema_vocab_hit_SV.shape[-1]).float().mean(-1)


def _columns(indices: Tensor, codebook_sizes: Sequence[int]) -> list[tuple[Tensor, int]]:
    """Each codebook's indices, flat, and its size."""
    columns = indices.reshape(-1, 1) if len(codebook_sizes) == 1 else indices.flatten(0, -2)
    if columns.shape[-1] != len(codebook_sizes):
        raise ValueError(
            f"indices have {columns.shape[-1]} codebooks; codebook_sizes name {len(codebook_sizes)}"
        )
    return list(zip(columns.unbind(-1), codebook_sizes, strict=True))
