"""Pictures on disk as endless sources: image folders and webdataset tar shards."""

import glob
import io
import itertools
import os
import re
import tarfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..images import load_image

_EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff", ".tif"}
_SHARD_EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp"}
_UNREADABLE = (OSError, ValueError, Image.DecompressionBombError)  # what a broken file raises


def check_size_and_seed(source: Any, smallest: int = 1) -> None:
    """Refuse early what would only fail on the first picture, or in every worker process."""
    if source.size < smallest or source.seed < 0:
        raise ValueError(
            f"{type(source).__name__}(size={source.size}, seed={source.seed}): "
            f"size starts at {smallest} pixels, seed at 0"
        )


def listed(name: str, given: Any, accepted: type | tuple[type, ...]) -> list:
    """One or several values of an accepted type as a list."""
    values = [given] if isinstance(given, accepted) else given
    if not isinstance(values, list | tuple | set) or not all(isinstance(v, accepted) for v in values):
        raise ValueError(f"{name} is {given!r}: give one string or a list of strings")
    return list(values)


@dataclass
class _Stored:
    """Pictures kept on disk, shuffled anew each epoch; the subclass says how many there are and reads one."""

    size: int
    seed: int = 0
    random_crop: bool = True
    flip: bool = True
    _reported: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    _shuffled: tuple[int, np.ndarray] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_size_and_seed(self)
        for name in ("random_crop", "flip"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: give true or false")

    def __len__(self) -> int:
        raise NotImplementedError

    def _read(self, position: int) -> bytes:
        raise NotImplementedError

    def _name(self, position: int) -> str:
        raise NotImplementedError

    def sample(self, index: int) -> np.ndarray:
        """Picture number `index`: uint8 [size, size, 3].

        For a broken file the next one of its epoch is taken; each process names it in one warning.

        Raises:
            OSError: no file can be read.
        """
        epoch, place = divmod(index, len(self))
        order = self._order(epoch)
        for attempt in range(len(self)):
            position = int(order[(place + attempt) % len(self)])
            try:
                return self._crop(index, self._read(position))
            except _UNREADABLE as error:
                self._report(position, error)
        raise OSError(f"none of the {len(self)} pictures can be read: see the warnings above")

    def _order(self, epoch: int) -> np.ndarray:
        """The order [N] in which an epoch visits the pictures."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self))
        return self._shuffled[1]

    def _report(self, position: int, error: Exception) -> None:
        name = self._name(position)
        if name not in self._reported:
            self._reported.add(name)
            warnings.warn(f"skipping {name}: {error.__cause__ or error}", stacklevel=3)

    def _crop(self, index: int, encoded: bytes) -> np.ndarray:
        """Scale the shorter side to `size` (bicubic), crop a square, mirror: TiTok's training transform."""
        image = Image.open(io.BytesIO(encoded))
        image.draft(image.mode, (2 * self.size, 2 * self.size))  # a large JPEG need not be decoded whole
        image = load_image(image)
        rng = np.random.default_rng((self.seed, index, 1))
        side = min(image.size)
        where = rng.random(2) if self.random_crop else np.array([0.5, 0.5])
        left, top = (where * (image.width - side, image.height - side)).tolist()
        box = (left, top, left + side, top + side)
        pixels = np.array(image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box))
        return pixels[:, ::-1].copy() if self.flip and rng.random() < 0.5 else pixels


