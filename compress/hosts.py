"""Everything that a release of transformers or accelerate may change, in one file.

Arguments and fields are found by type or from a signature, never by an unchecked name:
`check_parts` reads the signatures of a model's parts when a session attaches, and refuses what it does not
know. What a signature does not state is checked while the model runs (`check_growth`).
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..extras import needs

# The oldest release is 5.15, from which on PaddleOCR-VL and Gemma 4 run. Before 5.14 masks took the place of
# a query from `Cache.get_seq_length`, which must count dropped tokens for `generate`; since then they call
# `get_query_offset`, which returns the entries that a shortened cache holds.
with needs("transformers", None, "attaching reducers"):
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.masking_utils import (
        ALL_MASK_ATTENTION_FUNCTIONS,
        LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    )
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TESTED = "5.15 to 5.24"
ENCODES_BEFORE_FORWARD = hasattr(transformers.GenerationMixin, "_supports_mm_encoder_outputs")  # since 5.18
_HOOKS_RUN_ONCE = "__init_subclass__" in vars(GradientCheckpointingLayer)  # under checkpointing
CACHE_NAMES = ("cache", "past_key_values")  # since 5.24, and before
_CACHE_TYPE = re.compile(r"\b(?:Dynamic|Static|EncoderDecoder)?Cache\b")

# Arguments that hooks read by name. `check_parts` finds each of them in the signature of the part.
READ = {
    "core": ("input_ids", "inputs_embeds", "attention_mask", "position_ids"),
    "language model": ("inputs_embeds", "attention_mask", "position_ids"),
    "decoder layer": ("hidden_states", "attention_mask"),
    "attention": ("hidden_states",),
}


def release() -> str:
    """The installed release and those that were tested, for error messages."""
    return f"transformers {transformers.__version__} (tested: {TESTED})"


# Signatures -------------------------------------------------------------------------------------------------


_PARAMETERS: WeakKeyDictionary[Callable[..., Any], dict[str, inspect.Parameter]] = WeakKeyDictionary()


def _forward(module: nn.Module) -> Callable[..., Any]:
    """The function that runs when `module` is called, under what accelerate wraps around it."""
    own = vars(module).get("forward")
    function = type(module).forward if own is None else inspect.unwrap(own)
    return getattr(function, "__func__", function)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    if function not in _PARAMETERS:
        parameters = inspect.signature(function).parameters.items()
        _PARAMETERS[function] = {name: parameter for name, parameter in parameters if name != "self"}
    return _PARAMETERS[function]


def cache_parameter(function: Callable[..., Any]) -> str:
    """The name of the one parameter of `function` that takes a key-value cache, by annotation or known name.

    Raises TypeError when there is none or more than one.
    """
    names = [
        name
        for name, parameter in _parameters(function).items()
        if name in CACHE_NAMES or _CACHE_TYPE.search(str(parameter.annotation))
    ]
    if len(names) != 1:
        which = f" ({', '.join(names)})" if names else ""
        raise TypeError(f"{function.__qualname__} takes {len(names)} key-value caches{which}, not one")
    return names[0]


def check_parts(name: str, parts: Mapping[str, nn.Module]) -> None:
    """Check by signature that each part ("core", "language model", …) takes one key-value cache and the
    arguments that hooks read.

    Raises TypeError naming the model `name`, the part, its class and the release.
    """
    for part, module in parts.items():
        function = _forward(module)
        missing = [argument for argument in READ[part] if argument not in _parameters(function)]
        try:
            cache_parameter(function)
            problem = f"{function.__qualname__} takes no {' and no '.join(missing)}" if missing else None
        except TypeError as error:
            problem = str(error)
        if problem is not None:
            raise TypeError(
                f"reducers cannot attach to {name}: the {part} {type(module).__name__} of {release()} is not "
                f"called as expected: {problem}"
            )


def takes(module: nn.Module, name: str) -> bool:
    """Whether the forward of `module` has an argument of that name."""
    return name in _parameters(_forward(module))


def keywords(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by name, those given by position included."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(_parameters(_forward(module)), args, strict=False)), **kwargs}


# Caches -----------------------------------------------------------------------------------------------------


def cache_in(values: Mapping[str, Any]) -> Cache | None:
    """The key-value cache among the arguments of a call or the fields of an output, found by its type.

    Raises TypeError when there are several: which of them a reducer may shorten is then not known.
    """
    caches = {id(value): value for value in values.values() if isinstance(value, Cache)}
    if len(caches) > 1:
        names = ", ".join(name for name, value in values.items() if isinstance(value, Cache))
        raise TypeError(f"one key-value cache was expected, and {len(caches)} came as {names}; {release()}")
    return next(iter(caches.values()), None)


def cache_argument(module: nn.Module, kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache that `module` is called with.

    Raises TypeError when it is passed under a name that is not in the signature of the module.
    """
    cache = cache_in(kwargs)
    if cache is not None:
        name = next(name for name, value in kwargs.items() if value is cache)
        expected = cache_parameter(_forward(module))
        if name != expected and name not in CACHE_NAMES:
            raise TypeError(
                f"{type(module).__name__} of {release()} was given its cache as {name!r}, while its "
                f"signature has {expected!r}; reducers cannot work in it"
            )
    return cache


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that must not write into a cache."""
    left = {name: value for name, value in arguments.items() if not isinstance(value, Cache)}
    return {**left, "use_cache": False} if "use_cache" in left else left


def with_cache(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The argument that makes `model` continue a cache, under its name in this release."""
    return {cache_parameter(type(model).forward): cache}


