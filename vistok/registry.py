"""Names: family → class, and published checkpoint → family, configuration, weights, licence and paper
figures."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

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


_FAMILIES: dict[str, "type[Tokenizer]"] = {}
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


def families() -> "dict[str, type[Tokenizer]]":
    """Family name → Tokenizer class, in the order of `FAMILY_MODULES` whatever was imported first."""
    _import_families()

    def place(item: "tuple[str, type[Tokenizer]]") -> int:
        module = item[1].__module__.rpartition(".")[2]
        return FAMILY_MODULES.index(module) if module in FAMILY_MODULES else len(FAMILY_MODULES)

    return dict(sorted(_FAMILIES.items(), key=place))


def create(name_or_family: str, **config: Any) -> "Tokenizer":
    """Build a tokenizer with fresh weights.

    A registry name gives the published configuration, changed by `config`; a family name takes the whole
    configuration, either as the family's own fields or in the original's nested form
    (`create("titok", **json.load(open("config.json")))`). The state dict has the published checkpoint's keys.
    Raises ValueError for names, fields and values that do not exist.
    """
    known = entries()
    if name_or_family in known:
        entry = known[name_or_family]
        return families()[entry.family].create(**{**entry.config, **config})
    if name_or_family in families():
        return families()[name_or_family].create(**config)
    raise ValueError(unknown_name(name_or_family))


def unknown_name(name: str) -> str:
    """The message for a name that is neither in the registry nor a family."""
    import difflib

    close = difflib.get_close_matches(name, [*entries(), *families()], n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    return (
        f"unknown tokenizer {name!r}.{hint} `vistok list` shows the names; a hub repository "
        "(hf://owner/name), a folder or a weights file is also accepted."
    )


def load(
    source: "str | Path",
    *,
    device: Any = None,
    dtype: Any = None,
    weights: "str | Path | None" = None,
    **options: Any,
) -> "Tokenizer":
    """Load a tokenizer with its weights, in eval mode.

    `source`: a registry name (`vistok list`), a hub repository written `hf://owner/name`, a folder with
    config.json and model.safetensors (or shards with their index), or one weights file (.safetensors, or a
    weights-only pickle .bin/.pt/.pth). `weights` replaces the registry's hub file by a local file or folder.
    `dtype` is a floating dtype or its name ("bfloat16"). Further options: `config` (for a file without one),
    `revision`, `cache_dir`, `local_files_only`.

    Of a training checkpoint that also holds an average of the weights (EMA, SWA) the average is loaded, and
    a log line reports it; so does one for every download.

    Raises:
        FileNotFoundError: weights are neither local nor cached and the hub cannot be reached.
        ValueError: missing, unexpected or misshapen keys (the first of each and their number), weights with
            NaN or infinity, a configuration that the file cannot fill.
    """
    from .tokenizer import Tokenizer

    entry = entries().get(str(source))
    owner = families()[entry.family] if entry else Tokenizer
    return owner.from_pretrained(source, device=device, dtype=dtype, weights=weights, **options)
