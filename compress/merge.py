"""Merging the most similar tokens, as pure functions on tensors that know nothing of any model."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matching:
    """Which of N tokens merge into which: sets A (even places) and B (odd places) of a sequence.

    `unmerged` [B, |A|-r] and `source` [B, r] index A, `destination` [B, r] indexes B. Merged sequences hold
    the unmerged tokens of A and then all of B, or, with `second_first`, the first token of each before the
    rest. With nothing to merge (r = 0) sequences stay as they are.
    """

    unmerged: Tensor
    source: Tensor
    destination: Tensor
    num_tokens: int
    second_first: bool = False

    def merge(self, x: Tensor, mode: Literal["mean", "sum", "amax"] = "mean") -> Tensor:
        """Tokens [B, N, D] → [B, N - r, D]; each destination becomes the mean, sum or maximum with its
        sources."""
        if not self.source.shape[1]:
            return x
        even, odd = x[:, ::2], x[:, 1::2]
        kept = even.gather(1, _spread(self.unmerged, x))
        moved = even.gather(1, _spread(self.source, x))
        into = odd.scatter_reduce(1, _spread(self.destination, x), moved, reduce=mode, include_self=True)
        if self.second_first:
            return torch.cat([kept[:, :1], into[:, :1], kept[:, 1:], into[:, 1:]], 1)
        return torch.cat([kept, into], 1)

    def unmerge(self, x: Tensor) -> Tensor:
        """Merged tokens [B, N - r, D] → [B, N, D]: all in their old places, sources as copies of
        destinations."""
        if not self.source.shape[1]:
            return x
        count = self.unmerged.shape[1]
        if self.second_first:
            x = torch.cat([x[:, :1], x[:, 2 : count + 1], x[:, 1:2], x[:, count + 1 :]], 1)
        kept, into = x[:, :count], x[:, count:]
        out = x.new_empty(x.shape[0], self.num_tokens, x.shape[2])
        out[:, 1::2] = into
        out.scatter_(1, _spread(2 * self.unmerged, x), kept)
        return out.scatter_(1, _spread(2 * self.source, x), into.gather(1, _spread(self.destination, x)))

    def merge_weighted(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean over original tokens: x [B, N, D] standing for `size` [B, N, 1] of them (1 unless given).

        Returns the merged tokens [B, N - r, D] and their sizes [B, N - r, 1].
        """
        size = torch.ones_like(x[..., :1]) if size is None else size
        total = self.merge(size, "sum")
        return self.merge(x * size, "sum") / total, total


def bipartite_soft_matching(
    metric: Tensor, r: int, *, class_token: bool = False, distill_token: bool = False
) -> Matching:
    """Match the r most similar (even, odd) pairs of tokens by the cosine of `metric` [B, N, C].

    ToMe (Bolya et al., "Token Merging: Your ViT But Faster", 2023, arXiv 2210.09461, section 3). r is clamped
    to half the tokens that may merge; a class token (place 0) never merges and a distillation token (place 1)
    never receives. With a class token the unmerged tokens stay in order, otherwise they come by falling
    similarity. Raises ValueError for a metric that is not [B, N, C].
    """
    if metric.ndim != 3:
        raise ValueError(f"metric has shape {list(metric.shape)}; matching takes [B, N, C]")
    tokens = metric.shape[1]
    r = max(0, min(r, (tokens - class_token - distill_token) // 2))
    with torch.no_grad():
        metric = metric / metric.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(metric.dtype).tiny)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # [B, |A|, |B|]
        if class_token:
            scores[:, 0] = -torch.inf
        if distill_token:
            scores[..., 0] = -torch.inf
        if not scores.shape[2]:  # a single token has nobody to merge with
            best = partner = scores.new_zeros(scores.shape[:2], dtype=torch.long)
        else:
            best, partner = scores.max(-1)
        order = best.argsort(-1, descending=True)
        source, unmerged = order[:, :r], order[:, r:]
        if class_token:
            unmerged = unmerged.sort(-1).values
    return Matching(unmerged, source, partner.gather(1, source), tokens, class_token and distill_token)


def _spread(index: Tensor, x: Tensor) -> Tensor:
    """Token indices [B, n] for gathering from x [B, N, D]."""
    return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
