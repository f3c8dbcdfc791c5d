"""ToMe: the most similar tokens merge, a few in every block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..algorithms.merge import Matching, bipartite_soft_matching, r_schedule
from ..reducer import VisionReducer


@dataclass(kw_only=True)
class ToMe(VisionReducer):
    """Token Merging: Your ViT But Faster (Bolya et al., 2023, arXiv 2210.09461).

    `r` tokens merge in every block: a number, (r, inflection) for a linear schedule (-1: decreasing) or a
    list; no block merges more than half its patches. Or give `keep`, the patches left at the end, which
    spreads r as evenly as that limit allows. With `prop_attn` a merged token counts in attention as often as
    tokens merged into it (the paper turns it off for MAE models used without training).
    """

    summary: ClassVar = "merges the most similar"
    paper: ClassVar = "arXiv 2210.09461"
    verified: ClassVar = "groups equal, ViT logits within 3% of tolerance"

    r: int | tuple[int, float] | Sequence[int] | None = None
    prop_attn: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and self.keep is not None:
            raise ValueError("ToMe takes r or keep, not both: keep sets r")

    def plan(self, num_blocks: int, num_tokens: int, prefix: int, keep: int | None) -> list[int]:
        """Tokens merged in each of `num_blocks` blocks, from `num_tokens` patches to `keep` of them.

        Raises ValueError if neither r nor keep is known, or so few can not be reached.
        """
        if keep is not None:
            return _even(num_blocks, num_tokens, keep)
        if self.r is None:
            raise ValueError("ToMe needs r, the tokens merged in every block, or keep, those left at the end")
        return _clamped(r_schedule(num_blocks, self.r)[:num_blocks], num_tokens)

    def match(self, block: int, num_blocks: int, metric: Tensor, r: int, prefix: int) -> Matching:
        """Match r tokens by the mean key over heads, `metric` [B, N, D]."""
        return bipartite_soft_matching(metric, r, protected=prefix)


def _clamped(plan: list[int], tokens: int) -> list[int]:
    """Tokens merged in each block: at most half of its tokens."""
    merged = []
    for r in plan:
        merged.append(max(0, min(r, tokens // 2)))
        tokens -= merged[-1]
    return merged


def _even(num_blocks: int, tokens: int, keep: int) -> list[int]:
    """The most even plan that leaves `keep` tokens: r in some first blocks, r - 1 in the others."""

    def plan(step: int) -> list[int]:
        r, more = divmod(step, num_blocks)
        return _clamped([r + 1] * more + [r] * (num_blocks - more), tokens)

    # One step lowers the count by one at most, down to halving in every block.
    low, high = 0, num_blocks * (tokens // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if tokens - sum(plan(middle)) <= keep else (middle + 1, high)
    if tokens - sum(plan(low)) != keep:
        raise ValueError(
            f"ToMe cannot leave {keep} of {tokens} tokens in {num_blocks} blocks, each of which merges at "
            f"most half; the fewest are {tokens - sum(plan(low))}"
        )
    return plan(low)
