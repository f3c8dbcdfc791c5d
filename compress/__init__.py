"""Token reducers that attach to vision-language models and vision transformers.

`attach(model, "divprune", keep=0.1)` makes a stock model keep a tenth of its visual tokens; the algorithms
are pure functions in `vistok.compress.algorithms`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..checkout import check_checkout

if TYPE_CHECKING:
    from .guests.kvpress import Press as Press
    from .registry import list_reducers as list_reducers
    from .session import Session as Session
    from .session import attach as attach
    from .streaming import STC as STC
    from .streaming import Stream as Stream
    from .video_budget import QuoTA as QuoTA
    from .vision.text_tower import TextTower as TextTower

check_checkout(__file__, "compress")
_HOMES = {
    "attach": "session",
    "Session": "session",
    "list_reducers": "registry",
    "Press": "guests.kvpress",
    "TextTower": "vision.text_tower",
    "QuoTA": "video_budget",
    "STC": "streaming",
    "Stream": "streaming",
}


def __getattr__(name: str) -> Any:
    """What `_HOMES` lists, and the classes of all reducers, imported on first use."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name == "__all__":
        return [*_HOMES, *_classes()]
    if not name.startswith("_") and name in (classes := _classes()):
        return classes[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_classes()})


def _classes() -> dict[str, Any]:
    from .registry import reducers

    return {kind.__name__: kind for kind in reducers().values()}
