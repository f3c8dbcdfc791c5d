"""The state dicts inside what training scripts save: averages first, wrappers and prefixes opened."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights"),
    *("online_model", "tokenizer", "autoencoder", "vae", "generator", "student", "shadow"),
)
_AVERAGE_WORDS = {"ema", "swa", "averaged", "average", "avg", "polyak"}
_NOT_WEIGHTS = {"optimizer", "optim", "discriminator", "disc", "scheduler", "loss", "scaler", "lr"}
# What averages and wrappers keep beside the weights.
_COUNTERS = {"n_averaged", "num_updates", "decay", "initted", "step"}


@dataclass(frozen=True)
class StateDict:
    """Tensors by key. `origin` is where they were in the file, empty for all of it."""

    tensors: dict[str, Tensor]
    origin: str = ""
    is_average: bool = False


def choices(content: Any) -> list[StateDict]:
    """Every state dict in the content of a weights file that may be the model's, the likeliest first.

    An average of weights (EMA, SWA), whatever it is called, comes before the weights themselves. The prefixes
    of wrappers (`module.` of DDP, `_orig_mod.` of compile, `model.` of Lightning) are removed; where keys
    could be meant either way both are among the choices. An empty list: nothing in it is a state dict.
    """
    return sorted(_nested(content, ""), key=lambda choice: not choice.is_average)


def average_without_names(content: Any) -> str | None:
    """The name of an average in a weights file whose tensors have no names and so cannot be loaded."""
    if not isinstance(content, Mapping) or any(choice.is_average for choice in choices(content)):
        return None
    averages = (key for key, value in content.items() if isinstance(key, str) and _is_average(key))
    return next((key for key in averages if isinstance(content[key], (Mapping, list, tuple))), None)


def _nested(content: Any, origin: str) -> Iterator[StateDict]:
    if not isinstance(content, Mapping):
        return
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        yield from _flat(dict(content), origin)
        return
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    averages = [key for key in named if _is_average(key)]
    for key in averages + [key for key in _WRAPPERS if key in named]:
        for choice in _nested(named[key], f"{origin}.{key}".lstrip(".")):
            if choice.tensors:
                average = choice.is_average or key in averages
                yield StateDict(choice.tensors, choice.origin, average)


def _flat(tensors: dict[str, Tensor], origin: str) -> Iterator[StateDict]:
    """A mapping of keys to tensors: its averages, itself, and what is left without a wrapper's prefix."""
    averaged = "n_averaged" in tensors  # torch.optim.swa_utils.AveragedModel
    tensors = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}
    while (inner := _without(tensors, "module")) is not None:
        tensors = inner
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        first, dot, rest = key.partition(".")
        if dot:
            groups.setdefault(first, {})[rest] = value
    averages = [name for name in groups if _is_average(name)]
    plain = {key: value for key, value in tensors.items() if key.partition(".")[0] not in averages}
    for name in averages:
        complete = _completed(groups[name], plain)
        if complete:
            for choice in _flat(complete, f"{origin}.{name}".lstrip(".")):
                yield StateDict(choice.tensors, choice.origin, True)
    if averaged:
        tensors.pop("n_averaged", None)
    yield StateDict(tensors, origin, averaged)
    for name, group in groups.items():
        alone = len(group) == len([key for key in tensors if key not in _COUNTERS])
        if name not in averages and (alone or name in _WRAPPERS):
            for choice in _flat(group, f"{origin}.{name}".lstrip(".")):
                yield StateDict(choice.tensors, choice.origin, choice.is_average or averaged)


def _completed(average: dict[str, Tensor], plain: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """An average, with the buffers it lacks from the weights beside it; None if it is not a model.

    Averages of the CompVis kind have keys without dots, which those of the weights restore.
    """
    average = {key: value for key, value in average.items() if key not in _COUNTERS}
    while (inner := _without(average, "module")) is not None:
        average = inner
    weights = max(_inner(plain), key=lambda inner: len(_dotted(average, inner).keys() & inner.keys()))
    average = _dotted(average, weights)
    covered = average.keys() & weights.keys()
    return weights | average if 2 * len(covered) >= len(weights) else None


def _inner(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors as they are, and those under each first part of the keys."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        first, _, rest = key.partition(".")
        groups.setdefault(first, {})[rest] = value
    return [tensors, *groups.values()]


def _dotted(average: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if any("." in key for key in average):
        return average
    keys = {key.replace(".", ""): key for key in weights}
    return {keys.get(key, key): value for key, value in average.items()}


def _without(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor] | None:
    """The tensors without a prefix that all but counters have, or None."""
    counters = {key: value for key, value in tensors.items() if key in _COUNTERS}
    prefixed = {key: value for key, value in tensors.items() if key not in counters}
    if not prefixed or not all(key.startswith(f"{prefix}.") for key in prefixed):
        return None
    return {key.removeprefix(f"{prefix}."): value for key, value in prefixed.items()} | counters


def _is_average(name: str) -> bool:
    words = set(re.split(r"[._]", name.lower()))
    return bool(words & _AVERAGE_WORDS) and not words & _NOT_WEIGHTS
