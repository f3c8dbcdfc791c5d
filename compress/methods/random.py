"""Random tokens: the baseline that many methods fail to beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..algorithms import select
from ..algorithms.grid import Grid
from ..reducer import FeatureReducer, Image


@dataclass(kw_only=True)
class Random(FeatureReducer):
    """Keeps a random subset, drawn from `seed` and the image's content: the same image keeps the same tokens
    in any batch."""

    summary: ClassVar = "a random subset"

    seed: int = 0

    paper_positions: ClassVar = "keep"

    def scores(self, image: Image) -> Tensor:
        """Uniform draws [N]."""
        return torch.rand(image.num_tokens, generator=image.generator(self.seed))

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of the `count` highest `scores`, drawn from the seed unless given."""
        if scores is None:
            scores = torch.rand(len(features), generator=torch.Generator().manual_seed(self.seed))
        return select.top_k_mask(scores, count).to(features.device)
