"""Procedural solids with exact insides, to train tokenizers of 3D shapes without a data set.

A shape is one to three primitives, joined or cut from each other, turned and fitted into [-0.9, 0.9]³. Its
field is a signed distance for a primitive and bounded by one for several: the sign, which tells inside from
outside, is exact.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SPLITS = {"train": 0, "validation": 1, "test": 2}
"""Split name to the first word of the seed of its shapes."""
REACH = 0.9
Field = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Shape:
    """A solid: `field` maps points [M, 3] to values [M] that are negative inside, `name` states its parts."""

    name: str
    field: Field

    def inside(self, points: np.ndarray) -> np.ndarray:
        """Which of the points [M, 3] are inside, bool [M]."""
        return self.field(points) < 0

    def surface(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`count` points on the surface and their outward unit normals, float32 [count, 3] each.

        Points of the cube are moved along the field's gradient until they lie within 0.004 of the surface.
        """
        points, normals = np.empty((0, 3)), np.empty((0, 3))
        while len(points) < count:
            moved = rng.uniform(-1, 1, (2 * count, 3))
            for _ in range(6):
                value, slope = self._slope(moved)
                moved = np.clip(moved - value[:, None] * slope, -1, 1)
            value, slope = self._slope(moved)
            near = np.abs(value) < 0.004
            points, normals = np.concatenate([points, moved[near]]), np.concatenate([normals, slope[near]])
        return points[:count].astype(np.float32), normals[:count].astype(np.float32)

    def _slope(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values [M] and normalised gradients [M, 3]."""
        step = 1e-4
        ahead = np.concatenate([points + step * axis for axis in np.eye(3)])
        behind = np.concatenate([points - step * axis for axis in np.eye(3)])
        values = self.field(np.concatenate([points, ahead, behind])).reshape(7, -1)
        slope = (values[1:4] - values[4:]).T
        return values[0], slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-12)


def shape(split: str, seed: int, index: int) -> Shape:
    """Shape number `index` of the endless sequence (`split`, `seed`): a pure function of its arguments.

    Raises:
        ValueError: a split that is not in `SPLITS`, or a negative seed or index.
    """
    if split not in SPLITS or seed < 0 or index < 0:
        raise ValueError(
            f"shape({split!r}, {seed=}, {index=}): split is one of {', '.join(SPLITS)}, seed and index start "
            "at 0"
        )
    rng = np.random.default_rng((SPLITS[split], seed, index))
    count = int(rng.choice((1, 2, 3), p=(0.35, 0.4, 0.25)))
    names, fields = zip(*(_part(rng, count) for _ in range(count)), strict=True)
    name, field = names[0], fields[0]
    for other_name, other in zip(names[1:], fields[1:], strict=True):
        cut = _cut(field, other)
        if rng.random() < 0.3 and len(_inside(cut)) >= 100:
            name, field = f"{name} - {other_name}", cut
        else:
            name, field = f"{name} + {other_name}", _joined(field, other)
    return _fitted(name, field)


def primitive(name: str) -> Shape:
    """A primitive by name, upright and fitted: sphere, box, cylinder, torus, cone or capsule."""
    if name not in _PRIMITIVES:
        raise ValueError(f"there is no primitive {name!r}; there are {', '.join(_PRIMITIVES)}")
    return _fitted(name, _PRIMITIVES[name](np.array([0.6, 0.6, 0.6])))


def _part(rng: np.random.Generator, count: int) -> tuple[str, Field]:
    name = str(rng.choice(list(_PRIMITIVES)))
    field = _PRIMITIVES[name](rng.uniform(0.3, 0.7, 3))
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    offset = rng.uniform(-0.35, 0.35, 3) if count > 1 else np.zeros(3)
    return name, lambda points: field((points - offset) @ turn)


def _joined(one: Field, two: Field) -> Field:
    return lambda points: np.minimum(one(points), two(points))


def _cut(one: Field, two: Field) -> Field:
    return lambda points: np.maximum(one(points), -two(points))


def _inside(field: Field) -> np.ndarray:
    """Points of a coarse grid that are inside or close to it [n, 3]."""
    line = np.linspace(-1.4, 1.4, 36)
    grid = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    return grid[field(grid) < 0.04]


def _fitted(name: str, field: Field) -> Shape:
    """Centre the shape and scale it to reach `REACH` along its longest side, by a grid of its inside."""
    inside = _inside(field)
    low, high = inside.min(0), inside.max(0)
    centre, scale = (low + high) / 2, (high - low).max() / 2 / REACH
    return Shape(name, lambda points: field(points * scale + centre) / scale)


def _sphere(size: np.ndarray) -> Field:
    return lambda p: np.linalg.norm(p, axis=1) - size[0]


def _box(size: np.ndarray) -> Field:
    def field(p: np.ndarray) -> np.ndarray:
        beyond = np.abs(p) - size
        return np.linalg.norm(np.maximum(beyond, 0), axis=1) + np.minimum(beyond.max(1), 0)

    return field


def _cylinder(size: np.ndarray) -> Field:
    def field(p: np.ndarray) -> np.ndarray:
        beyond = np.stack([np.hypot(p[:, 0], p[:, 1]) - size[0], np.abs(p[:, 2]) - size[2]], 1)
        return np.linalg.norm(np.maximum(beyond, 0), axis=1) + np.minimum(beyond.max(1), 0)

    return field


def _torus(size: np.ndarray) -> Field:
    ring, tube = size[0], 0.35 * size[1]
    return lambda p: np.hypot(np.hypot(p[:, 0], p[:, 1]) - ring, p[:, 2]) - tube


def _cone(size: np.ndarray) -> Field:
    radius, half = size[0], size[2]
    length = np.hypot(radius, 2 * half)
    across, along = 2 * half / length, radius / length

    def field(p: np.ndarray) -> np.ndarray:
        side = across * np.hypot(p[:, 0], p[:, 1]) + along * (p[:, 2] - half)
        return np.maximum(side, -half - p[:, 2])

    return field


def _capsule(size: np.ndarray) -> Field:
    half, radius = size[2], 0.6 * size[0]

    def field(p: np.ndarray) -> np.ndarray:
        beyond = p[:, 2] - np.clip(p[:, 2], -half, half)
        return np.sqrt(p[:, 0] ** 2 + p[:, 1] ** 2 + beyond**2) - radius

    return field


_PRIMITIVES: dict[str, Callable[[np.ndarray], Field]] = {
    "sphere": _sphere,
    "box": _box,
    "cylinder": _cylinder,
    "torus": _torus,
    "cone": _cone,
    "capsule": _capsule,
}
