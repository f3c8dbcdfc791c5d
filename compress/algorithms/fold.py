"""Keeping the tokens with the most class attention and merging the others: VisionZip and PruMerge."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import Grid
from .select import full_precision, top_k, top_k_mask


@dataclass(frozen=True, eq=False)
class Folded:
    """The kept tokens, and new tokens merged from the others.

    `kept` [..., K] are places in the input sequence; `tokens` [..., K + E, C] the kept ones in that order,
    then E new ones.
    """

    kept: Tensor
    tokens: Tensor


def visionzip(
    hidden_states: Tensor, attention: Tensor, metric: Tensor, dominant: int, contextual: int
) -> Folded:
    """Keep the class token and what it attends to; merge the rest into `contextual` evenly spaced tokens.

    VisionZip (Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", 2024,
    arXiv 2412.04467, section 3). For tiles B of 1 + N tokens, class token first: hidden_states [B, 1 + N, C],
    the class token's `attention` [B, H, 1 + N] and `metric` [B, 1 + N, d], the mean over heads of the keys.
    `dominant` counts the class token. kept [B, dominant] is ascending; a contextual token is the state at its
    place plus the mean of the states most similar to it. Raises ValueError for counts that do not fit.
    """
    batch, tokens, channels = hidden_states.shape
    if not 1 <= dominant <= tokens or not 0 <= contextual <= tokens - dominant:
        raise ValueError(
            f"{dominant} dominant (the class token is one) and {contextual} contextual tokens do not fit "
            f"into {tokens}"
        )
    _check_length("attention", attention, tokens)
    _check_length("metric", metric.mT, tokens)
    patches = attention.float().sum(1)[:, 1:]
    keep = F.pad(top_k_mask(patches, dominant - 1), (1, 0), value=True)
    kept = keep.nonzero()[:, 1].view(batch, dominant)
    states = hidden_states[keep].view(batch, dominant, channels)
    if not contextual:
        return Folded(kept, states)
    rest, keys = (
        hidden_states[~keep].view(batch, -1, channels),
        metric[~keep].view(batch, tokens - dominant, -1),
    )
    places = torch.arange(rest.shape[1], device=rest.device)
    step = rest.shape[1] // contextual
    target = (places % step == 0) & (places < step * contextual)
    with full_precision(rest.device):
        unit = F.normalize(keys.float(), dim=-1, eps=1e-12)
        nearest = (unit[:, ~target] @ unit[:, target].mT).argmax(-1)  # [B, others], of equal ones the first
    into = rest[:, target]
    index = nearest.unsqueeze(-1)
    total = torch.zeros_like(into).scatter_add_(1, index.expand(-1, -1, channels), rest[:, ~target])
    count = into.new_zeros(batch, contextual, 1).scatter_add_(
        1, index, torch.ones_like(index, dtype=into.dtype)
    )
    return Folded(kept, torch.cat([states, into + total / count.clamp_min(1)], 1))


def visionzip_order(kept: Tensor, contextual: int, grid: Grid) -> Tensor:
    """The order in which VisionZip's tokens of P tiles enter the LLM, [P · (K + contextual)].

    `kept` [P, K] and the numbers in the result, tile · (K + contextual) + place in `Folded.tokens`, are
    those of `visionzip`. First all of the thumbnail; then the tiles' dominant patches in the raster order
    of the whole map, padding included; then their class tokens; then their contextual tokens.
    """
    tiles, dominant = kept.shape
    if tiles != grid.num_tiles:
        raise ValueError(f"kept is {list(kept.shape)}; this grid has {grid.num_tiles} tiles")
    grid = grid.to(kept.device)
    slot = torch.arange(tiles * (dominant + contextual), device=kept.device).view(tiles, -1)
    cut, patches = slot[grid.cut], kept[grid.cut, 1:] - 1
    key = (grid.map_row * (grid.cols * grid.width) + grid.map_col).gather(1, patches)
    raster = cut[:, 1:dominant].flatten()[key.flatten().argsort()]
    whole = slot[:0] if grid.thumbnail is None else slot[grid.thumbnail]
    return torch.cat([whole.flatten(), raster, cut[:, 0], cut[:, dominant:].flatten()])


def prumerge(
    features: Tensor,
    attention: Tensor,
    keys: Tensor,
    *,
    plus: bool = False,
    neighbours: int = 32,
    kept: Tensor | None = None,
) -> Folded:
    """Keep the outliers of the class token's attention and add to each the tokens most similar to it.

    LLaVA-PruMerge (Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal
    Models", 2024, arXiv 2403.15388, section 3). For one image without its class token: features [N, C], the
    class token's `attention` [N] after softmax (one head of full width in the original) and `keys` [N, d].
    How many are kept follows from the image: those above the third quartile by 1.5 interquartile ranges, by
    falling attention; `plus` adds evenly spaced ones (or it is `kept` [K] that stay). Each becomes itself
    plus its `neighbours` weighted by attention; one more token sums what is not kept. Raises ValueError for
    shapes that do not fit.
    """
    if features.ndim != 2 or attention.ndim != 1:
        raise ValueError(
            f"features [N, C] and attention [N] of one image; these are {list(features.shape)} and "
            f"{list(attention.shape)}"
        )
    tokens = len(features)
    _check_length("attention", attention, tokens)
    _check_length("keys", keys.mT, tokens)
    weight = attention.float()
    kept = _outliers(weight, plus) if kept is None else kept
    left = torch.ones(tokens, dtype=torch.bool, device=kept.device).index_fill_(0, kept, False)
    with full_precision(features.device):
        unit = F.normalize(keys.float(), dim=-1)
        similarity = unit[kept] @ unit.T
        similarity[torch.arange(len(kept), device=kept.device), kept] = -torch.inf
        near = top_k(similarity, min(neighbours, tokens - 1))  # [K, neighbours]
        share = torch.zeros_like(similarity).scatter_(1, near, weight[near])
        share = torch.cat([share, weight.where(left, 0).unsqueeze(0)])
        added = share @ features.float()
    own = torch.cat([features[kept].float(), added.new_zeros(1, features.shape[1])])
    return Folded(kept, (own + added).to(features.dtype))


def _outliers(weight: Tensor, plus: bool) -> Tensor:
    low, high = torch.quantile(weight, weight.new_tensor([0.25, 0.75]))
    outliers = int((weight > high + 1.5 * (high - low)).sum())
    kept = top_k(weight, outliers)
    if plus:
        # The original fails without outliers or with more than a third; one outlier and step 1 stand in.
        step = max(1, int(len(weight) / max(1, outliers)) // 3)
        evenly = torch.arange(0, len(weight) - 1, step, device=kept.device)
        kept = torch.cat([kept, evenly[~torch.isin(evenly, kept)]])
    return kept


def _check_length(name: str, value: Tensor, tokens: int) -> None:
    if value.shape[-1] != tokens:
        raise ValueError(f"{name} is for {value.shape[-1]} tokens; hidden states are for {tokens}")
