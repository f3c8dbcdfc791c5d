"""How many tokens a picture needs and which, by class attention and by how much of it repeats itself."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .select import full_precision, top_k


def attention_outliers(attention: Tensor) -> Tensor:
    """Which of `attention` [N] are above the third quartile by more than 1.5 interquartile ranges, bool [N].

    The rule of LLaVA-PruMerge (Shang et al., 2024, arXiv 2403.15388, section 3.2).
    """
    attention = attention.float()
    low, high = torch.quantile(attention, attention.new_tensor([0.25, 0.75]))
    return attention > high + 1.5 * (high - low)


def information_density(keys: Tensor, threshold: float, redundant_share: float) -> float:
    """The share of tokens that do not repeat, in [0, 1], by their keys [N, d].

    A token repeats if at least `redundant_share` · N other tokens have keys with a cosine above `threshold`.
    """
    tokens = len(keys)
    with full_precision(keys.device):
        unit = F.normalize(keys.float(), dim=-1)
        similar = (unit @ unit.T > threshold).fill_diagonal_(False).sum(1)
    return float((similar < redundant_share * tokens).sum()) / tokens


def draw_by_weight(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` places drawn without replacement with probabilities in proportion to `weights` [N], [count].

    The highest of log-weights plus Gumbel noise, in the order drawn; without a generator the highest weights.
    Draws are nested: from the same state of the generator a larger count adds places. Raises ValueError for a
    count above N.
    """
    logits = weights.double().cpu().clamp_min(1e-300).log()
    if generator is not None:
        uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64)
        logits = logits - (-uniform.clamp_min(1e-300).log()).clamp_min(1e-300).log()
    return top_k(logits, count).to(weights.device)


def informative_order(
    deep: Tensor,
    low: Tensor,
    keys: Tensor,
    generator: torch.Generator | None,
    *,
    threshold: float = 0.9,
    redundant_share: float = 0.05,
    sample_share: float = 0.5,
) -> tuple[Tensor, int]:
    """All tokens of one tile, the most informative first [N], and how many of them the picture needs.

    `deep` and `low` [N] are the class token's attention in a deep and in a low layer, `keys` [N, d] those of
    the low layer. First come the outliers of `deep`, by falling attention; then the others as they are drawn
    by `low` (see `draw_by_weight`). The picture needs the outliers and those of the first
    ceil(density · N · sample_share) draws that are not among them, where the density is that of the keys.

    Definition of this library from the description of "Token-level Correlation-guided Compression for
    Efficient Multimodal Document Understanding" (Zhang et al., 2024, arXiv 2407.14439), whose code was not
    published.
    """
    tokens = len(deep)
    outliers = attention_outliers(deep)
    draws = draw_by_weight(low, tokens, generator)
    density = information_density(keys, threshold, redundant_share)
    first = draws[: math.ceil(density * tokens * sample_share)]
    number = max(1, int(outliers.sum()) + int((~outliers[first]).sum()))
    best = top_k(deep.float(), tokens)
    return torch.cat([best[outliers[best]], draws[~outliers[draws]]]), number
