"""What merging inside a vision transformer must compute, by plain loops and explicit soft-maxes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def merged_groups(metric: Tensor, r: int, protected: int = 0) -> list[set[int]]:
    """Groups of token places, in their new order, after ToMe merges the r best pairs of one image [N, C]."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    tokens = len(metric)
    odd = [b for b in range(1, tokens, 2) if b >= protected]
    best = {}
    for a in range(protected + protected % 2, tokens, 2):
        if odd:
            best[a] = max(odd, key=lambda b: float(unit[a] @ unit[b]))
    ranked = sorted(best, key=lambda a: -float(unit[a] @ unit[best[a]]))
    sources = ranked[: max(0, min(r, (tokens - protected) // 2))]
    groups = {b: {b} for b in odd}
    for a in sources:
        groups[best[a]].add(a)
    if not sources:
        return [{place} for place in range(tokens)]
    unmerged = [a for a in (sorted(best) if protected else ranked) if a not in sources]
    return [{place} for place in range(protected)] + [{a} for a in unmerged] + list(groups.values())


Attend = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]]
Feed = Callable[[nn.Module, Tensor], Tensor]


def tome_forward(
    x: Tensor, blocks: Sequence[nn.Module], plan: list[int], prefix: int, attend: Attend, feed: Feed
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """ToMe with proportional attention on x [B, N, D].

    `attend` gives a block's queries, keys and values [B, H, N, d] (queries scaled) and what to do with the
    heads' outputs [B, N, H d] before they are added; `feed` gives what the MLP adds. Returns the merged
    tokens, their sizes [B, M], and the full-length tokens [B, N, D] after each block.
    """
    places = [[{n} for n in range(x.shape[1])] for _ in x]
    states = []
    for block, r in zip(blocks, plan, strict=True):
        query, key, value, finish = attend(block, x)
        size = torch.tensor([[len(group) for group in image] for image in places], dtype=x.dtype)
        weights = torch.exp(query @ key.transpose(2, 3)) * size[:, None, None]
        weights = weights / weights.sum(-1, keepdim=True)
        x = x + finish((weights @ value).transpose(1, 2).flatten(2))
        if r:
            metric, merged = key.mean(1), []
            for image in range(len(x)):
                groups = merged_groups(metric[image], r, prefix)
                weighed = x[image] * size[image, :, None]
                rows = [weighed[sorted(g)].sum(0) / size[image, sorted(g)].sum() for g in groups]
                merged.append(torch.stack(rows))
                places[image] = [set().union(*(places[image][n] for n in g)) for g in groups]
            x = torch.stack(merged)
        x = x + feed(block, x)
        full = [
            torch.stack(
                [x[image, next(i for i, g in enumerate(groups) if n in g)] for n in range(_total(groups))]
            )
            for image, groups in enumerate(places)
        ]
        states.append(torch.stack(full))
    size = torch.tensor([[len(group) for group in image] for image in places], dtype=x.dtype)
    return x, size, states


def _total(groups: list[set[int]]) -> int:
    return sum(len(group) for group in groups)


def timm_attend(block, x):
    attention = block.attn
    batch, tokens, _ = x.shape
    qkv = attention.qkv(block.norm1(x)).view(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(qkv[0]) * attention.scale, attention.k_norm(qkv[1])
    return query, key, qkv[2], lambda heads: block.ls1(attention.proj(heads))


def timm_feed(block, x):
    return block.ls2(block.mlp(block.norm2(x)))
