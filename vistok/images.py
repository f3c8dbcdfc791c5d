"""Files, PIL images, arrays and tensors to float tensors [B, 3, H, W] in [0, 1], and back."""

import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from .color_profiles import to_srgb
from .files import check_source
from .image_files import image_extensions as image_extensions
from .image_files import is_image as is_image
from .image_files import why_not_image

Profile = Literal["convert", "ignore"]
ImageFile = str | os.PathLike[str] | bytes | BinaryIO
ImageSource = ImageFile | Image.Image | np.ndarray | Tensor
MAX_FILE_BYTES = 2**30  # larger files are not read as images


def load_image(source: ImageFile | Image.Image, *, profile: Profile = "convert") -> Image.Image:
    """Open an image as upright 8-bit RGB: a path, encoded bytes, an open binary file, or a PIL image.

    EXIF orientation is applied; colours of an embedded ICC profile other than sRGB are converted to sRGB, as
    screens show them, unless `profile` is "ignore" (the raw numbers, which published evaluation protocols
    use); alpha is composited on white; 16-bit values (modes I;16 and I, 0..65535) and floats (mode F, 0..1)
    are scaled to 0..255. Of an animated file it is the first frame, of a PIL image the current one.

    Raises:
        FileNotFoundError: a missing file.
        OSError: a path that is not an ordinary file (a folder, pipe or device).
        ValueError: what is not a whole image: unreadable, pixels missing, values out of range, a file of more
            than MAX_FILE_BYTES, or of more than PIL.Image.MAX_IMAGE_PIXELS pixels, the guard against
            decompression bombs.
    """
    if profile not in ("convert", "ignore"):
        raise ValueError(f'profile is {profile!r}; it is "convert" (ICC profiles to sRGB) or "ignore"')
    if isinstance(source, Image.Image):
        return _decode(source, "the PIL image", profile)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open(BytesIO(source), f"the image of {len(source)} bytes", profile)
    if isinstance(source, (str, os.PathLike)):
        path = check_source(source, limit=MAX_FILE_BYTES)
        with open(path, "rb") as file:
            return _open(file, os.fspath(source), profile, path)
    if hasattr(source, "read"):
        return _open(source, str(getattr(source, "name", "the image file")), profile)
    raise TypeError(
        "an image is a path, bytes, a binary file or a PIL image (for to_tensor also an array or a tensor); "
        f"got {type(source).__name__}"
    )


def to_tensor(
    source: ImageSource | Sequence[ImageSource],
    size: int | None,
    *,
    crop: bool = True,
    profile: Profile = "convert",
) -> Tensor:
    """Turn one image or a list of them into float32 [B, 3, size, size] in [0, 1].

    Files and PIL images go through `load_image`, which also takes `profile`. NumPy arrays are [H, W],
    [H, W, C] or [B, H, W, C], tensors [C, H, W] or [B, C, H, W], with C 1 (grey) or 3; both uint8, or floats
    in [0, 1]. A list may mix them all. Tensors stay on their device. An empty list gives [0, 3, size, size].

    The shorter side is resized to `size` (bicubic, antialiased), the longer to int(size * long / short); then
    the centre is cropped: the evaluation protocol of TiTok ("An Image is Worth 32 Tokens for Reconstruction
    and Generation", 2024, arXiv:2406.07550), exact to the bit for 8-bit images. `crop=False` keeps the whole
    picture, `size=None` also its resolution; the images of a list must then come out in one size.

    ValueError for other shapes and dtypes, and for floats that are NaN or outside [0, 1].
    """
    size = _checked_size(size)
    sources = source if isinstance(source, (list, tuple)) else [source]
    if not sources:
        if size is None:
            raise ValueError("an empty list of images has no resolution of its own: give a size")
        return torch.zeros(0, 3, size, size)
    batches = [_to_batch(each, size, crop, profile) for each in sources]
    shapes, devices = {batch.shape[1:] for batch in batches}, {batch.device for batch in batches}
    if len(shapes) > 1:
        sizes = ", ".join(sorted(f"{width}x{height}" for _, height, width in shapes))
        raise ValueError(f"images of one batch need one size; got {sizes}: give a size and leave crop=True")
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"images of one batch need one device; got {names}: move the tensors to the CPU first"
        )
    return torch.cat(batches).contiguous()  # PIL and NumPy have their channels last


