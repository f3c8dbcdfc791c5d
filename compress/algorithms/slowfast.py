"""The slow and the fast tokens of a video: all of them, and few for the language model."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import square_side


def sampled_frames(frames: int, stride: int, min_frames: int) -> Tensor:
    """Which of the frames a sampling `stride` takes, int64 ascending: all where there are fewer than
    `min_frames`, and never fewer than those."""
    if stride <= 1 or frames < min_frames:
        return torch.arange(frames)
    count = max(frames // stride, min_frames)
    step = frames / count
    return torch.tensor([min(int(number * step), frames - 1) for number in range(count)])


def fast_tokens(
    features: Tensor,
    *,
    sampling_stride: int = 1,
    temporal_stride: int = 1,
    spatial_stride: int = 1,
    min_frames: int = 16,
) -> Tensor:
    """The tokens that enter the language model, [N, D], of a video's features [T, n, D].

    Frames are sampled with `sampling_stride`, then means of `temporal_stride` neighbouring frames are taken
    (frames that fill no window are left out; where fewer than `min_frames` windows would be left, as many
    adaptive means as there are frames up to that), then means of blocks of `spatial_stride` x
    `spatial_stride` tokens. A picture (T = 1) is only pooled in space. The slow tokens are all of the
    features, frame by frame.

    Slow-Fast Architecture for Video Multi-Modal Large Language Models (Shi et al., 2025, arXiv 2504.01328).
    Raises ValueError for strides or `min_frames` below 1 and for frames that are not square.
    """
    numbers = {
        "sampling_stride": sampling_stride,
        "temporal_stride": temporal_stride,
        "spatial_stride": spatial_stride,
        "min_frames": min_frames,
    }
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it takes a whole number of at least 1")
    if len(features) > 1:
        features = features[sampled_frames(len(features), sampling_stride, min_frames)]
        features = _temporal_means(features, temporal_stride, min_frames)
    return spatial_means(features, spatial_stride).flatten(0, 1)


def _temporal_means(features: Tensor, stride: int, min_frames: int) -> Tensor:
    """Means over frames of [T, n, D] → [T', n, D]."""
    frames = len(features)
    if stride == 1:
        return features
    if frames // stride >= min_frames:
        return features[: frames // stride * stride].unflatten(0, (-1, stride)).mean(1)
    rows = features.flatten(1).T[None]  # [1, n · D, T]
    return F.adaptive_avg_pool1d(rows, min(frames, min_frames))[0].T.reshape(-1, *features.shape[1:])


def spatial_means(features: Tensor, stride: int) -> Tensor:
    """Means of square blocks of the tokens of frames [T, n, D] → [T, n', D]; what fills no block is left
    out."""
    if stride == 1:
        return features
    side = square_side(features.shape[1])
    if stride > side:
        raise ValueError(f"spatial_stride is {stride}, and frames are {side} x {side} tokens; lower it")
    maps = features.transpose(1, 2).unflatten(2, (side, side))
    return F.avg_pool2d(maps, stride).flatten(2).transpose(1, 2)
