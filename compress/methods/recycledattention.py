"""Recycled Attention: between steps of full attention, attend to what the last of them attended to most."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algorithms.soft_vote import max_pooled
from ..attention import attention_rows
from ..reducer import CacheStep, StepReducer


@dataclass(kw_only=True)
class RecycledAttention(StepReducer):
    """Recycled Attention, published as RefreshKV: Updating Small KV Cache During Long-form Generation (Xu et
    al., ACL 2025, arXiv 2411.05787), for visual tokens.

    The last prompt token chooses, for each layer and key head, the visual tokens with the highest attention
    (maximum over the query heads, then over `kernel_size` neighbours); later tokens attend to these and to
    all text. At every `stride`-th step a layer attends to everything and chooses again, unless the cosine of
    its query (mean over heads) and that of its last full step is above `threshold`. `keep` sets the share or
    count of visual tokens, an eighth by default. The images of a prompt share one budget, unless `per_image`.

    Raises ValueError for a `stride` below 1, a `threshold` outside [-1, 1] and an even `kernel_size`.
    """

    summary: ClassVar = "recycles the choice of the last full step"
    paper: ClassVar = "arXiv 2411.05787"
    starts: ClassVar = True

    stride: int = 10
    threshold: float = 0.85
    kernel_size: int = 7
    per_image: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise ValueError(f"stride is {self.stride}; it takes a number of steps from 1")
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it takes a cosine from -1 to 1")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; it takes an odd number from 1")

    def default_count(self, tokens: int) -> int:
        """An eighth, at least 1."""
        return max(1, tokens // 8)

    def attend(self, step: CacheStep) -> Tensor:
        """Everything at full steps, and what the last full step chose at the others, bool [B, H_k, R, S]."""
        queries, memory, rows = step.query.float().mean(1), step.memory, []
        size, choice = step.keys.shape[2], None
        for r in range(queries.shape[1]):
            query, real = queries[:, r], step.real[:, r]
            if step.start:
                full = real
            else:
                memory["steps"] = memory["steps"] + real
                due = real & (memory["steps"] % self.stride == 0)
                full = due & (F.cosine_similarity(query, memory["query"], dim=-1) <= self.threshold)
            if bool(full.any()):
                choice = self._choice(step) if choice is None else choice
                chosen = F.pad(choice[:, :, r], (step.first, 0))
                memory["query"] = query if step.start else query.where(full[:, None], memory["query"])
                memory["kept"] = chosen if step.start else self._where(full, chosen, memory["kept"])
            if step.start:
                memory["steps"] = torch.zeros_like(real, dtype=torch.long)
            kept = _extended(memory["kept"], step.first + size)[..., step.first :]
            rows.append(kept | full[:, None, None])
        return torch.stack(rows, 2) & step.visual

    def _choice(self, step: CacheStep) -> Tensor:
        """The visual tokens with the highest attention of each query, bool [B, H_k, R, S]."""
        attention = attention_rows(step.query, step.keys, scaling=step.scaling, mask=step.allowed)
        by_head = attention.unflatten(1, (step.keys.shape[1], -1)).amax(2)
        return step.best(max_pooled(by_head.masked_fill(~step.visual, -torch.inf), self.kernel_size))

    @staticmethod
    def _where(full: Tensor, chosen: Tensor, kept: Tensor) -> Tensor:
        return chosen.where(full[:, None, None], _extended(kept, chosen.shape[-1]))


def _extended(kept: Tensor, size: int) -> Tensor:
    """Entries that came after a choice [B, H_k, earlier] was made are not in it."""
    return F.pad(kept, (0, size - kept.shape[-1]))
