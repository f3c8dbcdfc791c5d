"""Pictures of any size through a tokenizer of one size, in tiles whose borders do not show.

A tile's tokens stand for its square of the picture and half of `overlap` more on the sides where it has a
neighbour, reduced to the tokenizer's size: neighbours both describe the strip along their border. Decoding
enlarges each tile to its region again and blends the strip, with weights that go linearly from one tile to
the other and add up to one. Where two tiles differ in brightness or colour over the strip, half of the
difference is taken out of either, less with the distance from the border. Nothing here depends on a
tokenizer's weights.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .adaptive import AdaptiveTokens
from .tile_layout import TileLayout
from .tokens import Tokens

DEFAULT_SHARE = 16
"""The default overlap is the side of a tile divided by this: 8 pixels for tiles of 128."""
BATCH_SIZE = 16
"""Tiles that go through a tokenizer at a time."""
_ROUNDS = 4  # in which the tiles of a picture are encoded to a quality, each time to a higher one

Decode = TypeVar("Decode", bound=Callable[..., Any])


class TileTokenizer(Protocol):
    """The part of a tokenizer that coding in tiles uses."""

    image_size: int
    num_tokens: int
    conditions: tuple[str, ...]
    label: str

    def encode(self, images: Tensor, num_tokens: int | None = None, **options: Any) -> Any:
        """Images [B, 3, H, W] in [0, 1] → tokens, or AdaptiveTokens with `target_psnr`."""

    def decode(self, tokens: Tokens, **options: Any) -> Any:
        """Tokens → images [B, 3, H, W] in [0, 1]."""

    def check_pixels(self, images: Any, advice: str) -> None:
        """Raise ValueError unless images are [B, 3, H, W] floats in [0, 1], of any size."""


def takes_tiles(decode: Decode) -> Decode:
    """Decorator of a tokenizer's `decode`: tokens of pictures in tiles go through `decode_tiles`."""

    @wraps(decode)
    def decode_any(self: TileTokenizer, tokens: Any, **options: Any) -> Any:
        if isinstance(tokens, Tokens) and tokens.tiles is not None:
            return decode_tiles(self, tokens, **options)
        return decode(self, tokens, **options)

    return decode_any  # type: ignore[return-value]


# Pictures → tokens ------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_tiles(
    tokenizer: TileTokenizer,
    images: Tensor | Sequence[Tensor],
    num_tokens: int | None = None,
    *,
    target_psnr: float | None = None,
    overlap: int | None = None,
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> Tokens | AdaptiveTokens:
    """Pictures of any size → tokens of their tiles, as `Tokenizer.encode_tiles`."""
    pictures = _checked_pictures(tokenizer, images)
    side = tokenizer.image_size
    overlap = side // DEFAULT_SHARE // 2 * 2 if overlap is None else overlap
    layout = TileLayout(tuple(tuple(picture.shape[1:]) for picture in pictures), side, overlap)
    batch_size = _checked_batch_size(batch_size)

    def encode(layout: TileLayout, pictures: list[Tensor], **quality: float) -> Tokens:
        batches = _tile_batches(pictures, layout, batch_size)
        parts = [tokenizer.encode(batch, num_tokens, **quality, **options) for batch in batches]
        parts = [part.tokens if isinstance(part, AdaptiveTokens) else part for part in parts]
        return dataclasses.replace(Tokens.cat(parts), grid=None, tiles=layout)

    if target_psnr is None:
        return encode(layout, pictures)
    results = []
    for number, picture in enumerate(pictures):
        own = layout.pick([number])[0]
        encode_one = partial(encode, own, [picture])
        results.append(_to_quality(tokenizer, encode_one, picture, target_psnr, batch_size))
    if not results:
        nothing = torch.zeros(0, dtype=torch.float64)
        return AdaptiveTokens(encode(layout, [], target_psnr=target_psnr), nothing, nothing.bool())
    return _with_warning(results, target_psnr)


