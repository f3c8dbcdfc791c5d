"""The verifier of drafted paths: which of them the model accepts, and what the next token is drawn from.

Plain speculative sampling (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding",
2023, arXiv 2211.17192; over trees as in EAGLE, arXiv 2401.15077) leaves the model's distribution as it is.
LANTERN ("Accelerating Visual Autoregressive Models with Relaxed Speculative Decoding", Jang et al., 2025,
arXiv 2410.03355; LANTERN++, arXiv 2502.06352) also accepts a token for the probability of its nearest codes,
and moves at most a bounded mass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .trees import DraftTree


@dataclass(frozen=True)
class Lantern:
    """Relaxed acceptance: a token counts for the mass of its `k` nearest codes, up to a bound.

    `table` int [V, ≥ k] are the nearest codes of every code (`neighbour_table`). The bound on the moved mass
    is `delta` up to 1, and (delta - 1) · p(token) above (LANTERN++, whose λ is delta).

    Raises:
        ValueError: k outside the table, or a delta of 0 or less.
    """

    table: Tensor
    k: int = 1000
    delta: float = 0.1

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or not 1 <= self.k <= self.table.shape[1]:
            raise ValueError(
                f"k is {self.k} and the table {list(self.table.shape)}; it holds k or more neighbours of "
                "every code, [V, ≥ k]"
            )
        if not self.delta > 0:
            raise ValueError(f"delta is {self.delta}; it is above 0")

    def moved(self, probabilities: Tensor, token: int) -> float | None:
        """The mass that moves to a token from its nearest codes, under distribution [V]; None where already
        the nearest one has more than the bound."""
        own = float(probabilities[token])
        bound = self.delta if self.delta <= 1 else (self.delta - 1) * own
        nearest = self.table[token, : self.k].long()
        sums = probabilities[nearest].cumsum(0)
        count = int((sums <= bound).sum())
        return float(sums[count - 1]) if count else None

    def ruled_out(self, token: int) -> Tensor:
        """The codes that a rejection rules out beside the token, int64."""
        # Parity: the nearest k + 1, however many of them the mass came from.
        return self.table[token, : self.k + 1].long()


@dataclass(frozen=True)
class Verdict:
    """What was accepted: the number of the candidate `path`, its accepted `length` (tokens after the root),
    the distribution `result` [V] of the next token (greedy: its logits), how many uniforms were `used`, how
    many tokens were accepted by relaxation alone (`relaxed`), and the `moved` mass of accepted tokens."""

    path: int
    length: int
    result: Tensor
    used: int
    relaxed: int = 0
    moved: float = 0.0


def verify(
    candidates: Tensor,
    logits: Tensor,
    uniforms: Sequence[float] | Tensor,
    *,
    rule: Lantern | None = None,
    tree: DraftTree | None = None,
    draft_probabilities: Tensor | None = None,
    draft_distributions: Sequence[Tensor] | None = None,
    most_relaxed: int | None = None,
) -> Verdict:
    """Walk down the candidate paths, and accept or reject each drafted token by one uniform number.

    Args:
        candidates: int64 [P, D + 1], the tokens of P paths from the root on; -1 behind shorter ones.
        logits: [P, D + 1, V], the model's logits behind each token, after guidance, temperature and filters.
        uniforms: numbers in [0, 1), used from the first on, one per token that is tried.
        rule: None for plain acceptance, which keeps the model's distribution, or `Lantern`.
        tree: the static tree of the candidates, with the next two.
        draft_probabilities: [P, D + 1], with which each token was drafted, given that its earlier siblings
            were not. Without them every draft counts as certain, as from a dynamic tree.
        draft_distributions: for each level below the root the drafter's distributions [parents, V].
        most_relaxed: accept at most so many tokens by relaxation alone.

    Raises:
        ValueError: shapes that do not belong together, too few uniforms, and drafter's values without the
            others.
    """
    _check(candidates, logits, tree, draft_probabilities, draft_distributions)
    static = draft_probabilities is not None
    steps = candidates.shape[1]
    path, accepted, relaxed, moved, used = 0, candidates[0, :1], 0, 0.0, 0
    changed: Tensor | None = None
    for depth in range(1, steps):
        agrees = (candidates[:, :depth] == accepted).all(1)
        probabilities = logits[int(agrees.nonzero()[0]), depth - 1].float().softmax(-1)
        changed, tried, advanced = None, set(), False
        for row in agrees.nonzero().squeeze(1).tolist():
            token = int(candidates[row, depth])
            if token < 0 or token in tried:
                continue
            tried.add(token)
            if used >= len(uniforms):
                raise ValueError(f"{len(uniforms)} uniforms were given, and more are needed")
            uniform, used = float(uniforms[used]), used + 1
            drafted = float(draft_probabilities[row, depth]) if static else 1.0
            if drafted <= 0:
                continue
            may_relax = rule is not None and (most_relaxed is None or relaxed < most_relaxed)
            found = rule.moved(probabilities, token) if may_relax else None
            own, mass = float(probabilities[token]), found or 0.0
            if uniform <= (own + mass) / drafted:
                by_relaxation = uniform > own / drafted
                relaxed, moved = relaxed + by_relaxation, moved + mass
                accepted, path, advanced = candidates[row, : depth + 1], row, True
                break
            if static:
                level = draft_distributions[depth - 1]
                drafts = level[tree.parent_ranks[row, depth]].clone()
                earlier = _tokens_of(candidates, tree, tree.siblings[row][depth])
                if earlier:
                    drafts[earlier] = 0
                    drafts /= drafts.sum()
                if found is not None:
                    drafts[rule.ruled_out(token)] = (
                        0  # Parity: of the drafter's distribution, where the model's was meant
                    )
                probabilities = (probabilities - drafts).clamp_min(0)
            else:
                probabilities[token] = 0
                if found is not None:
                    probabilities[rule.ruled_out(token)] = 0
            total = probabilities.sum()
            probabilities = (
                probabilities / total
                if total > 0
                else torch.full_like(probabilities, 1).div_(len(probabilities))
            )
            changed = probabilities
        if not advanced:
            break
    length = len(accepted) - 1
    if changed is None or length + 1 == steps:
        changed = logits[path, length].float().softmax(-1)
    return Verdict(path, length, changed, used, relaxed, moved)


def verify_greedy(candidates: Tensor, logits: Tensor, *, rule: Lantern | None = None) -> Verdict:
    """The longest candidate path of which every token is the likeliest one, by relaxation with its
    neighbours' mass; of equally long ones the first. `result` are the model's logits behind it. Arguments as
    `verify`."""
    _check(candidates, logits, None, None, None)
    lengths, counts = [], []
    for row, tokens in enumerate(candidates.tolist()):
        length = relaxed = 0
        for depth in range(1, len(tokens)):
            if tokens[depth] < 0:
                break
            probabilities = logits[row, depth - 1].float().softmax(-1)
            likeliest = int(probabilities.argmax())
            if rule is not None:
                probabilities[tokens[depth]] += rule.moved(probabilities, tokens[depth]) or 0.0
            if int(probabilities.argmax()) != tokens[depth]:
                break
            length, relaxed = depth, relaxed + (likeliest != tokens[depth])
        lengths.append(length)
        counts.append(relaxed)
    best = max(range(len(lengths)), key=lambda row: (lengths[row], -row))
    return Verdict(best, lengths[best], logits[best, lengths[best]], 0, counts[best])


def _tokens_of(candidates: Tensor, tree: DraftTree, nodes: Sequence[int]) -> list[int]:
    """The tokens of nodes of the tree, from the candidates that hold them."""
    return [int(candidates[tuple((tree.candidates == node).nonzero()[0].tolist())]) for node in nodes]


def _check(
    candidates: Tensor,
    logits: Tensor,
    tree: DraftTree | None,
    draft_probabilities: Tensor | None,
    draft_distributions: Sequence[Tensor] | None,
) -> None:
    if candidates.ndim != 2 or logits.shape[:2] != candidates.shape or logits.ndim != 3:
        raise ValueError(
            f"candidates are {list(candidates.shape)} and logits {list(logits.shape)}; they are [P, D + 1] "
            "and [P, D + 1, V]"
        )
    if not bool((candidates[:, 0] == candidates[0, 0]).all()):
        raise ValueError("candidates do not begin with one token, the last that is certain")
    given = [each is not None for each in (tree, draft_probabilities, draft_distributions)]
    if any(given) and not all(given):
        raise ValueError("a static tree comes with its draft_probabilities and draft_distributions; give all")
    if tree is not None and tree.candidates.shape != candidates.shape:
        raise ValueError(
            f"candidates are {list(candidates.shape)}; those of the tree {list(tree.candidates.shape)}"
        )
