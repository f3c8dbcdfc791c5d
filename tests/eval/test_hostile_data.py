"""Folders, shards and manifests of anyone: nothing hangs, fills memory or leaves pictures out in silence."""

import io
import json
import os
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from vistok import to_tensor
from vistok.eval.data.dataset import batches, open_dataset
from vistok.eval.tasks.fid import _common_size
from vistok.train.data import Folder, Shards
from vistok.train.patterns import MOST_PATHS, expand
from vistok.train.tar_members import find_pictures

pytestmark = pytest.mark.slow

LIMITED = """
import resource, sys, warnings
warnings.simplefilter("ignore")
resource.setrlimit(resource.RLIMIT_AS, (7 << 30, 7 << 30))  # imports map up to 5 GB
from vistok.eval.data.dataset import batches, open_dataset
try:
    dataset = open_dataset(sys.argv[1])
    for batch in batches(dataset, 16, 2, workers=0):
        for _, name, reason in batch.bad:
            print("bad", name, reason)
except (OSError, ValueError) as error:
    print("refused", error)
status = open("/proc/self/status").read()  # ru_maxrss would be at least that of the tests' process
print(int(status.split("VmHWM:")[1].split()[0]) // 1024, "MB")
"""


def picture(value=90, size=(20, 16)):
    return Image.new("RGB", size, (value,) * 3)


def content(format="PNG", value=90, **options):
    file = io.BytesIO()
    picture(value).save(file, format, **options)
    return file.getvalue()


