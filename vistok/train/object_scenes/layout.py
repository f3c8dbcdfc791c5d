"""Which objects and signs a picture shows, and where: a function of a split, a seed and a number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

PICTURE_SIZE = 120
"""Side of a picture in pixels."""

GRID_SIDE = 6
"""Cells per side of the grid in which grounding answers are given."""

COLOURS = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.95, 0.90, 0.18),
    "green": (0.14, 0.62, 0.18),
    "cyan": (0.20, 0.82, 0.86),
    "blue": (0.14, 0.24, 0.88),
    "purple": (0.58, 0.16, 0.72),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("cube", "ball", "cone", "star", "ring", "cross")
MATERIALS = ("matte", "shiny", "striped", "dotted")
SIZES = ("small", "large")
LETTERS = "ACEFHJKLNPRTUXYZ2479"
"""The characters of codes."""

HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("orange", "ring"),
        ("green", "cube"),
        ("cyan", "cross"),
        ("blue", "cone"),
        ("purple", "ball"),
    }
)
"""Colour and shape pairs that appear in pictures and questions of the split "combinations" only."""

SPLITS = {"train": 0, "validation": 1, "test": 2, "combinations": 3}
"""Split name to the first word of the seed of its pictures."""

_RADII = {"small": (6, 7, 8), "large": (12, 13, 14, 15)}  # pixels
LETTER_PITCH, SIGN_HEIGHT = 7, 13  # pixels
_CELL = PICTURE_SIZE // GRID_SIDE

_T = TypeVar("_T")


@dataclass(frozen=True)
class SceneObject:
    """One object; the centre (column `x`, row `y`) and the radius are in pixels."""

    colour: str
    shape: str
    material: str
    size: str
    x: int
    y: int
    radius: int


@dataclass(frozen=True)
class Sign:
    """A coloured sign with a code of two to four characters; `x` and `y` are its left and top pixel."""

    colour: str
    code: str
    x: int
    y: int

    @property
    def width(self) -> int:
        """Width in pixels."""
        return len(self.code) * LETTER_PITCH + 4


@dataclass(frozen=True)
class ObjectScene:
    """What a picture shows: objects and signs that do not overlap; `seed` draws its background."""

    objects: tuple[SceneObject, ...]
    signs: tuple[Sign, ...]
    seed: tuple[int, ...]
    pairs: tuple[tuple[str, str], ...]
    """The colour and shape pairs that questions about this picture may name."""


def grid_cell(x: float, y: float) -> str:
    """Name the cell of the 6×6 grid at pixel (x, y): column A to F from the left, row 1 to 6 from the top."""
    column, row = int(x // _CELL), int(y // _CELL)
    if not (0 <= column < GRID_SIDE and 0 <= row < GRID_SIDE):
        raise ValueError(f"pixel ({x}, {y}) lies outside the picture of {PICTURE_SIZE}×{PICTURE_SIZE} pixels")
    return f"{'ABCDEF'[column]}{row + 1}"


def object_scene(split: str, seed: int, index: int) -> ObjectScene:
    """Return scene number `index` of the endless sequence (`split`, `seed`).

    Each attribute has a main value that two to five objects share, so that counts vary. Objects do not touch,
    and their centres keep two pixels from the borders of grid cells. A sign lies inside one quadrant of the
    picture, which is one AnyRes tile.

    Args:
        split: a key of `SPLITS`. Only "combinations" draws `HELD_OUT_PAIRS`: there, about half of the objects
            are such pairs.
        seed: from 0.
        index: from 0.

    Raises:
        ValueError: another split, or a negative seed or index.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"object_scene({split!r}, {seed=}, {index=}): seed and index start at 0")
    key = (SPLITS[split], seed, index)
    rng = np.random.default_rng(key)
    combinations = split == "combinations"
    allowed = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if combinations or (colour, shape) not in HELD_OUT_PAIRS
    ]
    count = int(rng.choice((4, 5, 6, 7), p=(0.15, 0.25, 0.3, 0.3)))
    main = allowed[_below(rng, len(allowed))]
    colours = _with_main(rng, count, main[0], tuple(COLOURS))
    shapes = _with_main(rng, count, main[1], SHAPES)
    materials = _with_main(rng, count, MATERIALS[_below(rng, len(MATERIALS))], MATERIALS)
    pairs = []
    for colour, shape in zip(colours, shapes, strict=True):
        if combinations and rng.random() < 0.5:
            pair = sorted(HELD_OUT_PAIRS)[_below(rng, len(HELD_OUT_PAIRS))]
        elif (colour, shape) in allowed:
            pair = (colour, shape)
        elif colour == main[0]:
            pair = choice(rng, [each for each in allowed if each[0] == colour])
        else:
            pair = choice(rng, [each for each in allowed if each[1] == shape])
        pairs.append(pair)
    signs, objects = _place(rng, pairs, materials)
    return ObjectScene(tuple(objects), tuple(signs), key, tuple(allowed))


