"""Leaving out parts of decoder layers for tokens that stay in the sequence and in the cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..attention import Seen, on_rows, probing
from ..families import Host
from ..hosts import cache_in, entries, forward_slot, keywords, recomputes, replace_entries, writes_cache
from ..reducer import Skip, SkipReducer, Stage, count_of
from ..undo import Undo
from .call import Call, current

Stock = Callable[..., Any]  # the forward that a module has without the session
Forward = Callable[..., Any]  # one that takes the module and its stock forward in front


class Skipping:
    """The `number`-th reducer inside the model of a session, one that leaves out parts of layers.

    The forwards of the decoder layers, of their attention and of their MLP are replaced while the session is
    attached. Raises TypeError for models whose layers are not made of these, and ValueError for layers that
    cannot leave out what is asked.
    """

    def __init__(self, host: Host, reducer: SkipReducer, number: int) -> None:
        self.host, self.reducer, self.number = host, reducer, number
        self._layers: list[Stock] = []
        own = reducer.skips(len(host.layers), None)
        self.takes_all = any(skip.tokens == "all" or skip.leading for skip in own.values())
        self._check()

    def _check(self) -> None:
        host, name = self.host, type(self.reducer).__name__
        plan, count = self.reducer.skips(len(host.layers), None), len(host.layers)
        if any(not isinstance(getattr(layer, "mlp", None), nn.Module) for layer in host.layers):
            raise TypeError(
                f"the decoder layers of {host.name} have no `mlp`, so {name} cannot leave it out; use a "
                "reducer of features"
            )
        if getattr(host.lm.config, "hidden_size_per_layer_input", 0):
            raise TypeError(
                f"{host.name} feeds every layer with further inputs for each token, so {name} cannot leave "
                "one out for some; use a reducer of features"
            )
        if not all(writes_cache(attention) for attention in host.attentions):
            raise TypeError(
                f"some layers of {host.name} use the keys of others, so {name} cannot leave out a layer; use "
                "a reducer of features"
            )
        for i, skip in plan.items():
            pair = {"block": i - 1, "parallel_block": i + 1}.get(skip.what) if skip.tokens == "all" else None
            if not 0 <= i < count or not 0 <= (i if pair is None else pair) < count:
                raise ValueError(
                    f"{name} leaves out something in layer {i} and needs its neighbour {pair}, but "
                    f"{host.name} has layers 0 to {count - 1}"
                )
            if pair is not None and {host.layer_type(i), host.layer_type(pair)} != {"full_attention"}:
                raise ValueError(
                    f"{name} joins the caches of layers {i} and {pair} of {host.name}, which needs full "
                    "attention in both; choose other layers, or let it skip an image's tokens only"
                )
            if skip.what == "attn" and skip.tokens == "all":
                self._check_projections(i)

    def _check_projections(self, i: int) -> None:
        """Raise TypeError unless normed states can stand in for the keys and values of layer i."""
        attention, width = self.host.attentions[i], self.host.lm.config.hidden_size
        projections = [getattr(attention, name, None) for name in ("k_proj", "v_proj")]
        if any(getattr(p, "out_features", None) != width for p in projections):
            raise TypeError(
                f"{type(self.reducer).__name__} writes the normed states of layer {i} into the cache, so its "
                f"keys and values must be as wide as hidden states ({width}); those of {self.host.name} "
                "are not; let it skip an image's tokens only"
            )

    # Planning -----------------------------------------------------------------------------------------------

    def start(self, call: Call) -> None:
        """Plan what the layers leave out in this call.

        Raises ValueError for images of different budgets where whole layers are left out for all tokens, and
        NotImplementedError where layers would be computed again in the backward pass without that.
        """
        layers = len(self.host.layers)
        if not call.prefill:
            plans = [self.reducer.skips(layers, None)] if call.state.skips else []
        else:
            plans = []
            budgets = call.budgets[Stage.LAYER][self.number]
            for entered, budget in zip(map(len, call.kept), budgets, strict=True):
                share = budget if not isinstance(budget, int) else count_of(budget, entered) / entered
                plans.append(self.reducer.skips(layers, share))
        plan: dict[int, list[int]] = {}
        for number, one in enumerate(plans):
            for i in one:
                plan.setdefault(i, []).append(number)
        if self.takes_all and any(one != plans[0] for one in plans[1:]):
            raise ValueError(
                f"{type(self.reducer).__name__} leaves out parts of layers for all tokens of a batch, so all "
                "of its images need the same budget; give one budget, or let it skip an image's tokens only"
            )
        if plan and torch.is_grad_enabled() and recomputes(self.host.lm):
            raise NotImplementedError(
                f"{type(self.reducer).__name__} leaves out parts of layers, and gradient checkpointing would "
                "compute them again without that; turn gradient checkpointing off"
            )
        skips = {i: next(one[i] for one in plans if i in one) for i in plan}
        call.derived["skip", self.number] = skips, plan

    def continues(self, call: Call) -> bool:
        """Whether calls after this prompt leave out something, too."""
        return self.takes_all and bool(call.derived["skip", self.number][0])

    def _skip(self, i: int, length: int) -> tuple[Call, Skip] | tuple[None, None]:
        """The call under way and what layer i leaves out in it for an input of `length` tokens."""
        call = current(self.host)
        skip = None if call is None else call.derived.get(("skip", self.number), ({}, {}))[0].get(i)
        if skip is None or not skip.least <= length <= skip.most:
            return None, None
        return call, skip

    def _frozen(self, call: Call, i: int) -> Tensor:
        """Which tokens of the current layout [B, L'] layer i leaves out something for."""
        layout, numbers = call.layout, call.derived["skip", self.number][1][i]
        key = ("frozen", self.number, id(layout), tuple(numbers))
        if key not in call.derived:
            image = call.prompt.image.gather(1, layout.index).masked_fill(~layout.valid, -1)
            frozen = torch.isin(image, image.new_tensor(numbers))
            frozen &= layout.index != call.last[:, None]  # its output predicts the answer
            call.derived[key] = frozen
        return call.derived[key]

    # Replaced forwards --------------------------------------------------------------------------------------

    def attach(self, undo: Undo) -> None:
        """Replace the forwards of the layers and their parts; `undo` restores them."""
        for i, layer in enumerate(self.host.layers):
            attention = self.host.attentions[i]
            self._layers.append(getattr(layer, forward_slot(layer)))
            _replace(undo, layer, self._layer(i))
            _replace(undo, attention, self._attention(i))
            _replace(undo, layer.mlp, self._mlp(i))
            for name in ("q_proj", "o_proj", "k_proj", "v_proj"):
                projection = getattr(attention, name, None)
                if isinstance(projection, nn.Module):
                    _replace(undo, projection, self._projection(i, name))

    def _layer(self, i: int) -> Forward:
        def forward(module: nn.Module, stock: Stock, *args: Any, **kwargs: Any) -> Any:
            arguments = keywords(module, args, kwargs)
            hidden = arguments["hidden_states"]
            before, pair = self._skip(i - 1, hidden.shape[1])
            if pair is not None and pair.what == "parallel_block":  # this layer has run beside the last one
                return before.derived["pair", self.number]
            call, skip = self._skip(i, hidden.shape[1])
            if skip is not None and skip.what == "parallel_block":
                output = call.derived["pair", self.number] = self._both(call, i, args, kwargs, arguments)
                return output
            if skip is not None and skip.what == "block" and skip.tokens == "all":
                self._copy_cache(i, cache_in(arguments))
                self._count(call, i, None, "projections", "rows", "keys", "mlp")
                return (hidden,) if call.derived["tuple", self.number] else hidden
            output = stock(*args, **kwargs)
            if (running := current(self.host)) is not None:
                running.derived["tuple", self.number] = isinstance(output, tuple)
            if skip is None or skip.what != "block":
                return output
            frozen = self._frozen(call, i).to(hidden.device)[..., None]
            if isinstance(output, tuple):
                return (torch.where(frozen, hidden, output[0]), *output[1:])
            return torch.where(frozen, hidden, output)

        return forward

    def _attention(self, i: int) -> Forward:
        def forward(module: nn.Module, stock: Stock, *args: Any, **kwargs: Any) -> Any:
            arguments = keywords(module, args, kwargs)
            hidden = arguments["hidden_states"]
            call, skip = self._skip(i, hidden.shape[1])
            if skip is None:
                return stock(*args, **kwargs)
            if skip.tokens == "all" and skip.what in ("attn", "parallel_attn"):
                call.derived["normed", self.number] = hidden
            if skip.what not in ("attn", "block"):
                return stock(*args, **kwargs)
            if skip.tokens == "all":
                self._count(call, i, None, "projections", "rows", "keys")
                if cache_in(arguments) is not None:
                    self._write_states(call, i, stock, args, kwargs, hidden)
                return torch.zeros_like(hidden), None
            frozen = self._frozen(call, i).to(hidden.device)
            self._count(call, i, frozen, *self._saved(i))
            with self._only(call, i, frozen):
                output, *rest = stock(*args, **kwargs)
            return (output.masked_fill(frozen[..., None], 0), *rest)

        return forward

    def _mlp(self, i: int) -> Forward:
        def forward(module: nn.Module, stock: Stock, states: Tensor, *args: Any, **kwargs: Any) -> Any:
            call, skip = self._skip(i, states.shape[1])
            if (
                skip is None
                or skip.what == "parallel_block"
                or (skip.what, skip.tokens) == ("attn", "visual")
            ):
                return stock(states, *args, **kwargs)
            if skip.what in ("attn", "parallel_attn"):
                return stock(call.derived.pop(("normed", self.number)), *args, **kwargs)
            if skip.leading is not None:  # Parity: the code adds the input of the MLP in place of its output
                first, rest = states[:, : skip.leading], states[:, skip.leading :]
                self._count(call, i, torch.arange(states.shape[1]) < skip.leading, "mlp")
                return torch.cat([first, stock(rest, *args, **kwargs)], 1) if rest.shape[1] else first
            if skip.tokens == "all":
                self._count(call, i, None, "mlp")
                return torch.zeros_like(states)
            frozen = self._frozen(call, i).to(states.device)
            self._count(call, i, frozen, "mlp")
            return _at(~frozen, stock, states, *args, **kwargs)

        return forward

    def _projection(self, i: int, name: str) -> Forward:
        def forward(module: nn.Module, stock: Stock, states: Tensor, *args: Any, **kwargs: Any) -> Any:
            call = current(self.host)
            only = None if call is None else call.derived.get(("only", self.number))
            if only is None or only[0] != i:
                return stock(states, *args, **kwargs)
            frozen = only[1]
            if name in ("q_proj", "o_proj"):
                return _at(~frozen, stock, states, *args, **kwargs)
            return states if frozen.all() else stock(states, *args, **kwargs)

        return forward

    # Parts --------------------------------------------------------------------------------------------------

    @contextmanager
    def _only(self, call: Call, i: int, frozen: Tensor) -> Iterator[None]:
        """While inside, the attention of layer i computes queries and outputs of tokens that are not `frozen`
        [B, L'] only."""
        call.derived["only", self.number] = i, frozen
        attention, count = self.host.attentions[i], int((~frozen).sum(1).max())
        index = (~frozen).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
        try:
            with on_rows(attention, index.sort(1).values) if "rows" in self._saved(i) else nullcontext():
                yield
        finally:
            del call.derived["only", self.number]

    def _saved(self, i: int) -> tuple[str, ...]:
        """What frozen tokens save in the attention of layer i: the kernel's rows where it takes masks of some
        rows, the projections where they are modules of their own."""
        attention = self.host.attentions[i]
        rows = self.host.kernel in ("sdpa", "eager") and getattr(attention, "is_causal", False)
        apart = all(isinstance(getattr(attention, name, None), nn.Module) for name in ("q_proj", "o_proj"))
        return ("rows",) * rows + ("projections",) * apart

    def _write_states(
        self, call: Call, i: int, stock: Stock, args: Any, kwargs: dict[str, Any], hidden: Tensor
    ) -> None:
        """Write the states that enter the attention of layer i into the cache, as keys (rotated) and values:
        the module is called with these in place of its projections, and left before it attends."""

        def probe(*arguments: Any) -> None:
            raise Seen

        everything = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        call.derived["only", self.number] = i, everything
        try:
            with probing({self.host.attentions[i]: probe}):
                stock(*args, **kwargs)
        except Seen:
            return
        finally:
            del call.derived["only", self.number]
        raise RuntimeError(
            f"attention did not report to {type(self.reducer).__name__} in layer {i}: its implementation was "
            "changed while the reducer is attached; change it first, then attach"
        )

    @staticmethod
    def _copy_cache(i: int, cache: Cache | None) -> None:
        """Give layer i a copy of what the layer before holds."""
        if cache is None:
            return
        keys, values = cache.layers[i - 1].keys, cache.layers[i - 1].values
        new = keys.shape[2] - entries(cache, i)
        cache.update(keys[:, :, -new:], values[:, :, -new:], i)  # so that the layer exists
        replace_entries(cache, i, keys.clone(), values.clone())

    def _both(self, call: Call, i: int, args: Any, kwargs: dict[str, Any], arguments: dict[str, Any]) -> Any:
        """The mean of what layers i and i + 1 make of the same input; their caches become the mean, too.

        Parity: of the first two layers only the first runs, and the second takes over its output and cache.
        """
        cache = cache_in(arguments)
        if i == 0:
            output = self._layers[0](*args, **kwargs)
            self._copy_cache(1, cache)
            self._count(call, 1, None, "projections", "rows", "keys", "mlp")
            return output
        outputs = [self._layers[number](*args, **kwargs) for number in (i, i + 1)]
        if cache is not None:
            pair = cache.layers[i : i + 2]
            keys, values = (sum(getattr(layer, name) for layer in pair) / 2 for name in ("keys", "values"))
            for number in (i, i + 1):
                replace_entries(cache, number, keys.clone(), values.clone())
        if isinstance(outputs[0], tuple):
            return ((outputs[0][0] + outputs[1][0]) / 2, *outputs[0][1:])
        return (outputs[0] + outputs[1]) / 2

    @staticmethod
    def _count(call: Call, i: int, frozen: Tensor | None, *parts: str) -> None:
        """Note how many tokens of each row layer i leaves out a part for (None: all), for the report."""
        if call.prefill:
            valid = call.layout.valid
            counts = (valid if frozen is None else valid & frozen.to(valid.device)).sum(1).tolist()
            call.skipped.setdefault(i, {}).update(dict.fromkeys(parts, counts))


def _replace(undo: Undo, module: nn.Module, forward: Forward) -> None:
    """Give `module` another forward, which takes the module, the stock forward and the arguments."""
    slot = forward_slot(module)
    stock = getattr(module, slot)

    @wraps(stock)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, stock, *args, **kwargs)

    undo.attribute(module, slot, MethodType(replaced, module))


def _at(mask: Tensor, stock: Stock, states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The output of a module that treats tokens one by one, at the tokens of `mask` [B, L]; zeros
    elsewhere."""
    output = stock(states[mask][None], *args, **kwargs)
    part = output[0] if isinstance(output, tuple) else output
    whole = part.new_zeros(*states.shape[:2], part.shape[-1])
    whole[mask] = part[0]
    return (whole, *output[1:]) if isinstance(output, tuple) else whole
