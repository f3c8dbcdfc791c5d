"""Where training pictures come from: endless sources addressed by number, so that a run can resume exactly.

A source has one method, `sample(index)`: picture number `index` of an endless sequence, uint8
[size, size, 3], a pure function of the source's fields and the index. `loader` turns a source into batches.
"""

import bisect
import functools
import glob
import importlib.util
import io
import itertools
import math
import os
import re
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from ..images import load_image
from .scenes import scene

__all__ = [
    "Folder",
    "Mixture",
    "Photos",
    "Scenes",
    "Shards",
    "Source",
    "build",
    "loader",
    "photo",
    "photo_names",
]

_EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff", ".tif"}
_SHARD_EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp"}
_UNREADABLE = (OSError, ValueError, Image.DecompressionBombError)  # what a broken file raises


class Source(Protocol):
    """An endless sequence of square pictures."""

    def sample(self, index: int) -> np.ndarray:
        """Picture number `index` (from 0, unbounded): uint8 [size, size, 3], sRGB."""
        ...


def _check_size_and_seed(source: Any, smallest: int = 1) -> None:
    """Refuse early what would only fail on the first picture, or in every worker process."""
    if source.size < smallest or source.seed < 0:
        raise ValueError(
            f"{type(source).__name__}(size={source.size}, seed={source.seed}): "
            f"size starts at {smallest} pixels, seed at 0"
        )


def _listed(name: str, given: Any, accepted: type | tuple[type, ...]) -> list:
    """One or several values of an accepted type as a list."""
    values = [given] if isinstance(given, accepted) else given
    if not isinstance(values, list | tuple | set) or not all(isinstance(v, accepted) for v in values):
        raise ValueError(f"{name} is {given!r}: give one string or a list of strings")
    return list(values)


@dataclass
class Scenes:
    """Procedural pictures, see `vistok.train.scenes`.

    Raises:
        ValueError: a size below 16, or a negative seed.
    """

    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_size_and_seed(self, smallest=16)

    def sample(self, index: int) -> np.ndarray:
        """Picture number `index`: uint8 [size, size, 3]."""
        return scene(self.seed, index, self.size)


# Photographs that ship with scikit-image and scikit-learn ---------------------------------------------------

_SKIMAGE, _SKLEARN = ("skimage", "data"), ("sklearn", "datasets", "images")
_PHOTOS = {  # name → where, file, how often it is drawn beside the others
    "astronaut": (_SKIMAGE, "astronaut.png", 4.0),
    "brick": (_SKIMAGE, "brick.png", 0.5),
    "camera": (_SKIMAGE, "camera.png", 2.0),
    "cell": (_SKIMAGE, "cell.png", 0.3),
    "chelsea": (_SKIMAGE, "chelsea.png", 4.0),
    "china": (_SKLEARN, "china.jpg", 4.0),
    "clock_motion": (_SKIMAGE, "clock_motion.png", 0.5),
    "coffee": (_SKIMAGE, "coffee.png", 4.0),
    "coins": (_SKIMAGE, "coins.png", 1.0),
    "flower": (_SKLEARN, "flower.jpg", 4.0),
    "grass": (_SKIMAGE, "grass.png", 0.5),
    "gravel": (_SKIMAGE, "gravel.png", 0.5),
    "hubble_deep_field": (_SKIMAGE, "hubble_deep_field.jpg", 1.0),
    "ihc": (_SKIMAGE, "ihc.png", 1.0),
    "moon": (_SKIMAGE, "moon.png", 0.5),
    "motorcycle_left": (_SKIMAGE, "motorcycle_left.png", 2.0),
    "motorcycle_right": (_SKIMAGE, "motorcycle_right.png", 2.0),
    "page": (_SKIMAGE, "page.png", 0.4),
    "retina": (_SKIMAGE, "retina.jpg", 1.0),
    "rocket": (_SKIMAGE, "rocket.jpg", 3.0),
    "text": (_SKIMAGE, "text.png", 0.4),
}


@functools.cache
def _photo_paths() -> dict[str, Path]:
    """Name → file, found without importing the packages."""
    roots = {}
    for package, distribution in (("skimage", "scikit-image"), ("sklearn", "scikit-learn")):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(
                f'photographs ship inside {distribution}, not installed: pip install "vistok[train]"'
            )
        roots[package] = Path(spec.submodule_search_locations[0])
    paths = {
        name: roots[package].joinpath(*folders, file)
        for name, ((package, *folders), file, _) in _PHOTOS.items()
    }
    return {name: path for name, path in paths.items() if path.is_file()}


def photo_names() -> list[str]:
    """Names of the photographs at hand, sorted.

    Raises:
        ImportError: scikit-image or scikit-learn is not installed.
    """
    return sorted(_photo_paths())


def photo(name: str) -> Image.Image:
    """One of the photographs that ship with scikit-image and scikit-learn, as an RGB picture of its own size.

    Raises:
        ImportError: scikit-image or scikit-learn is not installed.
        ValueError: there is no photograph of that name.
    """
    return _pyramid(name)[0].copy()


