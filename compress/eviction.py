"""Evicting visual tokens from the cache of a language model, once the prompt has been read."""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from .call import Call, past_columns
from .layout import Layout, compact
from .reducer import CacheReducer, Stage, count_of


def evict(call: Call, reducer: CacheReducer) -> None:
    """Remove entries of visual tokens from every full-attention layer, after the prompt has been read.

    Writes the remaining entries into the cache's state; layers of sliding windows are left alone.
    """
    state, cache = call.cache.reduction, call.cache
    shared: dict[tuple[tuple[int, ...], int], Tensor] = {}
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer) or not layer.is_initialized:
            continue
        layout, entries = call.layouts[i], call.entries[i]
        image = call.prompt.image.gather(1, layout.index).masked_fill(~layout.valid, -1)
        real = torch.cat([past_columns(call, i), layout.valid], 1).clone()
        dropped = False
        for number, span in enumerate(call.prompt.spans):
            places = (image[span.row] == number).nonzero().squeeze(1)
            if not len(places):
                continue
            tokens = (places + entries).to(layer.keys.device)
            keys, values = layer.keys[span.row][:, tokens], layer.values[span.row][:, tokens]
            budget = call.budgets[Stage.CACHE][number]
            count = len(places) if budget is None else count_of(budget, len(places))
            if count >= len(places):
                continue
            with call.timed():
                order = reducer.score(i, keys, values).sort(descending=True, stable=True).indices
            gone = places[order[count:].to(places.device)]
            real[span.row, gone + entries] = False
            dropped = True
        if not dropped:
            continue
        index, valid, ragged = compact(real)
        where = index[:, None, :, None].to(layer.keys.device)
        layer.keys = layer.keys.gather(2, where.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
        layer.values = layer.values.gather(
            2, where.expand(-1, layer.values.shape[1], -1, layer.values.shape[3])
        )
        # Entries stand to the right, so equal counts make equal columns: layers share them, and their masks.
        counts = tuple(valid.sum(1).tolist())
        state.columns[i], state.ragged[i] = shared.setdefault((counts, valid.shape[1]), valid), ragged
        places = layout.index.gather(1, (index - entries).clamp_min(0))
        call.held[i] = Layout(places, valid & (index >= entries), ragged)
        state.gap[i] = state.length - index.shape[1]
