"""Names of one kind of model: family → class, published name → configuration, weights and licence."""

import difflib
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeVar

from .registry import Entry

T = TypeVar("T", bound=type)


class Catalog:
    """The families and published checkpoints of one kind of model, imported on first use."""

    def __init__(self, kind: str, package: str, modules: Sequence[str], listing: str) -> None:
        """`kind` is the word for such a model in messages; the `modules` of `package`, one per family file,
        register their classes and rows when imported; `listing` completes "… shows the names"."""
        self.kind, self.package, self.modules, self.listing = kind, package, tuple(modules), listing
        self._families: dict[str, type[Any]] = {}
        self._entries: dict[str, Entry] = {}

    def family(self, name: str) -> Callable[[T], T]:
        """Class decorator: make a class known as the family `name`."""

        def add(cls: T) -> T:
            cls.family = name
            self._families[name] = cls
            return cls

        return add

    def register(self, *entries: Entry) -> None:
        """Add published checkpoints; ValueError for a name that is there already."""
        for entry in entries:
            if entry.name in self._entries:
                raise ValueError(f"{self.kind} {entry.name!r} is registered twice")
            self._entries[entry.name] = entry

    def entries(self) -> dict[str, Entry]:
        """Published checkpoints by name, in registration order."""
        self._import()
        return dict(self._entries)

    def families(self) -> dict[str, type[Any]]:
        """Family name → class, in the order of the modules whatever was imported first."""
        self._import()

        def place(item: tuple[str, type[Any]]) -> int:
            module = item[1].__module__.rpartition(".")[2]
            return self.modules.index(module) if module in self.modules else len(self.modules)

        return dict(sorted(self._families.items(), key=place))

    def create(self, name_or_family: str, **config: Any) -> Any:
        """Build a model with fresh weights: of a published configuration changed by `config`, or of a family
        with the whole configuration. ValueError for names, fields and values that do not exist."""
        if entry := self.entries().get(name_or_family):
            return self.families()[entry.family].create(**{**entry.config, **config})
        if name_or_family in self.families():
            return self.families()[name_or_family].create(**config)
        raise ValueError(self.unknown_name(name_or_family))

    def unknown_name(self, name: str) -> str:
        """The message for a name that is neither a published checkpoint nor a family."""
        close = difflib.get_close_matches(name, [*self.entries(), *self.families()], n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        return (
            f"unknown {self.kind} {name!r}.{hint} {self.listing} shows the names; a hub repository "
            "(hf://owner/name), a folder or a weights file is also accepted."
        )

    def _import(self) -> None:
        for module in self.modules:
            import_module(f"{self.package}.{module}")