def looked_at(source):
    """What a process of limited memory and time makes of a source."""
    command = [sys.executable, "-c", LIMITED, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *lines, memory = done.stdout.splitlines()
    assert int(memory.split()[0]) < 1500
    return "\n".join(lines)


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# ---- what is a picture -------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Pictures in many formats, a linked folder, a link that goes round, and files that are none."""
    root, elsewhere = tmp_path / "mixed", tmp_path / "elsewhere"
    (root / "class").mkdir(parents=True)
    elsewhere.mkdir()
    for name, format in {"a.gif": "GIF", "b.ppm": "PPM", "c.jp2": "JPEG2000", "d.tga": "TGA"}.items():
        picture().save(root / name, format)
    picture().save(root / "class" / "e.jfif", "JPEG")
    picture().save(root / "no-ending", "PNG")
    picture().save(elsewhere / "f.webp")
    (root / "linked").symlink_to(elsewhere)
    (root / "class" / "round").symlink_to(root)
    os.mkfifo(root / "pipe.png")
    (root / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (root / "list.csv").write_text("a,b")
    return root


@pytest.mark.parametrize("opened", [lambda root: Folder(16, path=root), open_dataset])
def test_every_format_is_read_and_the_rest_reported_in_one_line(mixed, opened):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = opened(mixed)
    assert len(source) == 7
    (line,) = [str(each.message) for each in caught if "left out" in str(each.message)]
    for part in ("left out 3 files", "pipe.png", "not an ordinary file", "HEIC", "phone.heic", "list.csv"):
        assert part in line
    assert "\n" not in line


def test_members_of_samples_without_a_picture_are_reported(tmp_path):
    members = {"0.gif": content("GIF"), "0.txt": b"caption", "1.heic": b"x", "1.txt": b"y", "2.json": b"{}"}
    path = tar_of(tmp_path / "a.tar", members)
    found = find_pictures(path)
    assert [member.name for member in found.pictures] == ["0.gif"]
    assert found.left_out == ["1.heic", "1.txt", "2.json"]
    for opened in (lambda: Shards(16, pattern=path), lambda: open_dataset(path)):
        with pytest.warns(UserWarning, match=r"left out 3 members of 1 tar file.*1 × .heic"):
            assert len(opened()) == 1


def test_the_command_reports_what_it_left_out(mixed, tmp_path):
    arguments = ["eval", "recon", "--tokenizer", "vistok-mini", "--data", str(mixed), "--metrics", "psnr"]
    done = subprocess.run(
        [sys.executable, "-m", "vistok.cli", *arguments, "--out", str(tmp_path / "out"), "--no-html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("left out 3 files") == 1
    record = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert record["n"] == 7 and record["protocol"]["icc_profiles"] == "ignored"


def test_evaluation_compares_the_numbers_of_files_whatever_their_profile(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    with_profile = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    with_profile.save(tmp_path / "a.png", icc_profile=profile)
    (batch,) = batches(open_dataset(tmp_path), 16, 1, workers=0)
    assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), np.asarray(with_profile))
    raw = to_tensor(tmp_path / "a.png", 16, profile="ignore")
    assert torch.equal(batch.images.float() / 255, raw)


# ---- files that are not ordinary ---------------------------------------------------------------------------


def test_pipes_and_devices_in_a_manifest_are_bad_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    picture().save(tmp_path / "good.png")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(1 << 40)  # takes no room
    names = ["good.png", "pipe.png", "/dev/zero", "huge.png", "a\0b.png", ".", "x" * 5000]
    lines = [json.dumps({"image": name}) for name in names]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    report = looked_at(tmp_path / "m.jsonl")
    assert report.count("bad ") == 6 and "named pipe" in report and "1,099,511,627,776 bytes" in report
    assert _common_size([open_dataset(tmp_path / "m.jsonl")]) == (16, 20)


@pytest.mark.parametrize("name", ["pipe", "pipe.tar", "pipe.jsonl", "/dev/zero"])
def test_a_pipe_or_device_is_refused_as_a_source(tmp_path, name):
    if name.startswith("pipe"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="which is not read from"):
        open_dataset(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no file"):
        Shards(16, pattern=tmp_path / name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"image": ' + b"9" * 5000 + b"}", "line 1"),
        (b"{" + b", ".join(b'"k%d": 1' % n for n in range(10_000)) + b"}", 'has no path under "image"'),
    ],
)
def test_a_bad_manifest_is_one_short_line(tmp_path, line, message):
    (tmp_path / "m.jsonl").write_bytes(line)
    with pytest.raises(ValueError, match=message) as error:
        open_dataset(tmp_path / "m.jsonl")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


# ---- patterns and tar files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "x{0..99999999}.tar",
        "x{99999999..0}.tar",
        "{0..99999}{0..99999}.tar",
        "{a,b}" * 40,
        "x{0..9999999999999999}",
        "{x,{0..99999}{0..99999}}.tar",
        "{x," + "{a..z}" * 9 + "}.tar",
    ],
)
def test_braces_are_not_written_out_beyond_a_limit(pattern):
    with pytest.raises(ValueError, match=f"stands for more than {MOST_PATHS:,} paths"):
        expand(pattern)


def test_links_that_go_round_end(tmp_path):
    (tmp_path / "a").mkdir()
    tar_of(tmp_path / "a" / "x.tar", {"0.png": content()})
    for name in ("one", "two", "three"):
        (tmp_path / "a" / name).symlink_to(tmp_path)
    assert expand(str(tmp_path / "**" / "*.tar")) == [str(tmp_path / "a" / "x.tar")]


def _header(name, size, kind=b"0"):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("size", [1 << 33, 3 << 20])
@pytest.mark.parametrize("kind", [b"0", b"x", b"L"])
def test_a_declared_size_is_not_believed(tmp_path, size, kind):
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(_header("0.png", len(content())) + content().ljust(512, b"\0"))
        file.write(_header("1.png", size, kind))
        file.truncate(1 << 21)
    assert "refused" in (report := looked_at(path)) and "not a whole" in report


def test_a_member_too_large_for_a_picture_is_a_bad_image(tmp_path):
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(_header("0.png", 1 << 31))
        file.truncate(512 + (1 << 31) + 1024)
    assert "2,147,483,648 bytes" in looked_at(path)


def test_a_broken_file_of_any_kind_is_skipped_in_training(tmp_path):
    picture().save(tmp_path / "good.png")
    whole = {
        format: content(format) for format in ("PNG", "GIF", "TIFF", "WEBP", "JPEG", "BMP", "PPM", "TGA")
    }
    rng = np.random.default_rng(0)
    for number, (format, data) in enumerate(list(whole.items()) * 6):
        broken = bytearray(data)
        for place in rng.integers(0, len(broken), 8):
            broken[place] = rng.integers(256)
        (tmp_path / f"{number}.{format.lower()}").write_bytes(broken)
    source = Folder(16, path=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in range(len(source)):
            assert source.sample(index).shape == (16, 16, 3)
