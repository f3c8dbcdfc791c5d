"""Colours of images with an ICC profile as sRGB has them."""

import warnings
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from PIL import ImageCms

_MODE_OF_SPACE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_LEVELS_OF_SRGB = 2  # profiles that move no 8-bit value further are sRGB under another name


def to_srgb(image: Image.Image, name: str) -> Image.Image:
    """Convert an image of 8-bit channels by its embedded ICC profile to sRGB; alpha stays as it is.

    Images without a profile, or with one of sRGB, come back unchanged. A damaged profile, or one of another
    colour space than the image has, is ignored with a UserWarning that begins with `name`.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode == "1":
        return image
    try:
        transform, mode = _transform(profile)
    except Exception as error:  # Pillow's wrapper of LittleCMS raises several kinds
        warnings.warn(
            f"{name}: its ICC colour profile cannot be used ({error or 'it is damaged'}); the colours are "
            "taken as sRGB",
            stacklevel=4,
        )
        return image
    if transform is None:
        return image
    return _converted(image, transform, mode, name)


def _converted(
    image: Image.Image, transform: "ImageCms.ImageCmsTransform", mode: str, name: str
) -> Image.Image:
    from PIL import ImageCms

    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if (image.mode == "CMYK") != (mode == "CMYK"):
        warnings.warn(
            f"{name}: its ICC colour profile is for {mode}, the image is {image.mode}; the colours are taken "
            "as sRGB",
            stacklevel=5,
        )
        return image
    colors = image.convert("RGBA").convert("RGB") if alpha is not None else image
    converted = ImageCms.applyTransform(colors.convert(mode), transform)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@lru_cache(maxsize=8)
def _transform(profile: bytes) -> tuple["ImageCms.ImageCmsTransform | None", str]:
    """LittleCMS's transform to sRGB and the mode it takes; None for profiles of sRGB."""
    from PIL import ImageCms

    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space not in _MODE_OF_SPACE:
        raise ValueError(f"its colour space is {space}")
    mode = _MODE_OF_SPACE[space]
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "CMYK":
        sample = _sample(mode)
        converted = np.asarray(ImageCms.applyTransform(sample, transform), np.int16)
        if abs(converted - np.asarray(sample.convert("RGB"), np.int16)).max() <= _LEVELS_OF_SRGB:
            return None, mode
    return transform, mode


def _sample(mode: str) -> Image.Image:
    """Colours from all of the cube, or all greys."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    return Image.fromarray(np.ascontiguousarray(cube))
