"""Procedural pictures with the statistics of photographs, to train tokenizers without a data set.

A picture is built back to front, as the dead-leaves model of natural images has it ("Occlusion Models for
Natural Images", Lee, Mumford, Huang, 2001): a backdrop, then layers of shapes whose sizes follow a power law
and which occlude one another, every shape with its own colour and texture; then light, lens and sensor.
"""

import math
from functools import cache, lru_cache, partial

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

__all__ = ["scene"]

_LETTERS = "eeeetttaaaooiinnsshhrrddlucmfwygpbvkxqjzETAOINSHRDLU0123456789.,-:!?&"
_HUES = ((0.07, 0.03), (0.10, 0.04), (0.25, 0.06), (0.58, 0.04), (0.02, 0.03), (0.5, 0.4))  # centre, spread


def scene(seed: int, index: int, size: int) -> np.ndarray:
    """Draw picture number `index` of the endless sequence `seed`: uint8 [size, size, 3], sRGB.

    A pure function of its arguments (for one version of NumPy and Pillow). `seed` and `index` are integers
    from 0, `size` is in pixels, at least 16.

    Raises:
        ValueError: a negative seed or index, or a size below 16.
    """
    if seed < 0 or index < 0 or size < 16:
        raise ValueError(f"scene({seed=}, {index=}, {size=}): seed and index start at 0, size at 16 pixels")
    rng = np.random.default_rng((seed, index))
    palette = _palette(rng)
    textures = _textures(rng, size)
    canvas = _backdrop(rng, size, palette, textures)
    style = rng.choice(5, p=(0.30, 0.34, 0.12, 0.12, 0.12))
    if style == 0:  # a few big things
        plans = [partial(_shapes, count=int(rng.integers(1, 6)), radii=(0.12, 0.6), power=1.5)]
    elif style == 1:  # dead leaves: everything everywhere, then something in front
        smallest = math.exp(rng.uniform(math.log(0.012), math.log(0.1)))
        count, power = int(rng.integers(30, 110)), rng.uniform(2.0, 3.2)
        plans = [partial(_shapes, count=count, radii=(smallest, 0.5), power=power)]
        if rng.random() < 0.5:
            plans.append(partial(_shapes, count=int(rng.integers(1, 8)), radii=(0.06, 0.45), power=2.0))
    elif style == 2:  # a subject before things that repeat
        plans = [_strokes, partial(_shapes, count=int(rng.integers(1, 12)), radii=(0.05, 0.4), power=2.0)]
    elif style == 3:  # something built
        plans = [_facade, partial(_shapes, count=int(rng.integers(0, 10)), radii=(0.02, 0.3), power=2.0)]
    else:  # open view
        plans = [partial(_shapes, count=int(rng.integers(0, 25)), radii=(0.015, 0.3), power=2.5)]
    if rng.random() < 0.12:
        plans.append(_writing)
    for draw in plans:
        if rng.random() < 0.25:
            canvas = _blur(canvas, size * rng.uniform(0.004, 0.03))  # what lies behind is out of focus
        layer = _Layer(size)
        draw(rng, layer, palette)
        canvas = _composite(rng, canvas, layer, textures)
    return _expose(rng, canvas, textures)


# Colour -----------------------------------------------------------------------------------------------------


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """HSV, each [N] in [0, 1], to RGB [N, 3] in [0, 1]."""
    wheel = (np.asarray(hue)[:, None] * 6 + np.array([5.0, 3.0, 1.0])) % 6
    return value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(wheel, 4 - wheel), 0, 1))


def _palette(rng: np.random.Generator) -> np.ndarray:
    """The colours [N, 3] of one picture: one to three hues, mostly muted, dark to light."""
    count = int(rng.integers(4, 10))
    families = rng.integers(0, len(_HUES), size=int(rng.integers(1, 4)))
    chosen = [_HUES[families[i]] for i in rng.integers(0, len(families), size=count)]
    hue = np.array([rng.normal(centre, spread) for centre, spread in chosen]) % 1
    strength = rng.choice([0.0, 0.6, 1.0, 2.2], p=[0.07, 0.28, 0.5, 0.15])
    saturation = np.clip(rng.beta(1.3, 3.0, size=count) * strength, 0, 0.95)
    low, high = sorted(rng.beta(0.9, 0.9, size=2))
    value = np.clip(rng.uniform(low - 0.1, high + 0.1, size=count), 0.03, 0.98)
    return _rgb(hue, saturation, value)