def _below(rng: np.random.Generator, count: int) -> int:
    """A whole number from 0 to count − 1; far quicker than `rng.integers` for one number."""
    return int(rng.random() * count)


def choice(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """One of the options, each equally likely."""
    return options[_below(rng, len(options))]


def _with_main(rng: np.random.Generator, count: int, main: str, values: tuple[str, ...]) -> list[str]:
    """`count` values: `main` two to five times, the others at random, in random order."""
    repeats = 2 + _below(rng, min(4, count - 1))
    others = [value for value in values if value != main]
    chosen = [main] * repeats + [choice(rng, others) for _ in range(count - repeats)]
    return [chosen[i] for i in rng.permutation(count)]


def _place(
    rng: np.random.Generator, pairs: list[tuple[str, str]], materials: list[str]
) -> tuple[list[Sign], list[SceneObject]]:
    """Signs and objects at places where none overlaps another; objects without a place are left out."""
    boxes: list[tuple[float, float, float, float]] = []  # left, top, right, bottom

    def is_free(left: float, top: float, right: float, bottom: float) -> bool:
        return not any(left < r and right > a and top < b and bottom > t for a, t, r, b in boxes)

    signs, half = [], PICTURE_SIZE // 2
    sign_colours = rng.permutation(len(COLOURS))
    for number in range(1 + (rng.random() < 0.6)):
        code = "".join(choice(rng, LETTERS) for _ in range(2 + _below(rng, 3)))
        sign = Sign(list(COLOURS)[sign_colours[number]], code, 0, 0)
        for _attempt in range(20):
            left = half * _below(rng, 2) + 2 + _below(rng, half - sign.width - 4)
            top = half * _below(rng, 2) + 2 + _below(rng, half - SIGN_HEIGHT - 4)
            box = (left - 2, top - 2, left + sign.width + 2, top + SIGN_HEIGHT + 2)
            if is_free(*box):
                boxes.append(box)
                signs.append(Sign(sign.colour, code, left, top))
                break
    objects, large = [], 0
    for (colour, shape), material in zip(pairs, materials, strict=True):
        size = "large" if large < 3 and rng.random() < 0.45 else "small"
        for _attempt in range(40):
            radius = choice(rng, _RADII[size])
            x, y = (_CELL * _below(rng, GRID_SIDE) + 2 + _below(rng, _CELL - 3) for _ in range(2))
            reach = radius + 2
            box = (x - reach, y - reach, x + reach, y + reach)
            inside = min(x, y) >= reach and max(x, y) + reach < PICTURE_SIZE
            if inside and is_free(*box):
                boxes.append(box)
                objects.append(SceneObject(colour, shape, material, size, x, y, radius))
                large += size == "large"
                break
            if _attempt == 25:
                size = "small"
    return signs, objects
