"""Names of one kind of model: family → class, published name → configuration, weights and licence."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .plugins import modules_of, plugins

T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Entry:
    """A published (or shipped) checkpoint.

    `repo` is the hub repository, `file` the weights in it (empty where none are published), `sha256` their
    digest where they ship with vistok (no `repo`); `license` is that of the weights; `figures` are the
    paper's own numbers, `parameters` millions of them. `verified` has the largest absolute errors of this
    configuration against recorded outputs of the original; nothing was recorded where it is empty.
    """

    name: str
    family: str
    config: dict[str, Any]
    repo: str | None
    license: str
    paper: str
    parameters: float
    file: str = "model.safetensors"
    figures: dict[str, float] = field(default_factory=dict)
    notes: str = ""
    verified: str = ""
    sha256: str = ""


class Catalog:
    """The families and published checkpoints of one kind of model, imported on first use."""

    def __init__(self, kind: str, package: str, listing: str, *, plugins: str) -> None:
        """`kind` is the word for such a model in messages; the modules of `package`, one file or folder per
        family, register their classes and rows when imported, and so do the entry points of the group
        `plugins` of other packages; `listing` completes "… shows the names"."""
        self.kind, self.package, self.listing, self.group = kind, package, listing, plugins
        self._families: dict[str, type[Any]] = {}
        self._entries: dict[str, Entry] = {}
        self._imported = False

    def family(self, name: str) -> Callable[[T], T]:
        """Class decorator: register a class as the family `name`."""

        def add(cls: T) -> T:
            cls.family = name
            self._families[name] = cls
            return cls

        return add

    def register(self, *entries: Entry) -> None:
        """Add published checkpoints; ValueError for a name that is registered already."""
        for entry in entries:
            if entry.name in self._entries:
                raise ValueError(f"{self.kind} {entry.name!r} is registered twice")
            self._entries[entry.name] = entry

    def entries(self) -> dict[str, Entry]:
        """Published checkpoints by name, family after family."""
        self._import()
        return dict(sorted(self._entries.items(), key=lambda item: item[1].family))

    def families(self) -> dict[str, type[Any]]:
        """Family name → class."""
        self._import()
        return dict(sorted(self._families.items()))

    def create(self, name_or_family: str, **config: Any) -> Any:
        """Build a model with fresh weights: of a published configuration changed by `config`, or of a family
        with the whole configuration. ValueError for names, fields and values that do not exist."""
        if entry := self.entries().get(name_or_family):
            return self.families()[entry.family].create(**{**entry.config, **config})
        if name_or_family in self.families():
            return self.families()[name_or_family].create(**config)
        raise ValueError(self.unknown_name(name_or_family))

    def load(self, base: type[Any], source: Any, **options: Any) -> Any:
        """Load a model: `from_pretrained` of the family of a published name, else of `base`, the class of all
        models of this kind."""
        entry = self.entries().get(str(source))
        owner = self.families()[entry.family] if entry else base
        return owner.from_pretrained(source, **options)

    def unknown_name(self, name: str) -> str:
        """The message for a name that is neither a published checkpoint nor a family."""
        close = difflib.get_close_matches(name, [*self.entries(), *self.families()], n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        return (
            f"unknown {self.kind} {name!r}.{hint} {self.listing} shows the names; a hub repository "
            "(hf://owner/name), a folder or a weights file is also accepted."
        )

    def _import(self) -> None:
        if not self._imported:
            for _ in modules_of(self.package):
                pass
            plugins(self.group)
            self._imported = True