def adm_center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop the centre as ADM trains on ImageNet: RGB, size x size.

    While the shorter side is at least twice `size` the image is halved by a box filter; a bicubic resize does
    the rest. ("Diffusion Models Beat GANs on Image Synthesis", 2021, arXiv:2105.05233; `center_crop_arr` in
    its code.)
    """
    image, size = load_image(image), _checked_size(size)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_pil(images: Tensor, rounding: Literal["round", "truncate"] = "round") -> list[Image.Image]:
    """Turn floats [B, 3, H, W] or [3, H, W] into 8-bit PIL images; values are clamped to [0, 1].

    "round" takes the nearest of the 256 levels; "truncate" the one below, as some published evaluators do.
    ValueError for other shapes and dtypes, and for NaN.
    """
    if rounding not in ("round", "truncate"):
        raise ValueError(f'rounding is "round" or "truncate"; got {rounding!r}')
    batch = images[None] if images.ndim == 3 else images
    if batch.ndim != 4 or batch.shape[1] != 3 or not batch.is_floating_point():
        got = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"to_pil takes floats [B, 3, H, W] or [3, H, W] in [0, 1]; got {got}")
    levels = batch.detach().float().clamp(0, 1) * 255  # [B, 3, H, W]
    if levels.isnan().any():
        raise ValueError("to_pil got NaN, which is not a pixel value: look for it where the images were made")
    if rounding == "round":
        levels = levels.round()
    return [Image.fromarray(array) for array in levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()]


def side_by_side(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str] | None = None) -> Image.Image:
    """Compose rows of images into one picture on white, with one caption above each column.

    Images keep their size; a column is as wide as its widest image or caption. ValueError without any
    image, and for another number of labels than columns.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise ValueError("side_by_side got no images: it takes rows of at least one")
    if labels is not None and len(labels) != columns:
        raise ValueError(f"side_by_side takes one label per column, here {columns}; got {len(labels)}")
    rows = [[load_image(image) for image in row] for row in rows]  # upright, as they are measured below
    gap, font = 4, ImageFont.load_default(14)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox
    boxes = [measure((0, 0), label, font=font) for label in labels or ()]
    widths = [max(row[column].width for row in rows if column < len(row)) for column in range(columns)]
    if labels is not None:
        widths = [max(width, round(box[2])) for width, box in zip(widths, boxes, strict=True)]
    header = max((round(box[3]) + gap for box in boxes), default=0)
    heights = [max((image.height for image in row), default=0) for row in rows]

    canvas_size = (sum(widths) + gap * (columns + 1), header + sum(heights) + gap * (len(rows) + 1))
    canvas = Image.new("RGB", canvas_size, "white")
    lefts = [gap + sum(widths[:column]) + gap * column for column in range(columns)]
    draw = ImageDraw.Draw(canvas)
    for left, label in zip(lefts, labels or (), strict=False):
        draw.multiline_text((left, gap), label, fill="black", font=font)
    top = header + gap
    for row, height in zip(rows, heights, strict=True):
        for left, image in zip(lefts, row, strict=False):
            canvas.paste(image, (left, top))
        top += height + gap
    return canvas


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn what PIL raises on a bad file into a ValueError that names it."""
    try:
        yield
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(_bomb_message(name, str(error))) from error
    except Exception as error:  # On a broken file PIL's decoders raise nearly anything, SyntaxError included.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a format that Pillow opens" if unknown else error
        raise ValueError(f"{name} is not an image, or a truncated or broken one: {reason}") from error


def _bomb_message(name: str, reason: str) -> str:
    return (
        f"{name} is too large to open safely (a decompression bomb?): {reason}; "
        "if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS"
    )


def _checked_size(size: int | None) -> int | None:
    """The size as an int, NumPy's integers included; ValueError for what is not a positive whole number."""
    try:
        number = None if size is None else operator.index(size)
    except TypeError:
        number = 0
    if number is not None and (number < 1 or isinstance(size, bool)):
        raise ValueError(
            f"size is the side of the images in pixels, 1 or more, or None to keep theirs; got {size!r}"
        )
    return number


def _open(file: BinaryIO, name: str, profile: Profile, path: Path | None = None) -> Image.Image:
    try:
        with _decoding(name):
            image = Image.open(file)
    except ValueError as error:
        kind = why_not_image(path) if path is not None else None
        if kind is None:
            raise
        raise ValueError(f"{name} is not an image that Pillow opens but {kind}") from error
    # PIL only warns above this limit. A filter that made its warning an error would act on all threads.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(_bomb_message(name, f"{image.width} x {image.height} pixels, the limit is {limit}"))
    return _decode(image, name, profile)


