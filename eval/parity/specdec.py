"""Parity of speculative decoding: tree tables, LANTERN's acceptance, and that of SJD and GSD.

Everything is recomputed from the recorded recipes: codebooks, logits, drafts and uniforms.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...generate.speculative import (
    GSD,
    DraftTree,
    Lantern,
    neighbour_table,
    verify,
    verify_drafts,
    verify_greedy,
)
from .case import Case, Outputs
from .fields import check_size, whole

FAMILIES = ("specdec",)
DRAWS = 400  # uniforms of a trial
NEIGHBOURS = 16  # recorded columns of the table


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor."""
    if "cases" in case.config:
        yield from _jacobi(case)
    elif isinstance(case.config.get("choices"), dict):
        yield from _trees(case)
    elif "choices" in case.config:
        yield from _lantern(case)
    else:
        raise case.refusal("it has neither trees, nor trials of a tree, nor Jacobi windows")


# Trees ------------------------------------------------------------------------------------------------------


def _trees(case: Case) -> Outputs:
    drafts = whole(case.path.name, case.config, "top_k_per_parent", 1, 1000)
    for name, choices in case.config["choices"].items():
        tree = DraftTree.of(choices, drafts)
        yield f"{name}.mask", tree.mask.to(torch.uint8)
        yield f"{name}.tree_indices", tree.draft_places
        yield f"{name}.position", tree.depth
        yield f"{name}.retrieve", tree.candidates
        yield f"{name}.p_indices", tree.parent_ranks
        most = max(1, *(len(entry) for row in tree.siblings for entry in row))
        padded = [[entry + [-1] * (most - len(entry)) for entry in row] for row in tree.siblings]
        yield f"{name}.b_indices", torch.tensor(padded)


# LANTERN ----------------------------------------------------------------------------------------------------


@dataclass
class _Trial:
    """One recorded trial: its candidates, logits along them, drafter's values, table and uniforms."""

    nodes: Tensor
    candidates: Tensor
    logits: Tensor
    drafted: Tensor
    levels: list[Tensor]
    table: Tensor
    uniforms: np.ndarray


def _trial(case: Case, tree: DraftTree, number: int) -> _Trial:
    config = case.config
    vocabulary, width = (whole(case.path.name, config, name, 2, 2**16) for name in ("vocab", "dim"))
    count, deepest, peak = len(tree.nodes), int(tree.depth.max()), float(config["peak"])
    check_size(case.path.name, "logits", (count + 1, vocabulary))
    random = np.random.RandomState(case.seed + number)

    def draw(scale: float, *shape: int) -> np.ndarray:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    codebook = draw(1.0, vocabulary, width)
    bases = draw(peak, deepest + 1, vocabulary)
    noise = draw(0.5 * peak, count + 1, vocabulary)
    levels = []
    for level in range(deepest):
        parents = sum(len(path) == level for path in tree.expanded)
        values = (0.7 * (bases[level] + draw(0.5 * peak, parents, vocabulary))).astype(np.float32)
        levels.append(torch.from_numpy(values).softmax(-1))
    root, uniforms = random.randint(vocabulary), random.rand(DRAWS)
    tokens, drafted = [root], [1.0]
    for path in tree.expanded:
        rank = [each for each in tree.expanded if len(each) == len(path)].index(path)
        top = levels[len(path)][rank].topk(tree.drafts_per_node)
        tokens += top.indices.tolist()
        rest = 1.0
        for value in top.values.tolist():
            drafted.append(value / rest)
            rest -= value
    nodes, real = torch.tensor(tokens)[tree.draft_places], tree.candidates >= 0
    places = tree.candidates.clamp_min(0)
    logits = torch.from_numpy(bases)[tree.depth] + torch.from_numpy(noise)[:count]
    return _Trial(
        nodes,
        nodes[places].masked_fill(~real, -1),
        F.pad(logits, (0, 0, 0, 1))[tree.candidates],  # -1 reads a row of zeros
        torch.tensor(drafted)[tree.draft_places][places].masked_fill(~real, 1.0),
        levels,
        neighbour_table(torch.from_numpy(codebook)),
        uniforms,
    )


def _lantern(case: Case) -> Outputs:
    tree = DraftTree.of(case.config["choices"])
    trials = [
        _trial(case, tree, number) for number in range(whole(case.path.name, case.config, "trials", 1, 1000))
    ]
    first = trials[0]
    yield "trial0_candidates", first.candidates
    yield "trial0_tree_candidates", first.nodes[None]
    yield "trial0_cart_prob", first.drafted
    yield "trial0_neighbours", first.table[:, :NEIGHBOURS]
    yield "trial0_logits0", first.logits[0]
    for number, trial in enumerate(trials):
        yield f"trial{number}_sample_token", trial.nodes[:1]
    settings, deltas, rows, results = list(_settings(case.config)), [], [], []
    for number, trial in enumerate(trials):
        for mode in range(3):
            for relaxed, k, delta in settings:
                rule = Lantern(trial.table, k, delta) if relaxed else None
                verdict = _verdict(trial, tree, mode, rule)
                rows.append([number, mode, relaxed, k, verdict.used, verdict.path, verdict.length])
                deltas.append(delta)
                results.append(verdict.result)
    yield "rows", torch.tensor(rows)
    yield "delta", torch.tensor(deltas)
    yield "result", torch.stack(results)


