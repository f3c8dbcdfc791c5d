"""How pictures of any size are divided into the square tiles that a tokenizer takes."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

Size = tuple[int, int]
"""Height and width, in pixels."""


@dataclass(frozen=True)
class TileLayout:
    """The sizes of pictures that are coded in tiles, and the tiles' side and overlap.

    `sizes` has (height, width) in pixels of every picture. Tiles of `side`×`side` pixels cover a picture row
    by row from its upper left corner, ceil(height / side) rows of ceil(width / side) tiles; what the last
    ones have beyond the picture is padding. `overlap` is the width in pixels of the strip that neighbours
    share, half of it on either side of their border: an even number up to `side`, or 0.

    Raises:
        ValueError: sizes, side or overlap outside these ranges.
        TypeError: numbers that are not whole.
    """

    sizes: tuple[Size, ...]
    side: int
    overlap: int = 0

    def __post_init__(self) -> None:
        """Check the numbers, and store them as plain integers."""
        object.__setattr__(self, "sizes", tuple(_checked_size(size) for size in self.sizes))
        for name in ("side", "overlap"):
            object.__setattr__(self, name, operator.index(getattr(self, name)))
        if self.side < 1:
            raise ValueError(f"tiles have a side of 1 pixel or more; got {self.side}")
        if not 0 <= self.overlap <= self.side or self.overlap % 2:
            raise ValueError(
                f"tiles of {self.side} pixels overlap by an even number of pixels in 0..{self.side}; got "
                f"{self.overlap}"
            )

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.sizes)

    @cached_property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of tiles of every picture."""
        return tuple((-(-height // self.side), -(-width // self.side)) for height, width in self.sizes)

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of tiles where all pictures have the same, else None."""
        return self.grids[0] if len(set(self.grids)) == 1 else None

    @property
    def counts(self) -> list[int]:
        """The number of tiles of every picture."""
        return [rows * columns for rows, columns in self.grids]

    @property
    def total(self) -> int:
        """The number of tiles of all pictures."""
        return sum(self.counts)

    def pick(self, pictures: Sequence[int]) -> tuple["TileLayout", list[int]]:
        """The layout of some of the pictures, by number, and the numbers of their tiles among all."""
        first, places = 0, []
        for count in self.counts:
            places.append(range(first, first + count))
            first += count
        layout = TileLayout(tuple(self.sizes[number] for number in pictures), self.side, self.overlap)
        return layout, [tile for number in pictures for tile in places[number]]

    def picture_of_tiles(self) -> list[int]:
        """The number of the picture that each tile belongs to."""
        return [number for number, count in enumerate(self.counts) for _ in range(count)]


def _checked_size(size: Size) -> Size:
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"the size of a picture is (height, width) in pixels; got {size!r}")
    height, width = map(operator.index, size)
    if height < 1 or width < 1:
        raise ValueError(f"the sides of a picture are 1 pixel or more; got {height}×{width}")
    return height, width
