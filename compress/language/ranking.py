"""One layer reducer in a language model: the scores it gathers while layers run, and the tokens it keeps."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Probe, Seen, attention_rows, mask_rows, probing
from ..families import Host
from ..hosts import without_cache
from ..reducer import LayerReducer, LayerTokens, Stage, count_of
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
        self._check(count)

    def _check(self, count: int) -> None:
        """Raise ValueError for schedules that cannot be met, and for layers that cannot be cut."""
        name, cuts = type(self.reducer).__name__, self.reducer.cuts(count)
        outside = [k for k in self.cuts if not 0 <= k < count]
        if outside:
            raise ValueError(
                f"{name} drops tokens before layers {outside}, but {self.host.name} has {count} layers (0 to "
                f"{count - 1})"
            )
        if self.reducer.rows and self.reducer.rows_of == "previous" and 0 in self.cuts:
            raise ValueError(
                f"{name} ranks tokens by the attention of the layer before, so it cannot drop before layer 0"
            )
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
        """Register the hooks that measure."""
        for i in self.measured:
            for name, module in (
                ("attention", self.host.attentions[i]),
                ("mlp", self.host.layers[i].mlp),
            ):
                undo.hook(module, self._measure(i, name))

    def probes(self, call: Call) -> dict[nn.Module, Probe]:
        """The attention probes of the layers before the cuts, for this prefill."""
        if not self.reducer.rows or self.reducer.rows_of != "previous":
            return {}
        return {self.host.attentions[k - 1]: self._row_probe(call, k) for k in self.cuts}

    def decide(self, call: Call, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Which tokens of the current layout stay [B, L] at the cut before layer i, or None when all do."""
        reducer, layout = self.reducer, call.layout
        attention = call.scores.pop((self.number, i), None)
        if reducer.rows and reducer.rows_of == "next":
            attention = self._next_rows(call, i, hidden, kwargs)
        if reducer.rows and attention is None:
            raise RuntimeError(
                f"attention did not report to {type(reducer).__name__} before layer {i}: its implementation "
                "was changed while the reducer is attached; change it first, then attach"
            )
        measured = call.measured.get(self.number)
        image = call.prompt.image.gather(1, layout.index).masked_fill(~layout.valid, -1)
        stay, dropped = layout.valid.clone(), False

        def at(values: Tensor | None, row: int, places: Tensor) -> Tensor | None:
            return None if values is None else values[row, places.to(values.device)]

        for number, span in enumerate(call.prompt.spans):
            places = (image[span.row] == number).nonzero().squeeze(1)
            original = call.derived.setdefault(("entered", number), len(places))
            count = self._count(call, number, i, original)
            if count >= len(places) or not len(places):
                continue
            tokens = LayerTokens(
                layer=i,
                hidden=at(hidden, span.row, places),
                attention=at(attention, span.row, places),
                measured=at(measured, span.row, places),
                record=lambda name, value: self.trace(f"{name}.{i}", value),
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
        key = ("shares", self.number, number)
        if key not in call.derived:
            budget = call.budgets[Stage.LAYER][self.number][number]
            if isinstance(budget, int):
                count_of(budget, original)  # raises when the image has fewer
            share = budget / original if isinstance(budget, int) else budget
            call.derived[key] = (self.reducer.schedule(len(self.host.layers), share), budget)
        shares, budget = call.derived[key]
        if isinstance(budget, int):
            return budget if i == max(shares) else max(budget, self.reducer.count(shares[i], original))
        return max(1, self.reducer.count(shares[i], original))

    # Scores -------------------------------------------------------------------------------------------------

    def _row_probe(self, call: Call, cut: int) -> Probe:
        def probe(
            module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
        ) -> None:
            with torch.no_grad():
                call.scores[self.number, cut] = self._rows(call, query, key, mask, scaling)

        return probe

    def _rows(
        self, call: Call, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        """Head-mean attention [B, L] that each token of the call gets from the reducer's rows."""
        index, real = (x.to(query.device) for x in self._row_index(call))
        length = query.shape[2]
        row_queries = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        rows = attention_rows(
            row_queries, key, scaling=scaling, mask=mask_rows(mask, index, length, key.shape[2] - length)
        ).mean(1)
        weights = real / real.sum(1, keepdim=True)
        return (rows * weights[..., None]).sum(1)[:, -length:]

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
