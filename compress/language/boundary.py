"""Dropping and merging visual tokens at the border of the language model, before its first layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..families import Host
from ..hosts import at_tokens, cache_argument, entries
from ..layout import Layout, Span, compact, gather
from ..reducer import (
    Budget,
    FeatureReducer,
    Image,
    Selection,
    Stage,
    budget_of,
    count_of,
    keeps_everything,
)
from ..vision.shrink import encoder
from .call import Call, past_columns, read_prompt
from .masks import shrunk, slide
from .spreading import spread_positions


def view(host: Host, span: Span, features: Tensor, text: Tensor) -> Image:
    """The image that a reducer gets: its tokens [N, D], the prompt's text [T, D], and what was
    recorded."""
    record, items = span.record, slice(span.item, span.item + span.items)
    grid = span.grid

    def per_item(stored: list[Tensor] | None) -> Tensor | None:
        if not stored:
            return None
        tiles = torch.cat(stored[items])
        if host.family.segment == "tiles":  # items are samples: take the tiles of this image
            first = span.offset // tiles.shape[-1]
            tiles = tiles[first : first + len(features) // tiles.shape[-1]]
        return tiles

    return Image(
        features=features,
        text=text,
        grid=grid,
        number=span.number,
        rows={layer: rows for layer, stored in record.rows.items() if (rows := per_item(stored)) is not None},
        states=per_item(record.states),
        keys=per_item(record.keys),
        project=getattr(host.core, "multi_modal_projector", None),
        newline=getattr(host.core, "image_newline", None),
        encode=encoder(host, record, span),
    )


@dataclass(frozen=True)
class Border:
    """The reducer that acts between the projector and the first layer of the language model.

    `budget` gives the budget of `reducer`, `left` the tokens of an image that go on from a tower in which
    patches merge or go (a mask [N]; None: all), `renumbered` whether the
    tokens that stay are numbered anew, `closes_gaps` whether text starts behind what stays of a picture,
    `spread` whether what stays of an image is spread over its extent.
    `active` is False where nothing acts here.
    """

    active: bool
    reducer: FeatureReducer | None
    budget: Callable[[], Budget]
    left: Callable[[Span], Tensor | None]
    renumbered: bool
    closes_gaps: bool = False
    spread: bool = False


def reduce_prompt(
    host: Host,
    call: Call,
    kwargs: dict[str, Any],
    border: Border,
    inside: Mapping[Stage, Sequence[Callable[[], Budget]]],
    first: int,
) -> dict[str, Any]:
    """The language model's arguments without the tokens that the border drops; `call` gets the plan.

    `inside` holds the budgets of the reducers inside the language model, stage by stage, and `first` is the
    first layer that has hooks (the number of layers where none has).
    """
    call.kept = [torch.arange(len(span.places)) for span in call.prompt.spans]
    call.whole_positions = call.positions
    embeds = changed = kwargs["inputs_embeds"]
    if border.active:
        with torch.no_grad() if not embeds.requires_grad else torch.enable_grad():
            stay, changed, call.kept = choose(host, call, embeds, border)
        kwargs = {**kwargs, "inputs_embeds": changed, "position_ids": call.positions}
        if not torch.equal(stay, call.start.valid):
            if border.closes_gaps:
                kwargs["position_ids"] = closed(call, call.positions)
            positions = "compact" if border.renumbered else "spread" if border.spread else "keep"
            kwargs = shorten(host, call, kwargs, stay, positions)
            call.positions = kwargs["position_ids"]
    for stage, budgets in inside.items():
        call.budgets[stage] = [_image_budgets(host, call, budget(), changed) for budget in budgets]
    mask = kwargs.get("attention_mask")
    call.full_mask = mask.get("full_attention") if isinstance(mask, dict) else None
    call.entering = call.layout
    call.layouts, call.removed = [call.layout] * first, [None] * first
    if first < len(host.layers) and kwargs.get("deepstack_visual_embeds") is not None:
        kwargs = _spread_deepstack(call, kwargs)
    return kwargs


def _image_budgets(host: Host, call: Call, keep: Budget, embeds: Tensor) -> list[Any]:
    """The budget of every image; functions of the image get the tokens that enter the language
    model."""
    if not callable(keep):
        return [keep] * len(call.prompt.spans)
    budgets = []
    for span, kept in zip(call.prompt.spans, call.kept, strict=True):
        places = span.places.to(embeds.device)[kept.to(embeds.device)]
        image = view(host, span, embeds[span.row, places], embeds[span.row, :0])
        budgets.append(budget_of(keep, image, None))
    return budgets


def _spread_deepstack(call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Features that Qwen3-VL adds after its first layers, as tensors [B, L, D] that can be cut like
    tokens."""
    visual, embeds = kwargs["visual_pos_masks"], kwargs["inputs_embeds"]
    call.deepstack = []
    for features in kwargs["deepstack_visual_embeds"]:
        spread = embeds.new_zeros(embeds.shape[0], embeds.shape[1], features.shape[-1])
        spread[visual.to(spread.device)] = features.to(spread)
        call.deepstack.append(spread)
    return {**kwargs, "visual_pos_masks": None, "deepstack_visual_embeds": None}


