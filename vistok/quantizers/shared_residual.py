"""Residual quantization with one codebook for all depths, moved by running means instead of a loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantized, Quantizer

EPSILON = 1e-5  # of the smoothed counts
JITTER = 0.01  # of latents that are repeated to replace codes


class SharedResidualQuantizer(Quantizer):
    """RQ whose depths share a codebook (Lee et al., 2022, arXiv 2203.01941, sections 3.1 and A.1).

    Each of `depth` codes is the row nearest to what the rows before it leave; the rows add up. Codes are
    indices [..., Q]; distances and sums are in float32 or better. In training mode a forward moves each row
    to the running mean (`decay`) of the residuals that chose it: statistics depth after depth, and rows with
    them (`moves_each_depth`) or once at the end. With `restart_unused` a row whose running count is below 1
    becomes one of the residuals.

    Loss of a forward: `commitment`, the mean over depths of the squared distance of the latents to the sum of
    the first codes. The gradient passes straight through to the latents.

    A family subclasses it with the names of its checkpoints: `books` are the modules that hold the table of a
    depth, all alike, of which the last counts, and `tables` returns its rows and running statistics.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        depth: int,
        *,
        decay: float = 0.99,
        restart_unused: bool = False,
        moves_each_depth: bool = True,
    ) -> None:
        super().__init__()
        self.moves_each_depth = moves_each_depth
        self.codebook_sizes = (codebook_size,) * depth
        self.dim, self.decay, self.restart_unused = dim, decay, restart_unused

    def books(self) -> nn.ModuleList:
        """One module per depth; training keeps them alike."""
        raise NotImplementedError

    def tables(self, book: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [V, D], running counts [V] and running sums [V, D] of a module, as views of its buffers."""
        raise NotImplementedError

    @property
    def rows(self) -> Tensor:
        """The codebook [V, D]."""
        return self.tables(self.books()[-1])[0]

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [..., D] → indices int64 [..., Q] (the first row on ties)."""
        with torch.autocast(latents.device.type, enabled=False):
            residual, codes = self._wide(latents.detach()), []
            for _ in self.codebook_sizes:
                codes.append(self._nearest(residual))
                residual = residual - self._rows(residual)[codes[-1]]
        return torch.stack(codes, -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Indices [..., Q], or only the first of the Q → latents [..., D]."""
        return self.decode_by_depth(codes).sum(-2)

    def decode_by_depth(self, codes: Tensor) -> Tensor:
        """Indices [..., Q] → the rows of every depth [..., Q, D], which add up to what `decode` returns.

        Raises ValueError for more codes per token than there are depths.
        """
        depth = len(self.codebook_sizes)
        if not 1 <= codes.shape[-1] <= depth:
            raise ValueError(
                f"tokens have {codes.shape[-1]} codes each; this codebook is read 1 to {depth} times"
            )
        return F.embedding(codes, self.rows)

    def forward(self, latents: Tensor) -> Quantized:
        """Straight-through sum of the rows, codes and the commitment; in training mode the codebook moves."""
        with torch.autocast(latents.device.type, enabled=False):
            wide, codes, distances = self._wide(latents), [], []
            total = torch.zeros_like(wide)
            for _ in self.codebook_sizes:
                residual = (wide - total).detach()
                codes.append(self._nearest(residual))
                total = total + self._rows(wide)[codes[-1]]
                if self.training:
                    self._count(residual.reshape(-1, self.dim), codes[-1].flatten())
                    if self.moves_each_depth:
                        self._move()
                distances.append((wide - total).square().mean())
            if self.training and not self.moves_each_depth:
                self._move()
            passed = wide + (total - wide).detach()
        losses = {"commitment": torch.stack(distances).mean()}
        return Quantized(passed.to(latents.dtype), torch.stack(codes, -1), losses)

    def _wide(self, latents: Tensor) -> Tensor:
        if latents.shape[-1] != self.dim:
            raise ValueError(
                f"latents have {latents.shape[-1]} channels; this codebook has rows of {self.dim}"
            )
        return latents.to(torch.promote_types(latents.dtype, torch.float32))

    def _rows(self, like: Tensor) -> Tensor:
        """The codebook in the dtype of `like`; a copy, as training changes it in place."""
        return self.rows.to(like.dtype, copy=self.training)

    def _nearest(self, residual: Tensor) -> Tensor:
        rows, flat = self._rows(residual), residual.reshape(-1, self.dim)
        norms = flat.square().sum(-1, keepdim=True) + rows.square().sum(-1)
        distances = torch.addmm(norms, flat, rows.T, alpha=-2.0)
        return distances.argmin(-1).view(residual.shape[:-1])

    @torch.no_grad()
    def _count(self, residuals: Tensor, codes: Tensor) -> None:
        """Move the running statistics by one depth's residuals [n, D] and codes [n]."""
        _, counts, sums = self.tables(self.books()[-1])
        if not len(codes):
            return
        hits = torch.zeros_like(counts).index_add_(0, codes, torch.ones_like(codes, dtype=counts.dtype))
        added = torch.zeros_like(sums).index_add_(0, codes, residuals.to(sums))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(hits)
            torch.distributed.all_reduce(added)
        counts.mul_(self.decay).add_(hits, alpha=1 - self.decay)
        sums.mul_(self.decay).add_(added, alpha=1 - self.decay)
        if self.restart_unused:
            used = (counts >= 1).to(counts)[:, None]
            fresh = self._replacements(residuals, len(counts)).to(sums)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.broadcast(fresh, 0)
            sums.mul_(used).add_(fresh * (1 - used))
            counts.mul_(used[:, 0]).add_(1 - used[:, 0])

    @torch.no_grad()
    def _move(self) -> None:
        """Move the rows to the running means, and all depths' tables with them."""
        rows, counts, sums = self.tables(self.books()[-1])
        total = counts.sum()
        smoothed = (counts + EPSILON) / (total + len(counts) * EPSILON) * total
        rows.copy_(sums / smoothed[:, None])
        for book in list(self.books())[:-1]:
            for own, moved in zip(self.tables(book), (rows, counts, sums), strict=True):
                own.copy_(moved)

    def _replacements(self, residuals: Tensor, count: int) -> Tensor:
        """`count` of the residuals [n, D] in random order; repeated with noise where they are too few."""
        if len(residuals) < count:
            residuals = residuals.repeat(-(-count // len(residuals)), 1)
            residuals = residuals + torch.rand_like(residuals) * (JITTER / self.dim**0.5)
        return residuals[torch.randperm(len(residuals), device=residuals.device)[:count]]
