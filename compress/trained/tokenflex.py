"""TokenFLEX: a projector that makes any number of tokens per tile.

"TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference" (Hu et al., 2025, arXiv 2504.03154).
Written from the paper, which has no public code or weights, so nothing of it is compared with the original.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...nn.flexible_projector import FlexibleProjector, FlexibleProjectorConfig
from ..algorithms.grid import Grid
from ..algorithms.select import uniform
from ..reducer import FeatureReducer, Image, Selection, keeps_everything, token_count
from .tiles import placed, resized

__all__ = ["FlexibleProjector", "FlexibleProjectorConfig", "TokenFLEX"]


@dataclass(kw_only=True)
class TokenFLEX(FeatureReducer):
    """Lets the model's own flexible projector make fewer tokens of each tile.

    The model's projector must be a `FlexibleProjector`, which the language model was trained with
    (`assets/scenes-tokenflex.yaml`):

        model.model.multi_modal_projector = FlexibleProjector.load(folder)

    Attach with positions="compact", as it is trained. A share of a tile's tokens becomes h × w tokens in the
    tile's aspect, √share of each side, cut to whole numbers and at least 1; a count is of the whole image's
    tokens with its separators. Raises TypeError for models with another projector and ValueError for images
    whose layout is not known.
    """

    summary: ClassVar = "a projector that pools to any grid"
    paper: ClassVar = "arXiv 2504.03154"
    merges: ClassVar = True
    comparable: ClassVar = False

    def wants_states(self) -> Literal["features"]:
        """The states that are projected."""
        return "features"

    def size_of(self, grid: Grid, budget: float | int) -> tuple[int, int]:
        """Height and width of a tile in tokens that a budget gives."""
        if isinstance(budget, float):
            return _scaled(grid, budget)
        sizes = [_scaled(grid, (side / grid.height) ** 2) for side in range(grid.height, 0, -1)]
        return next((size for size in sizes if resized(grid, *size).num_tokens <= budget), sizes[-1])

    def retained_count(self, grid: Grid | int, budget: float | int) -> int:
        """How many tokens of an image stay, separators included; a bare number of tokens is taken for the
        largest square in it."""
        if keeps_everything(budget):
            return token_count(grid)
        if isinstance(grid, int):
            grid = Grid.single(math.isqrt(grid), math.isqrt(grid))
        return resized(grid, *self.size_of(grid, budget)).num_tokens

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of `count` evenly spaced tokens: what stays where there is no projector."""
        mask = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        mask[uniform(len(features), count, features.device)] = True
        return mask

    def reduce(self, image: Image, budget: float | int) -> Selection:
        """The projector's tokens, at the places of those in the middle of what they show."""
        grid = image.grid
        if not isinstance(image.project, FlexibleProjector):
            raise TypeError(
                f"the model's projector is a {type(image.project).__name__}; TokenFLEX takes models trained "
                "with its own: set model.model.multi_modal_projector = FlexibleProjector.load(folder)"
            )
        if grid is None or image.states is None:
            raise ValueError(
                f"the layout of this image's {image.num_tokens} tokens or the states that they are made of "
                "are not known; have the attached model make the features itself from pixel_values"
            )
        size = self.size_of(grid, budget)
        states = image.states[:, -grid.tokens_per_tile :]
        return placed(
            image, resized(grid, *size), image.project(states, size, grid=(grid.height, grid.width))
        )


def _scaled(grid: Grid, share: float) -> tuple[int, int]:
    factor = math.sqrt(share) + 1e-9  # a root that should be whole is
    return max(1, int(grid.height * factor)), max(1, int(grid.width * factor))
