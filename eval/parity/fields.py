"""Checks of the fields of a parity case's json, before anything is built from them."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...configuration import shorten

LARGEST_ARRAY = 2**26
"""Entries that one drawn or described array of a case may have; recorded cases draw less than a million."""


class CannotBuild(ValueError):
    """The case needs something this version does not have; the message states what."""


def check_fields(name: str, data: Any) -> None:
    """Raise CannotBuild unless the json of case `name` is a mapping whose common fields have their types."""
    if not isinstance(data, dict) or not {"family", "tensors"} <= set(data):
        raise CannotBuild(f"{name} is not a parity case: it has no family and tensors")
    for field, (accepted, fits) in _FIELDS.items():
        if field in data and not fits(data[field]):
            raise CannotBuild(f"{name}: {field} is {shorten(data[field])}; it takes {accepted}")
    if not data["tensors"]:
        raise CannotBuild(f"{name} names no tensor, so there is nothing to compare; list them under tensors")


def check_size(name: str, what: str, shape: tuple[int, ...]) -> None:
    """Raise CannotBuild for an array that has a side below 1 or more than LARGEST_ARRAY entries."""
    if any(side < 1 for side in shape) or math.prod(shape) > LARGEST_ARRAY:
        raise CannotBuild(
            f"{name}: {what} has shape {shorten(list(shape))}; sides are 1 or more, and its entries at most "
            f"{LARGEST_ARRAY:,}"
        )


def whole(name: str, mapping: Any, key: str, low: int, high: int) -> int:
    """The whole number `mapping[key]` in low..high; CannotBuild for anything else."""
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    if not _is_whole(value) or not low <= value <= high:
        raise CannotBuild(f"{name}: {key} is {shorten(value)}; it takes a whole number from {low} to {high}")
    return value


def exact_names(data: Mapping[str, Any]) -> set[str]:
    """Names of recorded tensors that a json states in full, not by placeholders ("dec.upN", "enc.*")."""
    plain = {key for key in data["tensors"] if re.fullmatch(r"[A-Za-z0-9_.\-]+", key) and not _numbered(key)}
    return plain | set(data.get("shapes", {}))


def _numbered(key: str) -> str | None:
    """The pattern of a name whose last letter stands for a number ("eval_k", "dec.upN"), or None."""
    match = re.fullmatch(r"(.*)(N|(?<=[_.])[ijk])", key)
    return re.escape(match[1]) + r"\d+" if match else None


def is_numbered(key: str, name: str) -> bool:
    """Whether `name` is one of those that the placeholder `key` stands for."""
    pattern = _numbered(key)
    return pattern is not None and re.fullmatch(pattern, name) is not None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_tolerance(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _mapping_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_numbers(value: Any) -> bool:
    return all(map(_is_numbers, value)) if isinstance(value, list) else _is_number(value)


def _is_tensor_entry(value: Any) -> bool:
    """[dtype, shape], as in `state_dict` and `shapes`."""
    return isinstance(value, list) and len(value) == 2 and _is_dtype(value[0]) and _is_shape(value[1])


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(_is_whole(side) and 0 <= side < 2**31 for side in value)


def _is_entry_or_shape(value: Any) -> bool:
    return _is_tensor_entry(value) or _is_shape(value)


def _is_state_dict(value: Any) -> bool:
    """Keys to [dtype, shape]; cases of several models have one such table for each."""
    entry = _mapping_of(_is_tensor_entry)
    return entry(value) or _mapping_of(entry)(value)


def _is_keep(value: Any) -> bool:
    return _is_texts(value) or _mapping_of(_is_texts)(value)


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "family": ("the name of a family", lambda value: isinstance(value, str)),
    "case": ("text", lambda value: isinstance(value, str)),
    "system": ("text", lambda value: isinstance(value, str)),
    "reference": ("text", lambda value: isinstance(value, str)),
    "config": ("a mapping or a list", lambda value: isinstance(value, dict | list)),
    "seed": ("a whole number or null", lambda value: value is None or _is_whole(value)),
    "keep": ("a list of parts of keys", _is_keep),
    "scale": ("a mapping of parts of keys to numbers", _mapping_of(_is_number)),
    "overrides": ("a mapping of keys to numbers", _mapping_of(_is_numbers)),
    "state_dict": ("a mapping of keys to [dtype, shape]", _is_state_dict),
    "quantizer_state_dict": ("a mapping of keys to [dtype, shape]", _mapping_of(_is_tensor_entry)),
    "inputs": ("a mapping, a list or text", lambda value: isinstance(value, dict | list | str)),
    "tensors": ("a mapping of names to descriptions", _mapping_of(lambda value: isinstance(value, str))),
    "shapes": ("a mapping of names to [dtype, shape] or shape", _mapping_of(_is_entry_or_shape)),
    "rtol": ("a number from 0 to 0.1", lambda value: _is_tolerance(value) and value <= 0.1),
    "atol": ("a finite number of 0 or more", _is_tolerance),
    "tensor_atol": ("a mapping of names to numbers of 0 or more", _mapping_of(_is_tolerance)),
    "tensor_exact": ("a list of names", _is_texts),
    "parameters_with_grad": ("a list of names", _is_texts),
    "no_weight_decay": ("a list of names", _is_texts),
    "notes": ("text or a list of texts", lambda value: isinstance(value, str) or _is_texts(value)),
    "exact_where": ("a mapping of names to rules", _mapping_of(lambda value: isinstance(value, str))),
}
