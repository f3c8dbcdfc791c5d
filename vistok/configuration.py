"""Configuration dataclasses from files and users: each value of the type that its field declares."""

import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")

_LARGEST = 2**63 - 1  # what a tensor's size can be
_NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def build(cls: type[T], values: Mapping[str, Any], where: str = "the configuration") -> T:
    """Build a dataclass from a mapping, nested dataclasses included, each value converted as by `convert`.

    `where` starts every message: the file, or the part of it.

    Raises:
        ValueError: unknown or missing keys, a value of another type, and what the dataclass itself refuses.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {shorten(values)}; give a mapping of {cls.__name__}'s fields to values")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if unknown := [key for key in values if key not in fields]:
        raise ValueError(f"{where}: {_unknown(unknown, list(fields))}")
    required = (dataclasses.MISSING, dataclasses.MISSING)
    if missing := [
        name
        for name, field in fields.items()
        if (field.default, field.default_factory) == required and name not in values
    ]:
        raise ValueError(f"{where}: {', '.join(missing)} must be given")
    hints = typing.get_type_hints(cls)
    converted = {key: convert(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return cls(**converted)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def convert(kind: Any, value: Any, where: str) -> Any:
    """Convert a value from JSON, YAML or NumPy to the type hint `kind`.

    Lists become tuples where the hint is a tuple, whole numbers floats where it is float, and text that
    spells a number too (YAML reads 1e-4 as text). Numbers are finite, whole ones within 64 bits.

    Raises:
        ValueError: starting with `where`, the value and what is accepted.
    """
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value, where)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin in (tuple, list):
        items = _convert_items(origin, arguments, value, where)
        if items is not None:
            return items
    elif origin is dict:
        if isinstance(value, Mapping):
            return {
                convert(arguments[0], key, f"{where}: a key"): convert(arguments[1], item, f"{where}: {key}")
                for key, item in value.items()
            }
    elif kind is types.NoneType:
        if value is None:
            return value
    elif (scalar := _convert_scalar(kind, value)) is not None:
        return scalar
    raise ValueError(f"{where} is {shorten(value)}; it takes {describe(kind)}")


def describe(kind: Any) -> str:
    """Describe what a type hint accepts."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(each) for each in arguments)
    if kind is types.NoneType:
        return "null"
    if origin is tuple and arguments[-1] is not ...:
        return f"a list of {len(arguments)} ({', '.join(map(describe, arguments))})"
    if origin in (tuple, list):
        return f"a list, each of it {describe(arguments[0])}"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "a mapping of keys to values"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def run_config_reader(work: Any, source: Any, *arguments: Any) -> Any:
    """Return `work(*arguments)`, which reads the configuration in the file `source`; errors name it."""
    try:
        return work(*arguments)
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(
            f"the configuration of {source} does not describe a model ({type(error).__name__}: "
            f"{shorten(str(error), 160)}); check its values or fetch it again"
        ) from error


def shorten(value: Any, length: int = 60) -> str:
    """The value as text for a message, on one line of at most `length` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # whole numbers of thousands of digits, lists of thousands of levels
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _convert_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType)
    if len(kinds) == 1:
        return convert(kinds[0], value, where)
    for kind in kinds:
        try:
            return convert(kind, value, where)
        except ValueError:
            continue
    raise ValueError(f"{where} is {shorten(value)}; it takes {' or '.join(map(describe, kinds))}")


def _convert_items(origin: type, kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """The items of a list or tuple converted, or None if the value is not one of the right length."""
    if not isinstance(value, (list, tuple)):
        return None
    if origin is list or kinds[-1] is ...:
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        return None
    return origin(
        convert(kind, item, f"{where}[{index}]")
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _convert_scalar(kind: Any, value: Any) -> Any:
    """A truth value, number, text or other object of that type, or None if the value is not one."""
    is_truth = isinstance(value, bool)
    if kind is int:
        whole = isinstance(value, numbers.Integral) and not is_truth
        return int(value) if whole and -_LARGEST <= value <= _LARGEST else None
    if kind is float:
        if is_truth or not isinstance(value, (numbers.Real, str)):
            return None
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return None
        return number if math.isfinite(number) else None
    return value if isinstance(kind, type) and isinstance(value, kind) else None


def _unknown(keys: list[Any], accepted: list[str]) -> str:
    """The message for keys that a dataclass does not have, with the nearest that it has."""
    names = [str(key) for key in keys]
    near = {match for name in names for match in difflib.get_close_matches(name, accepted, n=1, cutoff=0.6)}
    hint = f" (did you mean {', '.join(sorted(near))}?)" if near else ""
    first = ", ".join(shorten(name, 40).strip("'") for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"unknown key {first}{more}{hint}; accepted are {', '.join(accepted)}"
