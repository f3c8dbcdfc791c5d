"""The modules of a package and the entry points of other packages, without a central list."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def modules_of(package: str) -> Iterator[ModuleType]:
    """Import the modules (and folders) of a package one by one, in the order of their names."""
    for info in iter_modules(import_module(package).__path__):
        yield import_module(f"{package}.{info.name}")


@cache
def plugins(group: str) -> dict[str, Any]:
    """The objects behind the entry points of a group (`vistok.tokenizers`, `vistok.generators`,
    `vistok.reducers`, `vistok.metrics`, `vistok.scorers`, `vistok.objectives`), by their names; imported once
    per process.

    A plug-in whose import fails is left out with one UserWarning that names it, its package and the error.
    """
    objects = {}
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        try:
            objects[point.name] = point.load()
        except Exception as error:  # whatever a foreign module does when it is imported
            package = point.dist.name if point.dist else point.value
            reason = f"importing it from {package} failed ({type(error).__name__}: {error})"
            skip_plugin(group, point.name, reason)
    return objects


def skip_plugin(group: str, name: str, reason: str) -> None:
    """Warn that the plug-in `name` of a group is left out, and why."""
    warnings.warn(f"the plug-in {name!r} of {group} is left out: {reason}", stacklevel=3)


def with_plugins(own: Iterable[T], group: str, fits: Callable[[Any], bool], expected: str) -> dict[str, T]:
    """Objects by their `name`, and after them those of a group's entry points that fit and whose name is new.

    Others are left out with a warning; `expected` is what they should be, such as "a Scorer".
    """
    known: dict[str, Any] = {each.name: each for each in own}
    for name, value in plugins(group).items():
        if not fits(value):
            skip_plugin(group, name, f"it is {value!r}, which is not {expected}")
        elif value.name in known:
            kind = expected.split()[1].lower()
            skip_plugin(group, name, f"another {kind} is called {value.name!r}")
        else:
            known[value.name] = value
    return known