@functools.cache
def _pyramid(name: str) -> list[Image.Image]:
    """A photograph at full, half, quarter … size, so that a large crop need not read every pixel."""
    if name not in _photo_paths():
        raise ValueError(f"no photograph {name!r}; there are {', '.join(photo_names())}")
    levels = [load_image(_photo_paths()[name])]
    while min(levels[-1].size) >= 64:
        levels.append(levels[-1].reduce(2))
    return levels


@dataclass
class Photos:
    """Random crops of the photographs that ship with scikit-image and scikit-learn, more of the coloured.

    A crop's side is log-uniform from `size` pixels (from 0.6 of the short side, if that is less) to the short
    side; its sides differ by up to a tenth; half are mirrored; colours and gamma stray a little; one in
    twenty is grey, one in twenty has its channels swapped. `exclude` (a name or several) holds photographs
    back for evaluation; motorcycle_left and motorcycle_right are a stereo pair, so hold back both.

    Raises:
        ImportError: scikit-image or scikit-learn is not installed.
        ValueError: `exclude` has a name that is no photograph's, or all of them; size below 1; negative seed.
    """

    size: int
    seed: int = 0
    exclude: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        _check_size_and_seed(self)
        names = photo_names()
        excluded = _listed("exclude", self.exclude, str)
        if unknown := [name for name in excluded if name not in names]:
            raise ValueError(f"cannot exclude {', '.join(unknown)}: the photographs are {', '.join(names)}")
        self.names = [name for name in names if name not in excluded]
        if not self.names:
            raise ValueError(f"exclude names all {len(names)} photographs: name fewer of them")
        self._edges = np.cumsum([_PHOTOS[name][2] for name in self.names]).tolist()

    def sample(self, index: int) -> np.ndarray:
        """Crop number `index`: uint8 [size, size, 3]."""
        rng = np.random.default_rng((self.seed, index))
        levels = _pyramid(self.names[bisect.bisect_right(self._edges, rng.random() * self._edges[-1])])
        width, height = levels[0].size
        short = min(width, height)
        side = math.exp(rng.uniform(math.log(min(self.size, 0.6 * short)), math.log(short)))
        stretch = math.exp(rng.uniform(-0.05, 0.05))
        wide, high = min(side * stretch, width), min(side / stretch, height)
        left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
        level = min(int(math.log2(max(1.0, side / self.size))), len(levels) - 1)
        scale_x, scale_y = levels[level].width / width, levels[level].height / height
        box = (left * scale_x, top * scale_y, (left + wide) * scale_x, (top + high) * scale_y)
        crop = levels[level].resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        return _jitter(rng, np.asarray(crop))


