"""What a release of transformers may rename: every argument and field that the session needs is looked up
here, by type or from a signature, and nowhere else by a name of ours."""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

_CACHE_TYPE = re.compile(r"\b(?:Dynamic|Static|EncoderDecoder)?Cache\b")


def cache_in(values: Mapping[str, Any]) -> Cache | None:
    """The key-value cache among the arguments of a call or the fields of an output, found by its type.

    Raises TypeError when there are several: which of them a reducer may shorten is then not known.
    """
    caches = {id(value): value for value in values.values() if isinstance(value, Cache)}
    if len(caches) > 1:
        names = ", ".join(name for name, value in values.items() if isinstance(value, Cache))
        raise TypeError(f"one key-value cache was expected, and {len(caches)} came as {names}")
    return next(iter(caches.values()), None)


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that must not write into a cache."""
    left = {name: value for name, value in arguments.items() if not isinstance(value, Cache)}
    return {**left, "use_cache": False} if "use_cache" in left else left


@lru_cache(maxsize=256)
def cache_parameter(function: Callable[..., Any]) -> str:
    """The name of the one parameter of `function` whose annotation is a key-value cache.

    Raises TypeError when there is none or more than one.
    """
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if _CACHE_TYPE.search(str(parameter.annotation))
    ]
    if len(names) != 1:
        raise TypeError(
            f"{function.__qualname__} takes {len(names)} key-value caches"
            f"{' (' + ', '.join(names) + ')' if names else ''}; one was expected"
        )
    return names[0]


def with_cache(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The argument that has `model` go on from a cache, under the name that this release gives it."""
    return {cache_parameter(type(model).forward): cache}


def causal_mask(
    pattern: str, config: Any, hidden: Tensor, real: Tensor | None, cache: Cache | None, layer: int
) -> Any:
    """The mask that transformers makes for `layer`, whose attention is of `pattern` ("full_attention", …).

    `hidden` [B, q, D] are the new states, `real` [B, entries + q] says which entries are no padding.
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
