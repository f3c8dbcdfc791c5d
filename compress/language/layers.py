"""Dropping visual tokens between the layers of a language model."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..attention import Probe
from ..families import Host
from ..hosts import check_checkpointing, keywords, writes_cache
from ..layout import Layout, compact, gather
from ..reducer import LayerReducer
from ..undo import Undo
from .call import Call, current
from .layer_arguments import LayerArguments
from .ranking import Ranking, Trace


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
    ) -> None:
        self.host = host
        self.rankings = [Ranking(host, reducer, number, trace) for number, reducer in enumerate(reducers)]
        self._arguments = LayerArguments(host, compact_positions)
        if evicting and not all(writes_cache(attention) for attention in host.attentions):
            raise TypeError(
                f"some layers of {host.name} use the keys of others, so nothing can be evicted from its "
                "cache; use a reducer of features"
            )
        cuts = [k for ranking in self.rankings for k in ranking.cuts]
        self.first = min(cuts) if cuts and not evicting else 0

    def attach(self, undo: Undo) -> None:
        """Register the hooks."""
        deepstack = hasattr(self.host.lm, "_deepstack_process")
        for i, layer in enumerate(self.host.layers):
            if i >= self.first:
                undo.pre_hook(layer, self._before(i))
            if deepstack:
                undo.hook(layer, self._after(i))
        for ranking in self.rankings:
            ranking.attach(undo)

    def probes(self, call: Call) -> dict[nn.Module, Probe]:
        """The attention probes of this call."""
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
                changed = self._arguments.on_cache(call, i, hidden, kwargs)
                return None if changed is None else ((hidden,), changed)
            check_checkpointing(module)
            adjusted = self._arguments.at_prefill(call, i, hidden, kwargs)
            for ranking in cutting:
                # Row probes got this layer's or the previous one's queries with the current layout.
                with call.timed():
                    stay = ranking.decide(call, i, hidden, adjusted)
                if stay is not None:
                    hidden = self._cut(call, hidden, stay)
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

    def _cut(self, call: Call, hidden: Tensor, stay: Tensor) -> Tensor:
        """Drop tokens from this layer on."""
        old = call.layout
        index, valid, ragged = compact(stay)
        call.layout = Layout(old.index.gather(1, index), valid, ragged)
        call.relative = index if call.relative is None else call.relative.gather(1, index)
        call.measured = {number: gather(values, index) for number, values in call.measured.items()}
        call.scores = {key: gather(values, index) for key, values in call.scores.items()}
        self._arguments.after_cut(call)
        return gather(hidden, index)


def _all(probes: list[Probe]) -> Probe:
    """One probe that reports to all of them."""
    if len(probes) == 1:
        return probes[0]

    def probe(*arguments: Any) -> None:
        for each in probes:
            each(*arguments)

    return probe
