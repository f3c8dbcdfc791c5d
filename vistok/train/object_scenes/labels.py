"""What each patch of a picture shows: targets for training a vision tower."""

import math

import numpy as np

from .layout import (
    COLOURS,
    LETTER_PITCH,
    LETTERS,
    MATERIALS,
    PICTURE_SIZE,
    SHAPES,
    SIGN_HEIGHT,
    SIZES,
    ObjectScene,
    Sign,
)
from .picture import outline

LABELS = {
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES) + 2,
    "material": len(MATERIALS) + 1,
    "size": len(SIZES) + 1,
    "centre": 2,
    "left_letter": len(LETTERS) + 1,
    "right_letter": len(LETTERS) + 1,
}
"""Label of a patch to its number of classes; class 0 is "nothing", the last class of shape is a sign."""


def patch_labels(scene: ObjectScene, patch_size: int) -> np.ndarray:
    """Report what each patch shows: int64 [120 / patch_size, 120 / patch_size, 7], in the order of `LABELS`.

    A patch belongs to the object or sign that covers most of it, at least a tenth. "centre" is 1 where an
    object's centre lies. The letters are those whose centre lies in the left and right half of the patch, for
    patches of at most 10 pixels, where each half has at most one letter; larger patches have none.

    Raises:
        ValueError: the patch size does not divide 120.
    """
    if patch_size < 1 or PICTURE_SIZE % patch_size:
        raise ValueError(f"patch_size {patch_size} does not divide {PICTURE_SIZE}, the side of a picture")
    side = PICTURE_SIZE // patch_size
    owner = np.zeros((PICTURE_SIZE, PICTURE_SIZE), dtype=np.int64)
    items = [*scene.objects, *scene.signs]
    rows = np.zeros((len(items) + 1, len(LABELS)), dtype=np.int64)
    colours = list(COLOURS)
    for number, item in enumerate(items, start=1):
        if isinstance(item, Sign):
            owner[item.y : item.y + SIGN_HEIGHT, item.x : item.x + item.width] = number
            rows[number, :2] = colours.index(item.colour) + 1, len(SHAPES) + 1
        else:
            cover = outline(item.shape, item.radius)[0] > 0.5
            top, left = item.y - item.radius, item.x - item.radius
            owner[top : top + len(cover), left : left + len(cover)][cover] = number
            rows[number, :4] = (
                colours.index(item.colour) + 1,
                SHAPES.index(item.shape) + 1,
                MATERIALS.index(item.material) + 1,
                SIZES.index(item.size) + 1,
            )
    line = np.arange(PICTURE_SIZE) // patch_size
    cell = (line[:, None] * side + line) * (len(items) + 1) + owner
    counts = np.bincount(cell.ravel(), minlength=side * side * (len(items) + 1)).reshape(side * side, -1)
    counts[:, 0] = math.ceil(patch_size * patch_size / 10)
    labels = rows[counts.argmax(axis=1)].reshape(side, side, -1)
    for item in scene.objects:
        labels[item.y // patch_size, item.x // patch_size, 4] = 1
    if patch_size <= 10:
        for sign in scene.signs:
            row = (sign.y + SIGN_HEIGHT // 2) // patch_size
            for place, character in enumerate(sign.code):
                x = sign.x + 2 + place * LETTER_PITCH + 3
                half = x % patch_size >= patch_size / 2
                labels[row, x // patch_size, 5 + half] = LETTERS.index(character) + 1
    return labels
