"""Names: family → class, and published checkpoint → family, configuration, weights, licence and paper
figures."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

# One module a family; `vistok.models.<module>` registers its class and rows when imported. The first whose
# `recognise` knows a checkpoint's keys has it.
FAMILY_MODULES = ("mini", "karl", "titok", "maskgit_vqgan", "instella", "flextok")


@dataclass(frozen=True)
class Entry:
    """A published (or shipped) checkpoint.

    `repo` is the hub repository, `file` the weights in it, `sha256` their digest where they ship with vistok
    (no `repo`); `license` is that of the weights; `figures` are the paper's own numbers, `parameters`
    millions of them. `verified` has the largest absolute errors of this configuration against recorded
    outputs of the original; nothing was recorded where it is empty.
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


_FAMILIES: dict[str, type[Any]] = {}
_ENTRIES: dict[str, Entry] = {}


def register_family(name: str) -> Callable[[T], T]:
    """Class decorator: make a Tokenizer subclass known as `name`."""

    def add(cls: T) -> T:
        cls.family = name
        _FAMILIES[name] = cls
        return cls

    return add


def register(*entries: Entry) -> None:
    """Add rows to the table behind `vistok list`."""
    for entry in entries:
        if entry.name in _ENTRIES:
            raise ValueError(f"tokenizer {entry.name!r} is registered twice")
        _ENTRIES[entry.name] = entry


def _import_families() -> None:
    for module in FAMILY_MODULES:
        import_module(f"vistok.models.{module}")


def entries() -> dict[str, Entry]:
    """All registry rows by name, in registration order."""
    _import_families()
    return dict(_ENTRIES)


def list_tokenizers() -> list[str]:
    """Names that `load` and `create` know."""
    return list(entries())


def families() -> dict[str, type[Any]]:
    """Family name → Tokenizer class, in the order of `FAMILY_MODULES` whatever was imported first."""
    _import_families()

    def place(item: tuple[str, type[Any]]) -> int:
        module = item[1].__module__.rpartition(".")[2]
        return FAMILY_MODULES.index(module) if module in FAMILY_MODULES else len(FAMILY_MODULES)

    return dict(sorted(_FAMILIES.items(), key=place))


def unknown_name(name: str) -> str:
    """The message for a name that is neither in the registry nor a family."""
    import difflib

    close = difflib.get_close_matches(name, [*entries(), *families()], n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    return (
        f"unknown tokenizer {name!r}.{hint} `vistok list` shows the names; a hub repository "
        "(hf://owner/name), a folder or a weights file is also accepted."
    )
