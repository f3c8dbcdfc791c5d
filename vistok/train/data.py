"""Where training pictures come from: endless sources addressed by number, so that a run can resume exactly.

A source has one method, `sample(index)`: picture number `index` of an endless sequence, uint8
[size, size, 3], a pure function of the source's fields and the index. `loader` turns a source into batches.
"""

import bisect
import functools
import importlib.util
import itertools
import math
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from ..extras import missing
from ..images import load_image
from .scenes import scene
from .stored import Folder, Shards, as_list, check_size_and_seed, pictures
from .workers import start as start_workers
from .workers import worker_started

__all__ = [
    "Crops",
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


class Source(Protocol):
    """An endless sequence of square pictures."""

    def sample(self, index: int) -> np.ndarray:
        """Picture number `index` (from 0, unbounded): uint8 [size, size, 3], sRGB."""
        ...


@dataclass
class Scenes:
    """Procedural pictures, see `vistok.train.scenes`.

    Raises:
        ValueError: a size below 16, or a negative seed.
    """

    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_size_and_seed(self, smallest=16)

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
    """Name → file, without importing the packages."""
    roots = {}
    for package, distribution in (("skimage", "scikit-image"), ("sklearn", "scikit-learn")):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise missing(distribution, "train", "training on photographs")
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
    return _levels(load_image(_photo_paths()[name]))


def _levels(image: Image.Image) -> list[Image.Image]:
    levels = [image]
    while min(levels[-1].size) >= 64:
        levels.append(levels[-1].reduce(2))
    return levels


@dataclass
class Photos:
    """Random crops of the photographs that ship with scikit-image and scikit-learn, more of the coloured.

    A crop's side is log-uniform from `size` pixels (from 0.6 of the short side, if that is less) to the short
    side; its sides differ by up to a tenth; half are mirrored; colours and gamma vary a little; one in
    twenty is grey, one in twenty has its channels swapped. `exclude` (a name or several) holds photographs
    back for evaluation; motorcycle_left and motorcycle_right are a stereo pair, so hold back both.

    Raises:
        ImportError: scikit-image or scikit-learn is not installed.
        ValueError: `exclude` has an unknown name or all of the names; size below 1; negative seed.
    """

    size: int
    seed: int = 0
    exclude: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        check_size_and_seed(self)
        names = photo_names()
        excluded = as_list("exclude", self.exclude, str)
        if unknown := [name for name in excluded if name not in names]:
            raise ValueError(f"cannot exclude {', '.join(unknown)}: the photographs are {', '.join(names)}")
        self.names = [name for name in names if name not in excluded]
        if not self.names:
            raise ValueError(f"exclude names all {len(names)} photographs: name fewer of them")
        self._edges = np.cumsum([_PHOTOS[name][2] for name in self.names]).tolist()

    def sample(self, index: int) -> np.ndarray:
        """Crop number `index`: uint8 [size, size, 3]."""
        rng = np.random.default_rng((self.seed, index))
        name = self.names[bisect.bisect_right(self._edges, rng.random() * self._edges[-1])]
        return _random_crop(rng, _pyramid(name), self.size)


@dataclass
class Crops:
    """Random crops of every picture in a folder and its subfolders, at all scales, as of `Photos`.

    For folders of few pictures, of which `Folder` would give the same squares again and again. Pictures stay
    in memory, with short sides reduced to at most 4 * `size`.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
        OSError: a subfolder cannot be listed, or a picture cannot be read.
        ValueError: a path, size or seed that is not one, or a picture that cannot be decoded.
    """

    size: int
    seed: int = 0
    path: str | Path = field(kw_only=True)

    def __post_init__(self) -> None:
        check_size_and_seed(self)
        if not isinstance(self.path, str | os.PathLike):
            raise ValueError(f"path is {self.path!r}: give a folder of pictures")
        self.files = [str(path) for path in pictures(self.path).images]
        self._levels: dict[str, list[Image.Image]] = {}

    def sample(self, index: int) -> np.ndarray:
        """Crop number `index`: uint8 [size, size, 3]."""
        rng = np.random.default_rng((self.seed, index))
        file = self.files[rng.integers(len(self.files))]
        if file not in self._levels:
            self._levels[file] = _levels(_reduced(load_image(file), 4 * self.size))
        return _random_crop(rng, self._levels[file], self.size)


def _reduced(image: Image.Image, least: int) -> Image.Image:
    """The picture divided by the largest whole number that leaves its short side at `least` or more."""
    return image.reduce(max(1, min(image.size) // least))


def _random_crop(rng: np.random.Generator, levels: Sequence[Image.Image], size: int) -> np.ndarray:
    """A crop of random scale, place and colour of the picture `levels`, uint8 [size, size, 3]."""
    width, height = levels[0].size
    short = min(width, height)
    side = math.exp(rng.uniform(math.log(min(size, 0.6 * short)), math.log(short)))
    stretch = math.exp(rng.uniform(-0.05, 0.05))
    wide, high = min(side * stretch, width), min(side / stretch, height)
    left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
    level = min(int(math.log2(max(1.0, side / size))), len(levels) - 1)
    scale_x, scale_y = levels[level].width / width, levels[level].height / height
    box = (left * scale_x, top * scale_y, (left + wide) * scale_x, (top + high) * scale_y)
    crop = levels[level].resize((size, size), Image.Resampling.BICUBIC, box=box)
    return _jitter(rng, np.asarray(crop))


def _jitter(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Mirror half of the pictures, vary gamma and colour a little, make a few grey or swap channels."""
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


_KINDS: dict[str, type] = {
    "scenes": Scenes,
    "photos": Photos,
    "crops": Crops,
    "folder": Folder,
    "shards": Shards,
}


def build(config: Mapping[str, Any], size: int, seed: int) -> Source:
    """The source that a configuration describes; a `Mixture` when it lists several.

    `{"sources": [{"kind": "scenes", "weight": 1.0}, {"kind": "folder", "path": "photos"}]}`: `kind` is
    scenes, photos, crops, folder or shards, `weight` is 1 unless given, and the other keys are the fields of
    that source. `size` is in pixels; every source gets its own seed, drawn from `seed`.

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
            raise ValueError(f"source {entry!r} is not a mapping: give {{kind: {entry}, …}}")
        options = dict(entry)
        kind = options.pop("kind", None)
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"unknown kind of source {kind!r}: accepted are {', '.join(_KINDS)}")
        weights.append(options.pop("weight", 1.0))
        accepted = {item.name for item in fields(_KINDS[kind]) if item.init} - {"size", "seed"}
        needed = accepted & {"path", "pattern"}
        if not needed <= set(options) <= accepted:
            keys = ", ".join(map(str, options)) or "nothing"
            raise ValueError(
                f"source {kind!r} was given {keys}: accepted are {', '.join(sorted({'weight', *accepted}))}"
                + (f"; needed is {', '.join(needed)}" if needed else "")
            )
        own_seed = int(np.random.SeedSequence((seed, position)).generate_state(1)[0])
        sources.append(_KINDS[kind](size=size, seed=own_seed, **options))
    mixture = Mixture(sources, weights, seed)  # made for one source too: it checks the weights
    return mixture if len(sources) > 1 else sources[0]


@dataclass
class _Samples(Dataset):
    """A source as torch's loader takes it: number → uint8 tensor [3, size, size]."""

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
) -> Generator[torch.Tensor]:
    """Batches without end: uint8 [batch_size, 3, size, size], on the CPU; close it to end its workers.

    Step t of rank r holds the samples from `(t * world_size + r) * batch_size` on, whatever the number of
    worker processes (0 reads in this one): a run resumed with `start=t` continues the same batches.

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
    prepare = worker_started if workers else None
    samples = DataLoader(_Samples(source), batch_sampler=batches, num_workers=workers, worker_init_fn=prepare)
    return _closable(start_workers(samples))


def _closable(batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    yield from batches
