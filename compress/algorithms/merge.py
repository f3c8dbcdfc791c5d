"""Merging the most similar tokens, as pure functions on tensors, independent of any model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["mean", "sum", "amax", "prune"]


@dataclass(frozen=True)
class Matching:
    """Which of N tokens stay and which merge into them.

    `kept` [B, M] are the places of the tokens that stay, in their new order; `source` [B, r] the places of
    those that merge; `destination` [B, r] the new places (0 to M-1) they merge into.
    """

    kept: Tensor
    source: Tensor
    destination: Tensor
    num_tokens: int

    @classmethod
    def identity(cls, batch: int, num_tokens: int, device: torch.device | None = None) -> "Matching":
        """Every token stays in its place."""
        nothing = torch.empty(batch, 0, dtype=torch.long, device=device)
        kept = torch.arange(num_tokens, device=device).expand(batch, -1)
        return cls(kept, nothing, nothing, num_tokens)

    @cached_property
    def groups(self) -> Tensor:
        """The new place [B, N] of every token: its own, or that of the token it merged into."""
        places = torch.empty(len(self.kept), self.num_tokens, dtype=torch.long, device=self.kept.device)
        new = torch.arange(self.kept.shape[1], device=self.kept.device)
        places.scatter_(1, self.kept, new.expand_as(self.kept))
        return places.scatter_(1, self.source, self.destination)

    def merge(self, x: Tensor, mode: Mode = "mean") -> Tensor:
        """Tokens [B, N, D] → [B, M, D]; each destination becomes the mean, sum or maximum of itself and its
        sources, or, with "prune", stays what it was."""
        if not self.source.shape[1]:
            return x
        out = _rows(x, self.kept)
        if mode == "prune":
            return out
        moved = _rows(x, self.source)
        if mode == "sum":
            return _add_rows(out, self.destination, moved)
        return out.scatter_reduce(1, _spread(self.destination, x), moved, reduce=mode, include_self=True)

    def unmerge(self, x: Tensor) -> Tensor:
        """Merged tokens [B, M, D] → [B, N, D]: all in their old places, sources as copies of
        destinations."""
        return x.gather(1, _spread(self.groups, x)) if self.source.shape[1] else x

    def merge_weighted(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean over original tokens: x [B, N, D] standing for `size` [B, N, 1] of them (1 unless given).

        Returns the merged tokens [B, M, D] and their sizes [B, M, 1]. Sums are taken in float32 or wider.
        """
        exact = torch.promote_types(x.dtype, torch.float32)
        size = torch.ones_like(x[..., :1], dtype=exact) if size is None else size.to(exact)
        total = self.merge(size, "sum")
        if not self.source.shape[1]:
            return x, total
        # Weights of 1 where nothing merges leave those tokens as they are.
        kept = _rows(x, self.kept).to(exact).mul_(_rows(size, self.kept) / total)
        weights = _rows(size, self.source) / _rows(total, self.destination)
        moved = _rows(x, self.source).to(exact) * weights
        return _add_rows(kept, self.destination, moved).to(x.dtype), total


