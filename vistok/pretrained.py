"""Find, recognise and load the weights of a class of models; `vistok.loading` has the public functions."""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, configuration, hub
from .bounded_build import bounded_build, count, empty_weights
from .catalog import Catalog, Entry
from .files import looks_like_path
from .statedict import StateDict

_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
_DIGITS = 8
"""Digits of the SHA-256 of weights that tokens carry."""
_logger = logging.getLogger("vistok")


def load_pretrained(
    cls: Any,
    source: str | Path,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
    weights: str | Path | None,
    config: Mapping[str, Any] | str | Path | None,
    hub_options: dict[str, Any],
    catalog: Catalog,
) -> Any:
    """Load a model of the class `cls` or a subclass; the arguments are those of `from_pretrained`.

    `catalog` has the families and published checkpoints of that kind of model.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"a model is loaded by a name or path; got a {type(source).__name__}")
    source = source if isinstance(source, str) else Path(source)
    kind = torch.float32 if dtype is None else as_dtype(dtype)
    device = as_device(device)
    entry = catalog.entries().get(str(source))
    located = _locate(source, entry, weights, hub_options, catalog)
    if config is not None and not isinstance(config, Mapping):
        config = checkpoint.read_config(Path(config))
    choices = checkpoint.read_choices(located.weights)
    family, fields = _identify(choices, config, located, entry, catalog)
    if not issubclass(family, cls):
        raise ValueError(
            f"{source} is a {family.family!r} checkpoint, not one of {cls.__name__}; use vistok.load, "
            "or vistok.generate.load for a generator"
        )
    published = entry is not None and config is None and fields == entry.config
    model = _build(family, fields, None if published else choices[0], located.weights)
    choices = [replace(choice, tensors=family.rename_keys(choice.tensors)) for choice in choices]
    choice = _fitting(model, choices)
    family.check_variant({key: value.shape for key, value in choice.tensors.items()}, fields)
    _report(choice, choices, located.weights)
    checkpoint.load_strictly(
        model, choice.tensors, dtype=kind, ignore=family.checkpoint_ignores, source=located.weights
    )
    own = config or located.config or {}
    model.name = entry.name if entry else _own_name(own, located.weights)
    model.weights_digest = _own_digest(entry, own, located.weights)
    return model.requires_grad_(True).to(device=device).eval()


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The floating dtype of that name ("bfloat16", "torch.float16") or itself; ValueError for others."""
    result = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if result not in _DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; weights take {', '.join(_DTYPES)}")
    return result


def as_device(device: torch.device | str | int | None) -> torch.device | int | None:
    """The device of that name or number, or itself; ValueError for text that names none."""
    if not isinstance(device, str):
        return device
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; give cpu, cuda, cuda:1, mps …") from error


def as_target(target: Any) -> Any:
    """The argument of `Module.to`, names of dtypes as dtypes; ValueError for text that names neither kind."""
    if not isinstance(target, str):
        return target
    if target.removeprefix("torch.") in _DTYPES:
        return as_dtype(target)
    try:
        return as_device(target)
    except ValueError as error:
        raise ValueError(
            f"{target!r} is neither a device (cpu, cuda, cuda:1, mps) nor a dtype ({', '.join(_DTYPES)})"
        ) from error


# Where weights come from ------------------------------------------------------------------------------------


def _locate(
    source: str | Path,
    entry: Entry | None,
    weights: str | Path | None,
    hub_options: dict[str, Any],
    catalog: Any,
) -> checkpoint.Located:
    """The weights file on this machine; only a registry name or `hf://owner/name` is ever downloaded."""
    if weights is not None:
        if entry is None and str(source) not in catalog.families() and not Path(source).exists():
            raise ValueError(catalog.unknown_name(str(source)))
        return checkpoint.locate(weights)
    if entry is not None:
        return _published(entry, hub_options)
    if isinstance(source, Path) or looks_like_path(source):
        return checkpoint.locate(source)
    repo = source.removeprefix(hub.PREFIX)
    if source.startswith(hub.PREFIX) or repo in {entry.repo for entry in catalog.entries().values()}:
        if repo.count("/") != 1 or not all(repo.split("/")):
            raise ValueError(f"{source} is not a hub repository; give {hub.PREFIX}owner/name")
        return checkpoint.fetch(repo, **hub_options)
    if source.count("/") == 1:
        raise FileNotFoundError(
            f"{source} is neither a file or folder here nor a registry name; `vistok list` shows the names, "
            f"and a repository of the Hugging Face hub is given as {hub.PREFIX}{source}"
        )
    raise ValueError(catalog.unknown_name(source))