def choose(host: Host, call: Call, embeds: Tensor, border: Border) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Which tokens of the prompt stay.

    Returns keep [B, L], the embeddings with merged values written in, and the places kept of each span, as
    token numbers. Tokens that the tower merged stay once. Images that stand in several rows (beams) are
    decided once.
    """
    keep = border.budget()
    if border.reducer is not None and border.reducer.reads_text:
        call.check_prompt_end(type(border.reducer).__name__)
    stay = call.start.valid.clone()
    text_mask = call.start.valid & (call.prompt.image < 0) & ~call.answered
    changed = embeds
    kept: list[Tensor] = []
    decided: dict[tuple[int, int, int], tuple[Selection, Tensor]] = {}
    for span in call.prompt.spans:
        places = span.places.to(embeds.device)
        first, last = int(span.places[0]), int(span.places[-1])
        in_one_piece = last - first + 1 == len(places)  # then a view is enough
        features = embeds[span.row, first : last + 1] if in_one_piece else embeds[span.row, places]
        key = (id(span.record), span.item, span.offset)
        if key not in decided:
            with call.timed():
                text = text_mask[span.row].nonzero().squeeze(1)
                image = view(host, span, features, embeds[span.row, text.to(embeds.device)])
                image.text_before = int((text < first).sum())
                image.text_ids = call.ids[span.row, text.to(call.ids.device)]
                image.renumbered = border.renumbered
                decided[key] = decide(image, border.reducer, keep, border.left(span), _entered(span))
        selection, numbers = decided[key]
        if last == call.last[span.row] and numbers[-1] != len(places) - 1:
            if (entered := _entered(span)) is not None and not entered[-1]:
                raise ValueError(
                    f"prompt {span.row} ends with an image whose last patches were dropped before the tower, "
                    "and the output at its last token predicts the answer; end the prompt with text"
                )
            # The last token's output predicts the answer: it stays even if it is visual.
            numbers = torch.cat([numbers[:-1], numbers.new_tensor([len(places) - 1])])
        if selection.values is not None:
            if changed is embeds:
                changed = embeds.clone()
            changed[span.row, places[numbers]] = selection.values.to(embeds)
        span.deepstack, span.shown = selection.deepstack, torch.arange(len(places))
        if selection.source is not None:
            span.shown[numbers.cpu()] = selection.source.cpu()
        row = stay[span.row].index_fill_(0, span.places, False)
        row.index_fill_(0, span.places[numbers.to(stay.device)], True)
        kept.append(numbers)
    return stay, changed, kept


def _entered(span: Span) -> Tensor | None:
    """Which of an image's tokens have patches that entered the tower [N]; None: all."""
    entered = None if span.record is None else span.record.entered
    return None if entered is None else entered[span.item]


def closed(call: Call, positions: Tensor) -> Tensor:
    """Positions [planes, B, L] or [B, L] in which what follows a picture starts behind the largest position
    of its tokens that stay, where patches were dropped before the tower."""
    positions = positions.expand(*positions.shape[:-2], *call.start.valid.shape).clone()
    planes = positions[-3:] if positions.ndim == 3 else positions[None]  # a fourth, in front, counts text
    for span, kept in zip(call.prompt.spans, call.kept, strict=True):
        after = int(span.places[-1]) + 1
        if _entered(span) is not None and after < positions.shape[-1]:
            largest = planes[:, span.row, span.places.to(kept.device)[kept].to(planes.device)].max()
            planes[:, span.row, after:] += largest + 1 - planes[:, span.row, after].min()
    return positions


