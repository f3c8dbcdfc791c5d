"""Batches of images of several sizes: what is accepted as a size, and which images share one."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Size = tuple[int, int]
"""Height and width, in pixels."""


def rows_by_size(sizes: Sequence[Size]) -> dict[Size, list[int]]:
    """Sizes of B images → for each different size the places of its images in the batch."""
    rows: dict[Size, list[int]] = {}
    for row, size in enumerate(sizes):
        rows.setdefault(size, []).append(row)
    return rows


def image_sizes(images: Sequence[Tensor]) -> list[Size]:
    """Height and width of every image [3, H, W] of a list; ValueError for what is not one."""
    for number, image in enumerate(images):
        if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
            got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"image {number} of the list is {got}; a list of images holds tensors [3, H, W]")
    return [tuple(image.shape[1:]) for image in images]


def batches_by_size(
    images: Sequence[Tensor], check: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Images [3, H, W] of several sizes → a batch per size, of what `check` returns for each image [1, 3, H,
    W], and the order [B] that puts the images of all batches back into theirs."""
    rows = rows_by_size(image_sizes(images))
    checked = [check(image[None]) for image in images]
    batches = [torch.cat([checked[row] for row in places]) for places in rows.values()]
    return batches, torch.tensor([row for places in rows.values() for row in places]).argsort()


def read_size(size: int | Size) -> Size:
    """A side, or (height, width), in pixels → (height, width); ValueError for anything else."""
    pair = (size, size) if _is_side(size) else size
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(map(_is_side, pair)):
        raise ValueError(
            f"size is {size!r}; give a side or (height, width) in pixels, or a list with one (height, width) "
            "per image"
        )
    return tuple(pair)


def read_sizes(sizes: Sequence[Size], batch: int) -> list[Size]:
    """One (height, width) per image; ValueError for another number of them and for anything else."""
    if len(sizes) != batch:
        raise ValueError(
            f"{len(sizes)} sizes were given for {batch} images; give one (height, width) per image"
        )
    # A list of two numbers could be meant as one (height, width), so that every entry has to be a pair.
    for size in sizes:
        if _is_side(size):
            raise ValueError(
                f"size is {sizes!r}; a list holds one (height, width) per image; one size for all of them is "
                "a side or a tuple (height, width)"
            )
    return [read_size(tuple(size) if isinstance(size, list) else size) for size in sizes]


def in_order(parts: Mapping[Size, Tensor], rows: Mapping[Size, Sequence[int]]) -> list[Tensor]:
    """Results of the images of each size, [n, …], as a list with one for each image in the batch's order."""
    ordered: dict[int, Tensor] = {}
    for size, places in rows.items():
        ordered |= dict(zip(places, parts[size], strict=True))
    return [ordered[row] for row in sorted(ordered)]


def draw_by_size(shapes: Mapping[Size, tuple[int, ...]], generator: torch.Generator) -> dict[Size, Tensor]:
    """Standard normal noise of every shape, each from the generator's present state.

    So an image gets the noise that it would have alone. Afterwards the generator has advanced past the
    largest shape.
    """
    state, results = generator.get_state(), {}
    for size, shape in sorted(shapes.items(), key=lambda item: item[1][-1] * item[1][-2]):
        generator.set_state(state)
        results[size] = torch.randn(shape, generator=generator, device=generator.device)
    return results


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
