"""What commands take as images, what they call their pictures, and what they do not write over."""

import dataclasses
import os
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_tokenizers import shared

import vistok
from vistok.commands.image_inputs import gather
from vistok.commands.picture_names import picture_paths

ASSETS = Path(str(files("vistok.assets")))
PHOTO, COFFEE = ASSETS / "chelsea.jpg", ASSETS / "coffee.jpg"


@pytest.fixture
def photos(tmp_path):
    """photos/: one picture, two class folders with the same names, and a text."""
    for name in ("cat.png", "a/same.jpg", "b/same.jpg", "b/moving.gif"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(PHOTO).resize((96, 64)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("of a cat")
    return tmp_path / "photos"


# ---- inputs ------------------------------------------------------------------------------------------------


def test_folders_name_images_below_them_and_files_their_own(photos):
    assert [each.name for each in gather([photos])] == ["a/same.jpg", "b/moving.gif", "b/same.jpg", "cat.png"]
    assert [each.name for each in gather([photos / "b" / "same.jpg", photos / "cat.png"])] == [
        "same.jpg",
        "cat.png",
    ]


def test_what_a_folder_leaves_out_is_one_line(photos, capsys):
    gather([photos])
    assert capsys.readouterr().err == f"left out 1 file of {photos}: 1 × not an image (.txt) (notes.txt)\n"


def test_patterns_are_expanded_unless_a_file_has_that_name(photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert [each.name for each in gather(["*/same.jpg"])] == ["same.jpg", "same.jpg"]
    assert [each.name for each in gather(["**/*.gif"])] == ["moving.gif"]
    (photos / "[1].png").write_bytes((photos / "cat.png").read_bytes())
    assert [each.name for each in gather(["[1].png"])] == ["[1].png"]
    with pytest.raises(FileNotFoundError, match=r"nothing matches \*.bmp"):
        gather(["*.bmp"])


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(ValueError, match=r"holds no images .*: left out 1 file .*pip install pillow-heif"):
        gather([tmp_path])


@pytest.mark.parametrize(
    "command", [["encode", "-o", "a.vtok"], ["reconstruct", "--out", "out"], ["eval", "lengths"]]
)
def test_every_command_that_takes_images_takes_patterns(run, photos, command):
    status, out, err = run(*command, "photos/*/same.jpg")
    assert status == 0, err
    assert "2 images" in out or out.count("same.jpg") >= 2


# ---- names of pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("photo.jpg", "photo.png"),
        ("a/photo.jpg", "a/photo.png"),
        ("../../etc/passwd", "etc/passwd.png"),
        ("/etc/cron.d/x.png", "etc/cron.d/x.png"),
        ("..", "picture.png"),
        ("...//.//", "picture.png"),
        ("C:\\windows\\x.bmp", "C_/windows/x.png"),
        ("a\nb\x1b.png", "a_b_.png"),
        ("\udcff.png", "_.png"),
        ("00007.png", "00007.png"),
        ("ü" * 300 + ".png", "ü" * 100 + ".png"),
        (".hidden", ".hidden.png"),
    ],
)
def test_names_lead_nowhere_else(tmp_path, name, path):
    assert picture_paths(tmp_path / "out", [name]) == [tmp_path / "out" / path]


def test_equal_names_are_numbered(tmp_path):
    names = ["a.jpg", "a.png", "A.png", "a-2.png", "b/a.png"]
    paths = [path.relative_to(tmp_path).as_posix() for path in picture_paths(tmp_path, names)]
    assert paths == ["a.png", "a-2.png", "A-3.png", "a-2-2.png", "b/a.png"]
    assert len(set(picture_paths(tmp_path, ["same.png"] * 5000))) == 5000


def test_links_do_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="is a link that leads out of"):
        picture_paths(tmp_path / "out", ["a/photo.png"])


# ---- encode and decode -------------------------------------------------------------------------------------


def test_names_survive_encode_and_decode_and_nothing_is_replaced(run, photos, tmp_path):
    status, _, err = run("encode", photos, "-o", "a.vtok")
    assert status == 0 and err.startswith("left out 1 file")
    assert vistok.Tokens.load("a.vtok").names == ("a/same.jpg", "b/moving.gif", "b/same.jpg", "cat.png")
    status, out, _ = run("decode", "a.vtok", "-o", "back")
    assert status == 0 and "4 images in back" in out
    written = {path.relative_to("back").as_posix(): path.read_bytes() for path in Path("back").rglob("*.png")}
    assert set(written) == {"a/same.png", "b/moving.png", "b/same.png", "cat.png"}
    (tmp_path / "back" / "cat.png").write_bytes(b"another")
    status, _, err = run("decode", "a.vtok", "-o", "back")
    assert status == 1 and err.count("\n") == 1 and "is there already" in err
    assert (tmp_path / "back" / "cat.png").read_bytes() == b"another"


