"""Scores of cached tokens by the attention that they have received so far."""

import torch
from torch import Tensor


def favour_recent(scores: Tensor, recent: int) -> Tensor:
    """Scores [..., N] with infinity for the `recent` last tokens, which then stay in any case.

    With the k highest kept this is the rule of H2O (Zhang et al., NeurIPS 2023, arXiv 2306.14048) and
    Keyformer: the newest tokens, and of the others those with the highest scores. Raises ValueError unless
    0 ≤ recent ≤ N.
    """
    tokens = scores.shape[-1]
    if not 0 <= recent <= tokens:
        raise ValueError(f"recent is {recent}; of {tokens} tokens between 0 and all can be the newest")
    scores = scores.clone()
    scores[..., tokens - recent :] = torch.inf
    return scores


def accumulated(scores: Tensor | None, attention: Tensor) -> Tensor:
    """What each entry of a cache has received: `scores` [..., S - q] of the entries before (None: there were
    none), plus the column sums of the `attention` [..., q, S] of q new queries. Returns [..., S].
    """
    received = attention.sum(-2)
    if scores is None:
        return received
    return received + torch.nn.functional.pad(scores, (0, attention.shape[-1] - scores.shape[-1]))


def gumbel_softmax(logits: Tensor, tau: float, generator: torch.Generator | None = None) -> Tensor:
    """Soft-max over the last dimension of (logits + Gumbel noise) / tau, in float32 and with a draw for every
    logit (Keyformer: Adnan et al., MLSys 2024, arXiv 2403.09054, section 3.2)."""
    exponential = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
    return ((logits.float() - exponential.log()) / tau).softmax(-1)
