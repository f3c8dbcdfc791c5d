"""Modules built without memory, not beyond what the published weights need, and in parts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .fields import CannotBuild

M = TypeVar("M", bound=nn.Module)

MOST_UNNAMED = 4096
"""Parameters that a module may have beside those its case names: a case may leave out parts of a model."""
MOST_BUFFERED = 2**26
"""Entries of buffers, which are computed and not filled."""


def build_within(make: Callable[[], M], published: Mapping[str, list[int]]) -> M:
    """The module that `make` constructs, on the meta device.

    Raises CannotBuild for a configuration that needs more than the `published` keys and shapes imply;
    construction stops where that shows, so that a depth of millions ends early.
    """
    with _counting(len(published) + MOST_UNNAMED), torch.device("meta"):
        module = make()
    entries = sum(buffer.numel() for buffer in module.buffers())
    if entries > MOST_BUFFERED:
        raise CannotBuild(
            f"this configuration has {entries:,} entries of tables, more than {MOST_BUFFERED:,}"
        )
    return module


def remove_unfilled(module: nn.Module) -> None:
    """Take the parameters that are still on the meta device, and modules of nothing else, out of a module."""
    for name, parameter in list(module._parameters.items()):
        if parameter is not None and parameter.is_meta:
            del module._parameters[name]
    for name, child in list(module.named_children()):
        parameters = list(child.parameters())
        if parameters and all(parameter.is_meta for parameter in parameters):
            del module._modules[name]
        else:
            remove_unfilled(child)


@contextmanager
def _counting(limit: int) -> Iterator[None]:
    count = 0

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += parameter is not None
        if count > limit:
            raise CannotBuild(
                f"this configuration has more than {limit} parameters, far more than its state_dict names"
            )

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()
