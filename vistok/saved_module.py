"""Modules that are saved as a folder of config.json and model.safetensors and loaded from it."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self

from . import checkpoint
from .bounded_build import empty_weights
from .configuration import build, shorten


class SavedModule(nn.Module):
    """A module that its configuration builds, a dataclass that a subclass names as `config_class`."""

    config_class: ClassVar[type]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which `load` reads back exactly."""
        config = {"module": type(self).__name__, "config": dataclasses.asdict(self.config)}
        checkpoint.save(folder, self.state_dict(), config)

    @classmethod
    def load(cls, folder: str | Path, *, dtype: torch.dtype | None = None) -> Self:
        """The module in a folder that `save` wrote, in evaluation mode; weights keep their dtype unless
        `dtype` is given.

        Raises:
            FileNotFoundError: there is no such folder or it holds no weights.
            ValueError: the folder holds another module, or weights that do not fit its configuration or are
                not finite.
        """
        located = checkpoint.locate(folder)
        config = located.config or {}
        if config.get("module") != cls.__name__ or "config" not in config:
            raise ValueError(
                f"{folder} is not a saved {cls.__name__}: config.json states the module "
                f"{shorten(config.get('module'))}; give a folder that {cls.__name__}.save wrote"
            )
        settings = build(cls.config_class, config["config"], str(Path(folder) / checkpoint.CONFIG_NAME))
        with empty_weights():
            module = cls(settings)
        checkpoint.load_strictly(
            module, checkpoint.read(located.weights), dtype=dtype, source=located.weights
        )
        return module.eval()
