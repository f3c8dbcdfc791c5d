"""Spending fewer visual tokens: reducers that attach to vision-language models and vision transformers.

`attach(model, "divprune", keep=0.1)` has a stock model keep a tenth of its visual tokens; the algorithms are
pure functions in `vistok.compress.algorithms.select`, `.anyres`, `.merge` and `.energy`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..checkout import check_checkout
from .registry import METHODS, list_reducers

if TYPE_CHECKING:
    from .session import Session, attach

check_checkout(__file__, "compress")
_CLASSES = {path.split(".")[1]: path.split(".")[0] for path in METHODS.values()}

__all__ = ["Session", "attach", "list_reducers", *sorted(_CLASSES)]


def __getattr__(name: str) -> Any:
    if name in ("attach", "Session"):
        return getattr(import_module(".session", __name__), name)
    if name in _CLASSES:
        return getattr(import_module(f".methods.{_CLASSES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
