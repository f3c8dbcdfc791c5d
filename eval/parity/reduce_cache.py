"""Parity of selectors of cached tokens, in their form for text: H2O, PromptDistill and TokenSelect.

The originals' tensor operations are recorded outside a model, so the cases go through the pure functions that
the reducers use.
"""

import re

import torch

from ...compress.algorithms.heavy_hitters import accumulated, favour_recent
from ...compress.algorithms.select import top_k
from ...compress.algorithms.soft_vote import max_pooled, soft_vote
from .case import CannotBuild, Case, Outputs

SELECTORS = {"h2o", "promptdistill", "tokenselect"}


def run(case: Case) -> Outputs:
    """Every recorded tensor of a case of selectors. Raises CannotBuild naming an unknown selector."""
    config = case.data["config"]
    if unknown := set(config) - SELECTORS:
        raise CannotBuild(f"{case.path.name}: this version does not verify {', '.join(sorted(unknown))}")
    if "h2o" in config:
        yield from _h2o(case)
    if "promptdistill" in config:
        from .prune_in_model import promptdistill_outputs

        yield from promptdistill_outputs(case)
    if "tokenselect" in config:
        yield from _tokenselect(case)


def _h2o(case: Case) -> Outputs:
    """A prompt and further steps of one layer's cache, in which every head keeps tokens of its own."""
    config = case.data["config"]["h2o"]
    heavy, recent = config["hh_size"], config["recent_size"]
    score, numbers, tokens = None, None, 0
    for call in ["prefill", *(f"step{step}" for step in range(config["steps"]))]:
        attention = case.recorded(f"h2o.attn.{call}")[0].float()  # [H, q, cache]
        heads, new, _ = attention.shape
        latest = torch.arange(tokens, tokens + new, device=attention.device).expand(heads, -1)
        numbers, tokens = latest if numbers is None else torch.cat([numbers, latest], 1), tokens + new
        score = accumulated(score, attention)
        if score.shape[1] > heavy + recent:
            kept = top_k(favour_recent(score, recent), heavy + recent).sort(-1).values
            score, numbers = score.gather(1, kept), numbers.gather(1, kept)
        yield f"h2o.kept.{call}", numbers
        yield f"h2o.score.{call}", score


def _tokenselect(case: Case) -> Outputs:
    """One chunk of queries: their mean votes for the tokens between the initial and the local window."""
    config = case.data["config"]["tokenselect"]
    first, local, count = config["n_init"], config["n_local"], config["top_k"]
    queries, keys = case.recorded("ts.q").float(), case.recorded("ts.k").float()  # [q, H, D], [N, H_k, D]
    case.check_stated("tokenselect.tokens", len(keys), config["tokens"])
    query, last = queries.mean(0), len(keys) - local
    key = keys[first:last].transpose(0, 1)[None]
    groups = queries.shape[1] // keys.shape[1]
    # The original's kernel reads key head h mod H_k for query head h.
    modulo = query.unflatten(0, (groups, -1)).transpose(0, 1).flatten(0, 1)
    for name, mapped in (("grouped", query), ("modulo", modulo)):
        votes = soft_vote(mapped[None, :, None], key, scaling=1.0)[0, 0]
        yield f"ts.score.{name}", votes
        for size in _pool_sizes(case, name):
            pooled = max_pooled(votes, size or 1)
            yield f"ts.pooled.{name}.pool{size}", pooled
            chosen = top_k(pooled, min(count, len(pooled))).sort().values + first
            numbers = torch.arange(len(keys), device=chosen.device)
            yield f"ts.kept.{name}.pool{size}", torch.cat([numbers[:first], chosen, numbers[last:]])


def _pool_sizes(case: Case, head_map: str) -> list[int]:
    """The sizes of the max pooling (0: none) with which a case is recorded."""
    matches = (re.fullmatch(rf"ts\.\w+\.{head_map}\.pool(\d+)", name) for name in case.tensors)
    return sorted({int(match[1]) for match in matches if match})
