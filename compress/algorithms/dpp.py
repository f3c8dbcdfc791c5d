"""Diverse subsets by a determinantal point process (DPP), weighted by relevance to a text."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .select import cosine_distances, full_precision

LEAST_VARIANCE = 1e-12  # what a token adds to the volume where it is a combination of picked ones


def text_relevance(image_embeds: Tensor, text_embeds: Tensor, *, sign: float = 1.0) -> Tensor:
    """How much image_embeds [N, E] say about text_embeds [M, E], [N] from 0 to 1.

    The cosine times `sign`, mean over the M embeddings, stretched to the range from just above 0 to just
    above 1 over all N. Equal cosines give 1. CDPruner (Zhang et al., "Beyond Attention or Similarity:
    Maximizing Conditional Diversity for Token Pruning in MLLMs", 2025, arXiv 2506.10967, section 3.2). Raises
    ValueError without embeddings of a text and for widths that differ.
    """
    if not len(text_embeds) or image_embeds.shape[-1] != text_embeds.shape[-1]:
        raise ValueError(
            f"embeddings of the image are {list(image_embeds.shape)} and those of the text "
            f"{list(text_embeds.shape)}; at least one text embedding of the same width is needed"
        )
    wide = torch.promote_types(image_embeds.dtype, torch.float32)
    with full_precision(image_embeds.device):
        image_unit, text_unit = (F.normalize(x.to(wide), dim=-1) for x in (image_embeds, text_embeds))
        relevance = sign * (image_unit @ text_unit.T).mean(-1)
    low, high = relevance.aminmax()
    if not bool(high > low):
        return torch.ones_like(relevance)
    return (relevance - low + 1e-6) / (high - low)


def dpp_order(features: Tensor, relevance: Tensor, count: int) -> Tensor:
    """Greedy order of the `count` tokens that span the largest volume: features [N, D], relevance [N] →
    [count].

    The kernel is the cosine of two tokens times the relevance of both. Each pick is the token with the
    largest part orthogonal to those picked so far, of equal ones the lowest place. Once all are combinations
    of picked ones, the lowest places follow; no place is repeated. float64 features are used as they are,
    others in float32.

    CDPruner (see `text_relevance`), section 3.3, by the algorithm of Chen et al., "Fast Greedy MAP Inference
    for Determinantal Point Process to Improve Recommendation Diversity", 2018, arXiv 1709.05135. Raises
    ValueError for a count above N and for features that are not finite.
    """
    tokens = len(features)
    if not 0 <= count <= tokens or relevance.shape != (tokens,):
        raise ValueError(
            f"{count} tokens were requested by relevance {list(relevance.shape)}; there are {tokens} to "
            "choose from"
        )
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.no_grad(), full_precision(features.device):
        kernel = 1 - cosine_distances(features, dtype)
        relevance = relevance.to(dtype)
        kernel.mul_(relevance).mul_(relevance[:, None])
        variance = kernel.diagonal().clone()
        # [count, N]: row t holds what each token has along the t-th new direction.
        parts = kernel.new_zeros(count, tokens)
        order = torch.empty(count, dtype=torch.long, device=features.device)
        for step in range(count):
            variance.clamp_min_(LEAST_VARIANCE)
            variance[order[:step]] = -torch.inf
            pick = variance.argmax()  # of equal ones the first
            order[step] = pick
            before = parts[:step]
            along = (kernel[pick] - before[:, pick] @ before) / variance[pick].sqrt()
            parts[step] = along
            variance -= along.square()
    return order
