"""Build a model without weights, and no larger than the weights file that should fill it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils._python_dispatch import TorchDispatchMode

# What a model of the file's own size may exceed it by: tables, buffers and parts that are not in the file.
_FACTOR = 8
_FREE_ELEMENTS, _FREE_MODULES = 2**28, 10_000
_FREE_AT_ONCE = 2**26  # elements of one tensor, which take memory for a moment
_FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "randint", "new_", "empty_strided")


@contextmanager
def empty_weights() -> Iterator[None]:
    """Modules made in the block have their parameters on the meta device and their buffers in memory."""
    handle = torch_modules.register_module_parameter_registration_hook(_without_memory)
    try:
        yield
    finally:
        handle.remove()


def _without_memory(owner: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or parameter.is_meta:
        return parameter
    return type(parameter)(parameter.to("meta"), requires_grad=parameter.requires_grad)


@contextmanager
def bounded_build(tensors: int, elements: int, source: Any) -> Iterator[None]:
    """Modules made in the block have parameters without memory, and may not outgrow the file.

    `tensors` and `elements` are what the file `source` holds: its configuration asks for a model, and one
    that needs many times as many modules or elements is refused before its memory is taken.

    Raises:
        ValueError: the model would be larger than the file can fill.
    """
    limit = _Limit(_FACTOR * elements, _FACTOR * tensors, source)
    handles = [
        torch_modules.register_module_parameter_registration_hook(limit.add_parameter),
        torch_modules.register_module_module_registration_hook(limit.add_module),
    ]
    try:
        with _SizedFactories(limit), empty_weights():
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Limit:
    """Counts what was built and refuses more than the file can fill."""

    def __init__(self, elements: int, modules: int, source: Any) -> None:
        self.elements, self.at_once = elements + _FREE_ELEMENTS, elements + _FREE_AT_ONCE
        self.modules, self.source = modules + _FREE_MODULES, source
        self.built_elements = self.built_modules = 0

    def add_parameter(self, owner: nn.Module, name: str, parameter: Tensor | None) -> None:
        if parameter is not None:
            self.built_elements += parameter.numel()
        if self.built_elements > self.elements:
            self.refuse(f"more than {self.elements:,} numbers")

    def add_module(self, owner: nn.Module, name: str, child: nn.Module | None) -> None:
        self.built_modules += 1
        if self.built_modules > self.modules:
            self.refuse(f"more than {self.modules:,} modules")

    def check_tensor(self, elements: int) -> None:
        if elements > self.at_once:
            self.refuse(f"{elements:,} numbers or more")

    def refuse(self, what: str) -> None:
        raise ValueError(
            f"the configuration asks for a model of {what}, far more than {self.source} holds; check that "
            "they belong together, and the configuration's sizes"
        )


class _SizedFactories(TorchDispatchMode):
    """Checks the size of every tensor before it is made."""

    def __init__(self, limit: _Limit) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(_FACTORIES):
            names = [argument.name for argument in func._schema.arguments]
            if "size" in names and len(args) > names.index("size"):
                self.limit.check_tensor(math.prod(args[names.index("size")]))
        elif name in ("arange", "linspace", "eye"):
            numbers = [abs(value) for value in args if isinstance(value, (int, float))]
            extent = max(numbers, default=0)
            self.limit.check_tensor(int(extent**2 if name == "eye" else extent))
        return func(*args, **(kwargs or {}))


def count(state: dict[str, Tensor]) -> tuple[int, int]:
    """Tensors and elements of a state dict."""
    return len(state), sum(value.numel() for value in state.values())
