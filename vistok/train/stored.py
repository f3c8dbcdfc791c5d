"""Pictures on disk as endless sources: image folders and webdataset tar shards."""

import io
import os
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import check_source
from ..image_files import ImageFolder, list_images
from ..images import MAX_FILE_BYTES, image_extensions, load_image
from .patterns import expand
from .tar_members import TarPictures, find_pictures, left_out_line, read_member


def check_size_and_seed(source: Any, smallest: int = 1) -> None:
    """Raise ValueError for a bad size or seed now, before it fails in every worker process."""
    if source.size < smallest or source.seed < 0:
        raise ValueError(
            f"{type(source).__name__}(size={source.size}, seed={source.seed}): "
            f"size starts at {smallest} pixels, seed at 0"
        )


def as_list(name: str, value: Any, accepted: type | tuple[type, ...]) -> list:
    """One or several values of an accepted type as a list."""
    values = [value] if isinstance(value, accepted) else value
    if not isinstance(values, list | tuple | set) or not all(isinstance(v, accepted) for v in values):
        raise ValueError(f"{name} is {value!r}: give one string or a list of strings")
    return list(values)


@dataclass
class _Stored:
    """Pictures kept on disk, shuffled anew each epoch; the subclass gives their number and reads one."""

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
            except (OSError, ValueError) as error:
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
        image = load_image(_opened(encoded, 2 * self.size))
        rng = np.random.default_rng((self.seed, index, 1))
        side = min(image.size)
        where = rng.random(2) if self.random_crop else np.array([0.5, 0.5])
        left, top = (where * (image.width - side, image.height - side)).tolist()
        box = (left, top, left + side, top + side)
        pixels = np.array(image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box))
        return pixels[:, ::-1].copy() if self.flip and rng.random() < 0.5 else pixels


def _opened(encoded: bytes, least: int) -> Image.Image:
    """A picture that is not decoded yet; a large JPEG is read smaller, with sides of `least` or more."""
    try:
        image = Image.open(io.BytesIO(encoded))
        image.draft(image.mode, (least, least))
    except MemoryError:
        raise
    except Exception as error:  # on a broken file Pillow raises nearly anything
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels; PIL.Image.MAX_IMAGE_PIXELS is {limit}")
    return image


def pictures(root: str | Path) -> ImageFolder:
    """Find every picture in a folder and its subfolders, linked ones too; one warning reports what was left
    out and why.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
        OSError: a subfolder cannot be listed.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give a folder of pictures")
    listed = list_images(root)
    line = listed.left_out_line()
    if not listed.images:
        raise FileNotFoundError(
            f"no picture under {root}: accepted are {', '.join(sorted(image_extensions()))}"
            + (f"; {line}" if line else "")
        )
    if line:
        warnings.warn(line, stacklevel=2)
    return listed


def read_picture(path: str | Path) -> bytes:
    """A file's bytes. OSError or ValueError for what is not an ordinary file, or too large for a picture."""
    return check_source(path, limit=MAX_FILE_BYTES).read_bytes()


@dataclass
class Folder(_Stored):
    """Every picture that Pillow decodes in a folder and its subfolders, linked ones too.

    Each epoch is a new order, fixed by `seed`. Pictures are read as `vistok.images.load_image` does; the
    shorter side is scaled to `size` and a square cropped at random (centred without `random_crop`); half are
    mirrored (none without `flip`).

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
        OSError: a subfolder cannot be listed.
        ValueError: a path, flag, size or seed that is not one.
    """

    path: str | Path = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.path, str | os.PathLike):
            raise ValueError(f"path is {self.path!r}: give a folder of pictures")
        self.files = [str(path) for path in pictures(self.path).images]

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, position: int) -> bytes:
        return read_picture(self.files[position])

    def _name(self, position: int) -> str:
        return self.files[position]


@dataclass
class Shards(_Stored):
    """Pictures in webdataset tar files, by the endings that Pillow decodes, read in place.

    `pattern` is one or several paths; each may hold braces, `train-{000..010}.tar` or `{a,b}.tar`, and
    wildcards; a file that several match is taken once. The tar files are indexed when the source is made, and
    must not be compressed. Order, crop and mirroring are as in `Folder`, over all shards together.

    Raises:
        FileNotFoundError: a path matches no file, or the files hold no picture.
        ValueError: a file is not an uncompressed tar, or is cut off or damaged; a pattern, flag, size or seed
            that is not one.
    """

    pattern: str | Path | Sequence[str | Path] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        patterns = [os.fspath(pattern) for pattern in as_list("pattern", self.pattern, (str, os.PathLike))]
        if not patterns:
            raise ValueError("pattern is an empty list: give at least one tar file")
        self.files = list(dict.fromkeys(file for pattern in patterns for file in expand(pattern)))
        rows = []
        for shard, tar in enumerate(shard_pictures(self.files)):
            rows += [(shard, member.offset, member.length) for member in tar.pictures]
        if not rows:
            raise FileNotFoundError(
                f"no picture in {', '.join(patterns)}: accepted are {', '.join(sorted(image_extensions()))}"
            )
        self._rows = np.array(rows, dtype=np.int64)  # [N, 3]: shard, offset and length in bytes

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self, position: int) -> bytes:
        shard, offset, length = self._rows[position].tolist()
        return read_member(self.files[shard], offset, length)

    def _name(self, position: int) -> str:
        shard, offset, _ = self._rows[position].tolist()
        with open(self.files[shard], "rb") as file:
            file.seek(offset - tarfile.BLOCKSIZE)  # a member's header is the block before its data
            header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        return f"{self.files[shard]}:{header.name}"


def shard_pictures(files: Sequence[str]) -> Iterator[TarPictures]:
    """The pictures of each tar file; at the end one warning reports members without a picture."""
    left_out: list[str] = []
    for file in files:
        tar = find_pictures(file)
        left_out += tar.left_out
        yield tar
    if line := left_out_line(left_out, len(files)):
        warnings.warn(line, stacklevel=3)
