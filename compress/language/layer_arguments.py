"""Masks, positions and rotations for decoder layers that get fewer tokens than the model read."""

from typing import Any

import torch
from torch import Tensor

from ..families import Host
from ..hosts import at_tokens, release, takes
from ..layout import Layout, gather
from .boundary import highest
from .cache import extended
from .call import Call, past_columns
from .masks import build, check, shrunk, slide, windowed
from .spreading import spread_positions

_PLACED = {"position_ids", "position_embeddings"}


class LayerArguments:
    """The arguments of the decoder layers of `host`, made to fit the tokens that are left.

    `compact`: after a cut, tokens are numbered anew; `spread`: what is left of an image is spread over its
    extent. Raises RuntimeError when a host's masks are not of the kind that its configuration names, and
    TypeError when a layer takes no positions by name.
    """

    def __init__(self, host: Host, compact: bool, spread: bool) -> None:
        self.host, self.compact, self.spread = host, compact, spread
        self._checked: set[str] = set()  # kinds of layers whose masks were compared with the host's

    def after_cut(self, call: Call) -> None:
        """Forget what was made for the layout before the cut, and note by how much positions fall."""
        if self.compact:
            full, start = self._numbered(call)
            last = full.masked_fill(~call.entering.valid, -1).amax(1)
            call.derived["removed"] = last - (start[:, 0] + call.layout.valid.sum(1) - 1)
        for key in [k for k in call.derived if isinstance(k, tuple) and k[0] in ("mask", "rotary", "tokens")]:
            del call.derived[key]

    def at_prefill(self, call: Call, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's arguments at prefill, for the tokens that are left."""
        state = call.state
        shifted = None if state is None else state.removed[i]
        own_columns = state is not None and (state.columns[i] is not state.columns[0] or i in state.numbers)
        if call.relative is None and shifted is None and not own_columns:
            return kwargs
        changed = {**kwargs, "attention_mask": self._mask(call, i, hidden, kwargs.get("attention_mask"))}
        renumbered = shifted is not None or ((self.compact or self.spread) and call.relative is not None)
        if call.relative is not None:
            left = {"attention_mask"}
            if renumbered:  # with positions in several planes, layers get as position ids those of the text
                left |= {"position_embeddings"} if call.positions.ndim == 3 else _PLACED
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
        arguments = {"position_embeddings": embeddings, "position_ids": positions}
        if positions.ndim == 3:
            del arguments["position_ids"]
        known = {name: value for name, value in arguments.items() if takes(self.host.layers[i], name)}
        if not known:
            raise TypeError(
                f"layer {i} of {self.host.name} takes neither position_embeddings nor position_ids by name "
                f"({release()}), so its tokens cannot be renumbered; attach with positions='keep'"
            )
        return known

    def _numbered(self, call: Call) -> tuple[Tensor, Tensor]:
        """Position ids [B, L'] that entered the language model, and the first real one of each row [B, 1]."""
        full = call.positions.expand(len(call.entering.valid), -1)
        return full, full.masked_fill(~call.entering.valid, highest(full)).amin(1, keepdim=True)

    def _renumbered(self, call: Call, i: int, hidden: Tensor, shifted: Tensor | None) -> tuple[Tensor, Any]:
        """Position ids of the tokens that are left, counted anew after a cut, and their rotations."""
        key = ("rotary", self.host.layer_type(i), id(shifted))
        if key not in call.derived:
            if self.spread and call.relative is not None:
                layout, whole = call.layout, call.whole_positions
                positions = spread_positions(self.host, call, whole, layout.index, layout.valid)
                positions = positions[-3:] if positions.ndim == 3 else positions
            else:
                positions, start = self._numbered(call)
            if self.compact and call.relative is not None:
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
            made = self._mask_on_cache(call, i, hidden, torch.cat([past_columns(call, i), layout.valid], 1))
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

    def on_cache(self, call: Call, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any] | None:
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
        return self._mask_on_cache(call, i, hidden, real)

    def _mask_on_cache(self, call: Call, i: int, hidden: Tensor, real: Tensor | None) -> Tensor | None:
        """The mask of layer i for new states on top of its cache; `real` [B, entries + q]."""
        numbers = None if real is None or call.state is None else call.state.numbered(i, real.shape[1])
        if numbers is None:
            return build(self.host, i, hidden, real, call.cache)
        return windowed(self.host, i, hidden, real, numbers, call.cache)
