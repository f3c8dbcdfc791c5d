"""The files of a data set with their sizes and times of change, to notice when one has changed."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import Self

from ...files import atomic_write

FIRST = 3
"""Files of each kind of change that a message names."""


@dataclass(frozen=True)
class Inventory:
    """Files by name: size in bytes and time of the last change in ns, or None where the file is not there."""

    files: dict[str, tuple[int, int] | None]

    @classmethod
    def take(cls, names: Sequence[str], root: str = "") -> Self:
        """Read size and time of change of these files, relative to `root`."""
        return cls({name: _mark(os.path.join(root, name)) for name in names})

    @property
    def digest(self) -> str:
        """Digest of all names and marks in order: another file, or another order, has another digest."""
        digest = hashlib.sha256()
        for name, mark in self.files.items():
            digest.update(f"{json.dumps(name)} {mark}\n".encode())
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write JSON lines: name, size, time of change."""
        with atomic_write(path) as aside, aside.open("w", encoding="utf-8") as lines:
            for name, mark in self.files.items():
                lines.write(json.dumps([name, *(mark or (None, None))]) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises OSError, or ValueError for anything else."""
        files = {}
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                name, size, changed = json.loads(line)
                files[name] = None if size is None else (size, changed)
        return cls(files)

    def changes(self, earlier: "Inventory") -> str:
        """What has changed since, with counts and first names; empty if nothing has."""
        both = [name for name in self.files if name in earlier.files]
        kinds = {
            "changed": [name for name in both if self.files[name] != earlier.files[name]],
            "new": [name for name in self.files if name not in earlier.files],
            "gone": [name for name in earlier.files if name not in self.files],
        }
        parts = [f"{len(names):,} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
        if not parts and list(self.files) != list(earlier.files):
            parts = ["they are in another order"]
        return ", ".join(parts)


def _mark(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # reading it will report that
        return None
    return status.st_size, status.st_mtime_ns


def _some(names: list[str]) -> str:
    return ", ".join(names[:FIRST]) + (", …" if len(names) > FIRST else "")
