"""PiToMe's matching: tokens in large clusters merge, isolated ones stay.

Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", 2024, arXiv 2405.16148.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .merge import Matching, bipartite_soft_matching, similarity

Rule = Literal["pitome", "pitome_bsm", "bsm", "text"]


def merged_count(num_tokens: int, ratio: float) -> int:
    """How many of `num_tokens` merge when `ratio` of them stay: floor(T - T ratio) in double precision.

    The rounding is the original's: 100 tokens at ratio 0.55 give 44. A ratio of 1 or more merges nothing.
    """
    return 0 if ratio >= 1 else math.floor(num_tokens - num_tokens * ratio)


def energy(metric: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """Energy [B, T] of tokens by `metric` [B, T, C]: high among similar tokens (equation 4).

    The mean over all tokens of ELU(cosine - margin), as in the published code; the paper does not subtract
    the margin above it.
    """
    return F.elu(_cosines(metric) - margin, alpha).mean(-1)


def text_energy(metric: Tensor, margin: float) -> Tensor:
    """Energy [B, T] of text tokens: the mean normal density of 1 - cosine with deviation 1 - margin."""
    deviation = 1 - margin
    density = torch.exp(-0.5 * ((1 - _cosines(metric)) / deviation) ** 2)
    return density.mean(-1) / (deviation * math.sqrt(2 * math.pi))


@torch.no_grad()
def pitome_matching(
    metric: Tensor, r: int, margin: float, *, protected: int = 0, alpha: float = 1.0, rule: Rule = "pitome"
) -> Matching:
    """Merge r of the tokens that have the highest energy, by `metric` [B, N, C].

    `rule` is one of the original's: "pitome" (algorithm 1) pairs the 2r tokens of highest energy, of which
    every other one, by falling energy, merges into its most similar neighbour; "text" merges the first r of
    them into the next r, by `text_energy`; "pitome_bsm" (`use_bsm_pitome`) splits all tokens by energy and
    merges the r best pairs; "bsm" (`use_bsm`) is ToMe's matching. The first `protected` tokens stay and lead.
    Raises ValueError if 2r exceeds the unprotected tokens, or the metric is not [B, N, C].
    """
    if metric.ndim != 3:
        raise ValueError(f"metric has shape {list(metric.shape)}; matching takes [B, N, C]")
    batch, tokens, _ = metric.shape
    free = tokens - protected
    if 2 * r > free:
        raise ValueError(
            f"PiToMe cannot merge {r} of {free} tokens in one block, at most half of them; use a ratio "
            "above 0.5"
        )
    if r <= 0:
        return Matching.identity(batch, tokens, metric.device)
    if rule == "bsm":
        return bipartite_soft_matching(metric, r, protected=protected)
    metric = metric[:, protected:]
    scores = text_energy(metric, margin) if rule == "text" else energy(metric, margin, alpha)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    calm = order[:, :0]
    if rule == "pitome_bsm":
        a, b = order[:, ::2], order[:, 1::2]
    elif rule == "pitome":
        a, b, calm = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
    elif rule == "text":
        a, b, calm = order[:, :r], order[:, r : 2 * r], order[:, 2 * r :]
    else:
        raise ValueError(f"rule is {rule!r}; it must be pitome, pitome_bsm, bsm or text")
    best, partner = _cosines(_rows(metric, a), _rows(metric, b)).max(-1)
    if rule == "pitome_bsm":
        ranked = best.argsort(dim=-1, descending=True, stable=True)
        calm = a.gather(1, ranked[:, r:])
        a, partner = a.gather(1, ranked[:, :r]), partner.gather(1, ranked[:, :r])
    leading = torch.arange(protected, device=metric.device).expand(batch, -1)
    kept = torch.cat([leading, calm + protected, b + protected], 1)
    return Matching(kept, a + protected, partner + protected + calm.shape[1], tokens)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _cosines(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Cosines [B, n, m] between x [B, n, C] and y [B, m, C] (x itself unless given), in float32 or wider."""
    exact = torch.promote_types(x.dtype, torch.float32)
    x = F.normalize(x.to(exact), dim=-1)
    y = x if y is None else F.normalize(y.to(exact), dim=-1)
    return similarity(x, y)
