"""Calls of a model that began before a session was attached to it, in any thread."""

import gc
import sys
import threading
from collections.abc import Iterable
from types import FrameType

from torch import nn

_CALLS = {"generate", "forward", "forward_features", "__call__", "_call_impl", "_wrapped_call_impl"}


class EarlierCalls:
    """The calls of some modules that are running now in other threads. They finish without the reducer,
    which would find only part of what it needs when attached in the middle of a call."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        known, here = {id(module) for module in modules}, threading.get_ident()
        self._frames = {
            frame
            for thread, top in (_top_frames().items() if known else ())
            for frame in _stack(top)
            if thread != here and frame.f_code.co_name in _CALLS and id(frame.f_locals.get("self")) in known
        }

    def include_this_one(self) -> bool:
        """Whether the caller runs inside one of these calls."""
        return bool(self._frames) and any(frame in self._frames for frame in _stack(sys._getframe(1)))


def is_running(module: nn.Module) -> bool:
    """Whether the caller runs inside a forward of `module`."""
    return any(
        frame.f_code.co_name == "forward" and frame.f_locals.get("self") is module
        for frame in _stack(sys._getframe(1))
    )


def _top_frames() -> dict[int, FrameType]:
    """The frame that each thread runs."""
    # A collection inside `_current_frames` may wait for the lock that it holds (CPython issue 106883).
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if collects:
            gc.enable()


def _stack(frame: FrameType | None) -> Iterable[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
