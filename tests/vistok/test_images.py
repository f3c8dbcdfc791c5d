"""Images: whatever they come as, the right pixels the right way up, or an error that says what is wrong."""

import warnings
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

import vistok
from vistok.images import adm_center_crop, load_image, side_by_side, to_pil, to_tensor

RED, GREEN, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 0)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """A slow gradient in three directions: what a shift by a pixel or an axis swap would change."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    return np.rint(255 * np.stack([x, y, (x + y) / 2], axis=-1)).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, exif=exif)


def pixels(image: Image.Image) -> list[list[tuple[int, ...]]]:
    return [[tuple(map(int, pixel)) for pixel in row] for row in np.array(image)]


# Files and modes --------------------------------------------------------------------------------------------

# What turns the upright picture into the stored one: the inverse of what each EXIF orientation asks for.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "RGBA"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_comes_out_upright(orientation, mode):
    upright = Image.fromarray(noise(3, 4))
    if mode == "I;16":
        upright = Image.fromarray(np.asarray(upright.convert("L")).astype(np.uint16) * 257)
    else:
        upright = upright.convert(mode)
    turn = STORED[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    found = load_image(oriented(stored, orientation))
    assert pixels(found) == pixels(load_image(upright))
    assert pixels(load_image(found)) == pixels(found)  # not turned twice


def test_an_opened_image_is_turned_and_left_as_it_was():
    image = Image.open(BytesIO(oriented(Image.fromarray(noise(3, 4)), 6)))
    assert load_image(image).size == (3, 4)
    assert image.size == (4, 3)


def test_alpha_is_composited_on_white():
    levels = [(255, 0, 0, 255), (255, 0, 0, 0), (255, 0, 0, 128), (0, 0, 0, 51)]
    image = Image.fromarray(np.array([levels], np.uint8))
    assert pixels(load_image(encoded(image))) == [[RED, WHITE, (255, 127, 127), (204, 204, 204)]]
    grey = Image.fromarray(np.array([[(0, 255), (0, 0), (0, 51)]], np.uint8))
    assert pixels(load_image(encoded(grey))) == [[BLACK, WHITE, (204, 204, 204)]]


def test_transparent_entries_of_a_palette_are_white():
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLACK])
    image.putdata([0, 1, 2])
    assert pixels(load_image(encoded(image))) == [[RED, GREEN, BLACK]]
    assert pixels(load_image(encoded(image, transparency=1))) == [[RED, WHITE, BLACK]]
    assert pixels(load_image(encoded(image, transparency=b"\xff\xff\x33"))) == [[RED, GREEN, (204, 204, 204)]]
    assert pixels(load_image(encoded(image, "GIF", transparency=2))) == [[RED, GREEN, WHITE]]


def test_a_transparent_colour_is_white():
    image = Image.fromarray(np.array([[RED, GREEN]], np.uint8))
    assert pixels(load_image(encoded(image, transparency=GREEN))) == [[RED, WHITE]]
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert pixels(load_image(encoded(grey, transparency=8))) == [[(7, 7, 7), WHITE]]
    deep = Image.fromarray(np.array([[0, 1000, 257]], np.uint16))
    assert pixels(load_image(encoded(deep, transparency=1000))) == [[BLACK, WHITE, (1, 1, 1)]]


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_a_fully_transparent_image_is_white_in_every_mode(mode):
    assert pixels(load_image(Image.new(mode, (1, 1), 0))) == [[WHITE]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(kind):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255]
    assert np.array(load_image(encoded(Image.fromarray(values), kind)))[0].tolist() == [
        [v] * 3 for v in expected
    ]


@pytest.mark.parametrize("dtype", [np.int32, np.float32, ">u2"])
def test_deep_pil_images_are_scaled(dtype):
    values = np.array([[0, 0.5, 1]]) if dtype is np.float32 else np.array([[0, 32768, 65535]])
    image = Image.fromarray(values.astype(dtype))
    assert np.array(load_image(image))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("values", "mode", "accepted"),
    [
        (np.array([[0, 65536]], np.int32), "I", "65535"),
        (np.array([[-1, 5]], np.int32), "I", "65535"),
        (np.array([[0, 1.5]], np.float32), "F", "1"),
        (np.array([[0, np.nan]], np.float32), "F", "1"),
    ],
)
def test_deep_images_out_of_range_are_refused(values, mode, accepted):
    with pytest.raises(
        ValueError, match=rf"mode {mode} and values in .*; accepted are 0\.\.{accepted}: rescale"
    ):
        load_image(Image.fromarray(values))


def test_grey_is_repeated_and_one_bit_is_black_and_white():
    grey = Image.fromarray(np.array([[0, 77, 255]], np.uint8))
    assert pixels(load_image(encoded(grey))) == [[BLACK, (77, 77, 77), WHITE]]
    assert pixels(load_image(encoded(grey.point(lambda v: v > 99, "1")))) == [[BLACK, BLACK, WHITE]]


def test_cmyk_ink_is_subtracted_from_white():
    image = Image.fromarray(np.tile(np.array([0, 255, 255, 0], np.uint8), (8, 8, 1)), mode="CMYK")
    for data in (encoded(image, "TIFF"), encoded(image, "JPEG", quality=100)):
        found = np.array(load_image(data)).astype(int)
        assert np.abs(found - RED).max() <= 2


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert Image.open(BytesIO(data)).n_frames == 2
    assert pixels(load_image(data)) == pixels(frames[0])
    opened = Image.open(BytesIO(data))
    opened.seek(1)
    assert pixels(load_image(opened)) == pixels(frames[1])


def test_every_way_to_hand_over_a_file_gives_the_same_picture(tmp_path):
    image = Image.fromarray(noise(5, 7))
    path = tmp_path / "picture.png"
    image.save(path)
    data = path.read_bytes()
    with open(path, "rb") as file:
        sources = [path, str(path), data, bytearray(data), memoryview(data), BytesIO(data), file, image]
        assert all(pixels(load_image(source)) == pixels(image) for source in sources)
        assert len({to_tensor(source, 4).numpy().tobytes() for source in sources if source is not file}) == 1


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused_by_name(tmp_path, kind, share):
    path = tmp_path / f"half.{kind.lower()}"
    whole = encoded(Image.fromarray(noise(40, 40)), kind)
    path.write_bytes(whole)
    assert load_image(path).size == (40, 40)
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(
        ValueError, match=rf"half\.{kind.lower()} is not an image, or a truncated or broken one"
    ):
        load_image(path)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF"]), st.data())
def test_a_damaged_file_is_an_image_or_a_value_error_and_nothing_else(kind, data):
    broken = bytearray(encoded(Image.fromarray(noise(6, 6)), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, about the damage
        try:
            assert load_image(broken).mode == "RGB"
        except ValueError as error:
            assert str(error).startswith(f"the image of {len(broken)} bytes")


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(ValueError, match=f"the image of {len(data)} bytes is not an image"):
        load_image(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [99, 49])  # PIL itself only warns up to twice its limit
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, limit):
    path = tmp_path / "bomb.png"
    Image.new("RGB", (10, 10)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert load_image(path).size == (10, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(
        ValueError, match=r"bomb\.png is too large to open safely.*raise PIL\.Image\.MAX_IMAGE"
    ):
        load_image(path)


def test_a_bomb_is_refused_the_same_where_warnings_are_errors(monkeypatch):
    data = encoded(Image.new("RGB", (10, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="too large to open safely"):
        warnings.simplefilter("error")
        load_image(data)


def test_no_limit_means_no_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert to_tensor(encoded(Image.new("RGB", (10, 10))), 20).shape == (1, 3, 20, 20)


def test_a_sliver_that_would_be_resized_into_a_bomb_is_refused():
    with pytest.raises(ValueError, match=r"1 x 60000 pixels is too narrow to resize.*crop it first"):
        to_tensor(np.zeros((60000, 1), np.uint8), 256)


def test_a_missing_file_is_missing_and_a_folder_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        load_image(tmp_path / "none.png")
    with pytest.raises(OSError, match=tmp_path.name):
        load_image(tmp_path)


@pytest.mark.parametrize("source", [None, 3, {"image": 1}])
def test_what_could_not_be_an_image_is_a_type_error(source):
    with pytest.raises(
        TypeError, match=f"path, bytes, a binary file or a PIL image.*{type(source).__name__}"
    ):
        to_tensor(source, 8)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("mode", ["RGB", "F"])
def test_an_image_without_pixels_is_refused(mode, size):
    with pytest.raises(ValueError, match=f"the PIL image has no pixels: it is {size[0]} x {size[1]}"):
        to_tensor(Image.new(mode, size), 8)


BAD_ARRAYS = {
    "alpha": (np.zeros((4, 4, 4), np.uint8), r"C 1 \(grey\) or 3 \(RGB\); got \[4, 4, 4\].*composite alpha"),
    "two channels": (np.zeros((1, 4, 4, 2), np.uint8), r"got \[1, 4, 4, 2\]"),
    "channels first": (np.zeros((3, 4, 5), np.uint8), r"arrays are \[H, W\], \[H, W, C\].*reorder the axes"),
    "one axis": (np.zeros(4, np.uint8), r"got \[4\]"),
    "five axes": (np.zeros((1, 1, 4, 4, 3), np.uint8), r"got \[1, 1, 4, 4, 3\]"),
    "no pixels": (np.zeros((0, 4, 3), np.uint8), r"got \[0, 4, 3\]"),
    "wide integers": (np.zeros((4, 4, 3), np.int64), "uint8, or floats in .*; got int64"),
    "booleans": (np.zeros((4, 4, 3), bool), "uint8, or floats in .*; got bool"),
    "tensor, channels last": (torch.zeros(4, 4, 3), r"tensors are \[C, H, W\].*got \[4, 4, 3\]"),
    "tensor, two axes": (torch.zeros(4, 4), r"tensors are .*got \[4, 4\]"),
    "tensor of integers": (
        torch.zeros(3, 4, 4, dtype=torch.int32),
        "uint8, or floats in .*; got torch.int32",
    ),
}


@pytest.mark.parametrize(("source", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_wrong_shapes_and_dtypes_say_what_is_accepted(source, message):
    with pytest.raises(ValueError, match=message):
        to_tensor(source, 4)


@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize(
    ("value", "fix"),
    [
        (float("nan"), "find the NaN"),
        (-0.5, r"from -0\.5 to 0: if they are in \[-1, 1\], use \(x \+ 1\) / 2"),
        (200.0, r"from 0 to 200: if they are in \[0, 255\], divide by 255"),
        (1.001, r"from 0 to 1\.001: rescale them, or clamp"),
        (-3.0, "rescale them"),
        (float("inf"), "rescale them"),
    ],
)
def test_floats_outside_zero_to_one_are_refused_with_the_likely_fix(kind, value, fix):
    values = np.zeros((4, 4, 3))
    values[2, 1, 0] = value
    source = values if kind == "array" else torch.from_numpy(values).permute(2, 0, 1)
    with pytest.raises(ValueError, match=rf"float images must be in \[0, 1\]; got values.*{fix}"):
        to_tensor(source, 4)


@pytest.mark.parametrize("size", [0, -1, 2.5, (8, 8), "8"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="size is the side of the images in pixels"):
        to_tensor(Image.new("RGB", (4, 4)), size)


# To tensors -------------------------------------------------------------------------------------------------


def test_an_empty_list_is_an_empty_batch_of_the_size():
    for empty in ([], ()):
        found = to_tensor(empty, 16)
        assert (found.shape, found.dtype) == ((0, 3, 16, 16), torch.float32)
    with pytest.raises(ValueError, match="no resolution of its own: give a size"):
        to_tensor([], None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_an_empty_batch_stays_an_empty_batch(dtype):
    assert to_tensor(torch.zeros(0, 3, 9, 5, dtype=dtype), 4).shape == (0, 3, 4, 4)


def test_a_mixed_list_gives_what_each_gives_alone(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(noise(30, 20)).save(path)
    grey = noise(17, 17)[..., 0]
    batch = torch.rand(2, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    sources = [path, Image.fromarray(noise(8, 9)), noise(12, 10), grey, batch, path.read_bytes()]
    found = to_tensor(sources, 8)
    assert found.shape == (7, 3, 8, 8)
    assert torch.equal(found, torch.cat([to_tensor(source, 8) for source in sources]))
    assert torch.equal(found[0], found[-1])


@pytest.mark.parametrize("source", [Image.fromarray(noise(9, 9)), noise(9, 9), noise(9, 9)[..., 0] / 255.0])
def test_the_result_is_a_contiguous_copy_in_float32(source):
    found = to_tensor(source, None)
    assert (found.dtype, found.is_contiguous()) == (torch.float32, True)
    before = to_tensor(source, None).clone()
    found.zero_()
    assert torch.equal(to_tensor(source, None), before)


def test_a_tensor_that_needs_no_change_is_not_aliased():
    images = torch.rand(1, 3, 8, 8)
    to_tensor(images, 8).zero_()
    assert images.any()


@pytest.mark.parametrize("size", [9, None])
def test_images_of_the_exact_size_are_untouched(size):
    array = noise(9, 9)
    expected = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    floats = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    for source in (
        array,
        Image.fromarray(array),
        encoded(Image.fromarray(array)),
        torch.from_numpy(array).permute(2, 0, 1),
    ):
        assert torch.equal(to_tensor(source, size), expected)
    assert torch.equal(to_tensor(floats, size), floats)


def test_the_same_picture_in_every_layout_is_the_same_tensor():
    array = noise(10, 14)
    expected = to_tensor(Image.fromarray(array), 6)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for source in (
        array,
        array[None],
        tensor,
        tensor[None],
        np.asfortranarray(array),
        array[:, ::-1][:, ::-1],
    ):
        assert torch.equal(to_tensor(source, 6), expected)
    grey = array[..., 0]
    for source in (
        grey[..., None],
        grey[None, ..., None],
        torch.from_numpy(grey)[None],
        Image.fromarray(grey),
    ):
        assert torch.equal(to_tensor(source, 6), to_tensor(grey, 6))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_float_arrays_are_bytes_divided_by_255(dtype):
    array = noise(9, 9)
    close = to_tensor((array / 255).astype(dtype), 9)
    assert (close - to_tensor(array, 9)).abs().max() < (5e-4 if dtype is np.float16 else 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_tensors_of_any_width_become_float32(dtype):
    images = torch.rand(1, 3, 8, 8).to(dtype)
    assert torch.equal(to_tensor(images, 8), images.float())


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 90), st.integers(2, 90), st.integers(1, 40), st.booleans())
def test_floats_are_resized_and_cropped_as_pil_does_it(height, width, size, crop):
    array = noise(height, width) // 2 + 64  # no overshoot to clip: PIL clips between its two passes as well
    by_pil = to_tensor(Image.fromarray(array), size, crop=crop)
    floats = to_tensor(array / np.float32(255), size, crop=crop)
    assert floats.shape == by_pil.shape
    assert min(floats.shape[2:]) == size
    assert (floats - by_pil).abs().max() < 2 / 255  # PIL rounds after each pass


@pytest.mark.parametrize(
    ("height", "width", "size", "shape"),
    [(100, 50, 20, (40, 20)), (50, 100, 20, (20, 40)), (33, 50, 20, (20, 30)), (7, 7, 20, (20, 20))],
)
def test_without_the_crop_the_longer_side_is_rounded_down(height, width, size, shape):
    for array in (noise(height, width), noise(height, width) / 255.0):
        assert to_tensor(array, size, crop=False).shape[2:] == shape


@pytest.mark.parametrize("long", [9, 10, 11, 12])
@pytest.mark.parametrize("divisor", [1, 255.0])
def test_the_centre_is_kept_without_resizing_when_the_shorter_side_fits(long, divisor):
    array = noise(8, long)
    left = round((long - 8) / 2)
    expected = to_tensor(array[:, left : left + 8], None)
    turned = np.ascontiguousarray(array.transpose(1, 0, 2))
    assert torch.allclose(to_tensor(array / divisor if divisor > 1 else array, 8), expected)
    assert torch.allclose(to_tensor(turned / divisor if divisor > 1 else turned, 8), expected.transpose(2, 3))


def test_resizing_floats_stays_in_range_and_passes_gradients():
    images = torch.zeros(1, 3, 16, 16)
    images[..., 8:] = 1  # an edge, where bicubic overshoots
    images.requires_grad_()
    found = to_tensor(images, 37)
    assert (found.min(), found.max()) == (0, 1)
    found.sum().backward()
    assert images.grad.abs().sum() > 0


def test_images_of_several_sizes_need_a_size():
    pictures = [noise(8, 9), noise(8, 8)]
    for options in ({"size": None}, {"size": 8, "crop": False}):
        with pytest.raises(ValueError, match="one size; got 8x8, 9x8: give a size and leave crop=True"):
            to_tensor(pictures, **options)
    assert to_tensor([pictures[0]] * 2, None).shape == (2, 3, 8, 9)


def test_images_of_several_devices_are_not_joined():
    images = [torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8, device="meta")]
    with pytest.raises(ValueError, match="one device; got cpu, meta: move"):
        to_tensor(images, 4)


def test_adm_crops_any_shape_to_upright_rgb_of_the_size():
    for height, width in ((8, 8), (9, 40), (40, 9), (100, 33), (5, 7)):
        cropped = adm_center_crop(Image.fromarray(noise(height, width)).convert("RGBA"), 8)
        assert (cropped.mode, cropped.size) == ("RGB", (8, 8))
    exact = Image.fromarray(noise(8, 8))
    assert pixels(adm_center_crop(exact, 8)) == pixels(exact)
    constant = Image.new("RGB", (64, 33), (9, 99, 199))
    assert pixels(adm_center_crop(constant, 16)) == [[(9, 99, 199)] * 16] * 16


def test_the_public_names_are_these():
    assert vistok.to_tensor is to_tensor
    assert vistok.to_pil is to_pil


# And back ---------------------------------------------------------------------------------------------------


def test_eight_bit_images_come_back_as_they_were():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    array = np.stack([levels, levels.T, 255 - levels], axis=-1)
    for rounding in ("round", "truncate"):
        found = to_pil(to_tensor([array, array[::-1].copy()], None), rounding)
        assert [image.mode for image in found] == ["RGB"] * 2
        assert np.array_equal(found[0], array)
        assert np.array_equal(found[1], array[::-1])


def test_rounding_takes_the_nearest_level_and_truncation_the_one_below():
    levels = torch.tensor([0.4, 0.6, 1.4, 254.6, -20, 300]).expand(3, 1, 6) / 255
    assert np.array(to_pil(levels)[0])[0, :, 0].tolist() == [0, 1, 1, 255, 0, 255]
    assert np.array(to_pil(levels, "truncate")[0])[0, :, 0].tolist() == [0, 0, 1, 254, 0, 255]
    with pytest.raises(ValueError, match='"round" or "truncate"; got \'floor\''):
        to_pil(levels, "floor")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_width_and_a_graph_can_be_shown(dtype):
    images = torch.full((2, 3, 4, 5), 0.5, dtype=dtype, requires_grad=True)
    found = to_pil(images)
    assert [image.size for image in found] == [(5, 4)] * 2
    assert found[0].getpixel((0, 0)) == (128, 128, 128)
    assert to_pil(images[:0]) == []


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 1, 4, 4),
        torch.zeros(4, 4),
        torch.zeros(4, 4, 3),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
    ],
    ids=lambda images: f"{images.dtype} {list(images.shape)}",
)
def test_what_is_no_batch_of_float_images_is_not_shown(images):
    with pytest.raises(ValueError, match=r"to_pil takes floats \[B, 3, H, W\]") as caught:
        to_pil(images)
    assert f"{images.dtype} {list(images.shape)}" in str(caught.value)


def test_nan_is_not_shown():
    images = torch.zeros(1, 3, 2, 2)
    images[0, 1, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="to_pil got NaN"):
        to_pil(images)


# Side by side -----------------------------------------------------------------------------------------------


def test_side_by_side_keeps_every_image_and_a_gap_of_four():
    images = [
        [Image.fromarray(noise(10, 20)), Image.fromarray(noise(6, 5, 1))],
        [Image.fromarray(noise(7, 30, 2))],
    ]
    sheet = side_by_side(images)
    assert sheet.size == (4 + 30 + 4 + 5 + 4, 4 + 10 + 4 + 7 + 4)
    corners = [[(4, 4), (38, 4)], [(4, 18)]]
    for row, places in zip(images, corners, strict=True):
        for image, (left, top) in zip(row, places, strict=True):
            box = (left, top, left + image.width, top + image.height)
            assert pixels(sheet.crop(box)) == pixels(image)
            sheet.paste("white", box)
    assert sheet.getextrema() == ((255, 255),) * 3  # nothing else is drawn


def test_captions_stand_above_their_columns_and_widen_them():
    images = [Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), GREEN)]
    label = "a caption wider than its image"
    sheet = side_by_side([images], [label, "b"])
    box = ImageDraw.Draw(sheet).multiline_textbbox((0, 0), label, font=ImageFont.load_default(14))
    width, header = round(box[2]), round(box[3]) + 4
    assert sheet.size == (4 + width + 4 + 20 + 4, header + 4 + 20 + 4)
    assert sheet.getpixel((4, header + 4)) == RED
    assert sheet.getpixel((8 + width, header + 4)) == GREEN
    for left in (4, 8 + width):
        assert sheet.crop((left, 0, left + 20, header + 4)).convert("L").getextrema()[0] < 100
    taller = side_by_side([images], [label, "b\nc"])
    assert taller.height > sheet.height + 8


def test_side_by_side_turns_and_flattens_images_before_it_measures_them():
    turned = Image.open(BytesIO(oriented(Image.new("RGB", (20, 10), RED), 6)))
    sheet = side_by_side([[turned, Image.new("RGBA", (6, 6), 0)]])
    assert sheet.size == (4 + 10 + 4 + 6 + 4, 4 + 20 + 4)
    assert pixels(sheet.crop((4, 4, 14, 24))) == [[RED] * 10] * 20
    assert pixels(sheet.crop((18, 4, 24, 10))) == [[WHITE] * 6] * 6


def test_side_by_side_refuses_nothing_and_unmatched_captions():
    for rows in ([], [[]]):
        with pytest.raises(ValueError, match="got no images"):
            side_by_side(rows)
    with pytest.raises(ValueError, match="one label per column, here 1; got 2"):
        side_by_side([[Image.new("RGB", (1, 1))]], ["a", "b"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_tensors_on_a_gpu_stay_there_and_come_out_the_same(dtype):
    images = torch.from_numpy(smooth(40, 60)).permute(2, 0, 1)
    images = images if dtype == torch.uint8 else images / 255
    found = to_tensor(images.to("cuda"), 16)
    assert found.device.type == "cuda"
    assert torch.allclose(found.cpu(), to_tensor(images, 16), atol=1e-6)
    assert pixels(to_pil(found)[0]) == pixels(to_pil(found.cpu())[0])


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_bytes_of_no_format_are_refused_without_an_address_in_memory(content):
    with pytest.raises(
        ValueError, match=f"the image of {len(content)} bytes .*: not a format that Pillow opens$"
    ):
        to_tensor(content, 8)
