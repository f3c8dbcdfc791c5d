"""Speed of ToMe's matching and merging, as a ratio against a straightforward implementation in the same
run."""

import torch
from torch import Tensor

from ...compress.algorithms.merge import bipartite_soft_matching
from .selection import Comparison

SIZES = ((8, 197, 384, 13, 1.0), (1, 577, 1024, 23, 1.0), (8, 577, 1024, 23, 1.3))
"""Images, tokens (class token included), width, merged per block, and the bar: ViT-S/16 and ViT-L/14 at 336
pixels."""


def plain_tome(x: Tensor, size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Match r tokens of x [B, N, D] by `metric` [B, N, C], the class token protected, and merge them weighted
    by `size` [B, N, 1], by gathers and scatters of whole rows."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)
    scores[:, 0] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)[..., None]
    source, unmerged = order[:, :r], order[:, r:].sort(1).values
    partner = partner[..., None].gather(1, source)

    def merge(values: Tensor) -> Tensor:
        even, odd = values[:, ::2], values[:, 1::2]
        width = values.shape[-1]
        stay = even.gather(1, unmerged.expand(-1, -1, width))
        moved = even.gather(1, source.expand(-1, -1, width))
        odd = odd.scatter_reduce(1, partner.expand(-1, -1, width), moved, reduce="sum")
        return torch.cat([stay, odd], 1)

    total = merge(size)
    return merge(x * size) / total, total


def comparisons() -> list[Comparison]:
    """Matching and one weighted merge of a block, at three sizes."""
    return [_comparison(*size) for size in SIZES]


def _comparison(images: int, tokens: int, width: int, r: int, bar: float) -> Comparison:
    random = torch.Generator().manual_seed(tokens + images)
    x = torch.randn(images, tokens, width, generator=random)
    metric = torch.randn(images, tokens, 64, generator=random)
    size = torch.randint(1, 4, (images, tokens, 1), generator=random).float()

    def ours() -> Tensor:
        matching = bipartite_soft_matching(metric, r, protected=1)
        merged, total = matching.merge_weighted(x, size)
        return torch.cat([merged, total], -1)

    def plain() -> Tensor:
        return torch.cat(plain_tome(x, size, metric, r), -1)

    return Comparison(f"ToMe {images}×{tokens}, r={r}, D={width}", plain, ours, bar)
