"""Rate–distortion of an ordered tokenizer beside thumbnail, JPEG and WebP, each at its real number of
bytes."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..images import to_pil, to_tensor
from ..tokenizer import Tokenizer
from .metrics.image import psnr

HEADER = ["codec", "setting", "bytes", "PSNR dB"]


@dataclass(frozen=True)
class Point:
    """One setting of one codec: mean bytes and mean PSNR over the images."""

    codec: str
    setting: str
    bytes: float
    psnr: float


@dataclass(frozen=True)
class Curves:
    """All points, and how many images they are means of."""

    count: int
    points: list[Point]

    def table(self) -> list[list[str]]:
        """Rows under HEADER."""
        return [[p.codec, p.setting, f"{p.bytes:.1f}", f"{p.psnr:.2f}"] for p in self.points]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"images": self.count, "points": [vars(point) for point in self.points]}


def measure(tokenizer: Tokenizer, images: Tensor) -> Curves:
    """Every prefix 1, 2, 4, … and the full length of `tokenizer` on images [B, 3, S, S] in [0, 1], and the
    baselines.

    A thumbnail is bicubic down, 8 bits, bicubic up, with no header counted; it gets the most pixels that fit
    the bytes of each prefix. JPEG and WebP are whole files of Pillow's encoder over qualities and
    downscalings, of which the best at each size is kept.
    """
    points, pictures = [], to_pil(images)
    lengths = [k for k in (2**n for n in range(20)) if k < tokenizer.num_tokens] + [tokenizer.num_tokens]
    tokens = tokenizer.encode(images)
    for k in lengths if tokenizer.ordered else lengths[-1:]:
        prefix = tokens.prefix(k) if tokenizer.ordered else tokens
        decoded = tokenizer.decode(prefix).cpu()
        size = float(prefix.bits_per_image.float().mean()) / 8
        points.append(Point(tokenizer.label, f"{k} tokens", size, float(psnr(decoded, images).mean())))
        points += _best_thumbnail(pictures, images, size)
    for codec in ("JPEG", "WebP"):
        points += list(_frontier(_files(codec, pictures, images)))
    return Curves(len(images), sorted(points, key=lambda p: (p.codec != tokenizer.label, p.codec, p.bytes)))


def _best_thumbnail(pictures: list[Image.Image], images: Tensor, budget: float) -> list[Point]:
    """The thumbnail of at most `budget` bytes (3 a pixel) that is best on average; none below one pixel."""
    pixels = int(budget // 3)
    shapes = {
        (width, pixels // width) for width in range(1, pixels + 1) if 0.5 <= width * width / pixels <= 2
    }
    found = []
    for width, height in shapes:
        if height:
            small = [_scaled(picture, (width, height)) for picture in pictures]
            quality = _quality([_scaled(s, p.size) for s, p in zip(small, pictures, strict=True)], images)
            found.append(Point("thumbnail", f"{width}×{height} pixels", 3.0 * width * height, quality))
    return [max(found, key=lambda p: p.psnr)] if found else []


def _files(codec: str, pictures: list[Image.Image], images: Tensor) -> Iterator[Point]:
    """Real files over qualities and downscalings, up to about 2 kB."""
    side = pictures[0].width
    for scale in (1, 2, 4, 8):
        for quality in (1, 2, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 95):
            decoded, total = [], 0
            for picture in pictures:
                file = io.BytesIO()
                options = {"optimize": True} if codec == "JPEG" else {"method": 6}
                _scaled(picture, (side // scale, side // scale)).save(file, codec, quality=quality, **options)
                total += file.tell()
                decoded.append(_scaled(Image.open(file).convert("RGB"), picture.size))
            if total / len(pictures) > 2048:
                break
            yield Point(
                codec, f"quality {quality}, 1/{scale}", total / len(pictures), _quality(decoded, images)
            )


def _frontier(points: Iterator[Point]) -> Iterator[Point]:
    """The points that no smaller one equals."""
    best = float("-inf")
    for point in sorted(points, key=lambda p: (p.bytes, -p.psnr)):
        if point.psnr > best:
            best = point.psnr
            yield point


def _scaled(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def _quality(decoded: list[Image.Image], images: Tensor) -> float:
    return float(psnr(torch.cat([to_tensor(picture, None) for picture in decoded]), images).mean())


def plot(curves: Curves, path: str | Path) -> None:
    """Bytes (logarithmic) against PSNR, one line a codec. Needs matplotlib (`pip install "vistok[eval]"`)."""
    from matplotlib.figure import Figure

    from ..files import written_aside

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    by_codec: dict[str, list[Point]] = {}
    for point in curves.points:
        by_codec.setdefault(point.codec, []).append(point)
    for number, (codec, points) in enumerate(by_codec.items()):
        points = sorted(points, key=lambda p: p.bytes)
        style = {"linewidth": 2.5, "marker": "o"} if number == 0 else {"linewidth": 1.5, "marker": "."}
        axes.plot([p.bytes for p in points], [p.psnr for p in points], label=codec, **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("bytes an image")
    axes.set_ylabel(f"PSNR, dB (mean of {curves.count} images)")
    axes.grid(alpha=0.3)
    axes.legend()
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")
