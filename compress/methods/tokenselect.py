"""TokenSelect: every new token attends to the visual tokens that its heads vote for."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..algorithms.soft_vote import max_pooled, soft_vote
from ..reducer import CacheStep, StepReducer


@dataclass(kw_only=True)
class TokenSelect(StepReducer):
    """TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level
    KV Cache Selection (Wu et al., EMNLP 2025, arXiv 2411.02886), for visual tokens.

    In every layer each token after the prompt attends to all text and to the `top_k` visual tokens with the
    highest sum, over heads, of a soft-max of q·k/√D over the visual tokens (with the rotations that the model
    uses). `pool` (odd) takes the maximum of that many neighbours first. `keep` sets the number. Each token of
    a call chooses for itself, so the answer does not depend on how it is cut into calls. The images of a
    prompt share one budget, unless `per_image`.

    Raises ValueError for a `top_k` below 1 and an even `pool`.
    """

    summary: ClassVar = "each step attends to what its heads vote for"
    paper: ClassVar = "arXiv 2411.02886"
    verified: ClassVar = "kept sets equal, votes 6.0e-8, both head maps"

    top_k: int = 2048
    pool: int = 1
    per_image: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it takes a count from 1")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool is {self.pool}; it takes an odd number from 1 (1: no pooling)")

    def default_count(self, tokens: int) -> int:
        """`top_k`, or all where there are fewer."""
        return min(self.top_k, tokens)

    def attend(self, step: CacheStep) -> Tensor:
        """The visual tokens with the most votes, bool [B, 1, R, S]."""
        votes = soft_vote(step.query, step.keys, step.visual, step.scaling)
        return step.best(max_pooled(votes, self.pool)[:, None])