def decide(
    image: Image,
    reducer: FeatureReducer | None,
    keep: Budget,
    left: Tensor | None,
    entered: Tensor | None = None,
) -> tuple[Selection, Tensor]:
    """The reducer's selection for one image, and the numbers of the kept tokens among all N.

    `left` [N] marks the tokens that go on from a tower in which patches merge or go.
    `entered` [N] marks the tokens whose patches entered the tower; no other has features. A share is of all N
    tokens, also where fewer are left. Raises ValueError for features that are not finite, budgets above N and
    empty selections.
    """
    numbers = torch.arange(image.num_tokens, device=image.features.device)
    if entered is not None:
        numbers = entered.nonzero().squeeze(1).to(numbers.device)
        image = replace(image.remaining(numbers), dropped=image.num_tokens - len(numbers))
    if left is not None:
        if not left.any():
            raise ValueError(
                "the vision tower dropped all patches that an image's tokens in the prompt are made of; "
                "raise keep"
            )
        numbers = left.nonzero().squeeze(1).to(image.features.device)
        image.features = image.features[numbers]
        if image.grid is not None:
            places = numbers.cpu()
            image.grid = replace(image.grid, tile=image.grid.tile[places], index=image.grid.index[places])
    if reducer is None:
        return Selection(numbers), numbers
    # One sum is cheaper than a mask of all values, and only then is a second look needed.
    total = image.features.sum(dtype=torch.float32)
    if not torch.isfinite(total) and not torch.isfinite(image.features).all():
        raise ValueError(
            "the image's features hold NaN or infinite values, so no selection means anything; check the "
            "pixel values and the precision of the vision tower"
        )
    budget = budget_of(keep, image, reducer.default_keep)
    if image.dropped and budget is not None and not keeps_everything(budget):
        count = count_of(budget, image.num_tokens + image.dropped)
        budget = count if count < image.num_tokens else 1.0
    if keeps_everything(budget):
        return Selection(numbers), numbers
    selection = reducer.reduce(image, budget)
    if not len(selection.kept):
        raise ValueError(
            f"{type(reducer).__name__} kept no token of an image with {image.num_tokens}; raise keep"
        )
    if selection.source is not None:
        source = selection.source.to(numbers.device)
        selection.source = numbers[source.clamp_min(0)].masked_fill(source < 0, -1)
    return selection, numbers[selection.kept.to(numbers.device)]


_SHORTENED = (
    "inputs_embeds",
    "position_ids",
    "attention_mask",
    "visual_pos_masks",
    "deepstack_visual_embeds",
)


def shorten(
    host: Host,
    call: Call,
    kwargs: dict[str, Any],
    stay: Tensor,
    positions: str,
) -> dict[str, Any]:
    """The language model's arguments without the tokens that do not stay: compacted to the right, with an
    explicit 2-D mask (an all-ones mask keeps the gaps in position ids from being read as packed
    sequences)."""
    index, valid, ragged = compact(stay)
    call.layout = Layout(index, valid, ragged)
    kwargs = dict(kwargs)
    kwargs["inputs_embeds"] = gather(kwargs["inputs_embeds"], index)
    if positions == "spread":
        kwargs["position_ids"] = spread_positions(host, call, kwargs["position_ids"], index, valid)
    else:
        kwargs["position_ids"] = _positions(kwargs["position_ids"], call.layout, positions)
    if kwargs.get("visual_pos_masks") is not None:
        visual = kwargs["visual_pos_masks"]
        remaining = stay.to(visual.device)[visual]
        kwargs["visual_pos_masks"] = gather(visual, index) & valid.to(visual.device)
        kwargs["deepstack_visual_embeds"] = [
            x[remaining.to(x.device)] for x in _deepstack(call, visual, kwargs["deepstack_visual_embeds"])
        ]
    for key, value in kwargs.items():  # such as Gemma's inputs for each layer
        if key not in _SHORTENED:
            kwargs[key] = at_tokens(key, value, index, stay.shape[1])
    kwargs["attention_mask"] = _mask(host, call, kwargs.get("attention_mask"))
    if "logits_to_keep" in kwargs:  # Gemma 4: the caller takes its part of the restored states
        kwargs["logits_to_keep"] = 0
    return kwargs