def bipartite_soft_matching(
    metric: Tensor,
    r: int,
    *,
    protected: int | Tensor = 0,
    class_token: bool = False,
    distill_token: bool = False,
) -> Matching:
    """Match the r most similar pairs of one even and one odd token by the cosine of `metric` [B, N, C].

    ToMe (Bolya et al., "Token Merging: Your ViT But Faster", 2023, arXiv 2210.09461, section 3): every even
    token picks its most similar odd token, and the r best of them merge into their picks. Tokens in
    `protected` (the first so many, or a mask [N]) neither merge nor receive and lead the merged sequence in
    their order; `class_token` and `distill_token` protect places 0 and 1. The rest follows: unmerged even
    tokens, in order if anything is protected and by falling similarity if not, then the odd tokens. r is
    clamped to half the unprotected tokens. Equal similarities go to the lower place. Raises ValueError for a
    metric that is not [B, N, C].
    """
    unit = unit_rows(metric)
    batch, tokens, _ = unit.shape
    mask = torch.zeros(tokens, dtype=torch.bool)
    if isinstance(protected, Tensor):
        mask |= protected.cpu()
    else:
        mask[:protected] = True
    mask[:1] |= class_token
    mask[1:2] |= distill_token
    shielded = int(mask.sum())
    r = max(0, min(r, (tokens - shielded) // 2, int((~mask[::2]).sum())))
    if not r or bool(mask[1::2].all()):
        return Matching.identity(batch, tokens, metric.device)
    with torch.no_grad():
        scores = similarity(unit[:, ::2], unit[:, 1::2])  # [B, |A|, |B|]
        if shielded:
            mask = mask.to(metric.device)
            scores.masked_fill_(mask[::2, None] | mask[1::2], -torch.inf)
        best, partner = scores.max(-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        source, unmerged = order[:, :r], order[:, r:]
        if shielded:
            unmerged = unmerged.sort(-1).values
        odd = torch.arange(1, tokens, 2, device=metric.device).expand(batch, -1)
        kept = torch.cat([2 * unmerged, odd], 1)
        destination = unmerged.shape[1] + partner.gather(1, source)
        if shielded:
            rank = torch.where(mask[kept], kept, tokens).argsort(dim=-1, stable=True)
            kept = kept.gather(1, rank)
            destination = rank.argsort(-1).gather(1, destination)
    return Matching(kept, 2 * source, destination, tokens)


def kth_bipartite_soft_matching(metric: Tensor, k: int) -> Matching:
    """Merge the first k - 1 of every k tokens into the most similar of the last ones, by `metric` [B, N, C].

    ToMe's strided matching (arXiv 2210.09461, its published code): N → N // k tokens. The N mod k tokens at
    the end are dropped, and unmerging gives (N // k) k tokens. Raises ValueError if k is not in 1 to N.
    """
    unit = unit_rows(metric)
    batch, tokens, _ = unit.shape
    if not 1 <= k <= tokens:
        raise ValueError(f"k is {k}; it must be between 1 and the number of tokens, {tokens}")
    places = torch.arange(tokens // k * k, device=metric.device).unflatten(0, (-1, k))
    kept = places[:, -1].expand(batch, -1)
    source = places[:, :-1].flatten().expand(batch, -1)
    with torch.no_grad():
        destination = similarity(unit[:, source[0]], unit[:, kept[0]]).argmax(-1)
    return Matching(kept, source, destination, places.numel())


def r_schedule(num_layers: int, r: int | tuple[int, float] | Sequence[int]) -> list[int]:
    """Tokens to merge in each of `num_layers` layers, by ToMe's three forms of r (arXiv 2210.09461, 4.1).

    A number is used in every layer. (r, inflection) runs from r (1 - inflection) to r (1 + inflection):
    inflection -1 is the paper's decreasing schedule. A list is taken as it is, with zeros up to `num_layers`.
    A tuple of two is always (r, inflection).
    """
    if isinstance(r, int):
        return [r] * num_layers
    if not isinstance(r, tuple) or len(r) != 2:
        return list(r) + [0] * (num_layers - len(r))
    mean, inflection = r
    first = int(mean * (1 - inflection))
    step = (2 * mean - 2 * first) / (num_layers - 1) if num_layers > 1 else 0.0
    return [int(first + step * layer) for layer in range(num_layers)]


def compose(matchings: Sequence[Matching | None]) -> Tensor | None:
    """The place [B, N] of every first token after all matchings in turn; None if none of them merges."""
    groups = None
    for matching in matchings:
        if matching is not None:
            groups = matching.groups if groups is None else matching.groups.gather(1, groups)
    return groups


def representatives(groups: Tensor, count: int) -> Tensor:
    """The first token [B, count] of every group 0 to count - 1 of `groups` [B, N], ascending.

    A merged image is cut to one token per group with it, where sequences must keep whole tokens.
    """
    batch, tokens = groups.shape
    places = torch.arange(tokens, device=groups.device).expand(batch, -1)
    first = groups.new_full((batch, count), tokens)
    return first.scatter_reduce(1, groups, places, reduce="amin").sort(-1).values


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """Products of all rows of x [B, N, C] and y [B, M, C], [B, N, M], in their own precision even under
    autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ y.transpose(1, 2)


def unit_rows(metric: Tensor) -> Tensor:
    """Rows of unit length in float32 or wider; zero rows stay zero."""
    if metric.ndim != 3:
        raise ValueError(f"metric has shape {list(metric.shape)}; matching takes [B, N, C]")
    metric = metric.detach().to(torch.promote_types(metric.dtype, torch.float32))
    return metric / metric.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(metric.dtype).tiny)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """The tokens [B, n, D] of x [B, N, D] at the places `index` [B, n], copied row by row."""
    return x.flatten(0, 1).index_select(0, _flat(index, x.shape[1])).view(*index.shape, x.shape[2])


def _add_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Add `rows` [B, n, D] to x [B, M, D] in place, at the places `index` [B, n]; returns x."""
    x.view(-1, x.shape[2]).index_add_(0, _flat(index, x.shape[1]), rows.flatten(0, 1))
    return x


def _flat(index: Tensor, tokens: int) -> Tensor:
    """Places [B, n] among `tokens` as places in the flattened batch [B n]."""
    first = torch.arange(len(index), device=index.device).mul_(tokens)
    return (index + first[:, None]).flatten()


def _spread(index: Tensor, x: Tensor) -> Tensor:
    """Token indices [B, n] for gathering from x [B, N, D]."""
    return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
