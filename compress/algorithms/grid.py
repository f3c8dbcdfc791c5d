"""Where each visual token of an image comes from: the layout that position-aware reducers need."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """The N visual tokens of one image, in the order in which they enter the LLM.

    `tile` [N] is the encoder input (tile) a token comes from and `index` [N] its row-major place among
    the tile's `height` · `width` tokens; both are -1 for a separator, such as the newline vector of
    LLaVA-NeXT, that shows no patch. The image is cut into `rows` × `cols` tiles, numbered row by row from
    `first`; `thumbnail` is the number of the tile that shows the whole image, or None where there is none.
    `image_size` (height, width in pixels) is known where padding was cut away from the stitched map of the
    tiles. With `video` the tiles are the frames of a video, in order (one row of `cols`). Raises ValueError
    for tokens that name no place of these tiles.
    """

    tile: Tensor
    index: Tensor
    height: int
    width: int
    rows: int = 1
    cols: int = 1
    thumbnail: int | None = None
    first: int = 0
    image_size: tuple[int, int] | None = None
    video: bool = False

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.rows, self.cols) < 1:
            raise ValueError("a grid has at least one tile of at least one token")
        if self.tile.ndim != 1 or self.tile.shape != self.index.shape:
            raise ValueError(
                f"tile and index are [N]; they have {list(self.tile.shape)} and {list(self.index.shape)}"
            )
        if self.tile.dtype != torch.int64 or self.index.dtype != torch.int64:
            raise ValueError(f"tile and index are int64, not {self.tile.dtype} and {self.index.dtype}")
        cut = (self.tile >= self.first) & (self.tile < self.first + self.rows * self.cols)
        in_tiles = cut if self.thumbnail is None else cut | (self.tile == self.thumbnail)
        inside = (self.index >= 0) & (self.index < self.tokens_per_tile)
        if not bool(((in_tiles & inside) | ((self.tile == -1) & (self.index == -1))).all()):
            raise ValueError(
                "a token is outside the grid: tile numbers are those of the cut tiles or the thumbnail, "
                f"index is below {self.tokens_per_tile}, and both are -1 for a separator"
            )

    @classmethod
    def single(cls, height: int, width: int) -> "Grid":
        """One tile of height × width tokens in raster order, as in LLaVA-1.5."""
        index = torch.arange(height * width)
        return cls(torch.zeros_like(index), index, height, width)

    @classmethod
    def tiled(
        cls,
        rows: int,
        cols: int,
        height: int,
        width: int,
        *,
        thumbnail: Literal["first", "last"] | None = None,
        image_size: tuple[int, int] | None = None,
        newline: bool = False,
        decimals: int | None = 7,
    ) -> "Grid":
        """rows × cols tiles of height × width tokens, stitched into one map and read in raster order.

        With `image_size` (height, width in pixels) the padding that gave the image the map's aspect ratio is
        cut away (see `unpadded`); `newline` ends each remaining row with a separator. The thumbnail's tokens
        come before the map or after it.
        """
        first = 1 if thumbnail == "first" else 0
        number = {"first": 0, "last": rows * cols, None: None}[thumbnail]
        top, bottom, left, right = 0, rows * height, 0, cols * width
        if image_size is not None:
            top, bottom, left, right = unpadded(bottom, right, image_size, decimals=decimals)
        row, col = torch.arange(top, bottom)[:, None], torch.arange(left, right)[None]
        tile = first + (row // height) * cols + col // width
        index = (row % height) * width + col % width
        if newline:
            end = torch.full((len(row), 1), -1)
            tile, index = torch.cat([tile, end], 1), torch.cat([index, end], 1)
        parts = [(tile.flatten(), index.flatten())]
        if number is not None:
            whole = torch.arange(height * width)
            parts.insert(0 if thumbnail == "first" else 1, (torch.full_like(whole, number), whole))
        tile, index = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(tile, index, height, width, rows, cols, number, first, image_size)

    @classmethod
    def anyres(
        cls,
        image_size: tuple[int, int],
        pinpoints: Sequence[Sequence[int]],
        side: int,
        *,
        tile_pixels: int,
        newline: bool = True,
    ) -> "Grid":
        """LLaVA-NeXT's layout: thumbnail, then the unpadded map of the tiles with a newline after each row.

        `image_size` and the `pinpoints` (resolutions to choose from) are (height, width) in pixels; a tile is
        tile_pixels² pixels and side² tokens. Equal to `pack_image_features` of transformers.
        """
        height, width = best_resolution(image_size, pinpoints)
        if height % tile_pixels or width % tile_pixels:
            raise ValueError(f"resolution {height}×{width} is not made of tiles of {tile_pixels}²")
        return cls.tiled(
            height // tile_pixels,
            width // tile_pixels,
            side,
            side,
            thumbnail="first",
            image_size=(int(image_size[0]), int(image_size[1])),
            newline=newline,
        )

    @property
    def num_tokens(self) -> int:
        """N, separators included."""
        return len(self.tile)

    @property
    def num_tiles(self) -> int:
        """Encoder inputs P of the image, the thumbnail included."""
        return self.rows * self.cols + (self.thumbnail is not None)

    @property
    def tokens_per_tile(self) -> int:
        """Tokens that the encoder gives for one tile."""
        return self.height * self.width

    @cached_property
    def separators(self) -> Tensor:
        """Which tokens show no patch, bool [N]."""
        return self.tile < 0

    @cached_property
    def flat(self) -> Tensor:
        """tile · tokens_per_tile + index of each token, -1 for separators, [N]."""
        return torch.where(self.separators, -1, self.tile * self.tokens_per_tile + self.index)

    @cached_property
    def place(self) -> Tensor:
        """The place in the sequence of each token of each tile, [P, tokens_per_tile]; -1 for padding."""
        place = torch.full((self.num_tiles * self.tokens_per_tile,), -1, device=self.tile.device)
        patches = (~self.separators).nonzero().squeeze(1)
        place[self.flat[patches]] = patches
        return place.view(self.num_tiles, self.tokens_per_tile)

    @cached_property
    def cut(self) -> slice:
        """The tiles that cut the image, among the P."""
        return slice(self.first, self.first + self.rows * self.cols)

    @cached_property
    def shown(self) -> Tensor:
        """Which tokens of the cut tiles are not padding, bool [rows · cols, tokens_per_tile]."""
        return self.place[self.cut] >= 0

    @cached_property
    def map_row(self) -> Tensor:
        """Row in the stitched map of each token of the cut tiles, int64 [rows · cols, tokens_per_tile]."""
        tile, index = self._cut_places
        return tile // self.cols * self.height + index // self.width

    @cached_property
    def map_col(self) -> Tensor:
        """Column in the stitched map, like `map_row`."""
        tile, index = self._cut_places
        return tile % self.cols * self.width + index % self.width

    @cached_property
    def rectangle(self) -> tuple[int, int, int, int]:
        """First row, end row, first column, end column of the map's tokens that are in the sequence.

        One place where there are none, so that a map of padding alone has a size.
        """
        if not bool(self.shown.any()):
            return 0, 1, 0, 1
        row, col = self.map_row[self.shown], self.map_col[self.shown]
        return int(row.min()), int(row.max()) + 1, int(col.min()), int(col.max()) + 1

    @cached_property
    def rectangle_index(self) -> Tensor:
        """Row-major place in the `rectangle`, like `map_row`; the nearest one for padding."""
        top, bottom, left, right = self.rectangle
        row, col = self.map_row.clamp(top, bottom - 1) - top, self.map_col.clamp(left, right - 1) - left
        return row * (right - left) + col

    @cached_property
    def separator_row(self) -> Tensor:
        """Row in the stitched map that each separator ends, [number of separators]; -1 where it ends none."""
        here = torch.arange(self.num_tokens, device=self.tile.device)
        last = here.where(~self.separators, -1).cummax(0).values[self.separators]
        tile = self.tile[last.clamp_min(0)] - self.first
        row = tile // self.cols * self.height + self.index[last.clamp_min(0)] // self.width
        return row.where((last >= 0) & (tile >= 0) & (tile < self.rows * self.cols), -1)

    @cached_property
    def row_end(self) -> Tensor:
        """The place in the sequence of the separator of each row of the map, [rows · height]; -1 without."""
        place = torch.full((self.rows * self.height,), -1, device=self.tile.device)
        ends = self.separator_row >= 0
        place[self.separator_row[ends]] = self.separators.nonzero().squeeze(1)[ends]
        return place

    @cached_property
    def block(self) -> Tensor:
        """Cut tile (from 0) that shows each place of the thumbnail, [tokens_per_tile].

        The thumbnail is divided into rows × cols blocks of whole tokens; what is left over belongs to the
        last.
        """
        index = torch.arange(self.tokens_per_tile, device=self.tile.device)
        row = (index // self.width // max(1, self.height // self.rows)).clamp_max(self.rows - 1)
        col = (index % self.width // max(1, self.width // self.cols)).clamp_max(self.cols - 1)
        return row * self.cols + col

    @cached_property
    def global_position(self) -> Tensor:
        """Row and column of each token in the stitched map, float32 [N, 2]; NaN for separators.

        Tokens of cut tiles stand at whole numbers. The thumbnail's are spread over the part of the map that
        shows the image, so that equal positions mean equal places of the picture.
        """
        row, col = self.index // self.width, self.index % self.width
        tile = (self.tile - self.first).clamp_min(0)
        position = torch.stack(
            [tile // self.cols * self.height + row, tile % self.cols * self.width + col], 1
        )
        position = position.float()
        if self.thumbnail is not None:
            top, bottom, left, right = self.rectangle
            scaled_row = top + (row + 0.5) * (bottom - top) / self.height - 0.5
            scaled_col = left + (col + 0.5) * (right - left) / self.width - 0.5
            whole = (self.tile == self.thumbnail)[:, None]
            position = torch.where(whole, torch.stack([scaled_row, scaled_col], 1), position)
        return position.masked_fill(self.separators[:, None], torch.nan)

    def to(self, device: torch.device | str) -> "Grid":
        """The same grid with its tensors on `device`."""
        device = torch.device(device)
        if self.tile.device == device:
            return self
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Grid(**values | {"tile": self.tile.to(device), "index": self.index.to(device)})

    @cached_property
    def _cut_places(self) -> tuple[Tensor, Tensor]:
        tile = torch.arange(self.rows * self.cols, device=self.tile.device)[:, None]
        return tile, torch.arange(self.tokens_per_tile, device=self.tile.device)[None]


def best_resolution(image_size: tuple[int, int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The (height, width) of `pinpoints` that shows most of an image of `image_size` (height, width) pixels.

    Most effective pixels first, then the least waste, then the earlier one; LLaVA-NeXT's rule. Raises
    ValueError without pinpoints or for an image without pixels.
    """
    height, width = (int(value) for value in image_size)
    if not pinpoints or height < 1 or width < 1:
        raise ValueError(f"no resolution for {height}×{width} pixels among {len(pinpoints)}")

    def merit(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - resolution[0] * resolution[1]

    best = max(pinpoints, key=merit)
    return int(best[0]), int(best[1])


def unpadded(
    height: int, width: int, image_size: tuple[int, int], *, decimals: int | None = 7
) -> tuple[int, int, int, int]:
    """Rows and columns (first, end, first, end) of a height × width map that show the image, not padding.

    `image_size` is (height, width). Lengths are cut to whole numbers after rounding to `decimals`, as
    transformers does; the first LLaVA code did not round (None). An odd remainder keeps one row of padding.
    """
    image_height, image_width = image_size

    def trimmed(length: float, whole: int) -> tuple[int, int]:
        image_length = int(length if decimals is None else round(length, decimals))
        padding = (whole - image_length) // 2
        return padding, whole - padding

    if image_width / image_height > width / height:
        return *trimmed(image_height * (width / image_width), height), 0, width
    return 0, height, *trimmed(image_width * (height / image_height), width)


def square_side(tokens: int) -> int:
    """The side of a square map of `tokens`. Raises ValueError where they are not a square number."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"a frame has {tokens} tokens, which are not a square map; give a square number")
    return side
