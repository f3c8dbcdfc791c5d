"""Parity of the parts of token reducers that act inside a language model: DART, SparseVLM, PromptDistill."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...compress.algorithms.pivots import least_duplicates
from ...compress.algorithms.prompt_logits import prompt_scores
from ...compress.algorithms.raters import text_raters
from ...compress.algorithms.recycling import density_peaks, group_means, mean_count, recycled_count
from ...compress.algorithms.select import top_k
from ...compress.attention import attention_rows
from ...compress.methods.dart import DART
from .case import Case, Outputs


def select(case: Case) -> Outputs:
    """DART's kept tokens and SparseVLM's raters, kept tokens and means, from arrays drawn by recipe."""
    for sub in case.data["config"]["subcases"]:
        tag = sub["tag"]
        states, keys, attention, embeddings = (x.to(case.device) for x in _draw(sub))
        start, end = sub["start"], sub["start"] + sub["n"]
        image, text = slice(start, end), slice(end, sub["L"])

        norms = keys.transpose(0, 1).flatten(1)  # [L, H D]
        pivots = {name: sub[name] for name in ("pivot_image", "pivot_text")}
        dart = DART(reduction_ratio=sub["reduction_ratio"], **pivots)
        places = torch.arange(sub["L"])
        kept = least_duplicates(
            states[image],
            states[text],
            norms[image],
            norms[text],
            dart.count(1 - sub["reduction_ratio"], sub["n"]),
            places=places[image],
            text_places=places[text],
            **pivots,
        )
        yield f"{tag}.dart", kept + start

        raters = text_raters(embeddings[image], embeddings[text]).nonzero().squeeze(1)
        yield f"{tag}.raters", raters
        scores = attention.mean(0)[end + raters, image].mean(0)
        order = top_k(scores, sub["n"])
        yield f"{tag}.sparse_kept", order[: sub["sparse_budget"]].sort().values
        dropped = order[sub["sparse_budget"] :]
        members = dropped[: recycled_count(len(dropped))]
        case.check_stated(f"{tag}: clusters", mean_count(len(members)), sub["cluster_num"])
        merged = states[image][members]
        groups = density_peaks(merged, sub["cluster_num"])
        yield f"{tag}.sparse_merged", group_means(merged, groups, sub["cluster_num"])[None]


def _draw(sub: dict[str, Any]) -> list[Tensor]:
    """Normed states [L, D], keys [H, L, d], attention [H, L, L] and input embeddings [L, D] of the recipe."""
    random, length, heads = np.random.RandomState(sub["seed"]), sub["L"], sub["H"]

    def mixture(width: int, centres: int = 30, noise: float = 0.6) -> np.ndarray:
        middle = random.standard_normal((centres, width))
        chosen = middle[random.randint(0, centres, (1, length))]
        return chosen + noise * random.standard_normal((1, length, width))

    states = mixture(sub["D"])
    keys = random.standard_normal((1, heads, length, sub["hd"]))
    logits = random.standard_normal((1, heads, length, length))
    attention = np.exp(logits - logits.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    embeddings = 0.3 * mixture(sub["D"])
    return [torch.from_numpy(x[0].astype(np.float32)) for x in (states, keys, attention, embeddings)]


def promptdistill_outputs(case: Case) -> Outputs:
    """PromptDistill's logits, scores and selected places, from recorded queries and keys."""
    query, key = case.recorded("pd.q"), case.recorded("pd.k")
    end = case.recorded("pd.prompt_end").long()
    count = case.data["config"]["promptdistill"]["n_topk"]
    last = end[:, None, None, None].expand(-1, query.shape[1], 1, query.shape[3])
    logits = attention_rows(query.gather(2, last), key, softmax=False).mean(1)[:, 0]
    yield "pd.logits", logits
    for pool in (False, True):
        scores = prompt_scores(logits, end, pool=pool)
        yield f"pd.scores.pool{int(pool)}", scores
        beyond = torch.arange(scores.shape[-1], device=scores.device) >= end[:, None]
        selected = top_k(scores.masked_fill(beyond, -torch.inf), count)
        yield f"pd.selected.pool{int(pool)}", selected.sort(-1).values
