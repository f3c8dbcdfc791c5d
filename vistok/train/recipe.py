"""A training run as a YAML file: its objective, and the fields of that objective's configuration."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from ..configuration import build, shorten
from ..files import check_source
from .config import RunConfig
from .objectives import objectives
from .yaml_file import read_yaml

LARGEST_FILE = 2**20  # bytes


def read(path: str | Path) -> RunConfig:
    """The configuration in a YAML file of at most 1 MB.

    `objective` names what is trained (`vistok.train.objectives`); files without it train a tokenizer. The
    other keys are the fields of its configuration.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is not an ordinary file.
        ValueError: it is not valid YAML, or a key or value is not accepted; the message names file and key.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no training configuration {path}; give a YAML file such as assets/vistok-mini.yaml"
        )
    values = read_yaml(check_source(path, limit=LARGEST_FILE))
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{path} holds a {type(values).__name__}; a configuration is a mapping of keys to values"
        )
    fields = dict(values)
    name = fields.pop("objective", "tokenizer")
    if not isinstance(name, str) or name not in objectives():
        raise ValueError(f"{path}: objective is {shorten(name)}; it is one of {', '.join(objectives())}")
    kind = objectives()[name]
    config = build(kind.config_class, fields, str(path))
    for message in kind.without_effect(fields, config):
        warnings.warn(f"{path}: {message}", stacklevel=2)
    return config