def _checked_pictures(tokenizer: TileTokenizer, images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Pictures [3, H, W], one by one; ValueError for what is not one."""
    advice = "use vistok.to_tensor(photo, size=None)"
    if isinstance(images, Tensor):
        tokenizer.check_pixels(images, advice)
        pictures = list(images)
    elif isinstance(images, (list, tuple)):
        for number, image in enumerate(images):
            if not isinstance(image, Tensor) or image.ndim != 3:
                kind = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise ValueError(
                    f"picture {number} of the list is {kind}; a list of pictures holds tensors [3, H, W]: "
                    f"{advice}[0]"
                )
            tokenizer.check_pixels(image[None], advice)
        pictures = list(images)
    else:
        raise ValueError(
            f"pictures are a {type(images).__name__}; {tokenizer.label} takes a float tensor [B, 3, H, W] or "
            f"a list of tensors [3, H, W]: {advice}"
        )
    return pictures


def _tile_batches(pictures: list[Tensor], layout: TileLayout, batch_size: int) -> Iterator[Tensor]:
    """The tiles of all pictures, [up to batch_size, 3, side, side] in [0, 1], at least one batch."""
    places = _places(layout)
    if not places:
        yield torch.zeros(0, 3, layout.side, layout.side)
    matrices = _matrices(layout, _reducing)
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        windows = [_window(pictures[number], row, column, layout) for number, row, column, _, _ in batch]
        stacked = torch.stack([window.to(windows[0]) for window in windows])  # [n, 3, window, window]
        vertical, horizontal = _of_tiles(matrices.to(stacked), batch)
        yield (vertical @ stacked @ horizontal.mT).clamp_(0, 1)


def _window(picture: Tensor, row: int, column: int, layout: TileLayout) -> Tensor:
    """A tile of a picture [3, H, W] with its margins, [3, window, window]; beyond the picture its edge
    continues."""
    line = torch.arange(layout.side + layout.overlap, device=picture.device) - layout.overlap // 2
    rows, columns = (
        (line + place * layout.side).clamp(0, size - 1)
        for place, size in zip((row, column), picture.shape[1:], strict=True)
    )
    return picture[:, rows[:, None], columns].to(_working_dtype(picture.dtype))


def _to_quality(
    tokenizer: TileTokenizer,
    encode: Callable[..., Tokens],
    picture: Tensor,
    target_psnr: float,
    batch_size: int,
) -> tuple[Tokens, float]:
    """The tokens of one picture [3, H, W] and the dB that the whole of it decodes to.

    Every tile is encoded to the target. Where the picture falls short (some tiles do not reach it, and
    resizing costs a little), its tiles aim higher by as much.
    """
    tokens, best, reached, aim = None, None, -math.inf, target_psnr
    for _ in range(_ROUNDS):
        before = tokens
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* do not reach")  # reported once, for whole pictures
            tokens = encode(target_psnr=aim)
        if tokens == before:  # no tile has more to give
            break
        decoded = decode_tiles(tokenizer, tokens, batch_size=batch_size)[0]
        dtype = _working_dtype(picture.dtype)
        error = (decoded.to(picture.device, dtype) - picture.to(dtype).clamp(0, 1)).square().mean()
        psnr = -10 * float(error.log10())
        if psnr > reached:
            best, reached = tokens, psnr
        if psnr >= target_psnr:
            break
        aim += target_psnr - psnr + 0.01
    return best, reached


def _with_warning(results: list[tuple[Tokens, float]], target_psnr: float) -> AdaptiveTokens:
    """The pictures' tokens joined, and a UserWarning where some do not reach the target."""
    psnr = torch.tensor([quality for _, quality in results], dtype=torch.float64)
    reached = psnr >= target_psnr
    if not bool(reached.all()):
        warnings.warn(
            f"{int((~reached).sum())} of {len(results)} pictures do not reach {target_psnr:g} dB (the worst "
            f"has {float(psnr.min()):.2f} dB) and keep the best prefixes tried: lower target_psnr, or look "
            "at `reached`",
            stacklevel=5,
        )
    return AdaptiveTokens(Tokens.cat([tokens for tokens, _ in results]), psnr, reached)


# Tokens → pictures ------------------------------------------------------------------------------------------


@torch.no_grad()
def decode_tiles(
    tokenizer: TileTokenizer, tokens: Tokens, *, batch_size: int = BATCH_SIZE, **options: Any
) -> Tensor | list[Tensor]:
    """Tokens of pictures in tiles → the pictures at their own sizes, in [0, 1].

    A tensor [B, 3, H, W] where all have one size, and a list of tensors [3, H, W] where sizes differ.
    `batch_size` tiles are decoded at a time; `options` are those of the tokenizer's `decode`, conditions with
    one per picture.

    Raises:
        ValueError: tokens without tiles or of tiles of another side than the tokenizer's images, another
            number of conditions than pictures, and whatever `decode` refuses.
    """
    layout = tokens.tiles
    if layout is None:
        raise ValueError("these tokens are not of pictures in tiles; use decode")
    if layout.side != tokenizer.image_size:
        raise ValueError(
            f"these tokens are of tiles of {layout.side}×{layout.side} pixels; {tokenizer.label} decodes "
            f"{tokenizer.image_size}×{tokenizer.image_size}"
        )
    if "size" in options:
        raise ValueError("tokens of pictures in tiles hold the pictures' sizes; leave size out")
    batch_size = _checked_batch_size(batch_size)
    per_tile = {
        name: _per_tile(name, options.pop(name), layout)
        for name in ("condition", *tokenizer.conditions)
        if options.get(name) is not None
    }
    tiles = dataclasses.replace(tokens, tiles=None, grid=None, names=None)
    if not len(layout):
        return tokenizer.decode(tiles, **per_tile, **options)
    batches = (
        tokenizer.decode(tiles[rows], **{name: values[rows] for name, values in per_tile.items()}, **options)
        for rows in (slice(start, start + batch_size) for start in range(0, len(tiles), batch_size))
    )
    pictures = list(_assembled(layout, batches, batch_size))
    return torch.stack(pictures) if len(set(layout.sizes)) == 1 else pictures


def _assembled(layout: TileLayout, batches: Iterator[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Decoded tiles in batches → pictures [3, H, W], one after the other."""
    places, matrices, weights = _places(layout), _matrices(layout, _enlarging), _matrices(layout, _weights)
    canvas: _Canvas | None = None
    for start, decoded in zip(range(0, len(places), batch_size), batches, strict=True):
        batch = places[start : start + batch_size]
        tiles = decoded.to(_working_dtype(decoded.dtype))
        vertical, horizontal = _of_tiles(matrices.to(tiles), batch)
        regions = vertical @ tiles @ horizontal.mT  # [n, 3, window, window]
        down, across = (each.squeeze(1) for each in _of_tiles(weights.to(tiles), batch))  # [n, window]
        for index, (number, row, column, _, _) in enumerate(batch):
            if canvas is None:
                canvas = _Canvas(layout, number, regions)
            canvas.add(regions[index], row, column, down[index], across[index])
            if (row, column) == canvas.last:
                yield canvas.picture().to(decoded.dtype)
                canvas = None


class _Canvas:
    """One picture that is put together from its tiles, given row by row."""

    def __init__(self, layout: TileLayout, number: int, like: Tensor) -> None:
        (rows, columns), self.size = layout.grids[number], layout.sizes[number]
        self.side, self.overlap, self.margin = layout.side, layout.overlap, layout.overlap // 2
        self.last = rows - 1, columns - 1
        self.pixels = like.new_zeros(3, *(count * self.side + self.overlap for count in (rows, columns)))
        self.before: Tensor | None = None  # the right strip of the tile before
        self.above: dict[int, Tensor] = {}  # the lower strip of the row above, by column
        self.smoothing, self.profile = _levelling(layout, like)

    def add(self, region: Tensor, row: int, column: int, down: Tensor, across: Tensor) -> None:
        """Add a tile with its margins [3, window, window], weighted by `down` × `across`, and level its
        borders with the tiles before and above."""
        top, left = row * self.side, column * self.side
        rows, columns = (slice(start, start + region.shape[-1]) for start in (top, left))
        self.pixels[:, rows, columns] += region * down[:, None] * across
        if not self.overlap:
            return
        reach = len(self.profile) // 2
        if column:
            step = (self.before - region[:, :, : self.overlap]).mean(2) @ self.smoothing * down  # [3, window]
            border = left + self.margin
            self.pixels[:, rows, border - reach : border + reach] += step[:, :, None] * self.profile
        if row:
            step = (self.above[column] - region[:, : self.overlap]).mean(1) @ self.smoothing * across
            border = top + self.margin
            self.pixels[:, border - reach : border + reach, columns] += step[:, None] * self.profile[:, None]
        self.before, self.above[column] = region[:, :, self.side :], region[:, self.side :]

    def picture(self) -> Tensor:
        """The picture without margins and padding, in [0, 1]."""
        rows, columns = (slice(self.margin, self.margin + side) for side in self.size)
        return self.pixels[:, rows, columns].clamp(0, 1)


def _levelling(layout: TileLayout, like: Tensor) -> tuple[Tensor, Tensor]:
    """How the difference of two tiles in the strip that both describe is taken out of the pixels beside it.

    Returns the smoothing along the border [window, window], transposed, and the share of the difference that
    is added across it, [2 reach] from a quarter of a tile before the border to one behind: each tile moves
    half-way to the other at the border, and less with the distance.
    """
    side, margin = layout.side, layout.overlap // 2
    line = torch.arange(side + layout.overlap, dtype=torch.float64)
    smoothing = torch.exp(-0.5 * ((line - line[:, None]) / (side / 8)).square())
    smoothing /= smoothing.sum(1, keepdim=True)
    reach = side // 4
    distance = torch.arange(-reach, reach, dtype=torch.float64) + 0.5
    own = (0.5 + distance / max(2 * margin, 1)).clamp(0, 1)  # the blending weight of the tile behind
    profile = (2 * own - 1) * (1 - distance.abs() / max(reach, 1)) / 2
    return smoothing.mT.to(like), profile.to(like)


def _per_tile(name: str, values: Any, layout: TileLayout) -> Any:
    """One condition per picture, or one text for all → one per tile."""
    if isinstance(values, str):
        return [values] * layout.total
    if len(values) != len(layout):
        raise ValueError(
            f"{len(values)} values were given as {name} for {len(layout)} pictures; give one per picture"
        )
    owners = layout.picture_of_tiles()
    if isinstance(values, Tensor):
        return values[torch.tensor(owners, dtype=torch.int64, device=values.device)]
    return [values[owner] for owner in owners]


# Both directions --------------------------------------------------------------------------------------------

Place = tuple[int, int, int, int, int]
"""Number of a picture, row and column of one of its tiles, and the kind of place along either axis."""


def _places(layout: TileLayout) -> list[Place]:
    """Where each tile lies, in the order of their rows in Tokens."""
    return [
        (number, row, column, _kind(row, rows), _kind(column, columns))
        for number, (rows, columns) in enumerate(layout.grids)
        for row in range(rows)
        for column in range(columns)
    ]


def _kind(place: int, count: int) -> int:
    """0 to 3: 1 for a neighbour before, 2 for one after."""
    return (place > 0) + 2 * (place < count - 1)


def _of_tiles(matrices: Tensor, batch: list[Place]) -> tuple[Tensor, Tensor]:
    """The matrices for the rows and for the columns of every tile, each [n, 1, …]."""
    vertical, horizontal = (torch.tensor([place[axis] for place in batch]) for axis in (3, 4))
    return (
        matrices[vertical.to(matrices.device)].unsqueeze(1),
        matrices[horizontal.to(matrices.device)].unsqueeze(1),
    )


def _matrices(layout: TileLayout, make: Callable[[int, int, int, int], Tensor]) -> Tensor:
    """The matrix along one axis for every kind of place, [4, …]."""
    margin = layout.overlap // 2
    return torch.stack(
        [make(layout.side, margin, margin * (kind & 1), margin * (kind >> 1)) for kind in range(4)]
    )


def _reducing(side: int, margin: int, before: int, after: int) -> Tensor:
    """A window of a tile and its margins → the tile's region in it, reduced: [side, side + 2 margin]."""
    matrix = torch.zeros(side, side + 2 * margin, dtype=torch.float64)
    reach = before + side + after
    matrix[:, margin - before : margin + side + after] = _resizing(reach, side)
    return matrix


def _enlarging(side: int, margin: int, before: int, after: int) -> Tensor:
    """A decoded tile → its window: its region, enlarged, and copies of its edge on outer sides:
    [side + 2 margin, side]."""
    region = _resizing(side, before + side + after)
    first, last = region[:1].expand(margin - before, -1), region[-1:].expand(margin - after, -1)
    return torch.cat([first, region, last])


def _weights(side: int, margin: int, before: int, after: int) -> Tensor:
    """The weights of a tile's window, [side + 2 margin]; those of two neighbours add up to one."""
    ramp = (torch.arange(2 * margin, dtype=torch.float64) + 0.5) / max(2 * margin, 1)
    weights = torch.ones(side + 2 * margin, dtype=torch.float64)
    if before:
        weights[: 2 * margin] *= ramp
    if after:
        weights[side:] *= ramp.flip(0)
    return weights


def _resizing(size: int, target: int) -> Tensor:
    """The matrix of a bicubic, antialiased resize of a line of pixels, [target, size]."""
    line = torch.eye(size, dtype=torch.float64)
    if size == target:
        return line
    shape = (target, size)
    return F.interpolate(line[None, None], shape, mode="bicubic", antialias=True, align_corners=False)[0, 0]


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _checked_batch_size(batch_size: int) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; it is 1 or more tiles at a time")
    return batch_size
