"""Importance of tokens in the graph of attention, and pruning by it, as pure functions on tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .merge import Matching, similarity, unit_rows


def page_rank(
    attention: Tensor, iterations: int, *, class_token: bool = False, epsilon: float | None = None
) -> Tensor:
    """Weighted page rank of N tokens in each head's graph of attention [B, H, N, N], [B, H, N] of sum 1.

    Zero-TPrune (Wang et al., 2024, arXiv 2305.17328, algorithm 1): in every iteration a token collects the
    attention that it receives (rows of `attention` are queries and sum to 1), weighted by the senders'
    scores. All tokens start equal or, with `class_token`, the first weighs √N times the others. With
    `epsilon` iterations end once no score changes by that much.
    """
    tokens = attention.shape[-1]
    start = attention.new_ones(tokens)
    if class_token:
        start[0] = tokens**0.5
    scores = (start / start.sum()).expand(attention.shape[0] * attention.shape[1], 1, -1)
    received = attention.flatten(0, 1).transpose(1, 2)
    for _ in range(iterations):
        before, scores = scores, similarity(scores, received)
        if epsilon is not None and bool((scores - before).abs().max() < epsilon):
            break
    return scores.view(attention.shape[:-1])


def head_variance(scores: Tensor) -> Tensor:
    """Variance [B, H] of the scores [B, H, N] over tokens, on a scale where their mean is 1."""
    return (scores * scores.shape[-1]).var(-1, correction=0)


def filtered_heads(scores: Tensor, v_min: float, v_max: float) -> Tensor:
    """The heads [B, H] whose scores [B, H, N] have a variance from `v_min` to `v_max` (arXiv 2305.17328,
    section 3.2); all heads of an image in which none has."""
    variance = head_variance(scores)
    used = (variance >= v_min) & (variance <= v_max)
    return used | ~used.any(-1, keepdim=True)


def head_mean(scores: Tensor, heads: Tensor | None = None) -> Tensor:
    """Root mean square [B, N] of the scores [B, H, N] over heads, or over the `heads` [B, H] marked True."""
    if heads is None:
        return scores.square().mean(1).sqrt()
    weights = heads.unsqueeze(-1).to(scores)
    return ((scores.square() * weights).sum(1) / weights.sum(1)).sqrt()


@dataclass(frozen=True)
class SimilarPruning:
    """The S-stage of one block: places of patches `less` [B, a] and `more` [B, b] important, both by falling
    importance, the cosine `best` [B, a] of each of the former with the most similar of the latter, and the
    places `pruned` [B, r]."""

    less: Tensor
    more: Tensor
    best: Tensor
    pruned: Tensor


def prune_similar(importance: Tensor, metric: Tensor, r: int, protected: int = 0) -> SimilarPruning:
    """The r of N tokens that are least missed: less important ones that resemble a more important one.

    Zero-TPrune's S-stage with the partition "Seq-U" (arXiv 2305.17328, section 3.3): of the tokens by
    `importance` [B, N], without the first `protected`, the more important half is kept whole; of the others
    those go whose `metric` [B, N, C] has the highest cosine with one of that half. r is clamped to the number
    of the others.
    """
    order = importance[:, protected:].argsort(dim=-1, descending=True, stable=True) + protected
    half = -(-order.shape[1] // 2)
    more, less = order[:, :half], order[:, half:]
    unit = unit_rows(metric)
    rows = torch.arange(len(unit), device=unit.device)[:, None]
    best = similarity(unit[rows, less], unit[rows, more]).amax(-1) if less.shape[1] else less.to(unit)
    pruned = less.gather(1, best.argsort(dim=-1, descending=True, stable=True)[:, : max(0, r)])
    return SimilarPruning(less, more, best, pruned)


def subgraph(attention: Tensor, kept: Tensor) -> Tensor:
    """The attention [B, H, N, N] among the tokens at places `kept` [B, n], with rows that sum to 1 again."""
    heads = attention.shape[1]
    rows = attention.gather(2, kept[:, None, :, None].expand(-1, heads, -1, attention.shape[-1]))
    part = rows.gather(3, kept[:, None, None, :].expand(-1, heads, kept.shape[1], -1))
    return part / part.sum(-1, keepdim=True).clamp_min(torch.finfo(part.dtype).tiny)


def without(tokens: int, dropped: Tensor) -> Tensor:
    """The places [B, tokens - r] that are not among the `dropped` [B, r], ascending; those differ."""
    stay = torch.ones(len(dropped), tokens, dtype=torch.bool, device=dropped.device)
    return stay.scatter_(1, dropped, False).nonzero()[:, 1].view(len(dropped), -1)


def pruned_matching(metric: Tensor, kept: Tensor, protected: int = 0) -> Matching:
    """The matching that keeps the tokens at places `kept` [B, M], ascending and with the first `protected`.

    Each dropped token points at the kept one, not protected, whose `metric` [B, N, C] has the highest cosine
    with its own, so that it can be shown as a copy of it where all N places are needed.
    """
    batch, tokens, _ = metric.shape
    dropped = without(tokens, kept)
    unit = unit_rows(metric)
    rows = torch.arange(batch, device=metric.device)[:, None]
    nearest = similarity(unit[rows, dropped], unit[rows, kept[:, protected:]]).argmax(-1)
    return Matching(kept, dropped, nearest + protected, tokens)
