"""Parity of Zero-TPrune's formulas, of which no original code exists: ranks, head filter, S- and I-stage."""

from typing import Any

from torch import Tensor

from ...compress.algorithms.page_rank import (
    filtered_heads,
    head_mean,
    head_variance,
    page_rank,
    prune_similar,
    subgraph,
    without,
)
from ...compress.methods.zerotprune import ZeroTPrune
from ...compress.reducer import TowerAttention
from .case import CannotBuild, Case, Outputs

STARTS = {"uni": False, "cls": True}


def run(case: Case) -> Outputs:
    """Every recorded tensor of a Zero-TPrune case, recomputed."""
    config = case.data["config"]
    attention, key = case.recorded("attn"), case.recorded("key")
    if config["class_token_index"] != 0:
        raise CannotBuild(f"{case.path.name}: the class token is {config['class_token_index']}, not 0")
    v_min, v_max = config["vmin"], config["vmax"]
    for name in (name.removeprefix("s.") for name in case.tensors if name.startswith("s.")):
        iterations, start = name.split(".")
        scores = page_rank(attention, int(iterations[1:]), class_token=STARTS[start])
        heads = filtered_heads(scores, v_min, v_max)
        yield f"s.{name}", scores
        yield f"var.{name}", head_variance(scores)
        yield f"heads.{name}", heads.float()
        yield f"eir.{name}", head_mean(scores)
        yield f"eir_vhf.{name}", head_mean(scores, heads)
    yield from _stages(attention, key, config)


def _stages(attention: Tensor, key: Tensor, config: dict[str, Any]) -> Outputs:
    stage, r = config["i_stage"], config["r_similarity"]
    v_min, v_max, starts_high = config["vmin"], config["vmax"], STARTS[stage["init"]]
    scores = page_rank(attention, 1, class_token=True)
    importance = head_mean(scores, filtered_heads(scores, v_min, v_max))
    yield "iprime", importance
    similar = prune_similar(importance, key, r, 1)
    yield "s_a", similar.less
    yield "s_b", similar.more
    yield "s_best", similar.best
    yield "s_pruned", similar.pruned.sort(-1).values
    left = without(key.shape[1], similar.pruned)
    yield "after_s", left
    scores = page_rank(subgraph(attention, left), stage["iterations"], class_token=starts_high)
    yield "i_importance", head_mean(scores, filtered_heads(scores, v_min, v_max))
    reducer = ZeroTPrune(
        r=r, iterations=(stage["iterations"],) * 3, v_min=v_min, v_max=v_max, uniform=not starts_high
    )
    dropped = key.shape[1] - 1 - stage["keep"]
    graph = TowerAttention(attention, class_token=True)
    yield "kept", reducer.match(0, 12, key, dropped, 1, attention=graph).kept
