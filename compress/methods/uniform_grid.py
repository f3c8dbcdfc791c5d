"""Tokens at even distances: the baseline that does not depend on the image's content."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..algorithms import select
from ..algorithms.grid import Grid
from ..reducer import FeatureReducer


@dataclass(kw_only=True)
class UniformGrid(FeatureReducer):
    """Keeps tokens at even distances along the sequence."""

    summary: ClassVar = "every n-th token"

    paper_positions: ClassVar = "keep"

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of `count` evenly spaced tokens."""
        mask = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        mask[select.uniform(len(features), count, features.device)] = True
        return mask
