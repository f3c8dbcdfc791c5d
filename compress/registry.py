"""Reducers by name: the methods of this package, and those that other packages add by entry points."""

from difflib import get_close_matches
from functools import cache

from ..plugins import modules_of, plugins, skip_plugin
from .reducer import Reducer


@cache
def reducers() -> dict[str, type[Reducer]]:
    """Name → class, sorted: a method is called by its class in lower case, a plug-in by its entry point.

    A plug-in that is not a subclass of `Reducer`, or whose name is taken, is left out with a UserWarning.
    """
    classes = {}
    for module in modules_of("vistok.compress.methods"):
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, Reducer) and not value.__name__.startswith("_"):
                classes[value.__name__.lower()] = value
    for name, value in plugins("vistok.reducers").items():
        if not (isinstance(value, type) and issubclass(value, Reducer)):
            skip_plugin("vistok.reducers", name, f"it is {value!r}, which is not a subclass of Reducer")
        elif _plain(name) in classes:
            skip_plugin("vistok.reducers", name, "another reducer has this name")
        else:
            classes[_plain(name)] = value
    return dict(sorted(classes.items()))


def list_reducers() -> list[str]:
    """The names that `attach` takes."""
    return list(reducers())


def comparable_reducers() -> list[str]:
    """The names of those that can be compared at one budget: `keep` alone sets how many tokens stay."""
    return [name for name, kind in reducers().items() if kind.comparable]


def reducer_class(name: str) -> type[Reducer]:
    """The class behind a name. Raises ValueError, with the nearest names, for others."""
    known = reducers()
    if _plain(name) not in known:
        close = get_close_matches(name.lower(), known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"no reducer is called {name!r}{hint} Known: {', '.join(known)}")
    return known[_plain(name)]


def reducer_by_name(name: str) -> Reducer:
    """A reducer with the paper's settings."""
    return reducer_class(name)()


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace("²", "2")
