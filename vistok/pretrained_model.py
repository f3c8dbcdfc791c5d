"""A module that is built from a configuration, and loaded and saved with it."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self

from . import checkpoint, pretrained


class PretrainedModel(nn.Module):
    """`from_pretrained` and `save_pretrained` of a family of models, and the device and dtype of each.

    A kind of model (generators) sets `catalog`, a family `config_class`, `create` and `recognise`.
    """

    catalog: ClassVar[Any]
    """The families and published checkpoints of this kind of model: `entries`, `families`, `unknown_name`."""
    family: ClassVar[str]
    config_class: ClassVar[type]
    checkpoint_ignores: ClassVar[tuple[str, ...]] = ()
    """Patterns of keys that a checkpoint may have or lack without harm (tables, training statistics)."""
    own_config_wins: ClassVar[bool] = False
    """Whether the configuration that comes with published weights is taken instead of the catalog's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.name: str | None = None
        self.weights_digest: str | None = None
        """First digits of the SHA-256 of the weights file, where weights of this name ship with vistok."""

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of the family's configuration."""
        raise NotImplementedError

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """The configuration of a checkpoint with these keys and shapes, or None if it is not of this family.

        `config` is the config.json found with it, in whatever form its authors wrote it.
        """
        return None

    @classmethod
    def config_in_file(cls, weights: Path) -> dict[str, Any] | None:
        """The configuration that a weights file of this family itself holds, or None."""
        return None

    @classmethod
    def rename_keys(cls, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint under this family's keys; a family that is published in several layouts
        renames those of the others."""
        return dict(tensors)

    @classmethod
    def check_variant(cls, shapes: Mapping[str, torch.Size], config: Mapping[str, Any]) -> None:
        """Raise ValueError for a checkpoint of another variant than `config` where that can be recognised."""

    @property
    def label(self) -> str:
        """The name of this model in messages."""
        return self.name or self.family

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the weights."""
        return next(self.parameters()).dtype

    def to(self, *arguments: Any, **options: Any) -> Self:
        """Move or convert as `torch.nn.Module.to`; a dtype may be given by name ("bfloat16").

        Raises ValueError for a text that names neither a device nor a floating dtype.
        """
        if isinstance(options.get("dtype"), str):
            options["dtype"] = pretrained.as_dtype(options["dtype"])
        if "device" in options:
            options["device"] = pretrained.as_device(options["device"])
        return super().to(*map(pretrained.as_target, arguments), **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        weights: str | Path | None = None,
        config: Mapping[str, Any] | str | Path | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load by published name, hub repository (`hf://owner/name`), folder or file, as `vistok.load` does.

        Weights become float32 unless `dtype` is given; a `config` given here wins over every other.
        """
        return pretrained.load_pretrained(
            cls,
            source,
            device=device,
            dtype=dtype,
            weights=weights,
            config=config,
            hub_options={
                "revision": revision,
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
            },
            catalog=cls.catalog,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which `load(folder)` reads back exactly."""
        config = {"family": self.family, "name": self.name, "config": dataclasses.asdict(self.config)}
        if self.weights_digest is not None:
            config["weights_digest"] = self.weights_digest
        checkpoint.save(folder, self.state_dict(), config)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the block; afterwards each part is in the mode it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
