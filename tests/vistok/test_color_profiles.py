"""Embedded ICC profiles: colours as a screen shows them, or the raw numbers on request."""

import warnings
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms

from vistok.images import load_image, to_tensor


def profile_with_swapped_primaries() -> bytes:
    """sRGB's own profile with the tags of red and green exchanged: its pure red is sRGB's pure green."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data.replace(b"rXYZ", b"0000").replace(b"gXYZ", b"rXYZ").replace(b"0000", b"gXYZ")


def encoded(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixel(image):
    return image.getpixel((0, 0))


SWAPPED = profile_with_swapped_primaries()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_colours_of_another_profile_become_srgb_and_raw_ones_stay():
    data = encoded(Image.new("RGB", (2, 2), (255, 0, 0)), icc_profile=SWAPPED)
    red, green, blue = pixel(load_image(data))
    assert green > 240 and red < 15 and blue < 15
    assert pixel(load_image(data, profile="ignore")) == (255, 0, 0)
    assert to_tensor(data, 2)[0, 1].min() > 0.9 and to_tensor(data, 2, profile="ignore")[0, 0].min() == 1


def test_a_profile_of_srgb_changes_no_bit():
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert np.array_equal(load_image(encoded(Image.fromarray(noise), icc_profile=SRGB)), noise)


def test_alpha_is_kept_apart_from_the_colours():
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half.putpixel((0, 0), (255, 0, 0, 255))
    image = load_image(encoded(half, icc_profile=SWAPPED))
    assert image.getpixel((0, 0))[1] > 240 and image.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_palettes_are_converted_and_greys_stay_grey(mode):
    source = Image.new("RGB", (2, 2), (255, 0, 0)).convert(mode)
    red, green, _ = pixel(load_image(encoded(source, icc_profile=SWAPPED)))
    assert green > 240 and red < 15 if mode == "P" else red == green


@pytest.mark.parametrize("profile", [b"not a profile", SRGB[:200]])
def test_a_damaged_profile_is_a_warning_and_the_picture_is_read(profile):
    data = encoded(Image.new("RGB", (2, 2), (255, 0, 0)), icc_profile=profile)
    with pytest.warns(UserWarning, match="ICC colour profile cannot be used"):
        assert pixel(load_image(data)) == (255, 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixel(load_image(data, profile="ignore")) == (255, 0, 0)


def test_another_choice_is_refused():
    with pytest.raises(ValueError, match="profile is 'raw'"):
        load_image(encoded(Image.new("RGB", (2, 2))), profile="raw")
