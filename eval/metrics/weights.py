"""The places of the metrics' published networks, and the error when they are absent."""

from collections.abc import Sequence
from pathlib import Path

import torch


class WeightsMissing(FileNotFoundError):
    """A metric's network is not on this machine; the message is one line: which file, from where, to where,
    by which option."""


def hub_folder() -> Path:
    """Torch hub's checkpoint folder ($TORCH_HOME/hub/checkpoints), which every tool on torch shares."""
    return Path(torch.hub.get_dir(), "checkpoints")


def find(
    path: str | Path | None, names: Sequence[str], folder: Path, *, metric: str, url: str, option: str
) -> Path:
    """The weights file at `path` (a file, or a folder that holds one of `names`), or in `folder` when None.

    Nothing is ever downloaded: an absent file is a WeightsMissing that names the metric, the file, its URL,
    the folder it belongs in and the option that takes a path.
    """
    place = folder if path is None else Path(path).expanduser()
    if path is not None and place.is_file():
        return place
    for name in names:
        if (place / name).is_file():
            return place / name
    if path is not None and not place.exists():
        raise WeightsMissing(f"{metric}: no file or folder {place}; {option} takes {names[0]}, from {url}")
    other = f" ({', '.join(names[1:])} is the same file)" if names[1:] else ""
    raise WeightsMissing(
        f"{metric} needs {names[0]}{other}, which is not in {place}: put {url} into {folder}, "
        f"or give its path with {option}"
    )
