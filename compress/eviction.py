"""Evicting visual tokens from the cache of a language model, once the prompt has been read."""

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from .boundary import budget_of, view
from .call import Call, past_columns
from .hosts.families import Host
from .layout import Layout, compact
from .reducer import Budget, CacheReducer, count_of


def evict(host: Host, call: Call, reducer: CacheReducer, keep: Budget) -> None:
    """Remove entries of visual tokens from every full-attention layer, after the prompt has been read.

    Writes the remaining entries into the cache's state; layers of sliding windows are left alone.
    """
    state, cache = call.cache.reduction, call.cache
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
            features = keys.transpose(0, 1).flatten(1)
            budget = budget_of(keep, view(host, span, features, features[:0]), None)
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
        state.columns[i], state.ragged[i] = valid, ragged
        places = layout.index.gather(1, (index - entries).clamp_min(0))
        call.held[i] = Layout(places, valid & (index >= entries), ragged)
        state.gap[i] = state.length - index.shape[1]
