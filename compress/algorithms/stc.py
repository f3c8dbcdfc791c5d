"""STC: which patches of a frame are computed anew in a vision tower, and which tokens of it are novel.

Accelerating Streaming Video Large Language Models via Hierarchical Token Compression (Wang et al., 2025,
arXiv 2512.00891). Functions on tensors; `vistok.compress.streaming` holds the state of a stream.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .select import top_k_mask
from .vidcom2 import kernel_nearness


def is_full(chunk: int, interval: int) -> bool:
    """Whether the chunk of this number, from 0, is computed in full: every `interval`-th one is."""
    return chunk % interval == 0


def update_count(tokens: int, ratio: float) -> int:
    """How many of a frame's T tokens are computed anew: truncated, at least 1 and at most T."""
    return min(max(int(tokens * ratio), 1), tokens)


def changed_tokens(keys: Tensor, reference: Tensor, count: int) -> Tensor:
    """The tokens whose keys changed most: keys [F, T, C] and those of the reference frame [T, C] → int64
    [F, count] ascending.

    Change is a low cosine over the full width C, heads not divided; of equal ones the first are taken.
    """
    exact = torch.promote_types(keys.dtype, torch.float32)
    cosine = F.cosine_similarity(keys.to(exact), reference.to(exact), dim=-1)
    return _lowest(cosine, count)


def with_rows(reference: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """The reference frame [T, C] with the rows at index [F, n] replaced by rows [F, n, C], [F, T, C]."""
    frames = reference.expand(len(index), -1, -1)
    return frames.scatter(1, index[..., None].expand_as(rows), rows)


def stable_half(features: Tensor) -> Tensor:
    """The half of the channels of features [F, T, D] that varies least over all tokens, int64 [D // 2] in
    ascending order of variance."""
    variance = features.flatten(0, 1).var(0, correction=0)
    return variance.sort(stable=True).indices[: features.shape[-1] // 2]


def novelty_scores(features: Tensor, memory: Tensor) -> Tensor:
    """How near each token of features [F, T, C] is to the mean of its frame and to the memory [C], [F, T].

    Nearness is the sum of Gaussian kernels of five widths between unit vectors. Low scores are novel.
    """
    unit = F.normalize(features, dim=-1)
    centre = unit.mean(1, keepdim=True)
    return kernel_nearness(unit, centre) + kernel_nearness(unit, F.normalize(memory, dim=-1))


def most_novel(scores: Tensor, count: int) -> Tensor:
    """The tokens of each frame with the lowest scores: [F, T] → int64 [F, count] ascending; of equal ones the
    first."""
    return _lowest(scores, count)


def _lowest(scores: Tensor, count: int) -> Tensor:
    mask = top_k_mask(-scores, count)
    return mask.nonzero()[:, 1].view(len(scores), count)
