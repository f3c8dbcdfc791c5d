"""Questions about a scene with one right answer each, and the fixed test set.

No answer can be guessed from the question. Every kind of question has at least four answers that are equally
likely before the picture is seen, so the best constant answer stays below 30% in every category. That is why
existence asks which of two things is there (first, second, both, neither) and never expects yes or no.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .layout import (
    COLOURS,
    MATERIALS,
    SHAPES,
    SIZES,
    ObjectScene,
    SceneObject,
    choice,
    grid_cell,
    object_scene,
)

CATEGORIES = ("attribute", "existence", "count", "relation", "comparison", "reading", "grounding")

_ATTRIBUTES = {"size": SIZES, "colour": tuple(COLOURS), "material": MATERIALS, "shape": SHAPES}
_NAMED = ("colour", "shape", "material")  # attributes that are asked for; the size only sets objects apart
_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """A question about one picture, its only right answer, and the category (one of `CATEGORIES`)."""

    category: str
    question: str
    answer: str


def questions(
    scene: ObjectScene, rng: np.random.Generator, categories: Sequence[str] = CATEGORIES
) -> list[Question]:
    """Ask one question of each category in `categories` that this scene allows, in that order.

    A category may repeat. The result is shorter than `categories` where a scene allows no question of a kind
    (two uniquely named objects in a clear direction, for example).

    Raises:
        ValueError: a name that is not in `CATEGORIES`.
    """
    asked = []
    for category in categories:
        if category not in _MAKERS:
            raise ValueError(f"category {category!r} is not one of {', '.join(CATEGORIES)}")
        pair = _MAKERS[category](scene, rng)
        if pair is not None:
            asked.append(Question(category, *pair))
    return asked


def test_questions(
    count: int = 2000, split: str = "test", seed: int = 0
) -> Iterator[tuple[ObjectScene, Question]]:
    """Yield the fixed test set: `count` scenes of a split, each with one question; categories take turns.

    A question is passed over where its answer is already ahead of a quarter of its category, so no constant
    answer does better than that. A smaller `count` gives the beginning of the same set.

    With "combinations" about half of the objects asked about have a pair of `HELD_OUT_PAIRS`.

    Raises:
        ValueError: as `object_scene`.
    """
    index = number = 0
    uses: Counter[tuple[str, str]] = Counter()
    while number < count:
        scene = object_scene(split, seed, index)
        rng = np.random.default_rng((*scene.seed, 2))
        asked = questions(scene, rng, (CATEGORIES[number % len(CATEGORIES)],))
        index += 1
        if asked and uses[asked[0].category, asked[0].answer] < 3 + number / len(CATEGORIES) / 4:
            uses[asked[0].category, asked[0].answer] += 1
            number += 1
            yield scene, asked[0]


test_questions.__test__ = False  # not a test of pytest


def _matches(item: SceneObject, description: dict[str, str]) -> bool:
    return all(getattr(item, name) == value for name, value in description.items())


def _phrase(description: dict[str, str], is_plural: bool = False) -> str:
    words = [description[name] for name in _ATTRIBUTES if name in description]
    if "shape" not in description:
        words.append("thing")
    if is_plural:
        words[-1] = plural(words[-1])
    return " ".join(words)


def plural(noun: str) -> str:
    """Return the plural of a shape or of "thing"."""
    return "crosses" if noun == "cross" else f"{noun}s"


_TEMPLATE_WORDS = (
    "what is the colour shape material which there or how many things are thing where seen from more most "
    "common does sign read in cell first second both neither equal left right above below leftmost rightmost "
    "topmost bottommost"
)
VOCABULARY = tuple(
    sorted(
        {word for values in _ATTRIBUTES.values() for word in values}
        | {plural(word) for word in (*SHAPES, "thing")}
        | set(re.findall(r"\w+", _TEMPLATE_WORDS))
    )
)
"""All words of questions and answers, but for codes, cells and numbers, whose characters stand alone."""

_DESCRIPTIONS = tuple(
    tuple(name for bit, name in enumerate(_ATTRIBUTES) if mask >> bit & 1)
    for mask in range(1, 1 << len(_ATTRIBUTES))
)


def _describe(
    scene: ObjectScene, rng: np.random.Generator, item: SceneObject, unasked: str | None = None
) -> str | None:
    """A phrase that only `item` fits, of one to three attributes without `unasked`; None where none does."""
    options = []
    for names in _DESCRIPTIONS:
        if len(names) > 3 or unasked in names:
            continue
        description = {name: getattr(item, name) for name in names}
        if sum(_matches(other, description) for other in scene.objects) == 1:
            options.append(description)
    if not options:
        return None
    shortest = min(map(len, options))
    return _phrase(choice(rng, [each for each in options if len(each) <= shortest + 1]))


def _shuffled(rng: np.random.Generator, items: Sequence[_T]) -> list[_T]:
    return [items[i] for i in rng.permutation(len(items))]


def _attribute(scene: ObjectScene, rng: np.random.Generator) -> tuple[str, str] | None:
    asked = choice(rng, _NAMED)
    for item in _shuffled(rng, scene.objects):
        phrase = _describe(scene, rng, item, unasked=asked)
        if phrase:
            return f"what {asked} is the {phrase}?", getattr(item, asked)
    return None


def _existence(scene: ObjectScene, rng: np.random.Generator) -> tuple[str, str] | None:
    present = _shuffled(rng, sorted({(item.colour, item.shape) for item in scene.objects}))
    absent = [pair for pair in _shuffled(rng, scene.pairs) if pair not in present]
    if rng.random() < 0.7:  # near misses first: the colour or the shape is there, on another object
        near = {item.colour for item in scene.objects} | {item.shape for item in scene.objects}
        absent.sort(key=lambda pair: not (pair[0] in near or pair[1] in near))
    answer = choice(rng, ("first", "second", "both", "neither"))
    chosen = {
        "first": (present[0], absent[0]),
        "second": (absent[0], present[0]),
        "both": tuple(present[:2]),
        "neither": tuple(absent[:2]),
    }[answer]
    if len(chosen) < 2:
        return None
    first, second = (" ".join(pair) for pair in chosen)
    return f"which is there, {first} or {second}?", answer


def _count(scene: ObjectScene, rng: np.random.Generator) -> tuple[str, str] | None:
    name = choice(rng, _NAMED)
    counts: dict[int, list[str]] = {}
    for value in _ATTRIBUTES[name]:
        number = sum(getattr(item, name) == value for item in scene.objects)
        counts.setdefault(number, []).append(value)
    most = max(counts)
    # The main value has two to five objects, so this gives each answer from 0 to 5 about the same share.
    few = [number for number in counts if number < 2]
    number = choice(rng, few) if few and rng.random() < 1 / 3 else most
    if number > 5:
        return None
    return f"how many {_phrase({name: choice(rng, counts[number])}, is_plural=True)} are there?", str(number)


def _relation(scene: ObjectScene, rng: np.random.Generator) -> tuple[str, str] | None:
    if rng.random() < 0.3:
        return _extreme(scene, rng)
    answer = choice(rng, ("left", "right", "above", "below"))
    for item in _shuffled(rng, scene.objects):
        for other in _shuffled(rng, scene.objects):
            if other is item or _direction(item, other) != answer:
                continue
            phrases = _describe(scene, rng, item), _describe(scene, rng, other)
            if all(phrases):
                return f"where is the {phrases[0]}, seen from the {phrases[1]}?", answer
    return None


def _direction(item: SceneObject, other: SceneObject) -> str | None:
    """Where `item` lies from `other`; None near the diagonals."""
    across, down = item.x - other.x, item.y - other.y
    if abs(across) > 1.4 * abs(down):
        return "right" if across > 0 else "left"
    if abs(down) > 1.4 * abs(across):
        return "below" if down > 0 else "above"
    return None


def _extreme(scene: ObjectScene, rng: np.random.Generator) -> tuple[str, str] | None:
    place, axis, sign = choice(
        rng, (("leftmost", "x", 1), ("rightmost", "x", -1), ("topmost", "y", 1), ("bottommost", "y", -1))
    )
    order = sorted(scene.objects, key=lambda item: sign * getattr(item, axis))
    if len(order) > 1 and abs(getattr(order[0], axis) - getattr(order[1], axis)) < 6:
        return None
    asked = choice(rng, _NAMED)
    return f"what {asked} is the {place} thing?", getattr(order[0], asked)


def _comparison(scene: ObjectScene, rng: np.random.Generator) -> tuple[str, str] | None:
    name = choice(rng, ("colour", "shape"))
    counts = {
        value: sum(getattr(item, name) == value for item in scene.objects) for value in _ATTRIBUTES[name]
    }
    if rng.random() < 0.4:
        order = sorted(counts, key=counts.__getitem__)
        if counts[order[-1]] == counts[order[-2]]:
            return None
        return f"which {name} is most common?", order[-1]
    answer = choice(rng, ("first", "second", "equal", "neither"))
    values = _shuffled(rng, list(counts))
    for first in values:
        for second in values:
            if first != second and _compare(counts[first], counts[second]) == answer:
                phrases = (_phrase({name: value}, is_plural=True) for value in (first, second))
                return f"are there more {' or '.join(phrases)}?", answer
    return None


def _compare(first: int, second: int) -> str:
    if first == second:
        return "equal" if first else "neither"
    return "first" if first > second else "second"


def _reading(scene: ObjectScene, rng: np.random.Generator) -> tuple[str, str] | None:
    if not scene.signs:
        return None
    sign = choice(rng, scene.signs)
    return f"what does the {sign.colour} sign read?", sign.code


def _grounding(scene: ObjectScene, rng: np.random.Generator) -> tuple[str, str] | None:
    for item in _shuffled(rng, scene.objects):
        phrase = _describe(scene, rng, item)
        if phrase:
            return f"in which cell is the {phrase}?", grid_cell(item.x, item.y)
    return None


_MAKERS: dict[str, Callable[[ObjectScene, np.random.Generator], tuple[str, str] | None]] = {
    "attribute": _attribute,
    "existence": _existence,
    "count": _count,
    "relation": _relation,
    "comparison": _comparison,
    "reading": _reading,
    "grounding": _grounding,
}
