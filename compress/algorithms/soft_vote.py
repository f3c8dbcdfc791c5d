"""Scores of cached tokens by the queries of one step."""

import torch.nn.functional as F
from torch import Tensor

from ..attention import attention_rows


def soft_vote(
    query: Tensor, key: Tensor, candidates: Tensor | None = None, scaling: float | None = None
) -> Tensor:
    """What the heads of queries [B, H, R, D] give keys [B, H_k, N, D]: a soft-max over the candidates per
    head, summed over heads, [B, R, N] in float32.

    `candidates` (bool, broadcastable to [B, H, R, N]; None: all) are the keys that take part, the others get
    0; `scaling` defaults to D^-1/2. TokenSelect (Wu et al., EMNLP 2025, arXiv 2411.02886), section 4.2.
    """
    votes = attention_rows(query, key, scaling=scaling, mask=candidates)
    if candidates is not None:
        votes = votes.masked_fill(~candidates, 0)
    return votes.sum(1)


def max_pooled(scores: Tensor, size: int) -> Tensor:
    """The highest of the `size` (odd) scores around each place of the last dimension [..., N].

    Raises ValueError for an even size, which has no middle.
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(
            f"the pooling size is {size}; it takes an odd number from 1, so that N places remain"
        )
    if size == 1:
        return scores
    flat = scores.reshape(-1, 1, scores.shape[-1])
    return F.max_pool1d(flat, size, stride=1, padding=size // 2).view_as(scores)