def _published(entry: Entry, hub_options: dict[str, Any]) -> checkpoint.Located:
    """The weights of a registry row: in this package or on the hub; FileNotFoundError for those on a page."""
    from importlib.resources import files

    if entry.repo is None:
        located = checkpoint.locate(Path(str(files("vistok.assets") / entry.file)))
        _check_digest(located.weights, entry)
        return located
    if not entry.file:
        raise FileNotFoundError(
            f"no weights of {entry.name} are published ({entry.repo} has the code); create({entry.name!r}) "
            f"builds it with fresh ones, and load({entry.name!r}, weights='path/to/weights') takes your own"
        )
    if "://" in entry.repo:
        raise FileNotFoundError(
            f"the weights of {entry.name} are not on the hub; download {entry.file} as {entry.repo} "
            f"describes and pass its path: load({entry.name!r}, weights='path/to/{Path(entry.file).name}')"
        )
    return checkpoint.fetch(entry.repo, entry.file, **hub_options)


def _check_digest(path: Path, entry: Entry) -> None:
    digest = checkpoint.digest(path)
    if digest != entry.sha256:
        raise ValueError(
            f"{path} is not the {entry.name} that this version of vistok ships (sha256 {digest[:12]}…, not "
            f"{entry.sha256[:12]}…); install vistok again"
        )


# What they are ----------------------------------------------------------------------------------------------


def _identify(
    choices: list[StateDict],
    user_config: Mapping[str, Any] | None,
    located: checkpoint.Located,
    entry: Entry | None,
    catalog: Any,
) -> tuple[Any, dict[str, Any]]:
    """Family and fields: by the user's config, the registry row, config.json, the file's own, or the keys."""
    known = catalog.families()
    config = user_config or located.config
    if config is None:
        own = (family.config_in_file(located.weights) for family in known.values())
        config = next(filter(None, own), None)
    named = (config or {}).get("family")
    if named is not None:
        if not isinstance(named, str) or named not in known:
            raise ValueError(
                f"{located.weights}: unknown family {configuration.shorten(named)}; this version has "
                f"{', '.join(known)}"
            )
        if entry and named != entry.family:
            raise ValueError(f"{located.weights} is of family {named!r}; {entry.name} is {entry.family!r}")
        fields = config.get("config", {})
        if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
            raise ValueError(
                f"{located.weights}: the configuration's config is {configuration.shorten(fields)}; it is a "
                f"mapping of {named} fields to values"
            )
        return known[named], dict(fields)
    if entry and user_config is None and not (config and known[entry.family].own_config_wins):
        return known[entry.family], dict(entry.config)
    for choice in choices:
        shapes = {key: value.shape for key, value in choice.tensors.items()}
        for family in known.values():
            fields = configuration.run_config_reader(
                family.recognise, located.weights, shapes, dict(config) if config else None
            )
            if fields is not None:
                return family, fields
    keys = list(choices[0].tensors)
    raise ValueError(
        f"{located.weights} is not of a known family ({', '.join(known)}); it has {len(keys)} keys such as "
        f"{', '.join(keys[:3])}. Give config={{'family': …, 'config': {{…}}}}"
    )


def _build(family: Any, fields: dict[str, Any], bound: StateDict | None, source: Path) -> Any:
    """The model without weights; a configuration from a file may not ask for more than `bound` can fill."""
    if bound is None:
        with empty_weights():
            return family.create(**fields)
    with bounded_build(*count(bound.tensors), source):
        return configuration.run_config_reader(lambda: family.create(**fields), source)


def _fitting(model: Any, choices: list[StateDict]) -> StateDict:
    """The first state dict that fits the model, else the one with the fewest keys that do not."""
    ignore = model.checkpoint_ignores
    counts = [sum(map(len, checkpoint.misfits(model, choice.tensors, ignore))) for choice in choices]
    return choices[counts.index(min(counts))]


def _report(choice: StateDict, choices: list[StateDict], source: Path) -> None:
    """Log which state dict of a file was loaded where there was a choice."""
    if choice.is_average:
        _logger.warning("%s: loading the average of its weights (%s)", source, choice.origin or "averaged")
    elif any(other.is_average for other in choices):
        _logger.warning("%s: its average does not fit this model; loading the weights themselves", source)


def _own_digest(entry: Entry | None, config: Mapping[str, Any], source: Path) -> str | None:
    """The mark of weights whose name may have had others, checked because tokens carry it.

    Of a published model that ships with vistok it is computed from the file, whichever was given; of a model
    that was saved from one it is in the config.json.
    """
    if entry is not None:
        return checkpoint.digest(source)[:_DIGITS] if entry.sha256 else None
    digest = config.get("weights_digest")
    if digest is None or (isinstance(digest, str) and re.fullmatch(f"[0-9a-f]{{{_DIGITS}}}", digest)):
        return digest if config.get("name") else None
    raise ValueError(
        f"the configuration of {source} has the weights_digest {configuration.shorten(digest)}; it has "
        f"{_DIGITS} hexadecimal digits, or is left out"
    )


def _own_name(config: Mapping[str, Any], source: Path) -> str | None:
    """The name that a config.json gives the model, checked because tokens carry it."""
    name = config.get("name")
    if name is None or (isinstance(name, str) and name.isprintable() and 0 < len(name) <= 200):
        return name
    raise ValueError(
        f"the configuration of {source} has the name {configuration.shorten(name)}; it is a line of text of "
        "up to 200 characters, or null"
    )
