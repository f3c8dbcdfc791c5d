"""Verification of drafts that a model makes for itself: speculative Jacobi decoding, and its grouped form.

Every pass evaluates a window of positions. What it draws there are the drafts of the next pass, which accepts
them one after the other ("Accelerating Auto-regressive Text-to-Image Generation with Training-free
Speculative Jacobi Decoding", Teng et al., 2025, arXiv 2410.01699). GSD accepts by the probability of a group
of like tokens instead of one ("Grouped Speculative Decoding for Autoregressive Image Generation", So et al.,
2025, arXiv 2508.07747); its output then differs from the model's distribution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GSD:
    """Groups of tokens that are accepted together: those near in probability and near in embedding.

    A token's group are its `below` and `above` neighbours in the ascending order of the model's logits,
    among them those whose probability differs by less than `p_gap` and whose squared distance, in `table`
    [T, T] of the first T codes, is less than `max_sq_dist`. Where a window would begin below the smallest
    logit there is no group, and the plain rule holds; a member beyond the table turns the test of distances
    off, and one equal to its size the group (the reference, "gsd-2025").
    """

    table: Tensor
    below: int = 7
    above: int = 7
    p_gap: float = 0.15
    max_sq_dist: float = 0.5

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or self.table.shape[0] != self.table.shape[1]:
            raise ValueError(f"table is {list(self.table.shape)}; it holds squared distances [T, T]")

    def members(self, logits: Tensor, probabilities: Tensor, token: int) -> Tensor | None:
        """The group of a token, int64, under logits and distribution [V]; None for the plain rule."""
        order = logits.sort(stable=True).indices
        rank = int((order == token).nonzero()[0])
        if rank < self.below:
            return None
        window = order[rank - self.below : rank + self.above]
        size = len(self.table)
        if size < len(logits) and (int(window.max()) == size or token == size):
            return None
        near = (probabilities[window] - probabilities[token]).abs() < self.p_gap
        if token < size and int(window.max()) < size:
            near &= self.table[token, window] < self.max_sq_dist
        return window[near]


@dataclass(frozen=True)
class JacobiVerdict:
    """The outcome of a window. `first_rejected` [B] is the position of the first rejected draft, the window's
    length L where none is. `tokens` [B, L] stand one position further than the window: accepted drafts, then
    (at first_rejected - 1) the token that replaces the rejected one, then the model's fresh tokens; where all
    drafts are accepted the last one is fresh. `rows` [B, L, V] are the distributions that they belong to: the
    drafter's of accepted drafts, else the model's. `acceptance` [B, L] is the probability with which each
    draft was accepted (first column: 1), `residuals` [B, V] what rejected drafts were replaced from (zeros
    where nothing was rejected)."""

    first_rejected: Tensor
    tokens: Tensor
    rows: Tensor
    acceptance: Tensor
    residuals: Tensor


def verify_drafts(
    logits: Tensor,
    draft_probabilities: Tensor,
    drafts: Tensor,
    fresh: Tensor,
    uniforms: Tensor,
    *,
    group: GSD | None = None,
    generator: torch.Generator | None = None,
    greedy: bool = False,
) -> JacobiVerdict:
    """Accept or reject the drafts of one Jacobi window.

    Args:
        logits: [B, L, V], the model's at each position, for the one behind it.
        draft_probabilities: [B, L, V], the distributions that drafts were drawn from, at their own positions.
        drafts: int64 [B, L]; the first is certain.
        fresh: int64 [B, L], what the model draws at each position in this pass.
        uniforms: [B, L] in [0, 1), one per position; the first is not used.
        group: accept by groups of like tokens, or by each token's own probability.
        generator: for the token that replaces a rejected draft, drawn from what the draft had too little of.
        greedy: take the likeliest of those instead.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if logits.ndim != 3 or draft_probabilities.shape != logits.shape:
        raise ValueError(
            f"logits are {list(logits.shape)} and draft_probabilities {list(draft_probabilities.shape)}; "
            "both are [B, L, V]"
        )
    for name, each in (("drafts", drafts), ("fresh", fresh), ("uniforms", uniforms)):
        if each.shape != logits.shape[:2]:
            raise ValueError(f"{name} are {list(each.shape)}; they are [B, L], here {list(logits.shape[:2])}")
    batch, length, vocabulary = logits.shape
    target = logits.float().softmax(-1)
    acceptance = torch.ones(batch, length)
    first = torch.full((batch,), length)
    tokens, rows = fresh.clone(), target.clone()
    residuals = torch.zeros(batch, vocabulary)
    for row in range(batch):
        for place in range(1, length):
            token, own, draft = (
                int(drafts[row, place]),
                target[row, place - 1],
                draft_probabilities[row, place],
            )
            members = None if group is None else group.members(logits[row, place - 1], own, token)
            if members is None:
                members = torch.tensor([token], device=own.device)
            acceptance[row, place] = _ratio(float(own[members].sum()), float(draft[members].sum()))
            if first[row] == length and not float(uniforms[row, place]) < float(acceptance[row, place]):
                first[row] = place
        end = int(first[row])
        tokens[row, : end - 1] = drafts[row, 1:end]
        rows[row, : end - 1] = draft_probabilities[row, 1:end].float()
        if end < length:
            rest = (target[row, end - 1] - draft_probabilities[row, end].float()).clamp_min(0)
            residuals[row] = rest / rest.sum() if rest.sum() > 0 else target[row, end - 1]
            drawn = None if greedy else torch.multinomial(residuals[row], 1, generator=generator)
            tokens[row, end - 1] = residuals[row].argmax() if drawn is None else drawn[0]
    return JacobiVerdict(first, tokens, rows, acceptance, residuals)


def _ratio(target: float, draft: float) -> float:
    """min(1, target / draft); 0 / 0 rejects."""
    if draft == 0:
        return 1.0 if target > 0 else 0.0
    return min(1.0, target / draft)
