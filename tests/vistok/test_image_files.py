"""Which files are images, what is left out of a folder and why."""

import os
import pickle

import numpy as np
import PIL
import pytest
from PIL import Image

from vistok.image_files import list_images
from vistok.images import image_extensions, is_image, load_image, to_tensor

KINDS = ["png", "jpg", "jfif", "webp", "bmp", "tif", "gif", "avif", "jp2", "ppm", "tga", "qoi", "ico"]


def picture(path):
    Image.new("RGB", (16, 16), "teal").save(path)  # the least that every Pillow writes as an icon
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_that_pillow_decodes_is_listed_and_loads(tmp_path, kind):
    Image.init()
    if f".{kind}" not in Image.EXTENSION or Image.EXTENSION[f".{kind}"] not in Image.SAVE:
        pytest.skip(f"Pillow {PIL.__version__} writes no {kind}")
    path = picture(tmp_path / f"a.{kind.upper()}")
    assert f".{kind}" in image_extensions() and is_image(path)
    assert list_images(tmp_path).images == [path] and list_images(tmp_path).left_out_line() is None
    assert load_image(path).mode == "RGB"


def test_formats_that_pillow_only_recognises_are_not_listed():
    assert not {".mpg", ".h5", ".eps", ".wmf"} & image_extensions()


@pytest.mark.parametrize("name", ["photo", "photo.dat", "photo.jpg_large"])
def test_other_names_are_judged_by_their_content(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / name, format="JPEG")
    assert is_image(tmp_path / name)
    (tmp_path / "notes").write_text("Python is not a picture, P5 neither")
    (tmp_path / "zeros.bin").write_bytes(bytes(4000))
    assert list_images(tmp_path).images == [tmp_path / name]


def test_linked_folders_are_entered_once_and_loops_end(tmp_path):
    picture(tmp_path / "deep.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "class").symlink_to(tmp_path / "classes")
    (tmp_path / "classes").mkdir()
    picture(tmp_path / "classes" / "a.png")
    (tmp_path / "classes" / "loop").symlink_to(tmp_path / "data")
    assert list_images(tmp_path / "data").images == [tmp_path / "data" / "class" / "a.png"]


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
KINDS_OF_OTHERS = [
    ("a.heic", HEIC, "a HEIC photograph; pip install pillow-heif"),
    ("a.jpg", HEIC, "a HEIC photograph; pip install pillow-heif"),
    ("a.jxl", b"\xff\x0a" + bytes(20), "a JPEG XL image; pip install pillow-jxl-plugin"),
    ("a.npy", b"\x93NUMPY" + bytes(20), "a NumPy array; load it with numpy.load"),
    ("a.csv", b"name,label\n", "a table; give the pictures"),
    ("a.pkl", pickle.dumps([1]), "a pickle, which is never opened"),
    ("a.png", b"", "an empty file; fetch it again"),
    ("a.jpg", b"<!DOCTYPE html><html>", "a web page in place of the picture"),
    ("a.svg", b"<svg xmlns=", "an SVG drawing; convert it"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), KINDS_OF_OTHERS)
def test_what_is_given_in_place_of_a_picture_gets_its_own_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not an image that Pillow opens but {sentence}"):
        load_image(tmp_path / name)


def test_one_line_reports_what_a_folder_leaves_out_and_why(tmp_path):
    picture(tmp_path / "a.png")
    for number in range(3):
        (tmp_path / f"{number}.heic").write_bytes(HEIC)
        (tmp_path / f"{number}.txt").write_text("a caption")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves")
    found = list_images(tmp_path)
    assert found.images == [tmp_path / "a.png"]
    line = found.left_out_line()
    assert line.startswith(f"left out 8 files of {tmp_path}: 3 × ") and "\n" not in line
    assert "3 × a HEIC photograph; pip install pillow-heif (0.heic, 1.heic, …)" in line
    assert "3 × not an image (.txt) (0.txt, 1.txt, …)" in line
    assert "1 × not an ordinary file (pipe.png)" in line and "1 × a link to nothing (gone.png)" in line


def test_pipes_devices_and_huge_files_are_refused_before_they_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match=r"pipe.png is a named pipe, which is not read from"):
        load_image(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="/dev/zero is a device"):
        load_image("/dev/zero")
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"sparse.png has 1,099,511,627,776 bytes; .* up to"):
        load_image(tmp_path / "sparse.png")


@pytest.mark.parametrize("size", [np.int64(4), np.uint8(4)])
def test_numpy_integers_are_sizes(tmp_path, size):
    assert to_tensor(picture(tmp_path / "a.png"), size).shape == (1, 3, 4, 4)


@pytest.mark.parametrize("size", [True, np.float64(4), np.int64(0)])
def test_what_is_not_a_positive_whole_number_is_not_a_size(tmp_path, size):
    with pytest.raises(ValueError, match="size is the side"):
        to_tensor(picture(tmp_path / "a.png"), size)
