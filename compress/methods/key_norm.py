"""Eviction of visual tokens from the cache by the length of their keys."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..reducer import CacheReducer


@dataclass(kw_only=True)
class KeyNorm(CacheReducer):
    """A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (Devoto et al., 2024, arXiv
    2406.11430), for visual tokens: in each layer those with the shortest keys stay (long keys get little
    attention). `keep` is the share or count of an image's tokens per layer after the prompt.
    """

    summary: ClassVar = "evicts long keys after the prompt"
    paper: ClassVar = "arXiv 2406.11430"

    def score(self, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        """Minus the mean key norm over heads [N]; keys [H, N, D]."""
        return -keys.float().norm(dim=-1).mean(0)
