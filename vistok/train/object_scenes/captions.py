"""Captions of scenes: everything that a picture shows, in words, and where it is."""

from .layout import COLOURS, LETTERS, MATERIALS, PICTURE_SIZE, SHAPES, SIZES, ObjectScene, SceneObject, Sign

_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
CAPTION_WORDS = (*SIZES, *COLOURS, *MATERIALS, *SHAPES, "sign", *_ROWS, *_COLUMNS, *LETTERS.lower())
"""The words of captions; the characters of a sign are words of their own."""


def caption(scene: ObjectScene) -> str:
    """Name all objects and signs of a scene, from the top down and then from the left.

    "large red shiny cube top left, small blue matte ball middle centre, white sign a 4 x bottom right": size,
    colour, material, shape and the third of the picture, by rows and columns, in which the centre lies.
    """
    items = sorted([*scene.objects, *scene.signs], key=lambda item: (item.y, item.x))
    return ", ".join(_phrase(item) for item in items)


def _phrase(item: SceneObject | Sign) -> str:
    if isinstance(item, Sign):
        return f"{item.colour} sign {' '.join(item.code.lower())} {_place(item.x + item.width // 2, item.y)}"
    return f"{item.size} {item.colour} {item.material} {item.shape} {_place(item.x, item.y)}"


def _place(x: int, y: int) -> str:
    return f"{_ROWS[3 * y // PICTURE_SIZE]} {_COLUMNS[3 * x // PICTURE_SIZE]}"