def _settings(config: dict[str, Any]) -> Iterator[tuple[int, int, float]]:
    yield 0, 0, 0.0
    for k in config["k"]:
        for delta in config["delta"]:
            yield 1, k, delta


def _verdict(trial: _Trial, tree: DraftTree, mode: int, rule: Lantern | None) -> Any:
    if mode == 2:
        return verify_greedy(trial.candidates, trial.logits, rule=rule)
    static = {
        "tree": tree,
        "draft_probabilities": trial.drafted,
        "draft_distributions": trial.levels,
    }
    return verify(trial.candidates, trial.logits, trial.uniforms, rule=rule, **(static if mode else {}))


# Jacobi windows ---------------------------------------------------------------------------------------------


def _jacobi(case: Case) -> Outputs:
    config = case.config
    size = whole(case.path.name, config, "distance_table_size", 1, 2**16)
    for number, each in enumerate(config["cases"]):
        name = f"{case.path.name}: case {number}"
        batch, length, vocabulary = (whole(name, each, key, 1, 2**16) for key in ("B", "L", "V"))
        check_size(name, "logits", (batch, length, vocabulary))
        random = np.random.RandomState(whole(name, each, "seed", 0, 2**32 - 1))
        rows = (each["escale"] * random.standard_normal((vocabulary, each["dim"]))).astype(np.float32)
        base = (each["peak"] * random.standard_normal((batch, length, vocabulary))).astype(np.float32)
        noise = (each["noise"] * random.standard_normal((batch, length, vocabulary))).astype(np.float32)
        logits = torch.from_numpy(base)
        drafting = torch.from_numpy(np.concatenate([noise[:, :1], base[:, :-1] + noise[:, 1:]], 1))
        if each["tk"]:
            logits, drafting = _top(logits, each["tk"]), _top(drafting, each["tk"])
        drafted = drafting.softmax(-1)
        sums, uniforms = drafted.numpy().cumsum(-1), random.rand(batch, length)
        drafts = torch.tensor(
            [
                [min(vocabulary - 1, int(np.searchsorted(sums[b, i], uniforms[b, i]))) for i in range(length)]
                for b in range(batch)
            ]
        )
        if each["onehot"]:
            last = slice(length - each["onehot"], length)
            drafted[:, last] = F.one_hot(drafts[:, last], vocabulary).float()
        draws = torch.from_numpy(random.rand(batch, length).astype(np.float32))
        fresh = logits.softmax(-1).argmax(-1)
        yield f"{number}.draft_tokens", drafts
        yield f"{number}.advanced_tokens", fresh
        before = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        order = before.sort(stable=True).indices
        ranks = (order == drafts[..., None]).int().argmax(-1)
        filtered = before.gather(2, drafts[..., None])[..., 0] == -torch.inf  # these have no order
        recorded = case.recorded(f"{number}.rank").cpu().long()
        yield f"{number}.rank", torch.where(filtered, recorded, ranks)
        codes = torch.from_numpy(rows[:size])
        table = (codes[:, None] - codes[None]).square().sum(-1)
        group = GSD(
            table,
            config["window_below"],
            config["window_above"],
            config["p_threshold"],
            config["distance_threshold"],
        )
        for rule, used in (("sjd", None), ("gsd", group)):
            verdict = verify_drafts(logits, drafted, drafts, fresh, draws, group=used, greedy=True)
            # Recorded are -1 for the first column, which has no draft, and -2 where nothing is divided by
            # nothing; both reject or do not apply.
            marks = case.recorded(f"{number}.{rule}.accept_prob").float().cpu()
            acceptance = torch.where((marks < 0) & (verdict.acceptance == 0), marks, verdict.acceptance)
            acceptance[:, 0] = -1
            yield f"{number}.{rule}.accept_prob", acceptance
            yield f"{number}.{rule}.first_reject", verdict.first_rejected
            yield f"{number}.{rule}.tokens", verdict.tokens
            scores = case.tensors[f"{number}.{rule}.scores_sum0"]
            yield f"{number}.{rule}.scores_sum0", verdict.rows[..., : scores.shape[-1]]
            residual = case.tensors[f"{number}.{rule}.residual"]
            rejected = verdict.residuals[verdict.first_rejected < length]
            yield f"{number}.{rule}.residual", rejected[..., : residual.shape[-1]]


def _top(logits: Tensor, count: int) -> Tensor:
    """Logits below the `count` highest of each row, filtered out."""
    least = logits.topk(count, -1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)
