"""VidCom²: keep the tokens of a video that its own frame and the whole video resemble least."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .select import top_k_mask

ALPHAS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)  # widths of the Gaussian kernels
TEMPERATURE = 0.01


@dataclass(frozen=True)
class FrameShares:
    """The shares of a video's T frames: `scales` float64 [T] of each frame's tokens, as `budgets` int64
    [T]."""

    scales: Tensor
    budgets: Tensor


def stable_channels(features: Tensor) -> Tensor:
    """The half of the channels of features [T, n, D] that varies least over all tokens, ascending, at least
    one."""
    variance = features.flatten(0, 1).var(0, correction=0)
    return variance.sort(stable=True).indices[: max(1, features.shape[-1] // 2)].sort().values


def vidcom2_scores(features: Tensor) -> tuple[Tensor, Tensor]:
    """How near each token of features [T, n, D] is to the mean of the video and to that of its frame, both
    [T, n].

    Nearness is the sum of Gaussian kernels of five widths, of unit vectors of the stable channels; tokens
    with a low sum are distinctive.
    """
    unit = F.normalize(features[..., stable_channels(features)], dim=-1, eps=1e-12)
    video, frame = unit.mean((0, 1), keepdim=True), unit.mean(1, keepdim=True)
    return kernel_nearness(unit, video), kernel_nearness(unit, frame)


def kernel_nearness(unit: Tensor, centre: Tensor) -> Tensor:
    """The sum of Gaussian kernels of the widths `ALPHAS` between unit vectors [..., C] and a centre [...]."""
    distance = (unit - centre).square().sum(-1)
    return torch.stack([torch.exp(-distance / (2 * alpha)) for alpha in ALPHAS]).sum(0)


def frame_shares(video_scores: Tensor, share: float) -> FrameShares:
    """How many of the n tokens of each frame stay, from their nearness to the video [T, n] and the retained
    `share` of all: more in frames that are unlike the video, and at least one."""
    tokens = video_scores.shape[1]
    distance = -video_scores.double().mean(1)
    weight = ((distance - distance.max()) / TEMPERATURE).softmax(0)
    scales = (share * (1 + weight - weight.mean())).clamp_max(1)
    # `round` is to even, as Python's is.
    return FrameShares(scales, (scales * tokens).round().long().clamp(1, tokens))


def vidcom2_count(frames: int, tokens_per_frame: int, share: float) -> int:
    """How many tokens of a video stay at a retained `share` of them: truncated, at least one per frame."""
    total = frames * tokens_per_frame
    return max(frames, min(int(total * share), total))


def vidcom2_select(features: Tensor, share: float, count: int | None = None) -> Tensor:
    """Which tokens of a video's features [T, n, D] stay, bool [T, n].

    Frames get `frame_shares` of the retained `share`, and in each the most distinctive tokens stay, of equal
    ones the first. Without a `count` that is the paper's selection, whose size differs from the share by
    rounding. With one exactly as many stay: the least distinctive of all kept tokens go (which may empty a
    frame), or the most distinctive of the others return, as the serving engine vLLM has it.

    VidCom²: Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models
    (Liu et al., EMNLP 2025, arXiv 2505.14454). Half precision is computed in float32.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    video, frame = vidcom2_scores(features)
    scores = video + frame
    kept = top_k_mask(-scores, frame_shares(video, share).budgets)
    if count is None:
        return kept
    surplus, flat = int(kept.sum()) - count, scores.flatten()
    if surplus > 0:
        kept &= ~top_k_mask(flat.masked_fill(~kept.flatten(), -torch.inf), surplus).view_as(kept)
    elif surplus < 0:
        kept |= top_k_mask((-flat).masked_fill(kept.flatten(), -torch.inf), -surplus).view_as(kept)
    return kept


def newline_order(kept: Tensor, width: int) -> Tensor:
    """The places of the tokens that enter LLaVA-Video, whose frames are maps of rows of `width` tokens with a
    newline vector after each row: kept [T, n] → int64, frame by frame its kept tokens and then all of its
    newlines. Raises ValueError where n is not a whole number of rows."""
    frames, tokens = kept.shape
    if tokens % width:
        raise ValueError(f"a frame has {tokens} tokens, which are not rows of {width}")
    rows = tokens // width
    places = torch.arange(frames * rows * (width + 1)).view(frames, rows, width + 1)
    parts = zip(kept, places[..., :width].flatten(1), places[..., width], strict=True)
    return torch.cat([torch.cat([own[mask], newlines]) for mask, own, newlines in parts])
