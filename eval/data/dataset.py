"""Images in batches, decoded in worker processes while the model works; unreadable ones are not fatal."""

import functools
import hashlib
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ...images import load_image
from ...train.workers import start as start_workers
from ...train.workers import worker_started
from .sources import Dataset, open_dataset

__all__ = [
    "Batch",
    "Dataset",
    "batches",
    "cores",
    "decode",
    "first_readable",
    "one",
    "open_dataset",
    "worker_count",
]

NICE = 10
"""Scheduling priority (niceness) of workers: one that takes a core from a model on all cores slows every
thread."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The readable images among consecutive ones of a dataset, and what was wrong with the others.

    `indices` int64 [B] are positions in the dataset, `images` uint8 [B, 3, H, W] on the CPU, `names` and
    `digests` have one per image; equal digests are equal pixels, as evaluated. `bad` has (index, name,
    reason) of the unreadable images; if all are, B is 0.
    """

    indices: Tensor
    images: Tensor
    names: list[str]
    digests: list[bytes]
    bad: list[tuple[int, str, str]]


def batches(
    dataset: Dataset,
    size: int,
    batch_size: int,
    *,
    crop: bool = True,
    multiple: int = 1,
    workers: int = 1,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Every image of a dataset once, in order: uint8 [B, 3, size, size], as `decode` makes them.

    Batch k holds the images `[k * batch_size, (k + 1) * batch_size)`, fewer if some are unreadable. A rank
    takes batches rank, rank + world_size, …, and skips the first `start` of them unread: which images share a
    batch depends on neither. With `crop=False` the shorter side becomes `size`, both sides are cut to a
    multiple of `multiple`, and every batch holds one image, whatever `batch_size` is.

    `workers` processes decode ahead (0: this one decodes, on demand); they start at once, and end with the
    iterator, which `contextlib.closing` ends early. They are spawned, not forked, so a script needs
    `if __name__ == "__main__":` around what calls this.

    Raises:
        ValueError: a size, batch size or multiple below 1, a multiple above `size` or beside a crop, a
            negative start or number of workers, or a rank that is not below the world size.
    """
    counts_fit = min(size, batch_size, multiple) >= 1 and start >= 0 and workers >= 0
    if not counts_fit or not 0 <= rank < world_size:
        raise ValueError(
            f"batches({size=}, {batch_size=}, {multiple=}, {start=}, {workers=}, {rank=}, {world_size=}): "
            "size, batch_size and multiple start at 1, start and workers at 0, rank runs from 0 to "
            "world_size - 1"
        )
    if multiple > (1 if crop else size):
        raise ValueError(f"{multiple=} is for crop=False and at most size; got {crop=}, {size=}")
    decoded = _Decoded(dataset, size, batch_size if crop else 1, crop, multiple)
    numbers = range(len(decoded))[rank + start * world_size :: world_size]
    return _named(dataset, _loader(decoded, numbers, min(workers, len(numbers))))


def decode(encoded: bytes, size: int, *, crop: bool = True, multiple: int = 1) -> np.ndarray:
    """An encoded image as uint8 [H, W, 3].

    To the bit these are the levels of `vistok.to_tensor(encoded, size, profile="ignore")`: published
    evaluation protocols ignore ICC profiles. Without `crop` both sides are cut to a multiple of `multiple`.

    Raises:
        ValueError: what `load_image` refuses, no bytes at all, and images too narrow to resize.
    """
    if not encoded:
        raise ValueError("the file is empty")
    image = load_image(encoded, profile="ignore")
    short, long = sorted(image.size)
    stretched = int(size * long / short)
    resized = (stretched, size) if image.height <= image.width else (size, stretched)
    if resized != image.size:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and size * stretched > limit:
            raise ValueError(
                f"{image.width} x {image.height} pixels are too narrow to resize: with {size} on the shorter "
                f"side there would be more than PIL.Image.MAX_IMAGE_PIXELS = {limit}"
            )
        image = image.resize(resized, Image.Resampling.BICUBIC)
    kept = (size, size) if crop else tuple(side - side % multiple for side in resized)
    if kept != resized:
        left, top = (round((side - own) / 2) for side, own in zip(resized, kept, strict=True))
        image = image.crop((left, top, left + kept[0], top + kept[1]))
    return np.array(image)


def first_readable(dataset: Dataset, size: int, batch_size: int = 1, **options: Any) -> Batch | None:
    """The first batch that has an image, None if none can be read; `options` are those of `batches`."""
    with closing(batches(dataset, size, batch_size, **options, workers=0)) as read:
        return next((batch for batch in read if len(batch.images)), None)


def one(dataset: Dataset, number: int, size: int, **options: Any) -> Batch:
    """A batch of one readable image; `options` are those of `decode`."""
    pixels = torch.from_numpy(decode(dataset.read(number), size, **options)).permute(2, 0, 1)
    return Batch(torch.tensor([number]), pixels[None], [dataset.names[number]], [], [])


def worker_count(count: int | None = None) -> int:
    """`count`, or by default one per core of this process, up to eight: they have a lower priority than the
    model."""
    if count is not None:
        return count
    return max(1, min(8, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# What runs in the workers -----------------------------------------------------------------------------------


# What a worker sends: indices, images [B, 3, H, W], digests, and (index, reason) of the unreadable.
_Part = tuple[list[int], Tensor, list[bytes], list[tuple[int, str]]]


@dataclass
class _Decoded(TorchDataset):
    """A dataset for torch's loader: the number of a batch → its decoded images."""

    dataset: Dataset
    size: int
    batch_size: int
    crop: bool
    multiple: int

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __getitem__(self, number: int) -> _Part:
        indices, images, digests, bad = [], [], [], []
        first = number * self.batch_size
        for index in range(first, min(first + self.batch_size, len(self.dataset))):
            try:
                encoded = self.dataset.read(index)
                pixels = decode(encoded, self.size, crop=self.crop, multiple=self.multiple)
            except (OSError, ValueError) as error:
                bad.append((index, _reason(error)))
                continue
            indices.append(index)
            images.append(torch.from_numpy(pixels).permute(2, 0, 1))
            digests.append(hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest())
        empty = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return indices, torch.stack(images) if images else empty, digests, bad


def _reason(error: OSError | ValueError) -> str:
    """The reason why an image cannot be read, in one line, the same in every run."""
    cause = error.__cause__ or error
    if isinstance(cause, UnidentifiedImageError):
        return "no image in a format that Pillow reads"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause).strip().partition("\n")[0] or type(cause).__name__