def _decode(image: Image.Image, name: str, profile: Profile) -> Image.Image:
    """Load the pixels and make them upright 8-bit RGB."""
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: it is {image.width} x {image.height}")
    with _decoding(name):
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_to_grey(image, name)
    elif profile == "convert":
        image = to_srgb(image, name)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _deep_to_grey(image: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit integers or floats to 8 bits; a PNG's transparent grey becomes white."""
    values, highest = np.asarray(image), 1 if image.mode == "F" else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= highest):  # NaN included
        raise ValueError(
            f"{name} has mode {image.mode} and values in {low}..{high}; accepted are 0..{highest}: rescale it"
        )
    grey = np.rint(values * (255 / highest)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _to_batch(source: ImageSource, size: int | None, crop: bool, profile: Profile) -> Tensor:
    """One source as float32 [B, 3, H, W] in [0, 1], resized and cropped."""
    if isinstance(source, np.ndarray):
        batch = _array_to_batch(source)
    elif isinstance(source, Tensor):
        batch = source[None] if source.ndim == 3 else source
        _check_batch(batch, source, "tensors are [C, H, W] or [B, C, H, W]")
    else:
        batch = torch.from_numpy(np.array(load_image(source, profile=profile))).permute(2, 0, 1)[None]
    batch = batch.expand(-1, 3, -1, -1)  # [B, 3, H, W], grey repeated
    if batch.is_floating_point():
        batch = batch.float()
        _check_unit_range(batch)
    if size is not None:
        batch = _resize_and_crop(batch, size, crop)
    return batch / 255 if batch.dtype == torch.uint8 else batch


def _array_to_batch(array: np.ndarray) -> Tensor:
    if np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32)
    if array.dtype != np.uint8 and array.dtype != np.float32:
        raise ValueError(
            f"image arrays are uint8, or floats in [0, 1]; got {array.dtype}: convert them first"
        )
    shaped = array[None, ..., None] if array.ndim == 2 else array[None] if array.ndim == 3 else array
    batch = torch.from_numpy(shaped.copy())
    batch = batch.permute(0, 3, 1, 2) if batch.ndim == 4 else batch  # [B, C, H, W]
    _check_batch(batch, array, "arrays are [H, W], [H, W, C] or [B, H, W, C]")
    return batch


def _check_batch(batch: Tensor, source: np.ndarray | Tensor, layouts: str) -> None:
    """Refuse a batch that is not [B, 1 or 3, H, W] of bytes or floats."""
    if batch.ndim != 4 or batch.shape[1] not in (1, 3) or 0 in batch.shape[2:]:
        raise ValueError(
            f"image {layouts}, with C 1 (grey) or 3 (RGB); got {list(source.shape)}: "
            "reorder the axes, or composite alpha first (PIL images may have it)"
        )
    if batch.dtype != torch.uint8 and not batch.is_floating_point():
        raise ValueError(
            f"image tensors are uint8, or floats in [0, 1]; got {batch.dtype}: convert them first"
        )


def _check_unit_range(batch: Tensor) -> None:
    if batch.numel() == 0:
        return
    low, high = (extreme.item() for extreme in batch.detach().aminmax())
    if low >= 0 and high <= 1:
        return
    if low != low:
        fix = "find the NaN where the images were made"
    elif -1 <= low < 0 and high <= 1:
        fix = "if they are in [-1, 1], use (x + 1) / 2"
    elif low >= 0 and 2 < high <= 255:
        fix = "if they are in [0, 255], divide by 255 or give uint8"
    else:
        fix = "rescale them, or clamp(0, 1) an overshoot"
    raise ValueError(f"float images must be in [0, 1]; got values from {low:.6g} to {high:.6g}: {fix}")


def _resize_and_crop(batch: Tensor, size: int, crop: bool) -> Tensor:
    """Shorter side to `size`, then the centre: [B, 3, H, W] to [B, 3, size, size], uint8 or float."""
    height, width = batch.shape[2:]
    long_side = int(size * max(height, width) / min(height, width))
    resized = (size, long_side) if height <= width else (long_side, size)
    if resized != (height, width):
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and size * long_side > limit:
            raise ValueError(
                f"an image of {width} x {height} pixels is too narrow to resize: with {size} on the shorter "
                f"side it would have more than PIL.Image.MAX_IMAGE_PIXELS = {limit} pixels: crop it first"
            )
        batch = _resize(batch, resized)
    if not crop:
        return batch
    top, left = (round((side - size) / 2) for side in resized)
    return batch[:, :, top : top + size, left : left + size]


def _resize(batch: Tensor, resized: tuple[int, int]) -> Tensor:
    if batch.is_floating_point():
        options = {"mode": "bicubic", "antialias": True, "align_corners": False}
        return F.interpolate(batch, resized, **options).clamp(0, 1)
    # Parity: 8-bit images are resized by PIL, which rounds between its two passes; interpolate does not.
    images = [Image.fromarray(image) for image in batch.permute(0, 2, 3, 1).cpu().numpy()]
    images = [np.array(image.resize(resized[::-1], Image.Resampling.BICUBIC)) for image in images]
    stacked = np.stack(images) if images else np.zeros((0, *resized, 3), np.uint8)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).to(batch.device)
