"""Scores of prompt tokens by the products of the last one's query with their keys, before any soft-max."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

KERNEL = 5


def prompt_scores(logits: Tensor, end: Tensor | None = None, *, pool: bool = True) -> Tensor:
    """Ranking scores [B, L] from the last prompt token's logits [B, L], mean over heads.

    With `pool` each score is the sum over five neighbours, divided by five; outside, and from the place `end`
    [B] on (None: nowhere), are zeros. Without, scores are the logits.

    PromptDistill (Jin et al., "PromptDistill: Query-based Selective Token Retention in Intermediate Layers
    for Efficient Large Language Model Inference", 2025, arXiv 2503.23274).
    """
    if not pool:
        return logits
    if end is not None:
        logits = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= end[:, None], 0)
    return avg_pool1d(logits[:, None], KERNEL, stride=1, padding=KERNEL // 2)[:, 0]
