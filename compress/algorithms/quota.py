"""QuoTA: a budget of tokens shared among the frames of a video by how relevant each is to the question."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import square_side
from .merge import bipartite_soft_matching

# Paper: QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension (Luo et
# al., 2025, arXiv 2503.08689).


def quota_weights(scores: Tensor) -> Tensor:
    """The share of the budget of each frame, float64 [T] with sum 1, by its relevance `scores` [T] from 0 to
    1: squares, so that relevant frames get more than their part.

    QuoTA (arXiv 2503.08689); the scores are probabilities that a small model answers "yes, this frame
    shows what the question asks about". Raises ValueError for scores outside 0 to 1 or all 0.
    """
    if scores.ndim != 1 or not len(scores) or not bool(((scores >= 0) & (scores <= 1)).all()):  # nor NaN
        raise ValueError(
            f"scores are {scores.tolist()}; each frame takes one number from 0 to 1, its relevance"
        )
    weights = (100 * scores.double()).square()
    if not bool(weights.sum() > 0):
        raise ValueError("all frames have relevance 0, so no share can be computed; raise one above 0")
    return weights / weights.sum()


def quota_capped(weights: Tensor, cap: float) -> Tensor:
    """Weights [T] of which none is above `cap`, float64: what is cut off goes to frames below it, once.

    In one pass in the order of frames each frame below the cap gets its part of the excess; where that lifts
    it above the cap, the rest goes to later frames only. So the order of frames matters, and the sum can stay
    below 1 (QuoTA, arXiv 2503.08689, as published).
    """
    values = weights.tolist()
    capped = [min(value, cap) for value in values]
    excess, total = sum(max(value - cap, 0.0) for value in values), sum(capped)
    for number, value in enumerate(capped):
        if value < cap:
            larger = value + value * excess / total
            capped[number] = min(larger, cap)
            excess += max(larger - cap, 0.0)
    return torch.tensor(capped, dtype=torch.float64)


def quota_budgets(weights: Tensor, total: int) -> Tensor:
    """Tokens of each frame, int64 [T]: its part of `total`, truncated. Frames may get none."""
    return torch.tensor([int(total * weight) for weight in weights.tolist()], dtype=torch.int64)


def quota_shape(count: int) -> tuple[int, int]:
    """Height and width of the nearly square map that a frame of `count` tokens is resized to; height times
    width is at most `count`."""
    side = math.isqrt(count)
    return (side + 1, side) if side * (side + 1) <= count else (side, side)


def bilinear(frame: Tensor, count: int) -> Tensor:
    """A frame's map [H, W, D] at the shape for `count` tokens, [h, w, D], which may be larger (version 1)."""
    size = quota_shape(count)
    return F.interpolate(_channels_first(frame), size, mode="bilinear", align_corners=False)[0].movedim(0, -1)


def adaptive(frame: Tensor, count: int) -> Tensor:
    """Means of a frame's map [H, W, D] in the shape for `count` tokens, [h, w, D] (version 2)."""
    return F.adaptive_avg_pool2d(_channels_first(frame), quota_shape(count))[0].movedim(0, -1)


def evenly_spaced(frame: Tensor, count: int) -> Tensor:
    """`count` evenly spaced tokens of a frame's map [H, W, D], row by row, [count, D] (version 3)."""
    tokens = frame.flatten(0, 1)
    return tokens[torch.linspace(0, len(tokens) - 1, count, device=frame.device).long()]


def merged(frame: Tensor, count: int) -> Tensor:
    """A frame's map [H, W, D] with the most similar tokens merged until `count` are left, [count, D]
    (version 4)."""
    return merge_down(frame.flatten(0, 1)[None], count)[0]


def merged_by_axis(frame: Tensor, count: int) -> Tensor:
    """A frame's map [H, W, D] with tokens merged within rows, then within columns, [h, w, D] (version 5)."""
    height, width = quota_shape(count)
    narrow = merge_down(frame, width)  # [H, w, D]
    return merge_down(narrow.transpose(0, 1), height).transpose(0, 1)


def merge_down(tokens: Tensor, count: int) -> Tensor:
    """Sequences [B, N, D] with the most similar tokens merged in rounds until `count` are left, [B, count,
    D].

    Each round of ToMe's matching (arXiv 2210.09461) merges up to half of the tokens, as plain means.
    """
    while tokens.shape[1] > count:
        before = tokens.shape[1]
        tokens = bipartite_soft_matching(tokens, min(before - count, before // 2)).merge(tokens)
    return tokens


# By version: how a frame is resized, whether weights are capped, whether frames are halved first.
VERSIONS: dict[str, tuple[Callable[[Tensor, int], Tensor], bool, bool]] = {
    "v1": (bilinear, False, False),
    "v2": (adaptive, True, False),
    "v3": (evenly_spaced, True, False),
    "v4": (merged, True, True),
    "v5": (merged_by_axis, True, False),
}


def quota_frames(features: Tensor, scores: Tensor, total: int, version: str = "v1") -> list[Tensor]:
    """The frames of a video's features [T, n, D] resized to their shares of `total` tokens, by relevance
    `scores` [T] from 0 to 1; frames whose share is below one token are left out.

    Frames are [h, w, D], or [n, D] in versions "v3" and "v4". Capped versions give no frame more than its n
    tokens; "v4" halves frames bilinearly first. Raises ValueError for other versions, scores that are not one
    per frame, and frames that are not square.
    """
    if version not in VERSIONS:
        raise ValueError(f"version is {version!r}; it takes {', '.join(VERSIONS)}")
    if scores.shape != features.shape[:1]:
        raise ValueError(f"scores are {list(scores.shape)}; {len(features)} frames take one number each")
    resize, is_capped, is_halved = VERSIONS[version]
    maps = features.unflatten(1, (square_side(features.shape[1]), -1))
    if is_halved:
        half = [-(-side // 2) for side in maps.shape[1:3]]
        small = F.interpolate(maps.movedim(-1, 1), half, mode="bilinear", align_corners=False)
        maps = small.movedim(1, -1)
    weights = frame_weights(scores, maps.shape[1] * maps.shape[2], total, is_capped)
    budgets = quota_budgets(weights, total).tolist()
    return [resize(frame, count) for frame, count in zip(maps, budgets, strict=True) if count > 0]


def frame_weights(scores: Tensor, tokens_per_frame: int, total: int, is_capped: bool) -> Tensor:
    """The part of `total` tokens of each frame, float64 [T]; capped ones stand for at most
    `tokens_per_frame`."""
    weights = quota_weights(scores)
    return quota_capped(weights, tokens_per_frame / total) if is_capped else weights


def _channels_first(frame: Tensor) -> Tensor:
    return frame.movedim(-1, 0)[None]
