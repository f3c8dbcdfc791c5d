"""Visual tokens that return: what a layer reducer drops for one token may be attended to by the next.

At every step the reducer selects anew from all visual tokens of the prompt. A token that was dropped leaves
the states with which it would have entered the next layer; once it is selected there, it runs on from these
beside the new token, and its keys and values join the cache. So each layer computes a token at most once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Probe, attention_rows
from ..families import Host
from ..hosts import at_tokens, release
from ..layout import compact, gather
from ..reducer import LayerReducer, LayerSelection, LayerTokens
from ..undo import Undo
from .call import Call, current
from .revival_state import Entries, Revivable, Step, mapped

Trace = Callable[[str, Tensor], None]
PLACED = ("position_embeddings", "position_ids")


class Revival:
    """Hooks with which a reducer that `revives` selects at every step, in layers of full attention.

    Raises TypeError for models with other layers or attention kernels without masks per query, and ValueError
    where tokens are numbered anew.
    """

    def __init__(self, host: Host, reducer: LayerReducer, cuts: Sequence[int], compact: bool, trace: Trace):
        self.host, self.reducer, self.cuts, self.trace = host, reducer, list(cuts), trace
        name, kinds = type(reducer).__name__, {host.layer_type(i) for i in range(len(host.layers))}
        if kinds != {"full_attention"} or any(attention is None for attention in host.attentions):
            raise TypeError(
                f"{name} returns tokens to layers of full attention, and {host.name} has others "
                f"({', '.join(sorted(kinds))}); use a method that drops tokens for good, as PyramidDrop"
            )
        if host.kernel not in ("sdpa", "eager"):
            raise TypeError(
                f"{name} hides other tokens at every step, and {host.kernel} takes no such mask; load the "
                "model with attn_implementation='sdpa'"
            )
        if compact:
            raise ValueError(
                f"{name} returns tokens to their own positions, which are not known when tokens are numbered "
                "anew; attach with positions='keep'"
            )

    def attach(self, undo: Undo) -> None:
        """Register the hook behind the last layer."""
        undo.hook(self.host.layers[-1], self._after)

    # The prompt ---------------------------------------------------------------------------------------------

    def start_prompt(self, call: Call) -> None:
        """Check that tokens of this prompt can return. Raises NotImplementedError where they cannot."""
        name = type(self.reducer).__name__
        if bool(call.answered.any()):
            raise NotImplementedError(
                f"{name} selects anew for every token of an answer, and this forward holds answers beside "
                "their prompt: they would get other outputs than token by token. Give the prompt alone, and "
                "generate with a cache"
            )
        if call.state is not None:
            raise NotImplementedError(
                f"{name} selects from the pictures of one prompt, and this cache has been shortened before; "
                "give the whole conversation with all its pictures"
            )
        if call.deepstack and len(call.deepstack) > self.cuts[0]:
            raise ValueError(
                f"{self.host.name} adds features of the tower after its first {len(call.deepstack)} layers, "
                f"which returning tokens would miss; let {name} drop from layer {len(call.deepstack)} on"
            )

    def note_arguments(self, call: Call, i: int, kwargs: dict[str, Any]) -> None:
        """Keep what layer i of a prompt places its visual tokens by. Raises TypeError for a layer with other
        arguments for each token."""
        token, _ = self._visual(call)
        length = call.entering.valid.shape[1]
        for name, value in kwargs.items():
            if name in PLACED and value is not None:
                key = ("revived", name, id(value))
                if key not in call.made:
                    call.made[key] = value, _batch_first(at_tokens(name, value, token, length), name)
                call.made.setdefault("placed", {}).setdefault(i, {})[name] = call.made[key][1]
            elif name != "attention_mask" and at_tokens(name, value, token, length) is not value:
                raise TypeError(
                    f"layer {i} of {self.host.name} takes {name} for each token ({release()}), which "
                    f"{type(self.reducer).__name__} cannot keep for tokens that return"
                )

    def note_dropped(
        self, call: Call, i: int, hidden: Tensor, selections: dict[int, tuple[Tensor, LayerSelection]]
    ) -> None:
        """Keep the states [B, L', D] with which the tokens that are dropped would have entered layer i."""
        for number, (places, selection) in selections.items():
            row = call.prompt.spans[number].row
            stay = torch.zeros(len(places), dtype=torch.bool, device=places.device)
            stay[selection.kept.to(places.device)] = True
            gone = places[~stay]
            dropped = call.made.setdefault("dropped", [])
            dropped.append(
                (i, row, call.layout.index[row, gone], hidden[row, gone.to(hidden.device)].detach())
            )

    def finish(self, call: Call) -> Revivable | None:
        """What the cache must hold after the prompt; None where nothing was dropped."""
        if "dropped" not in call.made:
            return None
        token, valid = self._visual(call)
        entering = call.entering.index
        place = entering.gather(1, token).masked_fill(~valid, -1)
        image = call.prompt.image.gather(1, place.clamp_min(0)).masked_fill(~valid, -1)
        sample = call.made["dropped"][0][3]
        states = sample.new_zeros(*place.shape, sample.shape[-1])
        frontier = torch.full_like(place, len(self.host.layers))
        numbers = torch.full_like(call.prompt.image, -1)  # [B, L], the token of each place
        own = torch.arange(place.shape[1], device=place.device).expand_as(place)
        rows = torch.arange(len(place), device=place.device)[:, None].expand_as(place)
        numbers[rows[valid], place[valid]] = own[valid]
        for layer, row, places, values in call.made["dropped"]:
            which = numbers[row, places]
            states[row, which.to(states.device)] = values.to(states)
            frontier[row, which] = layer
        entries = []
        for i in (self.cuts[0] - 1, *self.cuts):
            layout, past = call.layouts[i], call.entries[i]
            real = layout.valid
            text = torch.full((len(real), past), -1, device=real.device)
            before = torch.ones_like(text, dtype=torch.bool)
            if call.mask is not None and past:
                before = call.mask[:, :past].bool().to(real.device)
            earlier = Entries(text, torch.arange(-past, 0, device=real.device).expand_as(text), before)
            own_entries = Entries(numbers.gather(1, layout.index).masked_fill(~real, -1), layout.index, real)
            entries.append(earlier.extended(own_entries))
        counts = {
            number: [
                int((image[span.row] == number).logical_and(frontier[span.row] > cut).sum())
                for cut in self.cuts
            ]
            for number, span in enumerate(call.prompt.spans)
        }
        return Revivable(image, place, states, frontier, entries, counts, call.made["placed"])

    def _visual(self, call: Call) -> tuple[Tensor, Tensor]:
        """The places of visual tokens among those that enter the language model [B, V], and which are
        real."""
        if "visual" not in call.made:
            layout = call.entering
            visual = (call.prompt.image.gather(1, layout.index) >= 0) & layout.valid
            call.made["visual"] = compact(visual)[:2]
        return call.made["visual"]

    # Later tokens -------------------------------------------------------------------------------------------

    def start(self, call: Call) -> None:
        """Begin a call on a cache with revivable tokens."""
        state = call.state.revivable
        batch, device = len(state.image), state.image.device
        places = torch.arange(call.length, call.length + call.full, device=device).expand(batch, -1)
        real = torch.ones_like(places, dtype=torch.bool)
        if call.mask is not None:
            real = call.mask[:, call.length : call.length + call.full].bool().to(device)
        new = Entries(torch.full_like(places, -1), places, real)
        state.entries[0] = state.entries[0].extended(new)
        nothing = places[:, :0]
        call.step = Step(new, state.image >= 0, state.entries[0], nothing, real[:, :0])
        call.step.added = [call.full] * self.cuts[0]

    def probes(self, call: Call) -> dict[nn.Module, Probe]:
        """The attention probes of the layers before the cuts, for this call."""
        return {self.host.attentions[k - 1]: self._probe(call, k) for k in self.cuts}

    def _probe(self, call: Call, k: int) -> Probe:
        def probe(
            module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
        ) -> None:
            with torch.no_grad(), call.timed():
                last = None if mask is None else mask[..., -1:, :]
                rows = attention_rows(query[:, :, -1:], key, scaling=scaling, mask=last)
                call.scores["revival", k] = rows.mean((1, 2))  # [B, S]

        return probe

    def before(
        self, call: Call, i: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The states and arguments with which layer i, at the first cut or behind it, is called."""
        step, state = call.step, call.state.revivable
        if i in self.cuts:
            with torch.no_grad(), call.timed():
                hidden = self._select(call, step, state, i, hidden)
        step.added.append(step.count + step.new.token.shape[1])
        changed = {**kwargs, "attention_mask": self._mask(step, hidden)}
        index = step.token
        for name, value in state.placed[i].items():
            changed[name] = _joined(value, index, kwargs[name], name) if step.count else kwargs[name]
        return hidden, changed

    def _select(self, call: Call, step: Step, state: Revivable, i: int, hidden: Tensor) -> Tensor:
        """Choose the visual tokens that go on from layer i, and put those that it has not computed yet in
        front of the new ones."""
        self._take_back(step, state, i, hidden)
        scores = call.scores.pop(("revival", i), None)
        if scores is None:
            raise RuntimeError(
                f"attention did not report to {type(self.reducer).__name__} before layer {i}: its "
                "implementation was changed while the reducer is attached; change it first, then attach"
            )
        cut, device = self.cuts.index(i), state.image.device
        entries, alive = step.entries, step.alive.clone()
        attention = scores.new_zeros(state.image.shape)  # [B, V]
        which = (entries.token >= 0) & entries.real
        rows = torch.arange(len(alive), device=device)[:, None].expand_as(which)
        attention[rows[which], entries.token[which]] = scores.to(device)[which]
        for row in range(len(alive)):
            for number in state.image[row].unique().tolist():
                tokens = ((state.image[row] == number) & alive[row]).nonzero().squeeze(1)
                count = state.counts[number][cut] if number >= 0 else len(tokens)
                if count < len(tokens):
                    candidates = LayerTokens(
                        layer=i, hidden=hidden.new_empty(len(tokens), 0), attention=attention[row, tokens]
                    )
                    kept = self.reducer.select(candidates, count).kept.to(device)
                    alive[row, tokens] = False
                    alive[row, tokens[kept]] = True
                    self.trace(f"step.kept.{i}", tokens[kept])
        index, real, _ = compact(alive & (state.frontier == i))
        place = state.place.gather(1, index).masked_fill(~real, -1)
        returned = Entries(index.masked_fill(~real, -1), place, real)
        new_entries = returned.extended(step.new)
        state.entries[cut + 1] = state.entries[cut + 1].extended(new_entries)
        self.trace(f"step.computed.{i}", real.sum(1))
        step.alive, step.entries = alive, state.entries[cut + 1]
        new = hidden[:, step.count :]
        step.token, step.real, step.mask = index, real, None
        if not step.count:
            return new
        return torch.cat([gather(state.states, index).to(new), new], 1)

    def _take_back(self, step: Step, state: Revivable, layer: int, hidden: Tensor) -> None:
        """Keep the states of tokens that have run up to `layer`."""
        if not step.count:
            return
        rows = torch.arange(len(step.token), device=step.token.device)[:, None].expand_as(step.token)
        rows, token = rows[step.real], step.token[step.real]
        state.frontier[rows, token] = layer
        if layer < len(self.host.layers):
            values = hidden[:, : step.count][step.real.to(hidden.device)]
            state.states[rows.to(state.states.device), token.to(state.states.device)] = values.to(
                state.states
            )

    def _mask(self, step: Step, hidden: Tensor) -> Tensor:
        """What each query attends to, in the form that the kernel takes: text and what goes on, before it."""
        if step.mask is None:
            entries, new = step.entries, hidden.shape[1]
            alive = step.alive.gather(1, entries.token.clamp_min(0)) | (entries.token < 0)
            earlier = entries.place[:, None] <= entries.place[:, -new:, None]
            step.mask = (entries.real & alive)[:, None] & earlier
            step.mask[:, :, -new:].diagonal(dim1=1, dim2=2).fill_(True)  # padding attends to itself
        allowed = step.mask[:, None].to(hidden.device)
        if self.host.kernel == "sdpa":
            return allowed
        mask = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
        return mask.masked_fill(~allowed, torch.finfo(hidden.dtype).min)

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = current(self.host)
        if call is None or call.prefill or call.step is None or not call.step.count:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        self._take_back(call.step, call.state.revivable, len(self.host.layers), hidden)
        hidden = hidden[:, call.step.count :]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def finish_step(self, call: Call) -> None:
        """Record in the cache by how many entries its layers have grown beside the new tokens."""
        state, step = call.state, call.step
        for i, added in enumerate(step.added):
            state.gap[i] -= added - call.full


# Positions and rotations of tokens: tensors, alone or in tuples ---------------------------------------------


def _axes(name: str) -> int:
    """Dimensions of an argument of that name where positions have one plane."""
    return 3 if name == "position_embeddings" else 2


def _batch_first(value: Any, name: str) -> Any:
    """[B, V, …] as they are; [planes, B, V, …] as [B, V, planes, …]."""
    return mapped(value, lambda tensor: tensor.movedim(0, 2) if tensor.ndim > _axes(name) else tensor)


def _joined(kept: Any, index: Tensor, latest: Any, name: str) -> Any:
    """What was kept [B, V, …] at the tokens that return [B, R], and then the `latest` tokens' own."""
    if isinstance(latest, tuple | list):
        return tuple(_joined(a, index, b, name) for a, b in zip(kept, latest, strict=True))
    returned, planes = gather(kept, index).to(latest), int(kept.ndim > _axes(name))
    if planes:  # [B, R, planes, …] → [planes, B, R, …]
        returned = returned.movedim(2, 0)
    shape = list(latest.shape)
    shape[planes] = returned.shape[planes]
    return torch.cat([returned, latest.expand(shape)], planes + 1)
