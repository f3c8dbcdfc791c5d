"""Evicting visual tokens from the cache of a language model, once the prompt has been read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import attention_rows, mask_rows
from ..hosts import check_entries, holds_keys, replace_entries
from ..layout import Layout, compact
from ..reducer import CachedPrompt, CacheReducer, CacheTokens, Stage, count_of
from .call import Call, past_columns

BLOCK = 64  # queries whose attention is held at once


@dataclass
class LayerAttention:
    """The attention of layer `number` while it reads the prompt: rotated `query` [B, H, L', D], `key` and
    `value` [B, H_k, S, D], the `mask` in the form of the kernel, and what the module was called with."""

    number: int
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float | None
    hidden: Tensor | None = None
    position_embeddings: Any = None


def choose_evicted(
    call: Call,
    reducers: Sequence[CacheReducer],
    i: int,
    keys: Tensor,
    values: Tensor,
    attention: LayerAttention | None = None,
    trace: Callable[[str, Tensor], None] = lambda name, value: None,
) -> Tensor:
    """Which entries leave the cache of layer i, [B, S], or [B, H_k, S] where each head keeps its own.

    `keys` and `values` [B, H_k, S, D] are those of the last S tokens of the layer, which are all of them
    unless a window has dropped some. Each reducer ranks what those before it leave; budgets count the tokens
    that the layer computed. `attention` is needed by reducers that read more than keys and values.
    """
    candidates, sizes = _candidates(call, i, keys.shape[2])
    left, heads = candidates.clone(), None
    for number, reducer in enumerate(reducers):
        budgets = call.budgets[Stage.CACHE][number]
        for row, spans in budget_groups(call, sizes, reducer.per_image):
            columns = torch.isin(left[row], left.new_tensor(spans)).nonzero().squeeze(1)
            count = group_count(reducer, [budgets[span] for span in spans], [sizes[span] for span in spans])
            if count >= len(columns):
                continue
            columns = columns.to(keys.device)
            with torch.no_grad(), call.timed():
                tokens = _tokens(call, reducer, row, columns, count, i, keys, values, attention)
                score = _checked(reducer, reducer.rank(tokens), tokens)
                order = score.sort(dim=-1, descending=True, stable=True).indices[..., count:]
                trace(f"score.{i}", score)
                evicted = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True).to(left.device)
            columns = columns.to(left.device)
            if reducer.per_head:
                if heads is None:
                    heads = torch.zeros(*keys.shape[:3], dtype=torch.bool, device=left.device)
                heads[row, :, columns] = evicted
            else:
                left[row, columns[evicted]] = -1
    gone = (candidates >= 0) & (left < 0)
    return gone if heads is None else heads | gone[:, None]


def _candidates(call: Call, i: int, size: int) -> tuple[Tensor, dict[int, int]]:
    """The span of each of the last `size` entries of layer i [B, size] (-1: none, or it cannot be attended to
    any more), and the tokens of each span that the layer computed."""
    layout = call.layouts[i]
    first = size - layout.valid.shape[1]  # column of the call's first token
    image = call.prompt.image.gather(1, layout.index).masked_fill(~layout.valid, -1)
    ends = ((layout.index == call.last[:, None]) & layout.valid).long().argmax(1)  # of the prompts
    window = call.host.window(i) if call.host.layer_type(i) == "sliding_attention" else None
    candidates = torch.full((len(image), size), -1, device=image.device)
    sizes: dict[int, int] = {}
    for number, span in enumerate(call.prompt.spans):
        places = (image[span.row] == number).nonzero().squeeze(1)
        if not len(places):
            continue
        sizes[number] = len(places)
        if window is not None:  # what the first token of the answer cannot attend to is not counted
            places = places[places > ends[span.row] + 1 - window]
        columns = places + first
        candidates[span.row, columns[columns >= 0]] = number
    return candidates, sizes


def budget_groups(call: Call, sizes: dict[int, int], per_image: bool) -> Iterator[tuple[int, list[int]]]:
    """The rows of the batch and the spans in them that share one budget, of the spans in `sizes`."""
    if per_image:
        for number in sizes:
            yield call.prompt.spans[number].row, [number]
        return
    rows: dict[int, list[int]] = {}
    for number in sizes:
        rows.setdefault(call.prompt.spans[number].row, []).append(number)
    yield from rows.items()


def group_count(reducer: Any, budgets: Sequence[float | int | None], sizes: Sequence[int]) -> int:
    """How many tokens stay of images of these `sizes` that share their budgets."""
    if budgets[0] is None:
        return reducer.default_count(sum(sizes))
    return sum(count_of(budget, size) for budget, size in zip(budgets, sizes, strict=True))


def _tokens(
    call: Call,
    reducer: CacheReducer,
    row: int,
    columns: Tensor,
    count: int,
    i: int,
    keys: Tensor,
    values: Tensor,
    attention: LayerAttention | None,
) -> CacheTokens:
    tokens = CacheTokens(i, keys[row][:, columns], values[row][:, columns], count)
    scores = reducer.attention_scores(i)
    if scores is None and not reducer.wants_prompt:
        return tokens
    if attention is None:
        raise RuntimeError(
            f"the attention of layer {i} did not report to {type(reducer).__name__}: its implementation was "
            "changed while the reducer is attached; change it first, then attach"
        )
    rows, entries = _prompt_of(call, row, i, keys.shape[2])
    rows, entries = rows.to(keys.device), entries.to(keys.device)
    places = torch.searchsorted(entries, columns)
    if scores is not None:
        tokens.received = _received(attention, row, rows, entries, scores)[:, places]
    if reducer.wants_prompt:
        if len(rows) != len(entries):
            raise NotImplementedError(
                f"{type(reducer).__name__} reads the states of the whole prompt, and "
                f"{len(entries) - len(rows)} of its tokens were read by an earlier call; give the whole "
                "conversation in one call"
            )
        tokens.prompt = CachedPrompt(
            module=attention.module,
            lm=call.host.lm,
            hidden=attention.hidden[row : row + 1, rows],
            keys=keys[row : row + 1, :, entries],
            values=values[row : row + 1, :, entries],
            position_embeddings=_at_rows(attention.position_embeddings, row, rows),
            places=places,
        )
    return tokens


def _prompt_of(call: Call, row: int, i: int, size: int) -> tuple[Tensor, Tensor]:
    """Of one row: the places of its prompt tokens among this call's queries, and the entries of the layer
    that hold its prompt, earlier calls included."""
    layout = call.layouts[i]
    prompt = layout.valid[row] & (layout.index[row] <= call.last[row])
    columns = torch.cat([past_columns(call, i)[row].to(prompt.device), prompt])[-size:]
    return prompt.nonzero().squeeze(1), columns.nonzero().squeeze(1)


def _received(
    attention: LayerAttention,
    row: int,
    rows: Tensor,
    entries: Tensor,
    scores: Callable[[Tensor], Tensor],
) -> Tensor:
    """What the queries at `rows` give the entries [H_k, T], summed over queries and over the query heads of a
    key head."""
    query, key = attention.query[row : row + 1], attention.key[row : row + 1]
    mask = attention.mask
    if mask is not None and len(mask) > 1:
        mask = mask[row : row + 1]
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    total = key.new_zeros(key.shape[1], len(entries), dtype=torch.float32)
    for block in rows.split(BLOCK):
        allowed = mask_rows(mask, block[None], length, key.shape[2] - length)[..., : key.shape[2]]
        logits = attention_rows(
            query[:, :, block], key, scaling=attention.scaling, mask=allowed, softmax=False
        )
        total += scores(logits[0][..., entries]).sum(1).unflatten(0, (key.shape[1], groups)).sum(1)
    return total


def _at_rows(embeddings: Any, row: int, rows: Tensor) -> Any:
    """Rotations ([1 or B, L, D] or [planes, 1 or B, L, D], also in tuples) of some tokens of one row."""
    if isinstance(embeddings, tuple | list):
        return type(embeddings)(_at_rows(part, row, rows) for part in embeddings)
    if not isinstance(embeddings, Tensor):
        return embeddings
    batch = embeddings.shape[-3]
    index = row if batch > 1 else 0
    return embeddings[..., index : index + 1, :, :][..., rows.to(embeddings.device), :]


def _checked(reducer: CacheReducer, score: Tensor, tokens: CacheTokens) -> Tensor:
    expected = tokens.keys.shape[:2] if reducer.per_head else tokens.keys.shape[1:2]
    if score.shape != expected:
        raise ValueError(
            f"{type(reducer).__name__} returned scores of shape {tuple(score.shape)} in layer "
            f"{tokens.layer}; it has {'per_head, so ' if reducer.per_head else ''}to return "
            f"{tuple(expected)}: one per {'key head and ' if reducer.per_head else ''}visual token"
        )
    return score


def without_evicted(call: Call, i: int, gone: Tensor, heads: int) -> Tensor | None:
    """Which entries [B, 1 or heads, L', S] of layer i the answers in this forward must not attend to, as if
    they had been generated token by token; None where there is nothing to hide."""
    answer = call.answered.gather(1, call.layouts[i].index)
    by_head = gone if gone.ndim == 3 else gone[:, None]
    if not bool((by_head.any(2).any(1) & answer.any(1)).any()):
        return None
    hidden = answer[:, None, :, None] & by_head[:, :, None, :]
    return hidden if hidden.shape[1] == 1 else hidden.repeat_interleave(heads // hidden.shape[1], 1)


def evict(call: Call, reducers: Sequence[CacheReducer], trace: Callable[[str, Tensor], None]) -> None:
    """Remove entries of visual tokens from every layer of the cache, after the prompt has been read, and
    write the remaining ones into the cache's state.

    Raises RuntimeError when a layer then holds other than the planned entries.
    """
    state, cache = call.cache.reduction, call.cache
    shared: dict[tuple[tuple[int, ...], int], Tensor] = {}
    planned: dict[int, int] = {}
    for i, layer in enumerate(cache.layers[: len(call.layouts)]):
        if not holds_keys(cache, i) or not layer.is_initialized:
            continue
        size, layout = layer.keys.shape[2], call.layouts[i]
        gone = call.evicted.get(i)
        if gone is None:
            gone = choose_evicted(call, reducers, i, layer.keys, layer.values, trace=trace)
        gone = gone[..., -size:]
        if not bool(gone.any()):
            continue
        total = call.entries[i] + layout.valid.shape[1]
        real = torch.cat([past_columns(call, i), layout.valid], 1)[:, -size:]
        stay = real & ~gone if gone.ndim == 2 else real[:, None] & ~gone
        index, valid, ragged = compact(stay.flatten(0, -2))
        where = index.view(len(stay), -1, index.shape[1]).to(layer.keys.device)  # [B, 1 or H_k, S']
        keys, values = (
            x.gather(2, where[..., None].expand(-1, x.shape[1], -1, x.shape[3]))
            for x in (layer.keys, layer.values)
        )
        replace_entries(cache, i, keys, values)
        planned[i] = index.shape[1]
        state.gap[i] = state.length - index.shape[1]
        if gone.ndim == 3:  # every head of a row holds as many
            index, valid = index.view(*stay.shape[:2], -1)[:, 0], valid.view(*stay.shape[:2], -1)[:, 0]
            call.heads[i] = stay[..., -layout.valid.shape[1] :]
            call.held[i] = Layout(layout.index, layout.valid & call.heads[i].any(1), True)
        else:
            places = index + (total - size) - call.entries[i]  # among the tokens of this call
            call.held[i] = Layout(layout.index.gather(1, places.clamp_min(0)), valid & (places >= 0), ragged)
        # Entries stand to the right, so equal counts make equal columns: layers share them, and their masks.
        counts = tuple(valid.sum(1).tolist())
        state.columns[i], state.ragged[i] = shared.setdefault((counts, valid.shape[1]), valid), ragged
        if call.host.layer_type(i) == "sliding_attention":
            numbers = state.numbered(i, total)
            if numbers is None:
                numbers = torch.arange(total, device=gone.device).expand(len(gone), -1)
            state.read[i] = int(numbers[0, -1]) + 1
            state.numbers[i] = numbers[:, -size:].gather(1, index)
    check_entries(call.host.name, cache, planned)
