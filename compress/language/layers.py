"""Dropping visual tokens between the layers of a language model."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Probe, Seen, attention_rows, mask_rows, probing
from ..families import Host
from ..hosts import (
    at_tokens,
    check_checkpointing,
    keywords,
    release,
    takes,
    without_cache,
    writes_cache,
)
from ..layout import Layout, compact, gather
from ..reducer import LayerReducer, LayerTokens, Stage, count_of
from ..undo import Undo
from .cache import extended
from .call import Call, current, past_columns
from .masks import build, check, shrunk, slide, windowed

Trace = Callable[[str, Tensor], None]


class LayerCuts:
    """Hooks on the decoder layers that drop tokens at a reducer's cuts and give the layers after them masks,
    positions and rotations of their own length."""

    def __init__(
        self,
        host: Host,
        reducer: LayerReducer | None,
        compact_positions: bool,
        trace: Trace,
        evicting: bool,
    ) -> None:
        self.host, self.reducer, self.compact = host, reducer, compact_positions
        self.trace = trace
        self._checked: set[str] = set()  # kinds of layers whose masks were compared with the host's
        count = len(host.layers)
        self.cuts = sorted(reducer.cuts(count)) if reducer is not None else []
        outside = [k for k in self.cuts if not 0 <= k < count]
        if outside:
            raise ValueError(
                f"{type(reducer).__name__} drops tokens before layers {outside}, but {host.name} has "
                f"{count} layers (0 to {count - 1})"
            )
        if reducer is not None and reducer.rows and reducer.rows_of == "previous" and 0 in self.cuts:
            raise ValueError(
                f"{type(reducer).__name__} ranks tokens by the attention of the layer before, so it cannot "
                "drop before layer 0"
            )
        if reducer is not None:
            self._check(count)
        if evicting and not all(writes_cache(attention) for attention in host.attentions):
            raise TypeError(
                f"some layers of {host.name} use the keys of others, so nothing can be evicted from its "
                "cache; use a reducer of features"
            )
        self.measured = reducer.measured_layers(count) if reducer is not None else ()
        self.first = self.cuts[0] if self.cuts and not evicting else 0

    def _check(self, count: int) -> None:
        """Refuse schedules that cannot be met, and layers that cannot be cut."""
        name, cuts = type(self.reducer).__name__, self.reducer.cuts(count)
        shares = list(cuts.values())
        falling = all(a >= b for a, b in pairwise(shares))
        if list(cuts) != self.cuts or not falling or not all(0 < share <= 1 for share in shares):
            raise ValueError(
                f"{name} is to keep the shares {shares} before layers {list(cuts)}; layers must ascend, and "
                "shares fall or stay, above 0 and up to 1"
            )
        if getattr(self.host.lm.config, "hidden_size_per_layer_input", 0):
            raise TypeError(
                f"{self.host.name} feeds every layer with inputs of its own for each token, so {name} "
                "cannot drop tokens inside it; use a reducer of features"
            )

    def attach(self, undo: Undo) -> None:
        """Register the hooks."""
        deepstack = hasattr(self.host.lm, "_deepstack_process")
        for i, layer in enumerate(self.host.layers):
            if i >= self.first:
                undo.pre_hook(layer, self._before(i))
            if deepstack:
                undo.hook(layer, self._after(i))
            if i in self.measured:
                for name, module in (("attention", self.host.attentions[i]), ("mlp", layer.mlp)):
                    undo.hook(module, self._measure(i, name))

    def probes(self, call: Call) -> dict[nn.Module, Probe]:
        """What the attention of the layers before the cuts must report during this call."""
        if (
            self.reducer is None
            or not call.prefill
            or not self.reducer.rows
            or self.reducer.rows_of != "previous"
        ):
            return {}
        return {self.host.attentions[k - 1]: self._row_probe(call, k) for k in self.cuts}

    # Scores -------------------------------------------------------------------------------------------------

    def _row_probe(self, call: Call, cut: int) -> Probe:
        def probe(
            module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
        ) -> None:
            with torch.no_grad():
                call.scores[cut] = self._rows(call, query, key, mask, scaling)

        return probe

    def _rows(
        self, call: Call, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        """Head-mean attention [B, L] that each token of the call gets from the reducer's rows."""
        index, real = (x.to(query.device) for x in self._row_index(call))
        length = query.shape[2]
        wanted = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        rows = attention_rows(
            wanted, key, scaling=scaling, mask=mask_rows(mask, index, length, key.shape[2] - length)
        ).mean(1)
        weights = real / real.sum(1, keepdim=True)
        return (rows * weights[..., None]).sum(1)[:, -length:]

    def _row_index(self, call: Call) -> tuple[Tensor, Tensor]:
        """Places [B, R] of the rows to read, and which of them exist."""
        layout = call.layout
        places = torch.arange(layout.valid.shape[1], device=layout.valid.device)
        last = (self._in_prompt(call) * places).amax(1, keepdim=True)
        one = torch.ones_like(last, dtype=torch.float32)
        if self.reducer.rows == "last":
            return last, one
        visual = call.prompt.image.gather(1, layout.index) >= 0
        end = torch.where(visual, places, -1).amax(1, keepdim=True)
        after = (places > end) & self._in_prompt(call)
        count = max(1, int(after.sum(1).max()))
        index = after.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
        real = after.gather(1, index)
        nothing = ~real.any(1, keepdim=True)  # no instruction after the image: the last row stands in
        index = torch.where(nothing, last, index)
        real = real | (nothing & (torch.arange(count, device=index.device) == 0))
        return index, real.float()

    @staticmethod
    def _in_prompt(call: Call) -> Tensor:
        """Which real tokens of the current layout [B, L'] belong to the prompt, and not to an answer."""
        return call.layout.valid & (call.layout.index <= call.last[:, None])

    def _next_rows(self, call: Call, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The rows of layer i on the states that are about to enter it: its attention is called and left as
        soon as queries and keys are there."""
        layer, attention, found = self.host.layers[i], self.host.attentions[i], []

        def probe(
            module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
        ) -> None:
            if call.entries[i]:
                key = torch.cat([call.cache.layers[i].keys.to(key.device), key], 2)
            found.append(self._rows(call, query, key, mask, scaling))
            raise Seen

        with torch.no_grad(), probing({attention: probe}):
            try:
                attention(**{**without_cache(kwargs), "hidden_states": layer.input_layernorm(hidden)})
            except Seen:
                return found[0]
        return None

    def _measure(self, i: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            call = current(self.host)
            if call is None or not call.prefill:
                return
            inputs = args[0] if args else kwargs["hidden_states"]
            outputs = output[0] if isinstance(output, tuple) else output
            with torch.no_grad(), call.timed():
                valid = self._in_prompt(call)
                visual = (call.prompt.image.gather(1, call.layout.index) >= 0) & valid
                valid, visual = valid.to(outputs.device), visual.to(outputs.device)
                vector = self.reducer.measure(name, inputs, outputs, valid, visual)
                self.trace(f"{name}.{i}", vector)
                call.measured = vector if call.measured is None else call.measured.to(vector.device) + vector

        return hook

    # Hooks --------------------------------------------------------------------------------------------------

    def _before(self, i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            call = current(self.host)
            if call is None or not (call.prefill or call.state is not None):
                return None
            kwargs = keywords(module, args, kwargs)
            hidden = kwargs.pop("hidden_states", None)
            if hidden is None:
                raise TypeError(
                    f"layer {i} of {self.host.name} takes no hidden_states any more: its forward was "
                    "replaced while a reducer is attached; replace it first, then attach"
                )
            if not call.prefill:
                changed = self._continue(call, i, hidden, kwargs)
                return None if changed is None else ((hidden,), changed)
            check_checkpointing(module)
            adjusted = self._adjusted(call, i, hidden, kwargs)
            if i in self.cuts:
                # Row probes saw this layer's or the previous one's queries with today's layout.
                with call.timed():
                    stay = self._decide(call, i, hidden, adjusted)
                if stay is not None:
                    hidden = self._cut(call, i, hidden, stay)
                    adjusted = self._adjusted(call, i, hidden, kwargs)
            call.layouts.append(call.layout)
            call.removed.append(call.derived.get("removed"))
            # By position: checkpointing passes gradients to such arguments alone.
            return None if adjusted is kwargs else ((hidden,), adjusted)

        return hook

    def _after(self, i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            call = current(self.host)
            if call is None or not call.deepstack or i >= len(call.deepstack):
                return None
            added = call.deepstack[i]
            if call.relative is not None:
                added = gather(added, call.relative)
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden + added.to(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def _decide(self, call: Call, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Which tokens of the current layout stay [B, L], or None when all do."""
        reducer, layout = self.reducer, call.layout
        attention = call.scores.get(i)
        if reducer.rows and reducer.rows_of == "next":
            attention = self._next_rows(call, i, hidden, kwargs)
        if reducer.rows and attention is None:
            raise RuntimeError(
                f"attention did not report to {type(reducer).__name__} before layer {i}: its implementation "
                "was changed while the reducer is attached; change it first, then attach"
            )
        image = call.prompt.image.gather(1, layout.index).masked_fill(~layout.valid, -1)
        stay, dropped = layout.valid.clone(), False
        for number, span in enumerate(call.prompt.spans):
            places = (image[span.row] == number).nonzero().squeeze(1)
            original = call.derived.setdefault(("entered", number), len(places))
            count = self._count(call, number, i, original)
            if count >= len(places) or not len(places):
                continue
            tokens = LayerTokens(
                layer=i,
                hidden=hidden[span.row, places.to(hidden.device)],
                attention=None if attention is None else attention[span.row, places.to(attention.device)],
                measured=None
                if call.measured is None
                else call.measured[span.row, places.to(call.measured.device)],
                record=lambda name, value, number=number: self.trace(f"{name}.{i}", value),
            )
            with torch.no_grad():
                score = reducer.score(tokens)
            self.trace(f"score.{i}", score)
            order = score.sort(descending=True, stable=True).indices
            if layout.index[span.row, places[-1]] == call.last[span.row]:  # its output predicts the answer
                order = torch.cat([order[order == len(places) - 1], order[order != len(places) - 1]])
            kept = order[:count].sort().values
            self.trace(f"kept.{i}", kept)
            stay[span.row, places] = False
            stay[span.row, places[kept.to(places.device)]] = True
            dropped = True
        return stay if dropped else None

    def _count(self, call: Call, number: int, i: int, original: int) -> int:
        """Tokens of image `number` that stay at cut i, of the `original` ones that entered the language
        model."""
        key = ("shares", number)
        if key not in call.derived:
            budget = call.budgets[Stage.LAYER][number]
            if isinstance(budget, int):
                count_of(budget, original)  # raises when the image has fewer
            share = budget / original if isinstance(budget, int) else budget
            call.derived[key] = (self.reducer.schedule(len(self.host.layers), share), budget)
        shares, budget = call.derived[key]
        if isinstance(budget, int):
            return budget if i == max(shares) else max(budget, self.reducer.count(shares[i], original))
        return max(1, self.reducer.count(shares[i], original))

    def _cut(self, call: Call, i: int, hidden: Tensor, stay: Tensor) -> Tensor:
        """Leave out tokens from here on."""
        old = call.layout
        index, valid, ragged = compact(stay)
        call.layout = Layout(old.index.gather(1, index), valid, ragged)
        call.relative = index if call.relative is None else call.relative.gather(1, index)
        if call.measured is not None:
            call.measured = gather(call.measured, index)
        if self.compact:
            full, start = self._numbered(call)
            last = full.masked_fill(~call.entering.valid, -1).amax(1)
            call.derived["removed"] = last - (start[:, 0] + valid.sum(1) - 1)
        for key in [k for k in call.derived if isinstance(k, tuple) and k[0] in ("mask", "rotary", "tokens")]:
            del call.derived[key]
        return gather(hidden, index)

    # Masks and positions ------------------------------------------------------------------------------------

    def _adjusted(self, call: Call, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's arguments at prefill, for the tokens that are left."""
        state = call.state
        shifted = None if state is None else state.removed[i]
        own_columns = state is not None and (state.columns[i] is not state.columns[0] or i in state.numbers)
        if call.relative is None and shifted is None and not own_columns:
            return kwargs
        changed = {**kwargs, "attention_mask": self._mask(call, i, hidden, kwargs.get("attention_mask"))}
        renumbered = shifted is not None or (self.compact and call.relative is not None)
        if call.relative is not None:
            left = {"attention_mask"}
            left |= {"position_ids", "position_embeddings"} if renumbered else set()
            length = call.entering.valid.shape[1]
            for name, value in kwargs.items():
                key = ("tokens", name, id(value))  # the same rotations go to many layers
                if name not in left and key not in call.derived:
                    call.derived[key] = value, at_tokens(name, value, call.relative, length)
                if name not in left:
                    changed[name] = call.derived[key][1]
        if renumbered:
            positions, embeddings = self._renumbered(call, i, hidden, shifted)
            changed |= self._placed(i, embeddings, positions)
        return changed

    def _placed(self, i: int, embeddings: Any, positions: Tensor) -> dict[str, Any]:
        """The arguments that give layer i new positions. Raises TypeError when it takes none by name."""
        given = {"position_embeddings": embeddings, "position_ids": positions}
        known = {name: value for name, value in given.items() if takes(self.host.layers[i], name)}
        if not known:
            raise TypeError(
                f"layer {i} of {self.host.name} takes neither position_embeddings nor position_ids by name "
                f"({release()}), so its tokens cannot be renumbered; attach with positions='keep'"
            )
        return known

    def _numbered(self, call: Call) -> tuple[Tensor, Tensor]:
        """Position ids [B, L'] that entered the language model, and the first real one of each row [B, 1]."""
        full = call.positions.expand(len(call.entering.valid), -1)
        highest = torch.iinfo(full.dtype).max
        return full, full.masked_fill(~call.entering.valid, highest).amin(1, keepdim=True)

    def _renumbered(self, call: Call, i: int, hidden: Tensor, shifted: Tensor | None) -> tuple[Tensor, Any]:
        """Position ids of the tokens that are left, counted anew after a cut, and their rotations."""
        key = ("rotary", self.host.layer_type(i), id(shifted))
        if key not in call.derived:
            positions, start = self._numbered(call)
            if call.relative is not None:
                positions = (call.layout.valid.long().cumsum(1) - 1).clamp_min(0) + start
            if shifted is not None:
                positions = positions - shifted[:, None]
            call.derived[key] = (positions, self.host.rotary(i, hidden, positions))
        return call.derived[key]

    def _mask(self, call: Call, i: int, hidden: Tensor, mask: Tensor | None) -> Tensor | None:
        layout = call.layout
        columns = None if call.state is None else call.state.columns[i]
        numbers = None if call.state is None else call.state.numbers.get(i)
        key = ("mask", self.host.layer_type(i), id(columns), id(numbers))
        if key in call.derived:
            return call.derived[key]
        if not call.entries[i]:
            made = self._first_mask(call, i, hidden, mask)
        elif mask is None and not layout.ragged and call.mask is None and hidden.shape[1] == 1:
            made = None
        else:
            made = self._on_cache(call, i, hidden, torch.cat([past_columns(call, i), layout.valid], 1))
        call.derived[key] = made
        return made

    def _first_mask(self, call: Call, i: int, hidden: Tensor, mask: Tensor | None) -> Tensor | None:
        layout = call.layout
        if self.host.layer_type(i) not in self._checked and call.entering.valid.shape[1] > 1:
            check(self.host, i, mask, call.entering.valid)
            self._checked.add(self.host.layer_type(i))
        if self.host.layer_type(i) == "sliding_attention":
            # A window counts the tokens that are left, as the cache will.
            if call.full_mask is None:
                return build(self.host, i, hidden, layout.valid, None)
            full = shrunk(call.full_mask, Layout(call.relative, layout.valid, layout.ragged), layout.valid, 0)
            return slide(full, self.host.window(i))
        if mask is None:
            return build(self.host, i, hidden, layout.valid, None) if layout.ragged else None
        if mask.ndim == 2:
            return gather(mask, call.relative) * layout.valid.to(mask)
        return shrunk(mask, Layout(call.relative, layout.valid, layout.ragged), layout.valid, 0)

    def _continue(self, call: Call, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """A layer's arguments in a later call on a cache whose layers hold different tokens."""
        state, changed = call.state, None
        numbers = state.numbers.get(i)
        if numbers is not None or (i and state.columns[i] is not state.columns[0]):
            mask = kwargs.get("attention_mask")
            if mask is not None or state.ragged[i] or numbers is not None:
                key = ("mask", self.host.layer_type(i), id(state.columns[i]), id(numbers))
                if key not in call.derived:
                    call.derived[key] = self._later_mask(call, i, hidden)
                changed = {**kwargs, "attention_mask": call.derived[key]}
        if state.removed[i] is not None:
            key = ("rotary", self.host.layer_type(i), id(state.removed[i]))
            if key not in call.derived:
                positions = call.positions.to(hidden.device) - state.removed[i].to(hidden.device)[:, None]
                call.derived[key] = (positions, self.host.rotary(i, hidden, positions))
            positions, embeddings = call.derived[key]
            changed = {**(changed or kwargs), **self._placed(i, embeddings, positions)}
        return changed

    def _later_mask(self, call: Call, i: int, hidden: Tensor) -> Tensor | None:
        state, new = call.state, hidden.shape[1]
        real = None
        if state.ragged[i] or call.mask is not None or i in state.numbers:
            entries = call.entries[i]
            past = extended(state, i, entries, call.mask)
            if past is None and call.mask is not None:
                past = call.mask[:, :entries].bool()
            elif past is None:
                past = torch.ones(len(hidden), entries, dtype=torch.bool, device=hidden.device)
            latest = past.new_ones(len(past), new)
            if call.mask is not None:
                latest = call.mask[:, call.length : call.length + new].bool().to(past.device)
            real = torch.cat([past, latest], 1)
        return self._on_cache(call, i, hidden, real)

    def _on_cache(self, call: Call, i: int, hidden: Tensor, real: Tensor | None) -> Tensor | None:
        """The mask of layer i for new states on top of its cache; `real` [B, entries + q]."""
        numbers = None if real is None or call.state is None else call.state.numbered(i, real.shape[1])
        if numbers is None:
            return build(self.host, i, hidden, real, call.cache)
        return windowed(self.host, i, hidden, real, numbers, call.cache)