def pictures(root: str | Path) -> list[str]:
    """Every picture in a folder and its subfolders, save linked ones: sorted paths that begin with `root`.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
        OSError: a subfolder cannot be listed.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give a folder of pictures")
    walk = os.walk(root, onerror=_raise)
    found = (Path(parent, name) for parent, _, names in walk for name in names)
    files = sorted(str(file) for file in found if file.suffix.lower() in _EXTENSIONS)
    if not files:
        raise FileNotFoundError(f"no picture under {root}: accepted are {', '.join(sorted(_EXTENSIONS))}")
    return files


def _raise(error: OSError) -> None:
    raise error


@dataclass
class Folder(_Stored):
    """Every picture (png, jpg, jpeg, webp, bmp, tiff, tif) in a folder and its subfolders, save linked ones.

    Each epoch is a new order, fixed by `seed`. Pictures are read as `vistok.images.load_image` does; the
    shorter side is scaled to `size` and a square cropped at random (centred without `random_crop`); half are
    mirrored (none without `flip`).

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
        OSError: a subfolder cannot be listed.
        ValueError: a path, flag, size or seed that is none.
    """

    path: str | Path = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.path, str | os.PathLike):
            raise ValueError(f"path is {self.path!r}: give a folder of pictures")
        self.files = pictures(self.path)

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, position: int) -> bytes:
        return Path(self.files[position]).read_bytes()

    def _name(self, position: int) -> str:
        return self.files[position]


@dataclass
class Shards(_Stored):
    """Pictures (png, jpg, jpeg, webp) in webdataset tar files, read in place.

    `pattern` is one or several paths; each may hold braces, `train-{000..010}.tar` or `{a,b}.tar`, and
    wildcards; a file that several match is taken once. The tar files are indexed when the source is made, and
    must not be compressed. Order, crop and mirroring are as in `Folder`, over all shards together.

    Raises:
        FileNotFoundError: a path matches no file, or the files hold no picture.
        ValueError: a file is not an uncompressed tar, or is cut off or damaged; a pattern, flag, size or seed
            that is none.
    """

    pattern: str | Path | Sequence[str | Path] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        patterns = [os.fspath(pattern) for pattern in listed("pattern", self.pattern, (str, os.PathLike))]
        if not patterns:
            raise ValueError("pattern is an empty list: give at least one tar file")
        self.files = list(dict.fromkeys(file for pattern in patterns for file in expand(pattern)))
        rows = [(shard, *place) for shard, file in enumerate(self.files) for _, *place in members(file)]
        if not rows:
            raise FileNotFoundError(
                f"no picture in {', '.join(patterns)}: accepted are {', '.join(sorted(_SHARD_EXTENSIONS))}"
            )
        self._rows = np.array(rows, dtype=np.int64)  # [N, 3]: shard, offset and length in bytes

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self, position: int) -> bytes:
        shard, offset, length = self._rows[position].tolist()
        with open(self.files[shard], "rb") as file:  # anew: worker processes must not share an offset
            file.seek(offset)
            return file.read(length)

    def _name(self, position: int) -> str:
        shard, offset, _ = self._rows[position].tolist()
        with open(self.files[shard], "rb") as file:
            file.seek(offset - tarfile.BLOCKSIZE)  # a member's header is the block before its data
            header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        return f"{self.files[shard]}:{header.name}"


class Member(NamedTuple):
    """A picture in a tar file: its name, and where in the file its bytes are."""

    name: str
    offset: int
    length: int


def members(path: str | Path) -> list[Member]:
    """Every picture (png, jpg, jpeg, webp) in a tar file, in the file's order.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an uncompressed tar, or is cut off or damaged.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            found = [
                Member(member.name, member.offset_data, member.size)
                for member in tar
                if member.isfile() and Path(member.name).suffix.lower() in _SHARD_EXTENSIONS
            ]
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is not a whole, uncompressed tar file ({error}): "
            "fetch it again, or unpack .tar.gz to .tar"
        ) from error
    # tarfile takes a cut or damaged header for the end of the file; a real end is marked by a block of zeros.
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"{path} is cut off or damaged at byte {end}: fetch it again")
    return found


def expand(pattern: str) -> list[str]:
    """The files that a path with braces and wildcards stands for, in order.

    Raises:
        FileNotFoundError: one of its paths matches no file.
        ValueError: a range in braces counts down.
    """
    paths = _braces(pattern)
    files = [
        [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        for path in paths
    ]
    missing = [path for path, found in zip(paths, files, strict=True) if not found]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise FileNotFoundError(
            f"no file {', '.join(missing[:5])}{more}: {pattern} stands for {len(paths)} path(s)"
        )
    return list(itertools.chain.from_iterable(files))


def _braces(pattern: str) -> list[str]:
    """`a{00..02}` to a00, a01, a02; `{x,y}` to x, y; leftmost innermost brace first."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = bounds.groups()
        if int(first) > int(last):
            raise ValueError(f"{pattern} counts down: write {{{last}..{first}}}")
        parts = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        parts = match[1].split(",")
    rest = [pattern[: match.start()] + part + pattern[match.end() :] for part in parts]
    return list(dict.fromkeys(itertools.chain.from_iterable(map(_braces, rest))))