def _start_worker(max_image_pixels: int | None, number: int) -> None:
    """Make a new process decode as its parent would."""
    if hasattr(os, "nice"):
        os.nice(NICE)
    worker_started()
    Image.MAX_IMAGE_PIXELS = max_image_pixels
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # reported as a bad image


# What runs beside the model ---------------------------------------------------------------------------------


def _loader(decoded: _Decoded, numbers: range, workers: int) -> Iterator[_Part]:
    options = {}
    if workers:
        # A fork of this process could inherit a lock that one of its threads holds, and wait for it forever.
        method = "forkserver" if sys.platform == "linux" else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            # Torch is imported once, not in every worker.
            context.set_forkserver_preload([__name__, "vistok.train.worker_server"])
        options = {
            "multiprocessing_context": context,
            "worker_init_fn": functools.partial(_start_worker, Image.MAX_IMAGE_PIXELS),
        }
    # A generator of its own: the loader draws a seed, and must not draw it from the program's generator.
    generator = torch.Generator()
    loader = DataLoader(
        decoded, batch_size=None, sampler=numbers, num_workers=workers, generator=generator, **options
    )
    return start_workers(loader)


def _named(dataset: Dataset, parts: Iterable[_Part]) -> Iterator[Batch]:
    for indices, images, digests, bad in parts:
        names = [dataset.names[index] for index in indices]
        unreadable = [(index, dataset.names[index], reason) for index, reason in bad]
        yield Batch(torch.tensor(indices, dtype=torch.int64), images, names, digests, unreadable)
