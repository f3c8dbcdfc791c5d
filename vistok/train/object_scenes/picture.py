"""Drawing a scene: shapes, materials, signs and a soft background."""

import math
from collections.abc import Collection
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .layout import COLOURS, LETTER_PITCH, PICTURE_SIZE, SIGN_HEIGHT, ObjectScene


@cache
def outline(shape: str, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Cover and light of a shape: float32 [2 radius + 1] × 2 each; cover in [0, 1], light around 1."""
    fine = 4
    side = 2 * radius + 1
    line = (np.arange(side * fine) + 0.5) / (fine * radius) - side / (2 * radius)
    x, y = np.meshgrid(line, line)
    distance, angle = np.hypot(x, y), np.arctan2(x, -y)
    light = np.ones_like(x)
    if shape == "ball":
        inside = distance < 0.95
        light = 0.55 + 0.6 * np.clip(np.sqrt(np.clip(1 - distance**2, 0, 1)) - 0.4 * x - 0.4 * y, 0, 1.1)
    elif shape == "cube":
        inside = (np.abs(x) < 0.84) & (np.abs(y) < 0.97 - np.abs(x) * 0.5)
        light = np.where(y < -0.02 - 0.5 * np.abs(x), 1.15, np.where(x < 0, 0.85, 0.55))
    elif shape == "cone":
        inside = (np.abs(x) < 0.46 * (y + 0.97)) & (y < 0.85 - 0.35 * x**2)
        light = 0.85 - 0.4 * x / (0.5 * (y + 1.2))
    elif shape == "star":
        sector = np.abs((angle / (2 * math.pi / 5) + 0.5) % 1 - 0.5) * 2 * math.pi / 5
        notch, corner = 0.42, math.pi / 5  # inner radius, and half the angle of a tip
        inside = distance * (notch * np.sin(corner - sector) + np.sin(sector)) < notch * math.sin(corner)
    elif shape == "ring":
        inside = (distance < 0.95) & (distance > 0.5)
    else:  # cross
        inside = (np.minimum(np.abs(x), np.abs(y)) < 0.3) & (np.maximum(np.abs(x), np.abs(y)) < 0.95)
    pooled = [_pool(part.astype(np.float32), fine) for part in (inside, light)]
    return pooled[0], pooled[1]


def _pool(field: np.ndarray, factor: int) -> np.ndarray:
    side = len(field) // factor
    return field.reshape(side, factor, side, factor).mean(axis=(1, 3))


@cache
def _sprite(shape: str, radius: int, material: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cover, gain of the colour and added white of an object: float32 [side, side, 1] each."""
    cover, light = outline(shape, radius)
    line = np.arange(-radius, radius + 1)
    x, y = np.meshgrid(line, line)
    gloss = np.zeros_like(light)
    if material == "matte":
        light = 0.95 * light
    elif material == "shiny":
        along = (x + y) / radius
        gloss = 0.85 * np.exp(-(((along + 0.55) / 0.28) ** 2))
        light = light * (1 - 0.35 * np.clip(along, 0, 1))
    elif material == "striped":
        period = 4 if radius < 10 else 6
        light = np.where((x - y) % period < period / 2, 0.25 * light, light)
    else:  # dotted
        period = 4 if radius < 10 else 6
        dots = (x % period < period / 2) & (y % period < period / 2)
        light = np.where(dots, 0.1 * light, light)
        gloss = np.where(dots, 0.55, 0.0)
    parts = (cover, light, gloss)
    return tuple(part.astype(np.float32)[..., None] for part in parts)


@cache
def _glyph(character: str) -> np.ndarray:
    """Ink of a character: float32 [sign height, letter pitch] in [0, 1]."""
    image = Image.new("L", (LETTER_PITCH, SIGN_HEIGHT))
    ImageDraw.Draw(image).text((0, 0), character, font=ImageFont.load_default(10), fill=255)
    return np.asarray(image, dtype=np.float32) / 255


@cache
def _spread() -> np.ndarray:
    """Weights that enlarge five values to the side of a picture linearly: float32 [PICTURE_SIZE, 5]."""
    place = np.linspace(0, 4, PICTURE_SIZE)[:, None]
    return np.clip(1 - np.abs(place - np.arange(5)), 0, 1).astype(np.float32)


def render(scene: ObjectScene, hidden: Collection[int] = ()) -> np.ndarray:
    """Draw a scene without the objects whose numbers are `hidden`: uint8 [120, 120, 3], sRGB. The same scene
    gives the same picture (for one Pillow), and what is not hidden looks the same without the others."""
    rng = np.random.default_rng((*scene.seed, 1))
    weights = _spread()
    coarse = 0.42 + 0.1 * rng.standard_normal(dtype=np.float32)
    fields = coarse + 0.06 * rng.standard_normal((3, 5, 5), dtype=np.float32)
    shade = 0.05 * rng.standard_normal((5, 5), dtype=np.float32)
    canvas = np.clip(weights @ (0.35 * fields + 0.65 * fields.mean(axis=0) + shade) @ weights.T, 0.15, 0.7)
    canvas = canvas.transpose(1, 2, 0).copy()
    canvas += 0.02 * rng.standard_normal((PICTURE_SIZE, PICTURE_SIZE, 1), dtype=np.float32)
    for number, item in enumerate(scene.objects):
        cover, gain, gloss = _sprite(item.shape, item.radius, item.material)
        tint = np.asarray(COLOURS[item.colour], dtype=np.float32)
        tint = tint * (1 + 0.05 * rng.standard_normal(3, dtype=np.float32))
        if number in hidden:
            continue
        rows = slice(item.y - item.radius, item.y + item.radius + 1)
        columns = slice(item.x - item.radius, item.x + item.radius + 1)
        below = canvas[rows, columns]
        canvas[rows, columns] = below + cover * (tint * gain + gloss - below)
    for sign in scene.signs:
        paper = np.asarray(COLOURS[sign.colour], dtype=np.float32)
        ink = np.float32(0.04 if paper @ (0.3, 0.59, 0.11) > 0.35 else 0.97)
        plate = np.broadcast_to(paper, (SIGN_HEIGHT, sign.width, 3)).copy()
        letters = np.concatenate([_glyph(character) for character in sign.code], axis=1)[..., None]
        inner = plate[:, 2 : 2 + letters.shape[1]]
        inner += letters * (ink - inner)
        canvas[sign.y : sign.y + SIGN_HEIGHT, sign.x : sign.x + sign.width] = plate
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
