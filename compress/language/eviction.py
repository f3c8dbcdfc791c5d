"""Evicting visual tokens from the cache of a language model, once the prompt has been read."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..hosts import holds_keys, replace_entries
from ..layout import Layout, compact
from ..reducer import CacheReducer, Stage, count_of
from .call import Call, past_columns


def choose_evicted(
    call: Call, reducers: Sequence[CacheReducer], i: int, keys: Tensor, values: Tensor
) -> Tensor:
    """Which entries [B, S] of layer i leave its cache, by its keys and values [B, H_k, S, D]: those of the
    last S tokens of the layer, which are all of them unless a window has dropped some. Each reducer ranks
    what those before it leave; budgets count the tokens that the layer computed."""
    layout, size = call.layouts[i], keys.shape[2]
    first = size - layout.valid.shape[1]  # column of the call's first token
    image = call.prompt.image.gather(1, layout.index).masked_fill(~layout.valid, -1)
    ends = ((layout.index == call.last[:, None]) & layout.valid).long().argmax(1)  # of the prompts
    window = call.host.window(i) if call.host.layer_type(i) == "sliding_attention" else None
    gone = torch.zeros(len(keys), size, dtype=torch.bool, device=image.device)
    for number, span in enumerate(call.prompt.spans):
        places = (image[span.row] == number).nonzero().squeeze(1)
        if not len(places):
            continue
        original = len(places)
        if window is not None:  # what the first token of the answer cannot attend to is not counted
            places = places[places > ends[span.row] + 1 - window]
        columns = places + first
        columns = columns[columns >= 0]
        for reducer, budgets in zip(reducers, call.budgets[Stage.CACHE], strict=True):
            budget = budgets[number]
            count = original if budget is None else count_of(budget, original)
            if count >= len(columns):
                continue
            held = columns.to(keys.device)
            with torch.no_grad(), call.timed():
                score = reducer.score(i, keys[span.row][:, held], values[span.row][:, held])
                order = score.sort(descending=True, stable=True).indices.to(columns.device)
            gone[span.row, columns[order[count:]]] = True
            columns = columns[order[:count].sort().values]
    return gone


def hide_from_answers(
    call: Call, reducers: Sequence[CacheReducer], i: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor | None]:
    """A function that hides the entries of layer i which leave the cache from answers in the same forward, as
    they would be hidden when the answer is generated token by token."""

    def change(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor | None:
        gone = call.evicted[i] = choose_evicted(call, reducers, i, key, value)
        answer = call.answered.gather(1, call.layouts[i].index)
        if not bool((gone.any(1) & answer.any(1)).any()):
            return mask
        hidden = (answer[:, :, None] & gone[:, None, :])[:, None].to(query.device)  # [B, 1, L', S]
        if mask is None:
            rows, columns = hidden.shape[-2:]
            mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
        return (
            mask & ~hidden
            if mask.dtype == torch.bool
            else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        )

    return change


def evict(call: Call, reducers: Sequence[CacheReducer]) -> None:
    """Remove entries of visual tokens from every layer of the cache, after the prompt has been read, and
    write the remaining ones into the cache's state."""
    state, cache = call.cache.reduction, call.cache
    shared: dict[tuple[tuple[int, ...], int], Tensor] = {}
    for i, layer in enumerate(cache.layers[: len(call.layouts)]):
        if not holds_keys(cache, i) or not layer.is_initialized:
            continue
        size, layout = layer.keys.shape[2], call.layouts[i]
        gone = call.evicted.get(i)
        if gone is None:
            gone = choose_evicted(call, reducers, i, layer.keys, layer.values)
        gone = gone[:, -size:]
        if not bool(gone.any()):
            continue
        total = call.entries[i] + layout.valid.shape[1]
        numbers = state.numbered(i, total)
        if numbers is None:
            numbers = torch.arange(total, device=gone.device).expand(len(gone), -1)
        real = torch.cat([past_columns(call, i), layout.valid], 1)[:, -size:] & ~gone
        index, valid, ragged = compact(real)
        where = index[:, None, :, None].to(layer.keys.device)
        keys, values = (
            x.gather(2, where.expand(-1, x.shape[1], -1, x.shape[3])) for x in (layer.keys, layer.values)
        )
        replace_entries(cache, i, keys, values)
        # Entries stand to the right, so equal counts make equal columns: layers share them, and their masks.
        counts = tuple(valid.sum(1).tolist())
        state.columns[i], state.ragged[i] = shared.setdefault((counts, valid.shape[1]), valid), ragged
        places = index + (total - size) - call.entries[i]  # among the tokens of this call
        call.held[i] = Layout(layout.index.gather(1, places.clamp_min(0)), valid & (places >= 0), ragged)
        state.gap[i] = state.length - index.shape[1]
        if call.host.layer_type(i) == "sliding_attention":
            state.read[i] = int(numbers[0, -1]) + 1
            state.numbers[i] = numbers[:, -size:].gather(1, index)
