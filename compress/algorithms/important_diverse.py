"""Tokens that are important by attention, and of the others those that differ most: VisPruner's selection."""

import numpy as np
import torch
from torch import Tensor

from .select import top_k

ROUND = 8  # tokens removed between two pairings, at most


def important_and_diverse(
    attention: Tensor, features: Tensor, count: int, important_ratio: float = 0.5
) -> Tensor:
    """Places of `count` tokens of one tile, ascending [count]: attention [N], features [N, C].

    The share `important_ratio` of the count, rounded down, are the tokens with the most attention. The
    others, by falling attention, are thinned out: those at even ranks are compared with those at odd ranks,
    and the (at most 8) most similar to any of these go; what is left, the compared ones by falling similarity
    first, is paired anew until the count is reached.

    VisPruner (Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning
    in VLMs", ICCV 2025, arXiv 2412.01818, section 3). Each pairing depends on the order of all similarities
    before, so everything is computed in float64 on the CPU; N² numbers are held. With an odd number of
    tokens, on which the original fails, there is one more even rank. Raises ValueError for a count above N.
    """
    if attention.shape != features.shape[:1] or not 0 <= count <= len(features):
        raise ValueError(
            f"attention is {list(attention.shape)}, features {list(features.shape)} and the count {count}; "
            "[N], [N, C] and at most N are accepted"
        )
    order = top_k(attention.cpu().double(), len(attention))
    important = int(count * important_ratio)
    kept, rest = order[:important], order[important:]
    target = count - important
    if not target:
        return kept.sort().values
    rows = features.cpu().double()[rest]
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = rows / torch.where(norm > 0, norm, 1)
    similarity, left = (rows @ rows.T).numpy(), np.arange(len(rest))
    while len(left) > target:
        even, odd = left[0::2], left[1::2]
        nearest = similarity[np.ix_(even, odd)].max(1)
        most_similar = np.argsort(-nearest, kind="stable")
        gone = min(ROUND, len(left) - target, len(even))
        left = np.concatenate([even[most_similar[gone:]], odd])
    kept = torch.cat([kept, rest[torch.from_numpy(left)]])
    return kept.sort().values.to(attention.device)
