"""The reducers of a session that act on the cache: what leaves it after the prompt, and what later tokens
attend to."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms.select import top_k_mask
from ..attention import AttentionChange, change_attention, mask_rows
from ..families import Host
from ..hosts import keywords, recomputes, release
from ..layout import compact
from ..reducer import CacheReducer, CacheStep, Reducer, Stage, StepReducer
from ..undo import Undo
from .cache import StepState
from .call import Call, current
from .eviction import LayerAttention, budget_groups, choose_evicted, evict, group_count, without_evicted

Trace = Callable[[str, Tensor], None]


class CacheStage:
    """The reducers at the stage CACHE of one model: several that evict, or one that chooses at each step.

    Raises ValueError for reducers that exclude each other, and TypeError for those that the layers of the
    model cannot host.
    """

    def __init__(self, host: Host, reducers: Sequence[Reducer], trace: Trace) -> None:
        self.host, self.trace = host, trace
        self.evicting = [reducer for reducer in reducers if isinstance(reducer, CacheReducer)]
        self.steps = [reducer for reducer in reducers if isinstance(reducer, StepReducer)]
        self._check(reducers)
        self.step = self.steps[0] if self.steps else None
        self._reading = any(
            reducer.wants_prompt or reducer.attention_scores(0) is not None for reducer in self.evicting
        )

    def _check(self, reducers: Sequence[Reducer]) -> None:
        if self.steps and len(reducers) > 1:
            raise ValueError(
                f"{type(self.steps[0]).__name__} chooses at each step among all entries of the cache, so no "
                f"other reducer can act on the cache with it; {len(reducers)} were given at that stage: "
                f"{', '.join(type(reducer).__name__ for reducer in reducers)}"
            )
        windows = [i for i in range(len(self.host.layers)) if self.host.layer_type(i) != "full_attention"]
        within = f"layers {windows} of {self.host.name} attend within a window"
        for reducer in self.evicting:
            if reducer.per_head and reducer is not self.evicting[-1]:
                raise ValueError(
                    f"every head keeps tokens of its own with {type(reducer).__name__}, so no other reducer "
                    "can act on the cache after it; give it last, or with per_head=False"
                )
            if reducer.per_head and windows:
                raise TypeError(
                    f"{within}, which counts the same entries for all heads, and with "
                    f"{type(reducer).__name__} every head keeps its own; give it per_head=False"
                )
        if self.steps and windows and self.host.kernel not in ("sdpa", "eager"):
            raise TypeError(
                f"{within}, which {self.host.kernel} counts itself, so {type(self.steps[0]).__name__} cannot "
                "choose what they attend to; load the model with attn_implementation='sdpa'"
            )

    def attach(self, undo: Undo) -> None:
        """Register the hooks that note what attention modules are called with, where a reducer needs it."""
        for reducer in self.evicting:
            reducer.prepare(self.host.model)
        if any(reducer.wants_prompt for reducer in self.evicting):
            for i, module in enumerate(self.host.attentions):
                undo.pre_hook(module, partial(self._note_arguments, i))

    def _note_arguments(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        call = current(self.host)
        if call is not None and call.prefill:
            arguments = keywords(module, args, kwargs)
            call.attended[i] = (arguments["hidden_states"], arguments.get("position_embeddings"))

    # A prompt -----------------------------------------------------------------------------------------------

    def observe(self, call: Call) -> None:
        """Make the attention of a prompt report to the reducers, and hide from answers in the same forward
        what would be evicted or not chosen."""
        if not self.evicting and self.step is None:
            return
        reducer = self.step or self.evicting[0]
        name = type(reducer).__name__
        if self._reading or (self.step is not None and self.step.starts):
            call.check_prompt_end(name)
        elif call.unsettled is not None:
            warnings.warn(
                f"{name} acts on the cache once the prompt has been read, and labels that reach back "
                "to an image do not show where that is: it has no effect here. Set labels of prompt "
                "tokens to -100, or session.prompt_length",
                stacklevel=2,
            )
        if self.step is not None:
            layers = len(self.host.layers)
            call.steps = StepState(
                [None] * layers, [None] * layers, [False] * layers, [{} for _ in range(layers)]
            )
        answered = bool(call.answered.any())
        if answered:
            self._check_answers(name)
        if answered or self._reading or (self.step is not None and self.step.starts):
            attentions = self.host.attentions
            change_attention({module: self._at_prompt(call, i) for i, module in enumerate(attentions)})
            call.expected = set(range(len(attentions)))

    def _check_answers(self, name: str) -> None:
        if torch.is_grad_enabled() and recomputes(self.host.lm):
            raise NotImplementedError(
                f"{name} hides parts of the cache from answers in this forward, and gradient "
                "checkpointing would compute them again without that; turn gradient checkpointing off"
            )
        if self.host.kernel not in ("sdpa", "eager"):
            raise NotImplementedError(
                f"{name} must hide parts of the cache from the answers in this forward, and "
                f"{self.host.kernel} takes no such mask; load the model with attn_implementation='sdpa', or "
                "give the prompt alone"
            )

    def _at_prompt(self, call: Call, i: int) -> AttentionChange:
        module = self.host.attentions[i]

        def change(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            call.expected.discard(i)
            if self.evicting:
                hidden, embeddings = call.attended.pop(i, (None, None))
                attention = LayerAttention(i, module, query, key, value, mask, scaling, hidden, embeddings)
                gone = choose_evicted(call, self.evicting, i, key, value, attention, self.trace)
                call.evicted[i] = gone
                hidden_entries = without_evicted(call, i, gone, query.shape[1])
            else:
                with torch.no_grad(), call.timed():
                    hidden_entries = self._answers(call, i, query, key, mask, scaling)
            return key, value, mask if hidden_entries is None else _without(mask, hidden_entries, query, key)

        return change

    def finish(self, call: Call) -> None:
        """Evict, or record what later steps choose from, once the cache of a prompt has a state."""
        if self.evicting:
            evict(call, self.evicting, self.trace)
        if self.step is not None:
            for i in range(len(call.layouts)):
                self._add_layer(call, i)
            call.cache.reduction.steps = call.steps

    # Later tokens -------------------------------------------------------------------------------------------

    def follow(self, call: Call) -> None:
        """Make the tokens of a later call attend to what the reducer chooses."""
        state = call.state.steps
        if self.step is None or state is None:
            return
        change_attention(
            {
                module: self._at_step(call, i)
                for i, module in enumerate(self.host.attentions)
                if not state.complete[i]
            }
        )
        call.expected = {i for i, complete in enumerate(state.complete) if not complete}

    def check(self, call: Call) -> None:
        """Raise RuntimeError unless every layer whose attention was to report has done so."""
        if call.expected:
            reducer = self.step or self.evicting[0]
            raise RuntimeError(
                f"the attention of layer {min(call.expected)} of {self.host.name} did not report to "
                f"{type(reducer).__name__} ({release()}), so its answers would have attended to everything: "
                "the attention implementation was changed while the reducer is attached; change it first, "
                "then attach"
            )

    def _at_step(self, call: Call, i: int) -> AttentionChange:
        def change(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            call.expected.discard(i)
            new = query.shape[2]
            with torch.no_grad(), call.timed():
                real = torch.ones(len(query), new, dtype=torch.bool, device=query.device)
                if call.mask is not None:
                    real = call.mask[:, call.length : call.length + new].bool().to(query.device)
                rows = torch.arange(new, device=query.device).expand(len(query), -1)
                state = call.state.steps
                total = state.images[i].shape[1] + call.length - call.state.length + new
                attended = self._attended(state, i, query, key, mask, scaling, rows, real, total, False)
                if bool(attended.all()):
                    return key, value, mask
                if new == 1:
                    return gathered(self.host.kernel, attended[:, :, 0], query, key, value, mask)
            if self.host.kernel not in ("sdpa", "eager"):
                raise NotImplementedError(
                    f"each of {new} new tokens attends to visual tokens of its own with "
                    f"{type(self.step).__name__}, and {self.host.kernel} takes no such mask; load the model "
                    "with attn_implementation='sdpa', or give one token per call"
                )
            hidden = ~attended
            if hidden.shape[1] > 1:
                hidden = hidden.repeat_interleave(query.shape[1] // hidden.shape[1], 1)
            return key, value, _without(mask, hidden, query, key)

        return change

    # Steps --------------------------------------------------------------------------------------------------

    def _attended(
        self,
        state: StepState,
        i: int,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        rows: Tensor,
        real: Tensor,
        total: int,
        start: bool,
    ) -> Tensor:
        """Which of the S entries [B, 1 or H_k, R, S] the queries at `rows` [B, R] attend to: text, and what
        the reducer chooses. `total` counts the entries that the layer has read.

        Raises RuntimeError when the layer holds other entries than those that are known.
        """
        new, width = query.shape[2:]
        size = key.shape[2]
        if size != total and self.host.layer_type(i) == "full_attention":
            raise RuntimeError(
                f"the attention of layer {i} of {self.host.name} got {size} entries where {total} were "
                f"planned ({release()}), so which of them are visual is not known; no output was returned. "
                "Detach the reducer"
            )
        images = state.images[i].to(query.device)
        images = torch.nn.functional.pad(images, (0, total - images.shape[1]), value=-1)[:, -size:]
        allowed = mask_rows(mask, rows, new, size - new)[..., :size]
        if allowed.dtype != torch.bool:
            allowed = allowed > torch.finfo(allowed.dtype).min / 2
        allowed = allowed.any(1, keepdim=True)
        visual = (images >= 0)[:, None, None] & allowed
        counts = state.counts[i].to(query.device)

        def best(scores: Tensor) -> Tensor:
            chosen = torch.zeros_like(scores, dtype=torch.bool)
            for image in range(counts.shape[1]):
                members = ((images == image)[:, None, None] & allowed).expand_as(scores)
                ranked = scores.masked_fill(~members, -torch.inf)
                chosen |= top_k_mask(ranked, counts[:, image, None, None]) & members
            return chosen

        step = CacheStep(
            layer=i,
            query=query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, width)),
            keys=key,
            scaling=scaling,
            allowed=allowed,
            visual=visual,
            real=real,
            start=start,
            first=total - size,
            memory=state.memory[i],
            best=best,
        )
        chosen = self.step.attend(step)
        self.trace(f"attended.{i}", chosen)
        return chosen | (images < 0)[:, None, None]

    def _answers(
        self,
        call: Call,
        i: int,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float | None,
    ) -> Tensor | None:
        """Which entries [B, 1 or H, L', S] the answers in a prompt's forward do not attend to."""
        state, layout = call.steps, call.layouts[i]
        self._add_layer(call, i)
        if state.complete[i]:
            return None
        total = call.entries[i] + layout.valid.shape[1]
        last = ((layout.index == call.last[:, None]) & layout.valid).long().argmax(1, keepdim=True)
        if self.step.starts:
            self._attended(
                state, i, query, key, mask, scaling, last, torch.ones_like(last).bool(), total, True
            )
        answer = call.answered.gather(1, layout.index) & layout.valid
        count = int(answer.sum(1).max())
        if not count:
            return None
        rows = answer.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
        real = answer.gather(1, rows)
        attended = self._attended(state, i, query, key, mask, scaling, rows, real, total, False)
        hidden = ~attended & real[:, None, :, None]
        full = torch.zeros(
            len(hidden), hidden.shape[1], *query.shape[2:3], key.shape[2], dtype=torch.bool, device=key.device
        )
        where = rows[:, None, :, None].expand_as(hidden)
        full.scatter_(2, where, hidden)
        return full if full.shape[1] == 1 else full.repeat_interleave(query.shape[1] // full.shape[1], 1)

    def _add_layer(self, call: Call, i: int) -> None:
        """Note which entries of layer i are visual, and how many of them a step attends to."""
        state, before = call.steps, None if call.state is None else call.state.steps
        key = (id(call.layouts[i]), None if before is None else id(before.images[i]))
        if key not in call.made:
            call.made[key] = self._entries(call, i)
        state.images[i], state.counts[i], state.complete[i] = call.made[key]

    def _entries(self, call: Call, i: int) -> tuple[Tensor, Tensor, bool]:
        """The image of each entry of layer i, the budgets of the images, and whether these are everything."""
        layout, before = call.layouts[i], None if call.state is None else call.state.steps
        batch, device = len(layout.valid), layout.valid.device
        spans = call.prompt.image.gather(1, layout.index).masked_fill(~layout.valid, -1)
        past = torch.full((batch, call.entries[i]), -1, device=device)
        counts = torch.zeros(batch, 0, dtype=torch.long, device=device)
        if before is not None:
            known = before.images[i].to(device)
            past[:, : known.shape[1]], counts = known, before.counts[i].to(device)
        members = torch.bincount(spans[spans >= 0], minlength=len(call.prompt.spans)).tolist()
        sizes = {number: size for number, size in enumerate(members) if size}
        budgets = call.budgets[Stage.CACHE][0]
        per_row: list[list[int]] = [[] for _ in range(batch)]
        images = torch.full_like(spans, -1)
        shared = not self.step.per_image
        first = 0 if shared else counts.shape[1]
        for row, group in budget_groups(call, sizes, self.step.per_image):
            images[row, torch.isin(spans[row], spans.new_tensor(group))] = first + len(per_row[row])
            per_row[row].append(
                group_count(self.step, [budgets[n] for n in group], [sizes[n] for n in group])
            )
        width = max(1, *(len(row) for row in per_row))
        new = torch.tensor([row + [0] * (width - len(row)) for row in per_row], device=device)
        counts = counts + new if shared and counts.shape[1] else torch.cat([counts, new], 1)
        images = torch.cat([past, images], 1)
        held = torch.stack([(images == image).sum(1) for image in range(counts.shape[1])], 1)
        return images, counts, bool((counts >= held).all())


def _without(mask: Tensor | None, hidden: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask of sdpa or eager attention without the `hidden` entries [B, 1 or H, L', S]."""
    rows, columns = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    hidden = hidden.to(query.device)
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def gathered(
    kernel: str, attended: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The keys, values and mask with which one query per row attends to some entries [B, 1 or H_k, S] alone.

    `query` [B, H, 1, D], `key` and `value` [B, H_k, S, D]; `mask` is in the form that `kernel` takes. Raises
    NotImplementedError for kernels that take no mask for each head where one is needed.
    """
    batch, heads, _ = attended.shape
    index, valid, ragged = compact(attended.flatten(0, 1))
    index, valid = index.view(batch, heads, -1), valid.view(batch, heads, -1)
    where = index[..., None]
    key, value = (x.gather(2, where.expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value))
    if mask is None and not ragged:
        return key, value, None
    if mask is not None and mask.ndim == 4:
        columns = mask.expand(batch, -1, -1, -1)[..., : attended.shape[2]]
        columns = columns.expand(-1, max(heads, columns.shape[1]), -1, -1)
        short = columns.gather(3, index[:, :, None].expand(-1, columns.shape[1], -1, -1))
        lowest = False if short.dtype == torch.bool else torch.finfo(short.dtype).min
        short = short.masked_fill(~valid[:, :, None], lowest)
    elif kernel == "sdpa" and mask is None:
        short = valid[:, :, None]
    elif kernel == "eager" and mask is None:
        short = torch.zeros(valid.shape, dtype=query.dtype, device=query.device)
        short = short.masked_fill(~valid, torch.finfo(query.dtype).min)[:, :, None]
    elif heads == 1:  # kernels that take which entries are real
        real = valid[:, 0] if mask is None else mask.gather(1, index[:, 0]).bool() & valid[:, 0]
        return key, value, real.long()
    else:
        raise NotImplementedError(
            f"{kernel} takes no mask for each head, which is needed where heads choose what they attend to "
            "in a batch of different prompts; load the model with attn_implementation='sdpa', or generate "
            "from one prompt"
        )
    if 1 < short.shape[1] < query.shape[1]:
        short = short.repeat_interleave(query.shape[1] // short.shape[1], 1)
    return key, value, short
