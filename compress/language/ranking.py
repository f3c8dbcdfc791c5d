"""One layer reducer in a language model: the scores it gathers while layers run, and the tokens it keeps."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Probe, Seen, attention_rows, mask_rows, probing
from ..families import Host
from ..hosts import final_norm, keywords, release, without_cache
from ..layout import Span
from ..reducer import LayerContext, LayerReducer, LayerSelection, LayerTokens, Stage, count_of
from ..undo import Undo
from .call import Call, current

Trace = Callable[[str, Tensor], None]


class Ranking:
    """The `number`-th layer reducer of a session: its cuts, the scores it gathers, and its decisions.

    Raises ValueError for cuts outside the model or in an order that cannot be met.
    """

    def __init__(self, host: Host, reducer: LayerReducer, number: int, trace: Trace) -> None:
        self.host, self.reducer, self.number, self.trace = host, reducer, number, trace
        count = len(host.layers)
        self.cuts = sorted(reducer.cuts(count))
        self.measured = reducer.measured_layers(count)
        self.truncated = reducer.truncated(count)
        self._check(count)
        self._norm = final_norm(host.name, host.lm) if reducer.wants_context else None

    def _check(self, count: int) -> None:
        """Raise ValueError for schedules that cannot be met, and for layers that cannot be cut."""
        name, cuts = type(self.reducer).__name__, self.reducer.cuts(count)
        outside = [k for k in self.cuts if not 0 <= k < count]
        if outside:
            raise ValueError(
                f"{name} drops tokens before layers {outside}, but {self.host.name} has {count} layers (0 to "
                f"{count - 1})"
            )
        if self.reads_before and 0 in self.cuts:
            raise ValueError(
                f"{name} ranks tokens by the attention of the layer before, so it cannot drop before layer 0"
            )
        shares = list(cuts.values())
        falling = all(a >= b and type(a) is type(b) for a, b in pairwise(shares))
        accepted = all(share >= 1 if isinstance(share, int) else 0 < share <= 1 for share in shares)
        if list(cuts) != self.cuts or not falling or not accepted:
            raise ValueError(
                f"{name} is to keep the shares {shares} before layers {list(cuts)}; layers must ascend, and "
                "shares fall or stay, above 0 and up to 1 (or as counts of tokens, from 1)"
            )
        if getattr(self.host.lm.config, "hidden_size_per_layer_input", 0):
            raise TypeError(
                f"{self.host.name} feeds every layer with inputs of its own for each token, so {name} "
                "cannot drop tokens inside it; use a reducer of features"
            )

    @property
    def reads_before(self) -> bool:
        """Whether the layers before the cuts report their attention."""
        return self.reducer.reads_attention and self.reducer.rows_of == "previous"

    def attach(self, undo: Undo) -> None:
        """Register the hooks that measure."""
        for i in self.measured:
            for name, module in (
                ("attention", self.host.attentions[i]),
                ("mlp", self.host.layers[i].mlp),
            ):
                undo.hook(module, self._measure(i, name))
        for k in self.cuts if self.reducer.wants_decay else ():
            undo.pre_hook(self.host.attentions[k - 1], self._keep_rotations(k - 1))

    def start(self, call: Call, embeds: Tensor) -> None:
        """Choose the tokens of the text that rate each image, by the language model's input embeddings."""
        if self.reducer.rows != "raters":
            return
        layout = call.layout
        image = call.prompt.image.gather(1, layout.index).masked_fill(~layout.valid, -1)
        for number, span in enumerate(call.prompt.spans):
            text = text_after(call, span)
            places = (image[span.row] == number).nonzero().squeeze(1)
            if len(text) and len(places):
                with torch.no_grad(), call.timed():
                    states = embeds[span.row]
                    chosen = self.reducer.raters(
                        states[places.to(states.device)], states[text.to(states.device)]
                    )
                text = text[chosen.to(text.device)] if bool(chosen.any()) else text
                raters = layout.index[span.row, text]
            else:  # no text after the image: the last row stands in
                raters = call.last[span.row : span.row + 1]
            call.derived["raters", self.number, number] = raters
            self.trace("raters", raters)

    def probes(self, call: Call) -> dict[nn.Module, Probe]:
        """The attention probes of the layers before the cuts, for this prefill."""
        if not self.reads_before:
            return {}
        return {self.host.attentions[k - 1]: self._probe(call, k) for k in self.cuts}

    def decide(
        self, call: Call, i: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[int, tuple[Tensor, LayerSelection]]:
        """What stays of each image that is cut before layer i: span number → its places in the current
        layout [N], and the selection among them."""
        reducer, layout = self.reducer, call.layout
        attention = call.scores.pop((self.number, i), None)
        keys = call.scores.pop((self.number, i, "keys"), None)
        if reducer.rows and reducer.rows_of == "next":
            attention = self._next_rows(call, i, hidden, kwargs)
        if (reducer.rows and attention is None) or (reducer.wants_context and keys is None):
            raise RuntimeError(
                f"attention did not report to {type(reducer).__name__} before layer {i}: its implementation "
                "was changed while the reducer is attached; change it first, then attach"
            )
        measured = call.measured.get(self.number)
        image = call.prompt.image.gather(1, layout.index).masked_fill(~layout.valid, -1)
        selections: dict[int, tuple[Tensor, LayerSelection]] = {}

        def at(values: Tensor | None, row: int, places: Tensor) -> Tensor | None:
            return None if values is None else values[row, places.to(values.device)]

        for number, span in enumerate(call.prompt.spans):
            places = (image[span.row] == number).nonzero().squeeze(1)
            original = call.derived.setdefault(("entered", number), len(places))
            count, exact = self._count(call, number, i, original)
            if not len(places):
                continue
            tokens = LayerTokens(
                layer=i,
                hidden=at(hidden, span.row, places),
                attention=at(attention, span.row, places),
                measured=at(measured, span.row, places),
                record=lambda name, value: self.trace(f"{name}.{i}", value),
                **self._rated(call, number, places),
                context=None if keys is None else self._context(call, span, places, hidden, keys),
                exact=exact,
                last_stays=bool(layout.index[span.row, places[-1]] == call.last[span.row]),
            )
            with torch.no_grad():
                if not exact and count < original and (own := reducer.own_count(tokens)) is not None:
                    count = own
                if count >= len(places):
                    continue
                selection = self._checked(reducer.select(tokens, count), tokens)
            self.trace(f"kept.{i}", selection.kept)
            selections[number] = places, selection
        return selections

    def _checked(self, selection: LayerSelection, tokens: LayerTokens) -> LayerSelection:
        """The selection, with the token in it whose output predicts the answer. Raises RuntimeError for a
        method that keeps nothing, or makes that token part of a mean."""
        last = len(tokens.hidden) - 1
        kept = selection.kept
        if not len(kept) or (tokens.last_stays and selection.groups is not None and kept[-1] != last):
            raise RuntimeError(
                f"{type(self.reducer).__name__} keeps {len(kept)} of {last + 1} tokens before layer "
                f"{tokens.layer}{', without the last one of the prompt' if len(kept) else ''}; `select` must "
                "keep tokens.ranked(score)[:n] for some n from 1"
            )
        if tokens.last_stays and kept[-1] != last:
            selection.kept = torch.cat([kept[:-1], kept.new_tensor([last])])
        return selection

    def _context(self, call: Call, span: Span, places: Tensor, hidden: Tensor, keys: Tensor) -> LayerContext:
        """What surrounds the image of `span`, whose tokens are at `places` [N] of the current layout."""
        text = text_after(call, span)
        row, numbers = span.row, call.layout.valid[span.row].long().cumsum(0) - 1
        return LayerContext(
            text=hidden[row, text.to(hidden.device)],
            keys=keys[row, places.to(keys.device)],
            text_keys=keys[row, text.to(keys.device)],
            places=numbers[places],
            text_places=numbers[text],
            norm=self._norm,
        )

    def _count(self, call: Call, number: int, i: int, original: int) -> tuple[int, bool]:
        """Tokens of image `number` that stay at cut i, of the `original` ones that entered the language
        model, and whether the user has set their number."""
        key = ("shares", self.number, number)
        if key not in call.derived:
            budget = call.budgets[Stage.LAYER][self.number][number]
            if isinstance(budget, int):
                count_of(budget, original)  # raises when the image has fewer
            share = budget / original if isinstance(budget, int) else budget
            call.derived[key] = (self.reducer.schedule(len(self.host.layers), share, original), budget)
        shares, budget = call.derived[key]
        if shares[i] >= 1:
            return original, budget is not None
        if isinstance(budget, int):
            last = i == max(shares)
            return budget if last else max(budget, self.reducer.count(shares[i], original)), True
        return max(1, self.reducer.count(shares[i], original)), budget is not None

    # Scores -------------------------------------------------------------------------------------------------

    def _probe(self, call: Call, cut: int) -> Probe:
        def probe(
            module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
        ) -> None:
            with torch.no_grad():
                if self.reducer.rows:
                    call.scores[self.number, cut] = self._rows(call, query, key, mask, scaling)
                if self.reducer.wants_context:
                    new = key[:, :, -query.shape[2] :]
                    call.scores[self.number, cut, "keys"] = new.transpose(1, 2).flatten(2)

        return probe

    def _rows(
        self, call: Call, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        """Head-mean attention [B, L] that each token of the call gets from the reducer's rows."""
        if self.reducer.rows == "raters":
            return self._rows_of_raters(call, query, key, mask, scaling)
        index, real = (x.to(query.device) for x in self._row_index(call))
        rows = self._attention(query, key, mask, scaling, index).mean(1)
        weights = real / real.sum(1, keepdim=True)
        return (rows * weights[..., None]).sum(1)

    def _attention(
        self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, index: Tensor
    ) -> Tensor:
        """What the queries at `index` [B, R] give each token of the call, [B, H, R, L]."""
        length = query.shape[2]
        row_queries = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        allowed = mask_rows(mask, index, length, key.shape[2] - length)
        rows = attention_rows(row_queries, key, scaling=scaling, mask=allowed, softmax=self.reducer.softmax)
        return rows[..., -length:]

    def _rows_of_raters(
        self, call: Call, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        """The mean over heads and raters [B, L], in which each image has raters of its own; the rows
        themselves are kept for the cut."""
        layout = call.layout
        mean = query.new_zeros(layout.valid.shape, dtype=torch.float32)
        image = call.prompt.image.gather(1, layout.index).masked_fill(~layout.valid, -1)
        for number, span in enumerate(call.prompt.spans):
            row, raters = slice(span.row, span.row + 1), call.derived["raters", self.number, number]
            places = (image[span.row] == number).nonzero().squeeze(1)
            index = (torch.isin(layout.index[row], raters) & layout.valid[row]).nonzero()[:, 1]
            own_mask = mask if mask is None or len(mask) == 1 else mask[row]
            rows = self._attention(query[row], key[row], own_mask, scaling, index[None].to(query.device))
            rows = rows[0][..., places.to(rows.device)]
            decay = None
            if self.reducer.wants_decay:
                decay = _rotary_products(call.derived["rotations", self.number], span.row, index, places)
            columns = layout.tokens[span.row, places]
            call.derived["rated", self.number, number] = columns, rows, decay
            mean[span.row, places.to(mean.device)] = rows.mean((0, 1))
        return mean

    def _rated(self, call: Call, number: int, places: Tensor) -> dict[str, Tensor | None]:
        """The rows [H, R, N] of image `number`, and their decay, for its tokens at `places` [N] of the
        current layout."""
        if self.reducer.rows != "raters":
            return {}
        columns, rows, decay = call.derived["rated", self.number, number]
        match = call.layout.tokens[call.prompt.spans[number].row, places][:, None] == columns
        column = match.long().argmax(1).to(rows.device)
        return {"rows": rows[..., column], "decay": None if decay is None else decay[:, column]}

    def _keep_rotations(self, i: int) -> Callable[..., None]:
        """A hook that keeps what the attention of layer i rotates queries and keys by."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            call = current(self.host)
            if call is None or not call.prefill:
                return
            rotations = keywords(module, args, kwargs).get("position_embeddings")
            if rotations is None:
                raise TypeError(
                    f"the attention of layer {i} of {self.host.name} gets no position_embeddings, by whose "
                    f"decay {type(self.reducer).__name__} divides; use another version or method"
                )
            call.derived["rotations", self.number] = rotations

        return hook

    def _row_index(self, call: Call) -> tuple[Tensor, Tensor]:
        """Places [B, R] of the rows to read, and which of them exist."""
        layout = call.layout
        places = torch.arange(layout.valid.shape[1], device=layout.valid.device)
        last = (in_prompt(call) * places).amax(1, keepdim=True)
        one = torch.ones_like(last, dtype=torch.float32)
        if self.reducer.rows == "last":
            return last, one
        visual = call.prompt.image.gather(1, layout.index) >= 0
        end = torch.where(visual, places, -1).amax(1, keepdim=True)
        after = (places > end) & in_prompt(call)
        count = max(1, int(after.sum(1).max()))
        index = after.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
        real = after.gather(1, index)
        nothing = ~real.any(1, keepdim=True)  # no instruction after the image: the last row stands in
        index = torch.where(nothing, last, index)
        real = real | (nothing & (torch.arange(count, device=index.device) == 0))
        return index, real.float()

    def _next_rows(self, call: Call, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The rows of layer i on the states that are about to enter it: its attention is called and left as
        soon as queries and keys are there."""
        layer, attention, results = self.host.layers[i], self.host.attentions[i], []

        def probe(
            module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
        ) -> None:
            if call.entries[i]:
                key = torch.cat([call.cache.layers[i].keys.to(key.device), key], 2)
            results.append(self._rows(call, query, key, mask, scaling))
            raise Seen

        with torch.no_grad(), probing({attention: probe}):
            try:
                attention(**{**without_cache(kwargs), "hidden_states": layer.input_layernorm(hidden)})
            except Seen:
                return results[0]
        return None

    def _measure(self, i: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            call = current(self.host)
            if call is None or not call.prefill:
                return
            inputs = args[0] if args else kwargs["hidden_states"]
            outputs = output[0] if isinstance(output, tuple) else output
            with torch.no_grad(), call.timed():
                valid = in_prompt(call)
                visual = (call.prompt.image.gather(1, call.layout.index) >= 0) & valid
                valid, visual = valid.to(outputs.device), visual.to(outputs.device)
                vector = self.reducer.measure(name, inputs, outputs, valid, visual)
                self.trace(f"{name}.{i}", vector)
                total = call.measured.get(self.number)
                call.measured[self.number] = vector if total is None else total.to(vector.device) + vector

        return hook


def in_prompt(call: Call) -> Tensor:
    """Which real tokens of the current layout [B, L'] belong to the prompt, and not to an answer."""
    return call.layout.valid & (call.layout.index <= call.last[:, None])


def text_after(call: Call, span: Span) -> Tensor:
    """The places [T] in the current layout of the prompt's text after an image."""
    layout, row = call.layout, span.row
    text = in_prompt(call)[row] & (call.prompt.image[row, layout.index[row]] < 0)
    return (text & (layout.index[row] > span.places[-1])).nonzero().squeeze(1)


def _rotary_products(rotations: Any, row: int, index: Tensor, places: Tensor) -> Tensor:
    """The products [R, N] of queries of ones at `index` [R] and keys of ones at `places` [N] of a batch's
    row, rotated by cosines and sines [B or 1, L, D], or by complex numbers [B or 1, L, D]."""
    parts = rotations if isinstance(rotations, tuple | list) else (rotations.real, rotations.imag)
    if any(part.ndim != 3 for part in parts):
        raise NotImplementedError(
            f"this release of transformers ({release()}) rotates by positions in planes that the attention "
            "joins itself, so the decay of attention with distance is not known before it; upgrade "
            "transformers, or use SparseVLM(version='1.5')"
        )
    products = []
    for part in parts:
        values = part[min(row, len(part) - 1)].float()
        products.append(values[index.to(values.device)] @ values[places.to(values.device)].T)
    return sum(products)