def test_reconstruct_replaces_its_own_pictures_and_no_others(run, photos, tmp_path):
    for _ in range(2):
        status, _, err = run("reconstruct", photos / "cat.png", "--out", "out", "--tokens", 1)
        assert status == 0, err
    before = (photos / "cat.png").read_bytes()
    status, _, err = run("reconstruct", photos / "cat.png", "--out", photos)
    assert status == 1 and "cat.png is there already that vistok did not write" in err
    assert (photos / "cat.png").read_bytes() == before


def test_the_same_picture_twice_is_two_pictures(run, photos, tmp_path):
    status, _, _ = run("reconstruct", photos / "cat.png", photos / "cat.png", "--out", "out", "--tokens", 1)
    assert status == 0 and {path.name for path in Path("out").glob("*.png")} == {"cat.png", "cat-2.png"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["encode", "PICTURE", "-o", "PICTURE"],
        ["encode", "PICTURE", "-o", "FOLDER"],
        ["demo", "PICTURE", "--out", "PICTURE"],
        ["demo", "PICTURE", "--out", "FOLDER"],
        ["reconstruct", "PICTURE", "--out", "PICTURE"],
        ["decode", "TOKENS", "-o", "PICTURE"],
        ["eval", "lengths", "PICTURE", "--out", "PICTURE"],
        ["train", "vistok-mini.yaml", "-o", "PICTURE"],
    ],
)
def test_outputs_are_checked_before_the_work_and_harm_nothing(run, photos, tmp_path, monkeypatch, arguments):
    run("encode", COFFEE, "-o", "a.vtok")
    shutil.copy(ASSETS / "vistok-mini.yaml", tmp_path)
    monkeypatch.setattr("vistok.loading.load", lambda *_, **__: pytest.fail("worked before it checked"))
    places = {"PICTURE": photos / "cat.png", "FOLDER": photos, "TOKENS": "a.vtok"}
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    status, _, err = run(*[places.get(argument, argument) for argument in arguments])
    assert status == 1 and err.count("\n") == 1 and "name" in err
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before


def test_a_token_file_may_name_only_registry_names_by_itself(run, photos, tmp_path):
    model = shared("mini")
    images = vistok.to_tensor(photos / "cat.png", model.image_size)
    model.save_pretrained(tmp_path / "mine")
    for name in (str(tmp_path / "mine"), "mine", "hf://someone/evil", "someone/evil"):
        dataclasses.replace(model.encode(images), tokenizer=name).save("a.vtok")
        status, _, err = run("decode", "a.vtok", "-o", "back")
        assert status == 1 and "is not a registry name; if you trust the file, give --tokenizer" in err
    dataclasses.replace(model.encode(images), tokenizer=None).save("a.vtok")
    status, _, err = run("decode", "a.vtok", "-o", "back", "--tokenizer", "mine")
    assert status == 0, err


def test_a_file_without_names_is_numbered(run, tmp_path):
    model = vistok.load("vistok-mini")
    model.encode(vistok.to_tensor([PHOTO, COFFEE], 128)).save(tmp_path / "a.vtok")
    status, _, _ = run("decode", "a.vtok", "-o", "back")
    assert status == 0 and sorted(os.listdir("back")) == ["00000.png", "00001.png"]


def test_info_of_a_file_reports_which_weights_load(run, tmp_path):
    model = shared("mini")
    state = model.state_dict()
    model.save_pretrained(tmp_path / "mini")
    (tmp_path / "mini" / "model.safetensors").unlink()
    torch.save({"model": state, "ema": state}, tmp_path / "mini" / "pytorch_model.bin")
    status, out, err = run("info", "./mini")
    assert status == 0 and "mini" in out and "loading the average of its weights (ema)" in err


def test_hub_names_work_in_the_command_line(run, offline):
    status, _, err = run("encode", PHOTO, "-o", "a.vtok", "--tokenizer", "hf://someone/thing")
    assert status == 1 and err.count("\n") == 1 and "could not get" in err and "'someone/thing'" in err
    status, _, err = run("encode", PHOTO, "-o", "a.vtok", "--tokenizer", "someone/thing")
    assert status == 1 and err.count("\n") == 1 and "hf://someone/thing" in err
