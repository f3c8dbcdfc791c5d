"""Short videos of known objects that move, appear and vanish, with questions that one frame cannot answer.

Objects of a video move along parallel lanes of their own, all along rows or all along columns, so that none
hides another. As for pictures, everything is a function of a split, a seed and an index, and no answer can be
guessed from the question.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .layout import (
    COLOURS,
    GRID_SIDE,
    MATERIALS,
    PICTURE_SIZE,
    SHAPES,
    SPLITS,
    ObjectScene,
    SceneObject,
    choice,
)
from .picture import render
from .questions import Question

VIDEO_CATEGORIES = ("order", "count", "direction")
VIDEO_WORDS = ("appears", "vanishes", "last", "does", "move", "up", "down", "nowhere", "seen")
"""Words of questions about videos that questions about pictures do not have."""
DIRECTIONS = {(1, 0): "right", (-1, 0): "left", (0, 1): "down", (0, -1): "up", (0, 0): "nowhere"}
_LANE = PICTURE_SIZE // GRID_SIDE
_RADIUS = 8  # pixels, so that an object stays within its lane


@dataclass(frozen=True)
class MovingObject:
    """An object that is seen from frame `first` to frame `last` and moves `step` pixels per frame (across,
    down) from where `item` is in frame 0."""

    item: SceneObject
    step: tuple[int, int]
    first: int
    last: int

    @property
    def direction(self) -> str:
        """Where it moves: right, left, down, up or nowhere."""
        return DIRECTIONS[int(np.sign(self.step[0])), int(np.sign(self.step[1]))]


@dataclass(frozen=True)
class VideoScene:
    """What a video of `frames` frames shows; `seed` draws its background."""

    objects: tuple[MovingObject, ...]
    frames: int
    seed: tuple[int, ...]

    def frame(self, number: int) -> tuple[ObjectScene, frozenset[int]]:
        """The scene of one frame, and the numbers of its objects that are not seen in it."""
        items = tuple(
            replace(each.item, x=each.item.x + number * each.step[0], y=each.item.y + number * each.step[1])
            for each in self.objects
        )
        hidden = frozenset(i for i, each in enumerate(self.objects) if not each.first <= number <= each.last)
        return ObjectScene(items, (), self.seed, ()), hidden


def video_scene(split: str, seed: int, index: int, frames: int = 8) -> VideoScene:
    """Video number `index` of the endless sequence (`split`, `seed`), with three to five objects.

    Raises:
        ValueError: another split, a negative seed or index, or fewer than 4 or more than 64 frames.
    """
    if split not in SPLITS or seed < 0 or index < 0:
        raise ValueError(
            f"video_scene({split!r}, {seed=}, {index=}): split is one of {', '.join(SPLITS)}, seed and index "
            "start at 0"
        )
    if not 4 <= frames <= 64:
        raise ValueError(f"frames is {frames}; videos have 4 to 64 frames")
    key = (SPLITS[split], seed, index, 7)
    rng = np.random.default_rng(key)
    rows = rng.random() < 0.5
    count = int(rng.integers(3, 6))
    pairs = rng.permutation(len(COLOURS) * len(SHAPES))[:count]  # no two objects look alike
    lanes = rng.permutation(GRID_SIDE)[:count]
    objects = []
    for pair, lane in zip(pairs, lanes, strict=True):
        travel = (PICTURE_SIZE - 2 * _RADIUS - 2) // (frames - 1)  # pixels per frame, at most
        speed = int(rng.choice((-1, 0, 1), p=(0.4, 0.2, 0.4))) * int(rng.integers(1, max(2, travel + 1)))
        reach = abs(speed) * (frames - 1)
        start = int(rng.integers(_RADIUS + 1, PICTURE_SIZE - _RADIUS - reach))
        start += reach if speed < 0 else 0
        centre = int(lane) * _LANE + _LANE // 2
        x, y = (start, centre) if rows else (centre, start)
        colour, shape = list(COLOURS)[pair // len(SHAPES)], SHAPES[pair % len(SHAPES)]
        item = SceneObject(colour, shape, choice(rng, MATERIALS), "small", x, y, _RADIUS)
        first, last = _seen(rng, frames)
        objects.append(MovingObject(item, (speed, 0) if rows else (0, speed), first, last))
    return VideoScene(tuple(objects), frames, key)


def _seen(rng: np.random.Generator, frames: int) -> tuple[int, int]:
    """The first and last frame of an object: about a third appear later, a third vanish earlier."""
    first = int(rng.integers(1, frames // 2)) if rng.random() < 0.4 else 0
    last = int(rng.integers(frames // 2, frames - 1)) if rng.random() < 0.4 else frames - 1
    return first, last


def render_video(scene: VideoScene) -> np.ndarray:
    """Draw a video: uint8 [frames, 120, 120, 3], sRGB. What does not move has the same pixels throughout."""
    return np.stack([render(*scene.frame(number)) for number in range(scene.frames)])


def video_questions(
    scene: VideoScene, rng: np.random.Generator, categories: tuple[str, ...] = VIDEO_CATEGORIES
) -> list[Question]:
    """One question of each category that this video allows, in that order.

    "order" asks for the colour or shape of the thing that appears or vanishes first or last, "count" how many
    things appear, vanish or are seen in all, "direction" where a thing moves.

    Raises:
        ValueError: a name that is not in `VIDEO_CATEGORIES`.
    """
    makers = {"order": _order, "count": _count, "direction": _direction}
    asked = []
    for category in categories:
        if category not in makers:
            raise ValueError(f"category {category!r} is not one of {', '.join(VIDEO_CATEGORIES)}")
        pair = makers[category](scene, rng)
        if pair is not None:
            asked.append(Question(category, *pair))
    return asked


def video_test_questions(
    count: int = 600, split: str = "test", seed: int = 0, frames: int = 8
) -> Iterator[tuple[VideoScene, Question]]:
    """Yield `count` videos of a split, each with one question; categories take turns.

    A question is passed over where its answer is already ahead of a third of its category. A smaller `count`
    gives the beginning of the same set. Raises ValueError as `video_scene`.
    """
    index = number = 0
    uses: Counter[tuple[str, str]] = Counter()
    while number < count:
        scene = video_scene(split, seed, index, frames)
        category = VIDEO_CATEGORIES[number % len(VIDEO_CATEGORIES)]
        asked = video_questions(scene, np.random.default_rng((*scene.seed, 2)), (category,))
        index += 1
        if asked and uses[category, asked[0].answer] < 3 + number / len(VIDEO_CATEGORIES) / 3:
            uses[category, asked[0].answer] += 1
            number += 1
            yield scene, asked[0]


def _order(scene: VideoScene, rng: np.random.Generator) -> tuple[str, str] | None:
    verb = choice(rng, ("appears", "vanishes"))
    if verb == "appears":
        moments = {each: each.first for each in scene.objects if each.first > 0}
    else:
        moments = {each: each.last for each in scene.objects if each.last < scene.frames - 1}
    which = choice(rng, ("first", "last"))
    order = sorted(moments, key=moments.__getitem__, reverse=which == "last")
    if len(order) < 2 or moments[order[0]] == moments[order[1]]:
        return None
    asked = choice(rng, ("colour", "shape"))
    return f"what {asked} is the thing that {verb} {which}?", getattr(order[0].item, asked)


def _count(scene: VideoScene, rng: np.random.Generator) -> tuple[str, str] | None:
    late = sum(each.first > 0 for each in scene.objects)
    gone = sum(each.last < scene.frames - 1 for each in scene.objects)
    question, number = choice(
        rng,
        (
            ("how many things appear later?", late),
            ("how many things vanish?", gone),
            ("how many things are seen in all?", len(scene.objects)),
        ),
    )
    return question, str(number)


def _direction(scene: VideoScene, rng: np.random.Generator) -> tuple[str, str] | None:
    each = choice(rng, scene.objects)
    return f"where does the {each.item.colour} {each.item.shape} move?", each.direction
