"""PiToMe: tokens in large clusters merge, isolated ones stay."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..algorithms.energy import Rule, merged_count, pitome_matching
from ..algorithms.merge import Matching
from ..reducer import VisionReducer


@dataclass(kw_only=True)
class PiToMe(VisionReducer):
    """Accelerating Transformers with Spectrum-Preserving Token Merging (Tran et al., 2024, arXiv 2405.16148).

    Every block leaves `ratio` of its tokens (one ratio, or one per block), by energies above a `margin` that
    falls as margin (1 - i / L) in block i of L (or is one per block). With `keep`, the patches left at the
    end, the ratio follows. Blocks of `use_bsm` match as ToMe does, those of `use_bsm_pitome` split all tokens
    by energy, the others merge among the tokens of highest energy; both are a number of first blocks or a
    flag per block, and the first half of the blocks is `use_bsm_pitome` unless given.

    The defaults are the original's for DeiT in timm; `clip` gives those for CLIP towers. In MAE models the
    original uses `use_bsm_pitome` in the second half of the blocks instead.
    """

    summary: ClassVar = "merges the most similar, sparing isolated tokens"
    paper: ClassVar = "arXiv 2405.16148"
    verified: ClassVar = "groups equal, ViT and CLIP within 4% of tolerance"

    ratio: float | Sequence[float] = 0.925
    margin: float | Sequence[float] = 0.75
    use_bsm_pitome: int | Sequence[bool] | None = None
    use_bsm: int | Sequence[bool] = 0
    alpha: float = 1.0
    prop_attn: bool = False
    metric: Literal["keys", "hidden"] = "keys"
    where: Literal["attention", "layer"] = "attention"
    weighted: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        ratios = [self.ratio] if isinstance(self.ratio, int | float) else self.ratio
        if not all(0.5 <= ratio <= 1 for ratio in ratios):
            raise ValueError(
                f"ratio is {self.ratio}; a block leaves between half (0.5) and all (1) of its tokens"
            )

    @classmethod
    def clip(cls, **settings: Any) -> "PiToMe":
        """As the original merges in the CLIP tower of LLaVA: outputs of whole layers, without sizes."""
        original = dict(
            margin=0.9, use_bsm=13, use_bsm_pitome=0, metric="hidden", where="layer", weighted=False
        )
        return cls(**(original | settings))

    def plan(self, num_blocks: int, num_tokens: int, prefix: int, keep: int | None) -> list[int]:
        """Tokens merged in each of `num_blocks` blocks, from `num_tokens` patches to `keep` of them.

        Raises ValueError if so few can not be reached.
        """
        plan, left = [], num_tokens
        for block in range(num_blocks):
            if keep is not None:
                target = round(num_tokens * (keep / num_tokens) ** ((block + 1) / num_blocks))
                plan.append(min(left - target, left // 2))
            else:
                # ToMe's matching counts the class token as one of those that may merge.
                counted = left + min(prefix, 1) if _flag(self.use_bsm, block) else left
                ratio = self.ratio if isinstance(self.ratio, int | float) else self.ratio[block]
                plan.append(min(merged_count(counted, ratio), left // 2))
            left -= plan[-1]
        if keep is not None and left != keep:
            raise ValueError(
                f"PiToMe cannot leave {keep} of {num_tokens} tokens in {num_blocks} blocks, each of which "
                f"merges at most half; this schedule leaves {left}"
            )
        return plan

    def match(self, block: int, num_blocks: int, metric: Tensor, r: int, prefix: int) -> Matching:
        """Match r tokens by `metric` [B, N, C], with the margin and rule of block `block` of `num_blocks`."""
        margin = self.margin * (1 - block / num_blocks) if _is_number(self.margin) else self.margin[block]
        halves = (num_blocks + 1) // 2 if self.use_bsm_pitome is None else self.use_bsm_pitome
        rule: Rule = (
            "bsm" if _flag(self.use_bsm, block) else "pitome_bsm" if _flag(halves, block) else "pitome"
        )
        return pitome_matching(metric, r, margin, protected=prefix, alpha=self.alpha, rule=rule)


def _is_number(value: float | Sequence[float]) -> bool:
    return isinstance(value, int | float)


def _flag(flags: int | Sequence[bool], block: int) -> bool:
    """Whether a number of first blocks, or a flag per block, includes `block`."""
    return block < flags if isinstance(flags, int) else flags[block]
