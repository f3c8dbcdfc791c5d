"""EVS: the tokens of a video that differ most from the frame before."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..algorithms.evs import evs_count, evs_select
from ..algorithms.grid import Grid
from ..reducer import FeatureReducer, Image, Selection, count_of, keeps_everything, token_count
from ..video_budget import selected_of_frames


@dataclass(kw_only=True)
class EVS(FeatureReducer):
    """Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference (Bagrov et al.,
    2025, arXiv 2510.14624).

    Keeps the tokens of a video that are least like the token at the same place one frame earlier; the first
    frame always stays whole, and so does every picture. A share of 1 - `q` of the tokens stays, at least one
    frame; `keep` is that share, or a count of at least one frame. Separators of a video stay beside it. The
    count depends on the number and size of the frames alone (`retained_count`).
    """

    summary: ClassVar = "what changes from frame to frame"
    paper: ClassVar = "arXiv 2510.14624"
    verified: ClassVar = "picks equal in 6 videos with ties, 180 counts, positions of 3 prompts"

    q: float = 0.75

    default_keep: ClassVar[None] = None
    paper_positions: ClassVar = "keep"
    comparable: ClassVar = False
    reads_frames: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.q < 1:
            raise ValueError(f"q is {self.q}; it takes the share of tokens to drop, from 0 to below 1")

    def retained_count(self, grid: Grid | int, budget: float | int | None) -> int:
        """How many tokens stay: all of a picture, of a video the share or count, separators included. Raises
        ValueError for a count below one frame."""
        if isinstance(grid, int) or not grid.video or keeps_everything(budget):
            return token_count(grid)
        separators = int(grid.separators.sum())
        if not isinstance(budget, int):
            return separators + evs_count(
                grid.cols, grid.tokens_per_tile, 1 - self.q if budget is None else budget
            )
        if budget < grid.tokens_per_tile + separators:
            raise ValueError(
                f"keep is {budget} tokens, and EVS keeps the first frame of a video whole, which has "
                f"{grid.tokens_per_tile} (and {separators} separators stay); raise keep"
            )
        return count_of(budget, grid.num_tokens)

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of exactly `count` tokens; features [N, D] of a video with the layout `grid`, or of a
        picture, as one frame."""
        return selected_of_frames(features, grid, count, evs_select)

    def reduce(self, image: Image, budget: float | int | None) -> Selection:
        """The tokens kept of a video; all of a picture."""
        count = self.retained_count(image.grid or image.num_tokens, budget)
        return Selection(self.select(image.features, image.grid, count).nonzero().squeeze(1))
