"""Dropping visual tokens between the layers of a language model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms.recycling import group_means
from ..attention import Probe, watch
from ..families import Host
from ..hosts import check_checkpointing, keywords, writes_cache
from ..layout import Layout, compact, gather
from ..reducer import LayerReducer, LayerSelection, SkipReducer
from ..undo import Undo
from .cache import ReducedDynamicCache
from .call import Call, current
from .eviction import evict
from .layer_arguments import LayerArguments
from .ranking import Ranking, Trace
from .revival import Revival
from .skipping import Skipping


class LayerCuts:
    """Hooks on the decoder layers that drop tokens at the reducers' cuts, in the order of the reducers where
    several cut before one layer, and give the layers after them arguments of their own length."""

    def __init__(
        self,
        host: Host,
        reducers: Sequence[LayerReducer],
        compact_positions: bool,
        trace: Trace,
        evicting: bool,
        *,
        spread: bool = False,
    ) -> None:
        self.host, self._trace = host, trace
        self.rankings = [Ranking(host, reducer, number, trace) for number, reducer in enumerate(reducers)]
        self.skipping = [
            Skipping(host, reducer, number)
            for number, reducer in enumerate(reducers)
            if isinstance(reducer, SkipReducer)
        ]
        self._arguments = LayerArguments(host, compact_positions, spread)
        self._truncated = {k for ranking in self.rankings for k in ranking.truncated}
        merging = [type(reducer).__name__ for reducer in reducers if reducer.merges]
        if merging and self._truncated:
            raise ValueError(
                f"{merging[0]} moves tokens to other places, so the cache of earlier layers cannot be cut to "
                "what another reducer keeps; attach it alone, or leave their cache whole"
            )
        for number, ranking in enumerate(self.rankings):
            self._check_means(ranking, self.rankings[number + 1 :])
        whole = [each for each in self.skipping if each.takes_all]
        if self._truncated and evicting:
            raise ValueError(
                "one reducer cuts the cache of earlier layers to what it keeps and another evicts from the "
                "cache by its own choice; attach one of them, or leave the cache of earlier layers whole"
            )
        if whole and (len(reducers) > 1 or evicting):
            raise ValueError(
                f"{type(whole[0].reducer).__name__} leaves out parts of layers for all tokens, text too, "
                "beside which no other reducer works inside the model; attach it alone, or let it skip an "
                "image's tokens only"
            )
        self.revival = self._revival(compact_positions, evicting)
        evicting = evicting or self.truncates
        if evicting and not all(writes_cache(attention) for attention in host.attentions):
            raise TypeError(
                f"some layers of {host.name} use the keys of others, so nothing can be evicted from its "
                "cache; use a reducer of features"
            )
        cuts = [k for ranking in self.rankings for k in ranking.cuts]
        self.first = min(cuts) if cuts and not evicting else 0

    @staticmethod
    def _check_means(first: Ranking, later: Sequence[Ranking]) -> None:
        """Raise ValueError where a reducer makes means at a cut before which others have read attention."""
        shared = [each for each in later if each.reads_before and set(each.cuts) & set(first.cuts)]
        if first.reducer.merges and shared:
            names = [type(each.reducer).__name__ for each in (first, shared[0])]
            raise ValueError(
                f"{names[0]} and {names[1]} both cut before layers "
                f"{sorted(set(first.cuts) & set(shared[0].cuts))}; the first makes means there, of which the "
                "second has no attention. Cut before different layers"
            )

    def _revival(self, compact_positions: bool, evicting: bool) -> Revival | None:
        """What lets tokens return, where the reducer wants that. Raises ValueError beside other reducers."""
        reviving = [ranking for ranking in self.rankings if ranking.reducer.revives]
        if not reviving:
            return None
        reducer = reviving[0].reducer
        if len(self.rankings) > 1 or evicting:
            raise ValueError(
                f"{type(reducer).__name__} selects anew at every step, so no other reducer can act between "
                "the layers or on the cache with it; attach it alone, or with reducers of pixels, tower or "
                "features"
            )
        return Revival(self.host, reducer, reviving[0].cuts, compact_positions, self._trace)

    @property
    def truncates(self) -> bool:
        """Whether caches of layers before a cut are shortened, too."""
        return bool(self._truncated)

    def attach(self, undo: Undo) -> None:
        """Register the hooks."""
        deepstack = hasattr(self.host.lm, "_deepstack_process")
        for i, layer in enumerate(self.host.layers):
            if i >= self.first:
                undo.pre_hook(layer, self._before(i))
            if deepstack:
                undo.hook(layer, self._after(i))
        for part in (*self.rankings, *self.skipping):
            part.attach(undo)
        if self.revival is not None:
            self.revival.attach(undo)

    def start(self, call: Call, embeds: Tensor | None) -> None:
        """Plan a call; a prompt comes with its input embeddings [B, L', D].

        Raises NotImplementedError for answers in the same forward as the prompt, where a reducer cuts the
        cache of layers that only they would attend to whole.
        """
        for skipping in self.skipping:
            skipping.start(call)
        if not call.prefill:
            if call.state.revivable is not None:
                self.revival.start(call)
                watch(self.revival.probes(call))
            return
        for ranking in self.rankings:
            ranking.start(call, embeds)
        if self.revival is not None:
            self.revival.start_prompt(call)
        if self._truncated and bool(call.answered.any()):
            names = [type(r.reducer).__name__ for r in self.rankings if r.truncated]
            raise NotImplementedError(
                f"{names[0]} shortens the cache of layers that have run before it selects, and answers in "
                "this forward attend to all of it: they would get other outputs than token by token. Give "
                "the prompt alone, generate with a cache, or leave the cache of those layers whole"
            )

    def continues(self, call: Call) -> bool:
        """Whether calls after this prompt leave out parts of layers, too."""
        return any(each.continues(call) for each in self.skipping)

    def _truncate(self, call: Call) -> None:
        """Cut the caches of layers before the last cut that asks for it to the tokens that it kept."""
        if not self._truncated:
            return
        last = max(self._truncated)
        kept = call.layouts[last]
        for i, layout in enumerate(call.layouts):
            gone = torch.zeros(len(layout.valid), call.entries[i] + layout.valid.shape[1], dtype=torch.bool)
            if i < last:
                for row in range(len(gone)):
                    left = torch.isin(layout.index[row], kept.index[row, kept.valid[row]])
                    gone[row, call.entries[i] :] = (layout.valid[row] & ~left).cpu()
            call.evicted[i] = gone.to(layout.valid.device)
        evict(call, (), self._trace)

    def finish(self, call: Call, cache: ReducedDynamicCache) -> None:
        """Record on the cache of a prompt what lets dropped tokens return, and cut the caches of layers that
        are to hold only what stayed."""
        if self.revival is not None:
            cache.reduction.revivable = self.revival.finish(call)
        self._truncate(call)

    def probes(self, call: Call) -> dict[nn.Module, Probe]:
        """The attention probes of a prompt."""
        probes: dict[nn.Module, list[Probe]] = {}
        for ranking in self.rankings if call.prefill else ():
            for module, probe in ranking.probes(call).items():
                probes.setdefault(module, []).append(probe)
        return {module: _all(several) for module, several in probes.items()}

    # Hooks --------------------------------------------------------------------------------------------------

    def _before(self, i: int) -> Callable[..., Any]:
        cutting = [ranking for ranking in self.rankings if i in ranking.cuts]

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
                if call.step is not None and i >= self.revival.cuts[0]:
                    hidden, changed = self.revival.before(call, i, hidden, kwargs)
                    return (hidden,), changed
                changed = self._arguments.on_cache(call, i, hidden, kwargs)
                return None if changed is None else ((hidden,), changed)
            check_checkpointing(module)
            if self.revival is not None and i >= self.revival.cuts[0]:
                self.revival.note_arguments(call, i, kwargs)
            adjusted = self._arguments.at_prefill(call, i, hidden, kwargs)
            for ranking in cutting:
                # Row probes got this layer's or the previous one's queries with the current layout.
                with call.timed():
                    selections = ranking.decide(call, i, hidden, adjusted)
                if selections:
                    if self.revival is not None:
                        self.revival.note_dropped(call, i, hidden, selections)
                    hidden = self._cut(call, hidden, selections)
                    adjusted = self._arguments.at_prefill(call, i, hidden, kwargs)
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

    def _cut(
        self, call: Call, hidden: Tensor, selections: dict[int, tuple[Tensor, LayerSelection]]
    ) -> Tensor:
        """Drop tokens from this layer on."""
        old = call.layout
        stay = old.valid.clone()
        for number, (places, selection) in selections.items():
            row, kept = call.prompt.spans[number].row, selection.kept.to(places.device)
            if selection.groups is not None:
                hidden, kept = self._merge(call, hidden, row, places, selection)
            stay[row, places] = False
            stay[row, places[kept]] = True
        index, valid, ragged = compact(stay)
        shown = None if call.layout.shown is None else call.layout.shown.gather(1, index)
        call.layout = Layout(old.index.gather(1, index), valid, ragged, shown)
        call.relative = index if call.relative is None else call.relative.gather(1, index)
        call.measured = {number: gather(values, index) for number, values in call.measured.items()}
        call.scores = {key: gather(values, index) for key, values in call.scores.items()}
        self._arguments.after_cut(call)
        return gather(hidden, index)

    def _merge(
        self, call: Call, hidden: Tensor, row: int, places: Tensor, selection: LayerSelection
    ) -> tuple[Tensor, Tensor]:
        """Write the means of dropped tokens of an image to places of dropped tokens.

        `places` [N] are the image's. Returns the hidden states and which of the places stay [n + means]. Kept
        tokens hold their places and the means get the last free ones, unless tokens are numbered anew: then
        only the order counts, and means come last.
        """
        kept, members = selection.kept.to(places.device), selection.members.to(places.device)
        groups = selection.groups.to(places.device)
        count = int(groups.max()) + 1
        free = torch.ones_like(places, dtype=torch.bool)
        free[kept] = False
        slots = torch.cat([kept, free.nonzero().squeeze(1)[-count:]])
        source = torch.cat([kept, kept.new_full((count,), -1)])
        slots, order = slots.sort()
        if not self._arguments.compact:
            source = source[order]

        def changed(states: Tensor, at: Tensor) -> Tensor:
            """States [B, L, ...] whose row has at places `at` [N] what goes on."""
            at, own = at.to(states.device), source.to(states.device)
            image = states[row, at].flatten(1) if states.ndim > 2 else states[row, at][:, None]
            means = group_means(image[members.to(image.device)], groups.to(image.device), count)
            values = image[own.clamp_min(0)].masked_scatter((own < 0)[:, None], means.to(image))
            states = states.clone()
            states[row, at[slots.to(states.device)]] = values.view(-1, *states.shape[2:])
            return states

        call.measured = {number: changed(values, places) for number, values in call.measured.items()}
        if call.deepstack:
            entered = places if call.relative is None else call.relative[row, places]
            call.deepstack = [changed(features, entered) for features in call.deepstack]
        tokens = call.layout.tokens[row, places]
        unused = tokens[free.nonzero().squeeze(1)[-count:]]
        shown = call.layout.tokens.clone()
        shown[row, places[slots]] = tokens[source.clamp_min(0)].masked_scatter(
            source < 0, -1 - torch.where(unused < 0, -1 - unused, unused)
        )
        call.layout = replace(call.layout, shown=shown)
        return changed(hidden, places), slots


def _all(probes: list[Probe]) -> Probe:
    """One probe that reports to all of them."""
    if len(probes) == 1:
        return probes[0]

    def probe(*arguments: Any) -> None:
        for each in probes:
            each(*arguments)

    return probe
