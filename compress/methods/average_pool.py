"""Average pooling of neighbouring tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..algorithms import select
from ..algorithms.grid import Grid
from ..reducer import FeatureReducer, Image, Selection


@dataclass(kw_only=True)
class AveragePool(FeatureReducer):
    """Replaces runs of neighbouring tokens along the sequence by their mean, as evenly as the count
    allows."""

    summary: ClassVar = "means of neighbours along the sequence"
    merges: ClassVar = True

    paper_positions: ClassVar = "keep"

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of the first token of each of `count` runs."""
        mask = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        mask[_starts(len(features), count)] = True
        return mask

    def reduce(self, image: Image, budget: float | int) -> Selection:
        """Each run's first token, holding the run's mean."""
        count = self.retained_count(image.num_tokens, budget)
        starts = _starts(image.num_tokens, count)
        lengths = torch.diff(starts, append=torch.tensor([image.num_tokens]))
        run = torch.arange(count).repeat_interleave(lengths).to(image.features.device)
        means = torch.zeros(count, image.features.shape[1], dtype=torch.float32, device=image.features.device)
        means = means.index_add(0, run, image.features.float()) / lengths.to(means)[:, None]
        return Selection(starts.to(image.features.device), means.to(image.features))


def _starts(tokens: int, count: int) -> Tensor:
    return select.uniform(tokens + 1, count + 1)[:-1]
