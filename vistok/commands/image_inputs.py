"""The images named on the command line as files, folders and patterns, each with its own name."""

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..image_files import image_extensions, list_images
from .console import note


@dataclass(frozen=True, eq=False)
class ImageInput:
    """An image file, and its name: its path below the folder on the command line, or its own name."""

    path: Path
    name: str


def gather(sources: Iterable[str | Path]) -> list[ImageInput]:
    """Open folders into the images below them and patterns (`*.png`) into the files that match, in order.

    What is left out of a folder is reported in one line on stderr.

    Raises:
        FileNotFoundError: a pattern that nothing matches.
        ValueError: a folder without images, with what it holds instead.
    """
    inputs: list[ImageInput] = []
    for source in sources:
        for path in _expanded(Path(source)):
            inputs += _in_folder(path) if path.is_dir() else [ImageInput(path, path.name)]
    return inputs


def _expanded(path: Path) -> list[Path]:
    """A path itself, or the files and folders that a pattern stands for."""
    path = path.expanduser()
    if os.path.lexists(path) or not glob.has_magic(str(path)):
        return [path]
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        raise FileNotFoundError(f"nothing matches {path}; give image files, folders of them, or a pattern")
    return [Path(match) for match in matches]


def _in_folder(folder: Path) -> list[ImageInput]:
    listed = list_images(folder)
    line = listed.left_out_line()
    if not listed.images:
        usual = [
            ext for ext in (".png", ".jpg", ".webp", ".gif", ".avif", ".tif") if ext in image_extensions()
        ]
        raise ValueError(
            f"{folder} holds no images ({', '.join(usual)} …)"
            f"{f': {line}' if line else ''}; name another folder"
        )
    if line:
        note(line)
    return [ImageInput(path, path.relative_to(folder).as_posix()) for path in listed.images]
