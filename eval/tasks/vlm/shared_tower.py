"""The vision tower's output on a batch, made once for all settings that leave the tower alone."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ....compress.reducer import FeatureReducer, Stage
from ....compress.registry import reducer_class
from .settings import Setting


class SharedTower:
    """Keeps what a model's vision tower returned for one batch, and returns it again for equal inputs.

    Only `serve` puts it to use, so that the tower is as it was outside. It does nothing for models without a
    tower of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        encoder = getattr(model.base_model, "get_encoder", None)
        takes_modality = encoder is not None and "modality" in inspect.signature(encoder).parameters
        tower = encoder(modality="image") if takes_modality else None
        fits = isinstance(tower, nn.Module) and tower not in (model, model.base_model)
        self.tower: nn.Module | None = tower if fits else None
        self._inputs: tuple[Any, ...] | None = None
        self._output: Any = None

    def forget(self) -> None:
        """Drop what is kept, before another batch."""
        self._inputs = self._output = None

    def serve(self, setting: Setting) -> Any:
        """A context in which the tower's output is kept and reused, unless the setting acts inside the tower
        or reads its attention."""
        return self._replaced() if self.tower is not None and leaves_tower_alone(setting) else nullcontext()

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        tower = self.tower
        own = vars(tower).get("forward")
        original = tower.forward

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            inputs = (args, kwargs)
            if self._inputs is None:
                self._output, self._inputs = original(*args, **kwargs), inputs
            elif not _equal(inputs, self._inputs):
                return original(*args, **kwargs)
            return copy(self._output)  # models put the projected features into it

        tower.forward = forward
        try:
            yield
        finally:
            if own is None:
                del tower.forward
            else:
                tower.forward = own


def leaves_tower_alone(setting: Setting) -> bool:
    """Whether a setting needs the tower's ordinary output and nothing else of it."""
    if setting.kind != "reducers":
        return setting.kind == "full"
    for name, _ in setting.reducers:
        kind = reducer_class(name)
        if kind.stage in (Stage.PIXELS, Stage.VISION):
            return False
        if issubclass(kind, FeatureReducer):
            reducer = kind()
            if reducer.tower_layers() or reducer.wants_states() is not None:
                return False
    return True


def _equal(one: Any, two: Any) -> bool:
    """Whether two values of arguments are equal, tensors element by element."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one is two or (one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, Sequence) and isinstance(two, Sequence) and not isinstance(one, str):
        return len(one) == len(two) and all(map(_equal, one, two))
    return type(one) is type(two) and one == two