def _jitter(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Mirror half of the pictures, stray a little in gamma and colour, make a few grey or swap channels."""
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    fate = rng.random()
    if fate < 0.05:
        grey = (pixels @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
        pixels = np.repeat(grey[..., None], 3, axis=-1)
    elif fate < 0.1:
        pixels = pixels[..., rng.permutation(3)]
    gain, gamma = np.exp(rng.normal(0, 0.06, size=3)), math.exp(rng.normal(0, 0.12))
    if fate < 0.05:
        gain[:] = gain[0]
    curves = gain * np.linspace(0, 1, 256)[:, None] ** gamma  # [256, 3]
    curves = np.clip(curves * 255 + 0.5, 0, 255).astype(np.uint8)
    return np.stack([curves[:, channel][pixels[..., channel]] for channel in range(3)], axis=-1)


# Pictures on disk -------------------------------------------------------------------------------------------


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
        _check_size_and_seed(self)
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
        root = Path(self.path)
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is not a folder: give a folder of pictures")
        walk = os.walk(root, onerror=_raise)
        found = (Path(parent, name) for parent, _, names in walk for name in names)
        self.files = sorted(str(file) for file in found if file.suffix.lower() in _EXTENSIONS)
        if not self.files:
            raise FileNotFoundError(f"no picture under {root}: accepted are {', '.join(sorted(_EXTENSIONS))}")

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
        patterns = [os.fspath(pattern) for pattern in _listed("pattern", self.pattern, (str, os.PathLike))]
        if not patterns:
            raise ValueError("pattern is an empty list: give at least one tar file")
        self.files = list(dict.fromkeys(file for pattern in patterns for file in _expand(pattern)))
        rows = [(shard, *member) for shard, file in enumerate(self.files) for member in _members(file)]
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


def _members(path: str) -> list[tuple[int, int]]:
    """Offset and length in bytes of every picture in a tar file."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [
                (member.offset_data, member.size)
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
    return members


def _expand(pattern: str) -> list[str]:
    """The files that a path with braces and wildcards stands for, in order."""
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


# Mixtures and batches ---------------------------------------------------------------------------------------

_BLOCK = 1024


@dataclass
class Mixture:
    """Several sources in one: each gives its share by weight of every 1024 pictures (at least one), shuffled.

    Every source is read in its own order without gaps: an epoch of a folder still visits each file once.

    Raises:
        ValueError: no sources or more than 1024, another number of weights than of sources, a weight that is
            not finite and above 0, or a negative seed.
    """

    sources: Sequence[Source]
    weights: Sequence[float]
    seed: int = 0

    def __post_init__(self) -> None:
        usable = all(isinstance(weight, Real) and 0 < weight < math.inf for weight in self.weights)
        if not usable or not 1 <= len(self.sources) <= _BLOCK or len(self.sources) != len(self.weights):
            raise ValueError(
                f"{len(self.sources)} sources with weights {list(self.weights)}: "
                f"give 1 to {_BLOCK} sources, and for each a finite weight above 0"
            )
        if self.seed < 0:
            raise ValueError(f"Mixture(seed={self.seed}): seed starts at 0")
        edges = np.cumsum(self.weights) / sum(self.weights) * (_BLOCK - len(self.sources))
        self._counts = np.diff(edges.round().astype(int), prepend=0) + 1
        self._block: int | None = None

    def sample(self, index: int) -> np.ndarray:
        """Picture number `index`: uint8 [size, size, 3]."""
        block, slot = divmod(index, _BLOCK)
        if self._block != block:
            slots = np.repeat(np.arange(len(self.sources)), self._counts)
            self._block, self._slots = block, np.random.default_rng((self.seed, block)).permutation(slots)
        choice = int(self._slots[slot])
        before = int((self._slots[:slot] == choice).sum())
        return self.sources[choice].sample(block * int(self._counts[choice]) + before)


_KINDS: dict[str, type] = {"scenes": Scenes, "photos": Photos, "folder": Folder, "shards": Shards}


def build(config: Mapping[str, Any], size: int, seed: int) -> Source:
    """The source that a configuration describes; a `Mixture` when it lists several.

    `{"sources": [{"kind": "scenes", "weight": 1.0}, {"kind": "folder", "path": "photos"}]}`: `kind` is
    scenes, photos, folder or shards, `weight` is 1 unless given, and the other keys are the fields of that
    source. `size` is in pixels; every source gets its own seed, drawn from `seed`.

    Raises:
        ValueError: a missing list, an unknown kind, a key that is unknown or missing, or a value out of
            range.
        FileNotFoundError, ImportError: the pictures are not there, see the sources.
    """
    entries = config.get("sources") if isinstance(config, Mapping) and set(config) == {"sources"} else None
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError(f'data config is {config!r}: give {{"sources": [{{"kind": …}}, …]}}, not empty')
    if seed < 0:
        raise ValueError(f"build(seed={seed}): seed starts at 0")
    sources, weights = [], []
    for position, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(f"source {entry!r} is no mapping: give {{kind: {entry}, …}}")
        options = dict(entry)
        kind = options.pop("kind", None)
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"unknown kind of source {kind!r}: accepted are {', '.join(_KINDS)}")
        weights.append(options.pop("weight", 1.0))
        accepted = {item.name for item in fields(_KINDS[kind]) if item.init} - {"size", "seed"}
        needed = accepted & {"path", "pattern"}
        if not needed <= set(options) <= accepted:
            given = ", ".join(map(str, options)) or "nothing"
            raise ValueError(
                f"source {kind!r} was given {given}: accepted are {', '.join(sorted({'weight', *accepted}))}"
                + (f"; needed is {', '.join(needed)}" if needed else "")
            )
        own_seed = int(np.random.SeedSequence((seed, position)).generate_state(1)[0])
        sources.append(_KINDS[kind](size=size, seed=own_seed, **options))
    mixture = Mixture(sources, weights, seed)  # made for one source too: it checks the weights
    return mixture if len(sources) > 1 else sources[0]


@dataclass
class _Samples(Dataset):
    """A source as torch's loader wants it: number → uint8 tensor [3, size, size]."""

    source: Source

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.source.sample(index).transpose(2, 0, 1).copy())


@dataclass
class _Batches(Sampler):
    """The sample numbers of every batch of one rank, from step `start`, without end."""

    batch_size: int
    start: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.start):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


def loader(
    source: Source, batch_size: int, *, start: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0
) -> Iterator[torch.Tensor]:
    """Batches without end: uint8 [batch_size, 3, size, size], on the CPU.

    Step t of rank r holds the samples from `(t * world_size + r) * batch_size` on, whatever the number of
    worker processes (0 reads in this one): a run resumed with `start=t` sees what an uninterrupted one would.

    Raises:
        ValueError: a batch size below 1, a negative start or number of workers, or a rank that is not below
            the world size.
    """
    if batch_size < 1 or start < 0 or workers < 0 or not 0 <= rank < world_size:
        raise ValueError(
            f"loader({batch_size=}, {start=}, {rank=}, {world_size=}, {workers=}): "
            "batch_size starts at 1, start and workers at 0, rank runs from 0 to world_size - 1"
        )
    batches = _Batches(batch_size, start, rank, world_size)
    return iter(DataLoader(_Samples(source), batch_sampler=batches, num_workers=workers))