def _deepstack(call: Call, visual: Tensor, features: list[Tensor]) -> list[Tensor]:
    """What the first layers add to the `visual` tokens [B, L], with the reducer's values for kept ones."""
    replaced = [x for x in zip(call.prompt.spans, call.kept, strict=True) if x[0].deepstack is not None]
    if not replaced:
        return features
    features, order = [x.clone() for x in features], visual.flatten().long().cumsum(0).view(visual.shape) - 1
    for span, kept in replaced:
        index = order[span.row, span.places.to(order.device)[kept.to(order.device)]]
        for x, values in zip(features, span.deepstack, strict=True):
            x[index.to(x.device)] = values.to(x)
    return features


def _positions(position_ids: Tensor, layout: Layout, positions: str) -> Tensor:
    index = layout.index.to(position_ids.device)
    if position_ids.ndim == 3:
        index = index.expand(position_ids.shape[0], *index.shape)
        kept = position_ids.expand(*index.shape[:2], -1).gather(2, index)
        if positions == "keep":
            return kept
        start = kept.masked_fill(~layout.valid, highest(kept)).amin((0, 2), keepdim=True)
    else:
        kept = position_ids.expand(index.shape[0], -1).gather(1, index)
        if positions == "keep":
            return kept
        start = kept.masked_fill(~layout.valid, highest(kept)).amin(1, keepdim=True)
    return ((layout.valid.long().cumsum(1) - 1).clamp_min(0) + start).expand(kept.shape)


def highest(positions: Tensor) -> float:
    """The largest value of their type; Qwen3-Omni counts positions in floating point."""
    kind = torch.finfo if positions.is_floating_point() else torch.iinfo
    return kind(positions.dtype).max


def _mask(host: Host, call: Call, mask: Any) -> Any:
    layout, first = call.layout, host.first_attention
    past = call.entries[first]
    valid = torch.cat([past_columns(call, first), layout.valid], 1) if past else layout.valid
    if isinstance(mask, dict):
        if mask["full_attention"] is None:  # nothing was masked; the model makes its own from two dimensions
            return valid.long()
        full = shrunk(mask["full_attention"], layout, valid, past)
        shorter = {"full_attention": full}
        for i, kind in enumerate(host.layer_type(i) for i in range(len(host.layers))):
            if kind == "sliding_attention" and kind not in shorter:
                shorter[kind] = slide(full, host.window(i))
        if set(mask) - set(shorter):
            raise TypeError(
                f"{host.name} makes masks for {', '.join(mask)}; reducers take full and sliding ones"
            )
        return shorter
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return shrunk(mask, layout, valid, past)
    return valid.long()


def explicit_positions(kwargs: dict[str, Any], length: int) -> Tensor:
    """The position ids of a call, as the model would number them when none are given."""
    embeds = kwargs["inputs_embeds"]
    position_ids = kwargs.get("position_ids")
    if position_ids is not None:
        return position_ids
    return torch.arange(embeds.shape[1], device=embeds.device)[None] + length


def enter(host: Host, call: Call, kwargs: dict[str, Any]) -> None:
    """Record the language model's inputs and the length of its cache, before it runs."""
    call.cache = cache_argument(host.lm, kwargs)
    call.entries = [entries(call.cache, i) for i in range(len(host.layers))]
    call.length = 0 if call.cache is None else call.cache.get_seq_length()
    embeds = kwargs.get("inputs_embeds")
    call.positions = None if embeds is None else explicit_positions(kwargs, call.length)
    call.full = (kwargs["input_ids"] if embeds is None else embeds).shape[1]
    if call.mask is not None and call.mask.shape[1] < call.length + call.full:
        raise ValueError(
            f"attention_mask has {call.mask.shape[1]} columns; it must cover the {call.length} tokens in the "
            f"cache and the {call.full} new ones"
        )
    if call.prefill:
        read_prompt(host, call, embeds.shape[1])
