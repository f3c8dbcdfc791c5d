"""Compression without a tokenizer: JPEG, WebP and AVIF files, and thumbnails, at given bytes."""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean

import torch
from PIL import Image, features
from torch import Tensor

from ...images import to_tensor
from ..data.dataset import worker_count

QUALITIES = (1, 2, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 95)
SCALES = (1, 2, 4, 8)
OPTIONS = {"JPEG": {"optimize": True}, "WebP": {"method": 6}, "AVIF": {"max_threads": 1}}


@dataclass(frozen=True)
class FileSetting:
    """A whole file of Pillow's encoder, header and all, of the picture at 1/`scale`."""

    codec: str
    quality: int
    scale: int

    @property
    def label(self) -> str:
        """The setting's name in tables."""
        return f"quality {self.quality}" + (f", 1/{self.scale}" if self.scale > 1 else "")

    def __call__(self, picture: Image.Image) -> tuple[Image.Image, int]:
        """The reconstruction, at the picture's size, and its bytes."""
        small = (max(1, picture.width // self.scale), max(1, picture.height // self.scale))
        file = io.BytesIO()
        _scaled(picture, small).save(file, self.codec, quality=self.quality, **OPTIONS[self.codec])
        return _scaled(Image.open(file).convert("RGB"), picture.size), file.tell()


@dataclass(frozen=True)
class ThumbnailSetting:
    """Bicubic down, 8 bits, bicubic up; no header is counted."""

    width: int
    height: int
    codec: str = "thumbnail"

    @property
    def label(self) -> str:
        """The setting's name in tables."""
        return f"{self.width}×{self.height} pixels"

    def __call__(self, picture: Image.Image) -> tuple[Image.Image, int]:
        """The reconstruction, at the picture's size, and its bytes."""
        small = _scaled(picture, (self.width, self.height))
        return _scaled(small, picture.size), 3 * self.width * self.height


Setting = FileSetting | ThumbnailSetting


def missing(codec: str) -> str | None:
    """The reason why a codec cannot be used here, None if it can."""
    if codec in OPTIONS and codec != "JPEG" and not features.check(codec.lower()):
        return f"Pillow was built without {codec} here: `pip install -U pillow` brings a build that has it"
    return None


def best_within(codec: str, pictures: Sequence[Image.Image], budgets: Sequence[float]) -> list[Setting]:
    """For each budget in bytes the setting of the least mean squared error over the pictures whose mean size
    fits; no setting twice, none for budgets that nothing fits."""
    originals = torch.cat([to_tensor(picture, None) for picture in pictures])
    settings = _thumbnails(budgets) if codec == "thumbnail" else _files(codec)
    results = list(_measured(settings, pictures, originals, max(budgets)))
    chosen = []
    for budget in sorted(budgets):
        within = [(error, size, setting) for setting, size, error in results if size <= budget]
        if within:
            chosen.append(min(within, key=lambda each: each[:2])[2])
    return list(dict.fromkeys(chosen))


def apply(setting: Setting, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """Reconstructions of all pictures, float32 [B, 3, H, W] in [0, 1], and its bytes, int64 [B]."""
    with ThreadPoolExecutor(worker_count()) as pool:  # encoders release Python's lock
        decoded, sizes = zip(*pool.map(setting, pictures), strict=True)
    return torch.cat([to_tensor(picture, None) for picture in decoded]), torch.tensor(sizes)


def _files(codec: str) -> Iterator[FileSetting]:
    for scale in SCALES:
        for quality in QUALITIES:
            yield FileSetting(codec, quality, scale)


def _thumbnails(budgets: Sequence[float]) -> Iterator[ThumbnailSetting]:
    """Shapes of as many pixels as fit, none longer than twice its other side."""
    for pixels in sorted({int(budget // 3) for budget in budgets}):
        for width in range(1, pixels + 1):
            if 0.5 <= width * width / pixels <= 2 and (height := pixels // width):
                yield ThumbnailSetting(width, height)


def _measured(
    settings: Iterator[Setting], pictures: Sequence[Image.Image], originals: Tensor, most: float
) -> Iterator[tuple[Setting, float, float]]:
    """Each setting with its mean bytes and mean squared error; not qualities above a too large one."""
    too_large: set[int] = set()
    for setting in settings:
        if getattr(setting, "scale", None) in too_large:
            continue
        decoded, sizes = apply(setting, pictures)
        size = fmean(sizes.tolist())
        if size > most and isinstance(setting, FileSetting):
            too_large.add(setting.scale)
        # Not a mean of PSNR, which one exact reconstruction would make infinite.
        yield setting, size, float((decoded.double() - originals).square().mean())


def _scaled(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)