def _pick(rng: np.random.Generator, palette: np.ndarray, count: int, jitter: float = 0.07) -> np.ndarray:
    """Colours [count, 3] in [0, 1] near the palette: brightness varies more than hue."""
    colours = palette[rng.integers(0, len(palette), size=count)]
    light = np.exp(rng.normal(0, 3 * jitter, size=(count, 1)))
    return np.clip(colours * light + rng.normal(0, 0.3 * jitter, size=(count, 3)), 0.01, 0.99)


# Fields -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column and row coordinates in [-1, 1], and log frequency; each float32 [size, size]."""
    line = np.linspace(-1, 1, size, dtype=np.float32)
    frequency = np.fft.fftfreq(size) * size
    radius = np.hypot(frequency[:, None], frequency[None])
    radius[0, 0] = np.inf  # no mean
    return *np.meshgrid(line, line), np.log(radius).astype(np.float32)


def _noise(rng: np.random.Generator, size: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Two independent noise fields, amplitude falling as 1/f^alpha: float32 [size, size], variance 1."""
    white = rng.standard_normal((size, size, 2), dtype=np.float32).view(np.complex64)[..., 0]
    x, y, log_frequency = _grid(size)
    stretch = rng.uniform(-0.8, 0.8) if rng.random() < 0.3 else 0.0
    spectrum = np.exp(-alpha * log_frequency)
    if stretch:  # grain, as of wood or brushed metal
        spectrum *= np.exp(-np.abs(np.fft.fftshift(y if stretch > 0 else x)) * 12 * abs(stretch))
    field = np.fft.ifft2(white * spectrum)
    return tuple(part / (part.std() + 1e-6) for part in (field.real, field.imag))


def _pattern(rng: np.random.Generator, size: int, warp: np.ndarray) -> np.ndarray:
    """Stripes, a grating, checks or a weave, bent by `warp`: float32 [size, size] in about [-1, 1]."""
    x, y, _ = _grid(size)
    angle, cycles = rng.uniform(0, math.pi), math.exp(rng.uniform(math.log(3), math.log(size / 5)))
    phase = math.pi * cycles * (x * math.cos(angle) + y * math.sin(angle)) + warp * rng.uniform(0, 2.5)
    wave = np.sin(phase)
    kind = rng.integers(4)
    if kind == 0:
        return wave
    if kind == 1:
        return np.tanh(wave * 4)
    across = np.sin(math.pi * cycles * rng.uniform(0.5, 1.5) * (y * math.cos(angle) - x * math.sin(angle)))
    return np.tanh(wave * across * 5) if kind == 2 else np.maximum(wave, across)


def _textures(rng: np.random.Generator, size: int) -> list[np.ndarray]:
    """Four fields [size, size] that modulate shapes: slow shading, fine grain, a pattern, colour drift."""
    shading, drift = _noise(rng, size, rng.uniform(1.6, 2.6))
    grain, spots = _noise(rng, size, rng.uniform(0.3, 1.5))
    pattern = _pattern(rng, size, shading) if rng.random() < 0.5 else np.tanh(spots * rng.uniform(0.5, 4))
    if rng.random() < 0.3:
        grain = np.abs(grain) * 1.6 - 1.2  # ridged: bark, rock, foliage
    return [shading, grain, pattern, drift]


def _blur(canvas: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of float [H, W, 3]; `radius` is the standard deviation in pixels."""
    blurred = Image.fromarray(_to_uint8(canvas)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(blurred, dtype=np.float32) / 255


def _to_uint8(canvas: np.ndarray) -> np.ndarray:
    """Float in [0, 1] to uint8, rounded and clipped."""
    return np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)


def _backdrop(
    rng: np.random.Generator, size: int, palette: np.ndarray, textures: list[np.ndarray]
) -> np.ndarray:
    """A gradient with clouds, grain or land, behind everything: float32 [size, size, 3]."""
    x, y, _ = _grid(size)
    first, second, third = _pick(rng, palette, 3).astype(np.float32)
    angle = rng.normal(0, 0.3) if rng.random() < 0.6 else rng.uniform(0, 2 * math.pi)
    ramp = 0.5 + 0.35 * (x * math.sin(angle) + y * math.cos(angle))
    ramp = ramp + textures[0] * rng.choice([0.0, 0.08, 0.3])
    canvas = first + (second - first) * np.clip(ramp, 0, 1)[..., None]
    if rng.random() < 0.5:  # clouds, stains, foliage out of focus
        amount = np.clip(textures[3] * rng.uniform(0.3, 1.0), 0, 1)[..., None]
        canvas = canvas + (third - canvas) * amount
    if rng.random() < 0.6:
        canvas = canvas * (1 + textures[1] * rng.exponential(0.08))[..., None]
    if rng.random() < 0.3:
        layer = _Layer(size)
        _ridges(rng, layer, palette)
        canvas = _composite(rng, canvas, layer, textures, shadow=False)
    return canvas


# Layers -----------------------------------------------------------------------------------------------------


class _Layer:
    """A transparent sheet drawn at twice the size: one picture of colours, one of texture strengths."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.side = 2 * size
        self.colours = Image.new("RGBA", (self.side, self.side), (0, 0, 0, 0))
        self.strengths = Image.new("RGBA", (self.side, self.side), (128, 0, 0, 128))
        self.paint = ImageDraw.Draw(self.colours)
        self.modulate = ImageDraw.Draw(self.strengths)

    def fills(self, colours: np.ndarray) -> list[tuple[int, ...]]:
        """Colours [N, 3] in [0, 1] as opaque fills."""
        opaque = np.concatenate([colours, np.ones((len(colours), 1))], axis=1)
        return [tuple(row) for row in _to_uint8(opaque).tolist()]

    def textures(self, rng: np.random.Generator, count: int) -> list[tuple[int, ...]]:
        """How strongly each of `count` shapes takes the picture's four textures; most take few."""
        strengths = rng.exponential((50, 28, 45, 40), size=(count, 4)) * (
            rng.random((count, 4)) < (0.7, 0.6, 0.2, 0.3)
        )
        signs = rng.choice((-1, 1), size=(count, 2))
        strengths[:, 0] = 128 + signs[:, 0] * strengths[:, 0]
        strengths[:, 3] = 128 + signs[:, 1] * strengths[:, 3]
        return [tuple(row) for row in np.clip(strengths, 0, 255).astype(int).tolist()]

    def polygon(self, points: list[float], fill: tuple[int, ...], texture: tuple[int, ...]) -> None:
        """Fill a polygon given as x, y, x, y, … in sheet pixels."""
        self.paint.polygon(points, fill=fill)
        self.modulate.polygon(points, fill=texture)

    def line(self, points: list[float], fill: tuple[int, ...], texture: tuple[int, ...], width: int) -> None:
        """Draw a curve through points given as x, y, x, y, … in sheet pixels."""
        joint = "curve" if width > 4 else None
        self.paint.line(points, fill=fill, width=width, joint=joint)
        self.modulate.line(points, fill=texture, width=width, joint=joint)


def _composite(
    rng: np.random.Generator,
    canvas: np.ndarray,
    layer: _Layer,
    textures: list[np.ndarray],
    shadow: bool = True,
) -> np.ndarray:
    """Lay a sheet over the canvas [H, W, 3], with its textures and, on some, the soft shadow it casts."""
    colours = np.asarray(layer.colours.reduce(2), dtype=np.float32) / 255
    strengths = np.asarray(layer.strengths.reduce(2), dtype=np.float32) / 128
    cover = colours[..., 3:]
    # The colours are not multiplied by the cover, so edges come out light; models were trained on it.
    gain = 1 + 0.7 * (strengths[..., 0] - 1) * textures[0]
    gain += strengths[..., 1] * textures[1]
    gain += strengths[..., 2] * textures[2]
    tint = rng.normal(0, 0.25, size=3).astype(np.float32)
    ink = colours[..., :3] * np.maximum(gain, 0.05)[..., None]
    ink += ((strengths[..., 3] - 1) * textures[3])[..., None] * tint * cover
    if shadow and rng.random() < 0.45:
        reach = layer.size * rng.uniform(0.01, 0.06)
        offset = rng.normal(0, reach, size=2).round().astype(int)
        mask = Image.fromarray(_to_uint8(cover[..., 0])).filter(ImageFilter.GaussianBlur(reach))
        dark = np.asarray(mask, dtype=np.float32) * (rng.uniform(0.3, 0.9) / 255)
        canvas = canvas * (1 - np.roll(dark, offset, axis=(0, 1)))[..., None]
    return np.clip(ink, 0, cover) + canvas * (1 - cover)


def _outlines(rng: np.random.Generator, count: int, radii: np.ndarray, side: int) -> list[list[float]]:
    """Outlines of ellipses, boxes, blobs or polygons; `radii` [count] and the outlines in sheet pixels."""
    smooth = rng.random() < 0.65
    corners = int(rng.choice([20, 28, 36])) if smooth else int(rng.choice([3, 4, 4, 4, 5, 6, 9]))
    angle = np.arange(corners) * (2 * math.pi / corners) + np.zeros((count, 1))
    reach = np.ones((count, corners))
    if smooth:
        power = rng.choice([1.0, 1.0, 0.5, 0.25], size=(count, 1))  # ellipse … rounded box
        reach = (np.abs(np.cos(angle)) ** (2 / power) + np.abs(np.sin(angle)) ** (2 / power)) ** (-power / 2)
        if rng.random() < 0.6:
            waves = np.arange(2, 6)
            height = rng.normal(0, rng.uniform(0.1, 0.5), size=(count, 4)) / waves
            phase = rng.uniform(0, 2 * math.pi, size=(count, 4))
            ripple = (height[:, None] * np.cos(angle[..., None] * waves + phase[:, None])).sum(axis=-1)
            reach = reach * np.exp(ripple)
    elif rng.random() < 0.6:
        angle = angle + rng.normal(0, 1.0 / corners, size=angle.shape)
        reach = np.exp(rng.normal(0, 0.25, size=reach.shape))
    aspect = np.exp(rng.normal(0, rng.choice([0.1, 0.4, 0.8]), size=(count, 1)))
    turn = rng.normal(rng.uniform(0, math.pi), rng.choice([0.05, 0.4, 3.0]), size=(count, 1))
    x, y = reach * np.cos(angle) * np.sqrt(aspect), reach * np.sin(angle) / np.sqrt(aspect)
    centre = rng.uniform(-0.05, 1.05, size=(2, count, 1)) * side
    size = radii[:, None]
    across = centre[0] + size * (x * np.cos(turn) - y * np.sin(turn))
    down = centre[1] + size * (x * np.sin(turn) + y * np.cos(turn))
    return np.stack([across, down], axis=-1).reshape(count, -1).tolist()


def _shapes(
    rng: np.random.Generator,
    layer: _Layer,
    palette: np.ndarray,
    count: int,
    radii: tuple[float, float],
    power: float,
) -> None:
    """Shapes, their density falling as radius^-power between `radii` (parts of the side), balls, curves."""
    if not count:
        return
    exponent = 1 - power
    low, high = (radius**exponent for radius in radii)
    sizes = (low + (high - low) * rng.random(count)) ** (1 / exponent) * layer.side
    half = count // 2
    outlines = _outlines(rng, count - half, sizes[half:], layer.side)
    if half:
        outlines += _outlines(rng, half, sizes[:half], layer.side)
        outlines = [outlines[i] for i in rng.permutation(count)]
    fills = layer.fills(_pick(rng, palette, count))
    textures = layer.textures(rng, count)
    rimmed = rng.random() < 0.12
    for points, fill, texture in zip(outlines, fills, textures, strict=True):
        layer.polygon(points, fill, texture)
        if rimmed:
            layer.line(points + points[:2], fills[0], texture, 3)
    if rng.random() < 0.3:
        _balls(rng, layer, palette, sizes[: int(rng.integers(1, 9))])
    if rng.random() < 0.25:
        _curves(rng, layer, palette, int(rng.integers(1, 8)))


@cache
def _ball() -> tuple[Image.Image, Image.Image]:
    """A round body lit from the upper left, 96 pixels wide: its outline, and how dark each point is."""
    line = np.linspace(-1.02, 1.02, 96)
    x, y = np.meshgrid(line, line)
    inside = np.clip((1 - np.hypot(x, y)) * 40, 0, 1)
    normal = np.sqrt(np.clip(1 - x * x - y * y, 0, 1))
    dark = np.clip(1 - (0.65 * normal - 0.5 * x - 0.55 * y), 0, 1)
    return Image.fromarray(_to_uint8(inside)), Image.fromarray(_to_uint8(dark * inside))


def _balls(rng: np.random.Generator, layer: _Layer, palette: np.ndarray, radii: np.ndarray) -> None:
    """Shaded round bodies of `radii` [N] (sheet pixels)."""
    outline, dark = _ball()
    flip = Image.Transpose.FLIP_LEFT_RIGHT if rng.random() < 0.5 else None
    for radius, fill in zip(radii, layer.fills(_pick(rng, palette, len(radii))), strict=True):
        wide, high = (max(2, int(2 * radius * stretch)) for stretch in np.exp(rng.normal(0, 0.2, size=2)))
        corner = tuple((rng.uniform(0, 1, size=2) * layer.side - (wide / 2, high / 2)).astype(int).tolist())
        masks = [mask.transpose(flip) if flip is not None else mask for mask in (outline, dark)]
        masks = [mask.resize((wide, high), Image.Resampling.BILINEAR) for mask in masks]
        layer.colours.paste(fill, corner, masks[0])
        layer.colours.paste((*(channel // 6 for channel in fill[:3]), 255), corner, masks[1])
        layer.strengths.paste((128, 10, 0, 128), corner, masks[0])


def _curves(rng: np.random.Generator, layer: _Layer, palette: np.ndarray, count: int) -> None:
    """Rounded curves: branches, wires, rims, roads."""
    fills, textures = layer.fills(_pick(rng, palette, count)), layer.textures(rng, count)
    widest = math.exp(rng.uniform(math.log(1), math.log(layer.side * 0.06)))
    for fill, texture in zip(fills, textures, strict=True):
        heading = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, 0.12) + rng.normal(0, 0.15, size=24))
        steps = np.stack([np.cos(heading), np.sin(heading)], axis=-1) * layer.side * rng.uniform(0.01, 0.08)
        points = rng.uniform(0, layer.side, size=2) + np.cumsum(steps, axis=0)
        layer.line(points.ravel().tolist(), fill, texture, max(1, int(widest * rng.uniform(0.4, 1))))


def _strokes(rng: np.random.Generator, layer: _Layer, palette: np.ndarray) -> None:
    """Many strokes that share a direction: fur, grass, straw, rain, hatching."""
    count = int(rng.integers(40, 160))
    fills, textures = layer.fills(_pick(rng, palette[:4], count, jitter=0.1)), layer.textures(rng, count)
    direction, spread = rng.uniform(0, 2 * math.pi), rng.choice([0.05, 0.25, 0.7])
    heading = direction + rng.normal(0, spread, size=(count, 1))
    heading = heading + np.arange(5) * rng.normal(0, 0.12, size=(count, 1))
    length = layer.side * rng.uniform(0.01, 0.09) * np.exp(rng.normal(0, 0.3, size=(count, 1)))
    centre = rng.uniform(0, 1, size=(2, count, 1)) * layer.side
    if rng.random() < 0.5:  # a patch, not the whole picture
        centre = layer.side * (rng.uniform(0.2, 0.8, size=(2, 1, 1)) + rng.normal(0, 0.17, size=centre.shape))
    across = centre[0] + np.cumsum(length * np.cos(heading), axis=1)
    down = centre[1] + np.cumsum(length * np.sin(heading), axis=1)
    widths = 1 + rng.exponential(rng.uniform(0.5, 5), size=count).astype(int)
    paths = np.stack([across, down], axis=-1).reshape(count, -1).tolist()
    for points, fill, texture, width in zip(paths, fills, textures, widths.tolist(), strict=True):
        layer.line(points, fill, texture, width)


def _facade(rng: np.random.Generator, layer: _Layer, palette: np.ndarray) -> None:
    """Walls with rows of windows, shelves, tiles or bricks, drawn at a slant."""
    for _wall in range(int(rng.integers(1, 4))):
        side = layer.side
        corner, extent = rng.uniform(-0.2, 0.6, size=2) * side, rng.uniform(0.3, 1.2, size=2) * side
        slant = rng.normal(0, 0.2, size=(2, 2)) * (rng.random() < 0.6) + np.eye(2)
        rows, columns = rng.integers(1, 9, size=2)
        gap = rng.uniform(0.05, 0.45, size=2)
        wall, *panes = layer.fills(_pick(rng, palette, 4))
        textures = layer.textures(rng, 4)
        box = np.array([[0.0, 0.0], [1, 0], [1, 1], [0, 1]])
        layer.polygon(((box * extent) @ slant.T + corner).ravel().tolist(), wall, textures[0])
        odd = rng.random((rows, columns))
        brick = 0.5 * (rng.random() < 0.3)
        for row in range(rows):
            for column in range(columns):
                cell = box * (1 - gap) + gap / 2 + (column + brick * (row % 2), row)
                cell = cell / (columns + brick, rows)
                pane = 0 if odd[row, column] < 0.7 else 1 + (row + column) % 2
                points = ((cell * extent) @ slant.T + corner).ravel().tolist()
                layer.polygon(points, panes[pane], textures[1 + pane])


def _ridges(rng: np.random.Generator, layer: _Layer, palette: np.ndarray) -> None:
    """A horizon: one to four bands of land, each with a ragged upper edge, the nearer the lower."""
    count = int(rng.integers(1, 5))
    heights = np.sort(rng.uniform(0.25, 0.9, size=count)) * layer.side
    fills, textures = layer.fills(_pick(rng, palette, count)), layer.textures(rng, count)
    across = np.linspace(0, layer.side, 48)
    for height, fill, texture in zip(heights, fills, textures, strict=True):
        walk = np.cumsum(rng.normal(0, 1, size=48))
        edge = height + (walk - walk.mean()) * layer.side * rng.choice([0.0, 0.004, 0.015])
        points = np.stack([across, edge], axis=-1).ravel().tolist()
        layer.polygon([*points, layer.side, layer.side, 0, layer.side], fill, texture)


@lru_cache(maxsize=64)
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(pixels)


def _writing(rng: np.random.Generator, layer: _Layer, palette: np.ndarray) -> None:
    """A word on a sign, or lines of print."""
    lines = int(rng.choice([1, 2, 6], p=[0.5, 0.25, 0.25]))
    pixels = max(10, int(layer.side * rng.uniform(0.06, 0.3 if lines == 1 else 0.12)) // 2 * 2)
    words = [
        "".join(rng.choice(list(_LETTERS), size=int(rng.integers(2, 9))))
        for _ in range(lines * (1 + lines // 2))
    ]
    step = len(words) // lines
    text = "\n".join(" ".join(words[i : i + step]) for i in range(0, len(words), step))
    paper, ink = layer.fills(_pick(rng, palette, 2, jitter=0.15))
    if abs(sum(paper[:3]) - sum(ink[:3])) < 150:
        ink = (15, 15, 15, 255) if sum(paper[:3]) > 380 else (240, 240, 240, 255)
    place = (rng.uniform(-0.05, 0.5, size=2) * layer.side).tolist()
    if rng.random() < 0.6:
        left, top, right, bottom = layer.paint.multiline_textbbox(place, text, font=_font(pixels))
        box = [left - pixels / 3, top - pixels / 3, right + pixels / 3, bottom + pixels / 3]
        layer.paint.rectangle(box, fill=paper)
        layer.modulate.rectangle(box, fill=(128, 8, 0, 128))
    layer.paint.multiline_text(place, text, fill=ink, font=_font(pixels))


# Light and lens ---------------------------------------------------------------------------------------------


def _expose(rng: np.random.Generator, canvas: np.ndarray, textures: list[np.ndarray]) -> np.ndarray:
    """Light, colour cast, focus, contrast and sensor noise: float [H, W, 3] to uint8."""
    size = len(canvas)
    x, y, _ = _grid(size)
    if rng.random() < 0.6:
        slope = rng.normal(0, 0.2, size=2)
        light = 1 + x * slope[0] + y * slope[1] + textures[0] * rng.exponential(0.06)
        if rng.random() < 0.4:
            light = light - rng.uniform(0.05, 0.3) * (x * x + y * y)
        canvas = canvas * np.maximum(light, 0.1).astype(np.float32)[..., None]
    warmth = rng.normal(0, 0.06) if rng.random() < 0.7 else 0.0
    canvas = canvas * np.array([1 + warmth, 1 + rng.normal(0, 0.015), 1 - warmth], dtype=np.float32)
    if rng.random() < 0.25:
        canvas = _blur(canvas, size * rng.exponential(0.006))
    low, high = float(canvas.min()), float(canvas.max())
    if rng.random() < 0.5 and high - low > 0.05:  # automatic levels, as cameras do
        amount = rng.uniform(0.3, 1.0)
        canvas = canvas + amount * ((canvas - low) / (high - low) - canvas)
    canvas = np.clip(canvas, 0, 1) ** np.float32(math.exp(rng.normal(0, 0.2)))
    if rng.random() < 0.3:
        grain = rng.standard_normal(canvas.shape[: 2 + int(rng.integers(2))], dtype=np.float32)
        canvas = canvas + grain.reshape(size, size, -1) * np.float32(rng.exponential(0.02))
    return _to_uint8(canvas)
