"""VidCom²: the tokens that stand out in their frame and in the video, with more for unusual frames."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..algorithms.grid import Grid
from ..algorithms.vidcom2 import vidcom2_count, vidcom2_select
from ..reducer import FeatureReducer, Image, Selection, count_of, keeps_everything, token_count
from ..video_budget import frame_places, selected_of_frames


@dataclass(kw_only=True)
class VidCom2(FeatureReducer):
    """Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models (Liu
    et al., EMNLP 2025, arXiv 2505.14454).

    Keeps the tokens of a video that are least like the means of their frame and of the video, more of them in
    frames that are unlike the others; pictures stay whole. A share of 1 - `q` stays, at least one token per
    frame; `keep` is that share, or a count. Separators of a video stay beside it. With `mode="exact"` the
    count depends on the number and size of the frames alone (`retained_count`), as serving engines need;
    "reference" is the paper's code, in which rounding changes it.
    """

    summary: ClassVar = "what stands out in frame and video"
    paper: ClassVar = "arXiv 2505.14454"
    verified: ClassVar = "picks and budgets equal in 6 videos, 180 counts"

    q: float = 0.75
    mode: Literal["exact", "reference"] = "exact"

    default_keep: ClassVar[None] = None
    paper_positions: ClassVar = "keep"
    comparable: ClassVar = False
    reads_frames: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.q < 1:
            raise ValueError(f"q is {self.q}; it takes the share of tokens to drop, from 0 to below 1")
        if self.mode not in ("exact", "reference"):
            raise ValueError(f'mode is {self.mode!r}; it takes "exact" or "reference"')

    def retained_count(self, grid: Grid | int, budget: float | int | None) -> int:
        """How many tokens stay: all of a picture, of a video the share or count, separators included. Raises
        ValueError for a count below one token per frame, and in reference mode, where it is not known before
        the features."""
        if isinstance(grid, int) or not grid.video or keeps_everything(budget):
            return token_count(grid)
        if self.mode == "reference":
            raise ValueError('how many tokens mode="reference" keeps depends on the features; use "exact"')
        separators = int(grid.separators.sum())
        if not isinstance(budget, int):
            share = 1 - self.q if budget is None else budget
            return separators + vidcom2_count(grid.cols, grid.tokens_per_tile, share)
        if budget < grid.cols + separators:
            raise ValueError(
                f"keep is {budget} tokens, below one token for each of the video's {grid.cols} frames (and "
                f"{separators} separators stay); raise keep"
            )
        return count_of(budget, grid.num_tokens)

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of exactly `count` tokens; features [N, D] of a video with the layout `grid`, or of a
        picture, as one frame. Frames share the part of the tokens that `count` is."""

        def exact(frames: Tensor, count: int) -> Tensor:
            return vidcom2_select(frames, count / (len(frames) * frames.shape[1]), count)

        return selected_of_frames(features, grid, count, exact)

    def reduce(self, image: Image, budget: float | int | None) -> Selection:
        """The tokens kept of a video; all of a picture."""
        grid = image.grid
        if grid is None or not grid.video:
            return Selection(torch.arange(image.num_tokens, device=image.features.device))
        separators = int(grid.separators.sum())
        share = 1 - self.q if budget is None else budget
        if isinstance(budget, int):
            share = (count_of(budget, grid.num_tokens) - separators) / (grid.num_tokens - separators)
        count = None if self.mode == "reference" else self.retained_count(grid, budget) - separators
        places = frame_places(image.features, grid)
        kept = vidcom2_select(image.features[places], share, count)
        mask = torch.ones(image.num_tokens, dtype=torch.bool, device=kept.device)
        mask[places[~kept]] = False
        return Selection(mask.nonzero().squeeze(1))