def wants_cache(lm: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the language model `lm` is to keep keys and values."""
    use_cache = kwargs.get("use_cache")
    return bool(getattr(lm.config, "use_cache", False) if use_cache is None else use_cache)


def recomputes(module: nn.Module) -> bool:
    """Whether the layers of `module` are checkpointed: then they keep nothing, whatever `use_cache` is."""
    return module.training and any(getattr(m, "gradient_checkpointing", False) for m in module.modules())


def check_checkpointing(layer: nn.Module) -> None:
    """Raise NotImplementedError for a checkpointed layer of a release that runs hooks a second time in the
    backward pass, when no call is under way."""
    if not _HOOKS_RUN_ONCE and torch.is_grad_enabled() and recomputes(layer):
        raise NotImplementedError(
            f"gradient checkpointing of {release()} runs the hooks of a layer twice, so no reducer can act "
            "inside it; turn it off, use a reducer of features, or install transformers 5.23 or later"
        )


def entries(cache: Cache | None, layer: int) -> int:
    """Tokens in a layer of the cache, including those that a window has dropped."""
    return Cache.get_seq_length(cache, layer) if holds_keys(cache, layer) else 0


def holds_keys(cache: Cache | None, layer: int) -> bool:
    """Whether a layer of the cache holds keys; those of layers that use another's keys do not."""
    return (
        cache is not None and layer < len(cache.layers) and isinstance(cache.layers[layer], CacheLayerMixin)
    )


def writes_cache(attention: nn.Module | None) -> bool:
    """Whether an attention module has keys of its own; some layers of Gemma 3n and 4 use another's, and
    layers with a running state have no attention (None)."""
    return attention is not None and not getattr(attention, "is_kv_shared_layer", False)


def has_window(cache: Cache, layer: int) -> bool:
    """Whether a layer of the cache drops tokens that a window has passed."""
    return bool(cache.layers[layer].is_sliding)


def window_limit(cache: Cache, layer: int) -> int | None:
    """How many tokens a layer of the cache holds at most between calls; None: all."""
    return (
        cache.layers[layer].sliding_window - 1
        if holds_keys(cache, layer) and has_window(cache, layer)
        else None
    )


def visible_entries(cache: Cache | None, layer: int, new: int) -> int:
    """How many keys a layer's attention gets when `new` tokens come."""
    return new if cache is None else cache.get_mask_sizes(new, layer)[0]


def replace_entries(cache: Cache, layer: int, keys: Tensor, values: Tensor) -> None:
    """Make a layer of a dynamic cache hold these keys and values [B, H, S, D] and no others.

    Raises RuntimeError when the layer then counts other entries than S.
    """
    held = cache.layers[layer]
    held.keys, held.values = keys, values
    if has_window(cache, layer):  # it counts what it has read, and continues with what it holds
        held.cumulative_length = keys.shape[-2]
    if entries(cache, layer) != keys.shape[-2]:
        raise RuntimeError(
            f"layer {layer} of a {type(cache).__name__} counts {entries(cache, layer)} entries after it was "
            f"shortened to {keys.shape[-2]}; {release()} keeps its cache in a way that reducers cannot use"
        )


def check_growth(
    name: str,
    attentions: Sequence[nn.Module | None],
    cache: Cache | None,
    before: Sequence[int],
    planned: Sequence[int],
) -> None:
    """Compare what each layer's cache holds after a call with what it held `before` and the `planned` tokens.

    Raises RuntimeError naming the model, the release and the first layer where they differ.
    """
    if cache is None:
        raise RuntimeError(
            f"{name} was to keep keys and values (use_cache), but its language model returned no cache that "
            f"{release()} is known to use; no output was returned. Detach the reducer, or generate with "
            "use_cache=False"
        )
    for layer, (attention, old, new) in enumerate(zip(attentions, before, planned, strict=True)):
        held, expected = entries(cache, layer), old + new if writes_cache(attention) else old
        if held != expected:
            raise RuntimeError(
                f"the cache of {name} holds {held} tokens in layer {layer} where {expected} were planned "
                f"({old} before and {new} new ones); {release()} keeps its cache in a way that reducers do "
                "not support, so no output was returned. Detach the reducer"
            )


def check_entries(name: str, cache: Cache, planned: Mapping[int, int]) -> None:
    """Compare what layers of a cache hold after an eviction with the `planned` entries of each.

    Raises RuntimeError naming the model, the release and the first layer where they differ.
    """
    for layer, expected in planned.items():
        held = cache.layers[layer]
        lengths = {entries(cache, layer), held.keys.shape[-2], held.values.shape[-2]}
        if lengths != {expected}:
            raise RuntimeError(
                f"the cache of {name} holds {' and '.join(map(str, sorted(lengths)))} entries in layer "
                f"{layer} where {expected} were planned after an eviction; {release()} keeps its cache in a "
                "way that reducers do not support, so no output was returned. Detach the reducer"
            )


# Features ---------------------------------------------------------------------------------------------------


def lengths_of_samples(lengths: list[int], arguments: Mapping[str, Any]) -> list[int]:
    """Visual tokens per sample of a family whose pictures come as [samples, most tiles, C, H, W], filled up
    with zeros. Before 5.18 its features are one item per tile, later one per sample."""
    pixels = arguments["pixel_values"]
    if len(lengths) == len(pixels):
        return lengths
    tiles = pixels.flatten(2).any(-1).sum(1).tolist()
    if sum(tiles) != len(lengths):
        raise TypeError(f"{len(lengths)} items of features came from {sum(tiles)} tiles; {release()}")
    starts = [sum(tiles[:i]) for i in range(len(tiles) + 1)]
    return [sum(lengths[a:b]) for a, b in pairwise(starts)]


def check_beams(rows: int, prompts: int | None, pictures: Sequence[int]) -> None:
    """Raise NotImplementedError where the release would give the pictures of one prompt to another: before
    5.18 under beams, for `prompts` (None: not known) of which one has several `pictures`, expanded to `rows`.
    """
    expanded = prompts is not None and rows > prompts
    if not ENCODES_BEFORE_FORWARD and expanded and max(pictures, default=0) > 1:
        raise NotImplementedError(
            f"{release()} mixes up the pictures of a prompt with several of them under beam search and "
            "num_return_sequences; install transformers 5.18 or later, or generate one sequence"
        )


# Per-token arguments ----------------------------------------------------------------------------------------


def at_tokens(name: str, value: Any, index: Tensor, length: int) -> Any:
    """An argument of a call on L = `length` tokens, for those at `index` [B, L'].

    Tensors of one entry per token, [B or 1, L, …] or [planes, B or 1, L, …], are gathered, also inside
    tuples, lists and dictionaries; what has nothing of length L stays as it is. Raises TypeError, by name,
    for a tensor that has a dimension of length L elsewhere.
    """
    if isinstance(value, tuple | list):
        parts = [at_tokens(name, part, index, length) for part in value]
        return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    if isinstance(value, dict):
        changed = copy(value)  # outputs of transformers are dictionaries, too
        for key, part in value.items():
            changed[key] = at_tokens(f"{name}[{key!r}]", part, index, length)
        return changed
    if not isinstance(value, Tensor):
        inside = [] if isinstance(value, Cache | nn.Module) else getattr(value, "__dict__", {}).values()
        if any(isinstance(part, Tensor) and length in part.shape for part in inside):
            raise TypeError(
                f"the argument {name} is a {type(value).__name__} that holds tensors of {length} tokens; a "
                f"reducer cannot shorten it ({release()})"
            )
        return value
    if length not in value.shape:
        return value
    shape, batch = value.shape, len(index)
    rotation = name.startswith("position_embeddings")  # its last dimension is that of a head
    # A mask, whose columns would stay.
    square = value.ndim > 3 and shape[-1] == shape[-2] == length and not rotation
    planes = value.ndim > 2 and shape[1] in (1, batch) and shape[2] == length and not square
    # With as many rows as planes, [B, heads, L, D] looks like planes; rotations have planes and no heads.
    heads = planes and value.ndim > 3 and shape[0] == batch > 1 and not rotation
    if value.ndim > 1 and shape[0] in (1, batch) and shape[1] == length and not square:
        rows = index.to(value.device)
        return value.expand(batch, *shape[1:])[torch.arange(batch, device=rows.device)[:, None], rows]
    if planes and not heads:
        return torch.stack([at_tokens(name, plane, index, length) for plane in value])
    raise TypeError(
        f"the argument {name} has the shape {tuple(shape)} on {length} tokens, and which of its entries "
        f"belong to which token is not known; a reducer cannot shorten it ({release()})"
    )


# Dispatched models ------------------------------------------------------------------------------------------


def forward_slot(module: nn.Module) -> str:
    """The attribute of `module` that holds its forward: where accelerate has wrapped one, the inner one, so
    that weights are still brought in around it."""
    return "_old_forward" if "_hf_hook" in vars(module) and "_old_forward" in vars(module) else "forward"


# Modules ----------------------------------------------------------------------------------------------------


def final_norm(name: str, lm: nn.Module) -> nn.Module:
    """The norm behind the last layer of the language model `lm` of a model called `name`.

    Raises TypeError where it has none under a known name.
    """
    norm = getattr(lm, "norm", None)
    if not isinstance(norm, nn.Module):
        raise TypeError(
            f"the language model {type(lm).__name__} of {name} has no final norm called `norm` ({release()}) "
            "behind which this reducer compares tokens; use a reducer that reads attention alone"
        )
    return norm


# Masks and attention ----------------------------------------------------------------------------------------


def causal_mask(
    pattern: str, config: Any, hidden: Tensor, real: Tensor | None, cache: Cache | None, layer: int
) -> Any:
    """The mask that transformers makes for `layer`, whose attention is of `pattern` ("full_attention", …).

    `hidden` [B, q, D] are the new states, `real` [B, entries + q] marks entries that are not padding.
    """
    make = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[pattern]
    return make(
        config=config,
        inputs_embeds=hidden,
        attention_mask=real,
        position_ids=None,
        layer_idx=layer,
        **{cache_parameter(make): cache},
    )


def pattern_of(config: Any, attention: nn.Module, layer: int) -> tuple[str, int | None]:
    """The kind of a layer's attention ("full_attention", "sliding_attention", "chunked_attention") and the
    size of its window or chunk, as the host builds its masks: by `layer_types` where the configuration has
    them, else one kind for all layers."""
    types = getattr(config, "layer_types", None)
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    if types:
        kind = types[layer]
    else:
        kind = "sliding_attention" if window else "chunked_attention" if chunk else "full_attention"
    if kind == "sliding_attention":
        return kind, getattr(attention, "sliding_window", None) or window
    return kind, chunk if kind == "chunked_attention" else None


def attention_function(implementation: str) -> Callable[..., Any] | None:
    """The registered attention function of a name; None for "eager", of which each model file has its own.

    Raises ValueError for names that are not registered.
    """
    if implementation == "eager":
        return None
    if implementation not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"the attention implementation {implementation!r} is not registered with transformers, so it "
            'cannot be observed; load the model with attn_implementation="sdpa", or use a reducer that reads '
            "no attention"
        )
    return ALL_ATTENTION_FUNCTIONS[implementation]


def register_attention(name: str, function: Callable[..., Any], like: str) -> None:
    """Register an attention function under a name of its own, with the masks that the implementation `like`
    takes; a name that is registered already stays."""
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, function)
        if like in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[like])
