"""Evaluated images: every source, every kind of bad file, and batches that depend on nothing but the data."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import closing
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_dataset import in_memory
from PIL import Image

from vistok.eval.data.dataset import NICE, batches, decode, open_dataset
from vistok.eval.speed import pipeline
from vistok.images import to_tensor
from vistok.loading import create

SIZE = 16
SHAPES = ((40, 24), (16, 16), (24, 50), (7, 9), (33, 32))  # of the pictures of every source


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(seed, size=(24, 20)):
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels)


PICTURES = [encoded(noise(seed, shape), "JPEG") for seed, shape in enumerate(SHAPES)]


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def write_files(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def levels(content, size=SIZE, **options):
    """What the shared image path makes of an encoded image, as levels."""
    return (to_tensor(content, size, **options)[0] * 255).round().to(torch.uint8)


def everything(read):
    """All batches as one: indices, images, names, digests, bad."""
    parts = list(read)
    indices = torch.cat([part.indices for part in parts])
    images = torch.cat([part.images for part in parts])
    lists = ([each for part in parts for each in getattr(part, name)] for name in ("names", "digests", "bad"))
    return indices, images, *lists


# Sources ----------------------------------------------------------------------------------------------------


def folder_source(root):
    names = ["a.jpg", "b/a.jpeg", "b/c/d.JPG", "b/c/z.jpg", "e.jpg"]
    write_files(root, dict(zip(names, PICTURES, strict=True)) | {"notes.txt": b"words"})
    return {"source": root}, "folder", names


def shards_source(root):
    first = {"1.jpg": PICTURES[0], "1.txt": b"a caption", "0.jpg": PICTURES[1]}
    write_tar(root / "val-000.tar", first)
    write_tar(root / "val-001.tar", {f"deep/{n}.jpg": PICTURES[n] for n in (2, 3, 4)})
    names = ["val-000.tar:1.jpg", "val-000.tar:0.jpg", *(f"val-001.tar:deep/{n}.jpg" for n in (2, 3, 4))]
    return {"source": str(root / "val-{000..001}.tar")}, "shards", [f"{root}/{name}" for name in names]


def manifest_source(root):
    write_files(root / "pictures", {f"{n}.jpg": content for n, content in enumerate(PICTURES)})
    rows = [{"image": f"pictures/{number}.jpg", "label": 1} for number in range(4)]
    rows.append({"image": str(root / "pictures" / "4.jpg")})
    text = "\n".join(json.dumps(row) for row in rows[:2]) + "\n\n" + "\n".join(map(json.dumps, rows[2:]))
    (root / "manifest.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    return {"source": root / "manifest.jsonl"}, "manifest", [row["image"] for row in rows]


def files_source(root):
    names = [f"{number}.jpg" for number in (3, 0, 4, 1, 2)]
    write_files(root, dict(zip(names, PICTURES, strict=True)))
    return {"source": [root / name for name in names]}, "files", [str(root / name) for name in names]


def hub_source(root):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    for split, contents in (("train", PICTURES[:1]), ("validation", PICTURES)):
        rows = {"label": range(len(contents)), "picture": [{"bytes": each} for each in contents]}
        table = datasets.Dataset.from_dict(rows, features=features)
        (root / "data").mkdir(exist_ok=True)
        table.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    names = [f"{root}:validation:{row}" for row in range(5)]
    return {"source": root, "split": "validation"}, "hub", names


SOURCES = [folder_source, shards_source, manifest_source, files_source, hub_source]


@pytest.fixture(params=SOURCES, ids=lambda make: make.__name__.removesuffix("_source"))
def source(request, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "source").mkdir()
    return request.param(tmp_path / "source")


def test_every_source_gives_its_images_as_the_shared_image_path_makes_them(source):
    options, kind, names = source
    dataset = open_dataset(**options)
    assert (dataset.kind, list(dataset.names), len(dataset)) == (kind, names, 5)
    indices, images, shown, digests, bad = everything(batches(dataset, SIZE, 2, workers=0))
    assert indices.tolist() == list(range(5))
    assert shown == names
    assert bad == []
    assert len(set(digests)) == 5
    assert images.dtype == torch.uint8
    contents = [dataset.read(index) for index in range(5)]
    assert sorted(contents) == sorted(PICTURES)
    for image, content in zip(images, contents, strict=True):
        assert torch.equal(image, levels(content))


def test_worker_processes_give_the_same_batches_from_every_source(source):
    options, _, _ = source
    dataset = open_dataset(**options)
    alone = list(batches(dataset, SIZE, 2, workers=0))
    helped = list(batches(dataset, SIZE, 2, workers=1))
    for expected, batch in zip(alone, helped, strict=True):
        assert torch.equal(batch.indices, expected.indices)
        assert torch.equal(batch.images, expected.images)
        assert batch.images.is_contiguous() and expected.images.is_contiguous()
        assert (batch.names, batch.digests) == (expected.names, expected.digests)


def test_a_limit_keeps_the_first_images_of_every_source(source):
    options, _, names = source
    dataset = open_dataset(**options, limit=3)
    assert list(dataset.names) == names[:3]
    assert everything(batches(dataset, SIZE, 2, workers=0))[0].tolist() == [0, 1, 2]
    assert len(open_dataset(**options, limit=99)) == 5
    with pytest.raises(ValueError, match="limit=0"):
        open_dataset(**options, limit=0)


@pytest.mark.parametrize("pattern", ["val-*.tar", "val-00[01].tar", "{val-000,val-001}.tar"])
def test_shards_are_found_by_wildcards(tmp_path, pattern):
    _, _, names = shards_source(tmp_path)
    assert list(open_dataset(tmp_path / pattern).names) == names
    assert list(open_dataset([tmp_path / "val-000.tar", tmp_path / "val-001.tar"]).names) == names


def test_shards_with_several_images_a_sample_are_read_by_extension(tmp_path):
    members = {"0.jpg": PICTURES[0], "0.seg.png": encoded(noise(9)), "1.jpg": PICTURES[1]}
    write_tar(tmp_path / "a.tar", members)
    assert len(open_dataset(tmp_path / "a.tar")) == 3
    dataset = open_dataset(tmp_path / "a.tar", column="jpg")
    assert [dataset.read(index) for index in range(2)] == PICTURES[:2]
    assert len(open_dataset(tmp_path / "a.tar", column="seg.png")) == 1


def test_long_names_in_shards_are_whole(tmp_path):
    name = "folder/" * 30 + "picture.jpg"
    write_tar(tmp_path / "a.tar", {name: PICTURES[0]})
    dataset = open_dataset(tmp_path / "a.tar")
    assert (list(dataset.names), dataset.read(0)) == ([f"{tmp_path}/a.tar:{name}"], PICTURES[0])


def test_a_list_may_hold_folders_and_a_pattern_may_stand_for_images(tmp_path):
    write_files(tmp_path, {"a/2.jpg": PICTURES[0], "a/1.jpg": PICTURES[1], "b.jpg": PICTURES[2]})
    dataset = open_dataset([tmp_path / "b.jpg", tmp_path / "a"])
    assert [Path(name).name for name in dataset.names] == ["b.jpg", "1.jpg", "2.jpg"]
    assert [Path(name).name for name in open_dataset(tmp_path / "a" / "*.jpg").names] == ["1.jpg", "2.jpg"]


def test_a_manifest_may_keep_its_paths_under_another_key(tmp_path):
    write_files(tmp_path, {"a.jpg": PICTURES[0]})
    (tmp_path / "m.jsonl").write_text('{"file": "a.jpg"}\n')
    assert open_dataset(tmp_path / "m.jsonl", column="file").read(0) == PICTURES[0]


def test_a_home_relative_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_files(tmp_path / "photos", {"a.jpg": PICTURES[0]})
    assert list(open_dataset("~/photos").names) == ["a.jpg"]


# Errors before the work starts ------------------------------------------------------------------------------


def lines(*rows):
    return "\n".join(rows).encode()


@pytest.mark.parametrize(
    ("files", "given", "error", "message"),
    [
        ({}, "nowhere", FileNotFoundError, "no file or folder .*nowhere: give a folder of images"),
        ({}, "nowhere.jpg", FileNotFoundError, "no file or folder"),
        ({"a/notes.txt": b""}, "a", FileNotFoundError, r"no picture under .*accepted are .*\.png"),
        ({"a/b.tar": b""}, "a", FileNotFoundError, r"it holds tar files: give .*a/\*\.tar"),
        ({}, "a.tar", FileNotFoundError, r"no file or folder .*a\.tar"),
        ({}, "a-{000..002}.tar", FileNotFoundError, r"no file .*a-000\.tar.*3 path"),
        ({}, "a-*.tar", FileNotFoundError, r"no file .*a-\*\.tar"),
        ({"a.tar": b"no tar at all" * 99}, "a.tar", ValueError, "not a whole, uncompressed tar"),
        ({"a.tgz": b"\x1f\x8b" * 99}, "a.tgz", ValueError, r"unpack \.tar\.gz"),
        ({}, "m.jsonl", FileNotFoundError, r"m\.jsonl"),
        ({"m.jsonl": b"\n\n"}, "m.jsonl", FileNotFoundError, "names no image"),
        ({"m.jsonl": b'{"image": "a.jpg"}'}, "m.jsonl", FileNotFoundError, "none of the 1 .*relative"),
        ({"m.jsonl": lines('{"image": "a"}', '{"file": 1}')}, "m.jsonl", ValueError, "line 2.*keys are file"),
        ({"m.jsonl": lines('{"image": ["a"]}')}, "m.jsonl", ValueError, 'line 1 has no path under "image"'),
        ({"m.jsonl": lines('["a"]')}, "m.jsonl", ValueError, 'line 1 has no path under "image"'),
        ({"m.jsonl": lines('{"image": "a"}', "a.jpg")}, "m.jsonl", ValueError, "line 2 is not JSON"),
    ],
)
def test_sources_without_images_are_refused_with_what_to_do(tmp_path, files, given, error, message):
    write_files(tmp_path, files)
    with pytest.raises(error, match=message):
        open_dataset(tmp_path / given)


def test_real_compressed_and_empty_shards_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar.gz", {"0.jpg": PICTURES[0]}, "w:gz")
    with pytest.raises(ValueError, match=r"unpack \.tar\.gz"):
        open_dataset(tmp_path / "a.tar.gz")
    write_tar(tmp_path / "text.tar", {"0.txt": b"words"})
    with pytest.raises(FileNotFoundError, match=r"no image \(png.*text\.tar"):
        open_dataset(tmp_path / "text.tar")
    write_tar(tmp_path / "a.tar", {"0.jpg": PICTURES[0]})
    with pytest.raises(FileNotFoundError, match=r"column 'seg.png'"):
        open_dataset(tmp_path / "a.tar", column="seg.png")
    with pytest.raises(ValueError, match="mixes images and tar files"):
        open_dataset([tmp_path / "a.tar", *write_files(tmp_path, {"b.jpg": PICTURES[0]}).glob("b.jpg")])
    with pytest.raises(ValueError, match="no images were given"):
        open_dataset([])


@pytest.mark.parametrize("make", [folder_source, files_source, shards_source, manifest_source])
def test_options_that_would_be_ignored_are_refused(tmp_path, make):
    options, _, _ = make(tmp_path)
    with pytest.raises(ValueError, match="split='test' does not apply"):
        open_dataset(**options, split="test")
    if make in (folder_source, files_source):
        with pytest.raises(ValueError, match="column='jpg' does not apply"):
            open_dataset(**options, column="jpg")


def test_a_dataset_with_several_splits_or_columns_asks_which(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "a").mkdir()
    hub_source(tmp_path / "a")
    with pytest.raises(ValueError, match=r"has 2 splits.* one of train, validation"):
        open_dataset(tmp_path / "a")
    with pytest.raises(ValueError, match=r"has no split 'test'.* one of train, validation"):
        open_dataset(tmp_path / "a", split="test")
    with pytest.raises(ValueError, match=r"has no column 'image'.* one of label, picture"):
        open_dataset(tmp_path / "a", split="train", column="image")
    features = datasets.Features({"left": datasets.Image(), "right": datasets.Image()})
    rows = {"left": [{"bytes": PICTURES[0]}, None], "right": [{"bytes": PICTURES[1]}, {"bytes": PICTURES[2]}]}
    (tmp_path / "b").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "b" / "all.parquet")
    with pytest.raises(ValueError, match=r"has 2 columns .* one of left, right"):
        open_dataset(tmp_path / "b")
    dataset = open_dataset(tmp_path / "b", column="left")  # its only split needs no name
    indices, _, _, _, bad = everything(batches(dataset, SIZE, 2, workers=0))
    assert indices.tolist() == [0]
    assert [(index, reason) for index, _, reason in bad] == [(1, "the row holds no image under 'left'")]


@pytest.mark.parametrize(("offline", "reason"), [(False, "ConnectError"), (True, "OfflineModeIsEnabled")])
def test_an_unreachable_hub_is_told_at_once(monkeypatch, offline, reason):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the discard port
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    begun = time.perf_counter()
    with pytest.raises(
        ConnectionError, match=r"no file or folder owner/name.*hub cannot be reached.*download"
    ):
        open_dataset("owner/name")
    assert time.perf_counter() - begun < 10


# Bad images -------------------------------------------------------------------------------------------------

WHOLE = encoded(noise(1, (64, 64)), "JPEG")
BROKEN = {  # name → content, what is said of it
    "cut.jpg": (WHOLE[: len(WHOLE) // 2], "truncated"),
    "cut.png": (encoded(noise(1, (64, 64)))[:3000], "truncated"),
    "empty.jpg": (b"", "the file is empty"),
    "text.png": (b"no image at all", "no image in a format that Pillow reads"),
    "bomb.png": (encoded(Image.new("1", (300, 300))), "300 x 300 pixels, the limit is 50000"),
    "narrow.png": (encoded(Image.new("1", (3000, 1))), "too narrow to resize"),
}


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_named_and_cost_only_themselves(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # workers must keep to it as well
    good = {f"good{number}.jpg": content for number, content in enumerate(PICTURES)}
    write_files(tmp_path, good | {name: content for name, (content, _) in BROKEN.items()})
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.warns(UserWarning, match=r"left out 1 file .*a link to nothing \(gone.jpg\)"):
        dataset = open_dataset(tmp_path)
    indices, images, names, digests, bad = everything(batches(dataset, SIZE, 3, workers=workers))
    assert names == sorted(good)
    assert [dataset.names[index] for index in indices] == names
    assert len(digests) == 5
    for image, name in zip(images, names, strict=True):
        assert torch.equal(image, levels(good[name]))
    said = {name: reason for index, name, reason in bad if dataset.names[index] == name}
    assert len(bad) == 6
    assert sorted(said) == sorted(BROKEN)
    for name, (_, words) in BROKEN.items():
        assert words in said[name]
        assert "\n" not in said[name] and "0x" not in said[name]


def test_a_batch_of_bad_images_alone_is_empty():
    dataset = in_memory([b"bad", b"", PICTURES[0]])
    first, second = batches(dataset, SIZE, 2, workers=0)
    assert first.images.shape == (0, 3, SIZE, SIZE)
    assert first.images.dtype == torch.uint8
    assert first.indices.shape == (0,)
    assert first.indices.dtype == torch.int64
    assert [index for index, _, _ in first.bad] == [0, 1]
    assert (second.indices.tolist(), second.names, second.bad) == ([2], ["picture 2"], [])


def test_the_same_picture_twice_has_one_digest_whatever_its_file():
    picture = noise(5, (20, 30))
    contents = [encoded(picture), encoded(picture, "BMP"), encoded(noise(6, (20, 30))), encoded(picture)]
    digests = everything(batches(in_memory(contents), SIZE, 3, workers=0))[3]
    assert digests[0] == digests[1] == digests[3] != digests[2]


# Decoding ---------------------------------------------------------------------------------------------------


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(2, (40, 24)), "JPEG", exif=exif)


PALETTE = noise(3, (40, 24)).convert("P", palette=Image.Palette.ADAPTIVE)
MODES = {
    "grey": encoded(noise(3, (40, 24)).convert("L")),
    "palette": encoded(PALETTE),
    "transparent palette": encoded(PALETTE, transparency=3),
    "alpha": encoded(noise(3, (40, 24)).convert("RGBA").rotate(20)),
    "grey alpha": encoded(noise(3, (40, 24)).convert("LA")),
    "16 bits": encoded(Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 60)),
    "one bit": encoded(noise(3, (40, 24)).convert("1")),
    "cmyk": encoded(noise(3, (40, 24)).convert("CMYK"), "JPEG"),
    "turned": turned(),
    "webp": encoded(noise(3, (40, 24)), "WEBP"),
    "large jpeg": encoded(noise(3, (900, 700)), "JPEG"),
}


@pytest.mark.parametrize("size", [8, 24, 61])
@pytest.mark.parametrize("mode", MODES)
def test_decoding_equals_the_shared_image_path_to_the_bit(mode, size):
    pixels = decode(MODES[mode], size)
    assert pixels.shape == (size, size, 3)
    assert torch.equal(
        torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, to_tensor(MODES[mode], size)[0]
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.booleans())
def test_any_size_is_resized_and_cropped_as_the_shared_image_path_does(width, height, size, crop):
    content = encoded(noise(width * 100 + height, (width, height)))
    pixels = torch.from_numpy(decode(content, size, crop=crop)).permute(2, 0, 1)
    assert torch.equal(pixels, levels(content, size, crop=crop))


def test_without_crop_images_keep_their_aspect_and_come_one_by_one():
    contents = [encoded(noise(1, (90, 40))), encoded(noise(2, (30, 61))), b"bad", encoded(noise(3, (9, 9)))]
    read = list(batches(in_memory(contents), 20, 8, crop=False, multiple=4, workers=0))
    assert [tuple(batch.images.shape) for batch in read] == [
        (1, 3, 20, 44),
        (1, 3, 40, 20),
        (0, 3, 20, 20),
        (1, 3, 20, 20),
    ]
    whole = levels(contents[0], 20, crop=False)
    assert whole.shape == (3, 20, 45)
    assert torch.equal(read[0].images[0], whole[:, :, :44])  # half of the one column too many rounds to none


# Batches ----------------------------------------------------------------------------------------------------

TINY = [encoded(Image.new("RGB", (2, 2), (number, 0, 0)), "BMP") for number in range(40)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 5), st.sets(st.integers(0, 39)))
def test_ranks_share_the_batches_of_one_process_without_overlap_or_gap(count, batch_size, world_size, broken):
    contents = [b"bad" if number in broken else TINY[number] for number in range(count)]
    dataset = in_memory(contents)
    alone = list(batches(dataset, 2, batch_size, workers=0))
    ranks = [
        list(batches(dataset, 2, batch_size, workers=0, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for number, expected in enumerate(alone):
        batch = ranks[number % world_size].pop(0)
        assert torch.equal(batch.indices, expected.indices)
        assert torch.equal(batch.images, expected.images)
        assert batch.bad == expected.bad
        last = min((number + 1) * batch_size, count)
        seen = sorted([*batch.indices.tolist(), *(index for index, _, _ in batch.bad)])
        assert seen == list(range(number * batch_size, last))
    assert not any(ranks)
    assert sum(len(batch.indices) + len(batch.bad) for batch in alone) == count
    assert [int(image[0, 0, 0]) for batch in alone for image in batch.images] == [
        number for number in range(count) if number not in broken
    ]


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_start_skips_batches_of_the_rank_without_reading_them(tmp_path, start):
    dataset = in_memory(TINY[:33], tmp_path)
    options = {"workers": 0, "rank": 1, "world_size": 2}
    whole = list(batches(in_memory(TINY[:33]), 2, 4, **options))
    resumed = list(batches(dataset, 2, 4, start=start, **options))
    assert len(resumed) == max(0, 4 - start)
    for expected, batch in zip(whole[start:], resumed, strict=True):
        assert torch.equal(batch.indices, expected.indices)
    assert dataset.noted() == set(chain.from_iterable(batch.indices.tolist() for batch in resumed))


def test_workers_decode_ahead_while_the_model_is_busy(tmp_path):
    dataset = in_memory(TINY, tmp_path)
    with closing(batches(dataset, 2, 4, workers=1)) as read:
        next(read)
        deadline = time.monotonic() + 30
        while 7 not in dataset.noted() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert {4, 5, 6, 7} <= dataset.noted()  # the second batch, which nobody has asked for
        assert 39 not in dataset.noted()  # but not everything: memory is bounded


@pytest.mark.skipif(not hasattr(os, "nice"), reason="priorities are POSIX")
def test_workers_stand_back_behind_the_model():
    with closing(batches(in_memory(TINY), 2, 4, workers=1)) as read:
        next(read)
        found = [os.getpriority(os.PRIO_PROCESS, child.pid) for child in multiprocessing.active_children()]
    assert max(found) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE)


def test_reading_leaves_the_random_state_of_the_program_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(islice(batches(in_memory(TINY), 2, 4, workers=0), 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {"batch_size": 0},
        {"multiple": 0},
        {"workers": -1},
        {"start": -1},
        {"rank": -1},
        {"rank": 2, "world_size": 2},
        {"world_size": 0},
        {"multiple": 2},
        {"multiple": 3, "crop": False},
    ],
)
def test_batches_refuses_numbers_out_of_range_before_it_is_iterated(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        batches(in_memory(TINY), **{"size": 2, "batch_size": 2, "workers": 0, **options})


# Processes --------------------------------------------------------------------------------------------------

CONSUMER = """
import signal, sys, time
from vistok.eval.data.dataset import batches, open_dataset

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    if sys.argv[2] == "interrupted early":
        print("reading", flush=True)
    for batch in batches(open_dataset(sys.argv[1]), 16, 1, workers=2):
        print("reading", flush=True)
        if sys.argv[2] == "fails":
            raise RuntimeError("the model failed")
        time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")
@pytest.mark.parametrize("end", ["fails", "interrupted", "interrupted early", "killed"])
def test_no_process_outlives_a_consumer_that_fails_or_is_stopped(tmp_path, end):
    write_files(tmp_path / "images", {f"{number}.jpg": PICTURES[0] for number in range(50)})
    (tmp_path / "consumer.py").write_text(CONSUMER)
    command = [sys.executable, tmp_path / "consumer.py", tmp_path / "images", end]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as running:
        assert running.stdout.readline() == b"reading\n"
        if end == "interrupted early":
            time.sleep(1.0)  # the server of workers imports torch
        if end.startswith("interrupted"):
            os.killpg(running.pid, signal.SIGINT)  # as Ctrl-C does: every process of the group
        if end == "killed":
            running.kill()
        told = running.communicate(timeout=60)[1].decode()
    assert running.returncode != 0
    assert told.count("Traceback") == (end != "killed")  # the consumer's own, none of a worker
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    pytest.fail("processes were left behind")


# The benchmark ----------------------------------------------------------------------------------------------


def test_the_pipeline_benchmark_pairs_its_passes_and_counts_readable_images(tmp_path):
    write_files(tmp_path, {"a.jpg": PICTURES[0], "b.jpg": b"bad", "c.jpg": PICTURES[2]})
    model = create("mini", image_size=16, patch_size=8, thumbnail_size=8).eval()
    speed = pipeline.measure(model, open_dataset(tmp_path), batch_size=2, workers=0, repeats=3)
    assert speed.count == 2
    assert len(speed.bare) == len(speed.pipeline) == 3
    assert min(took.seconds for took in [*speed.bare, *speed.pipeline, speed.decoding]) > 0
    record = json.loads(json.dumps(speed.record()))
    assert record["images"] == 2
    assert all(len(row) == len(pipeline.HEADER) for row in speed.table())
    with pytest.raises(ValueError, match="none of the 1 images"):
        pipeline.measure(model, in_memory([b"bad"]))


def test_the_pipeline_bar_compares_the_median_of_pairs():
    speed = pipeline.PipelineSpeed("", 10)
    speed.pipeline = [pipeline.Took(10, 10)] * 3
    speed.decoding = pipeline.Took(0.5, 0.25)
    speed.bare = [pipeline.Took(seconds, 7.5) for seconds in (8.5, 9, 1)]
    assert speed.ratios == pytest.approx([0.85, 0.9, 0.1])
    assert speed.ceiling == pytest.approx(7.5 / 10)
    assert speed.passed
    assert "ok" in speed.table()[1][4]
    speed.bare[0] = pipeline.Took(8.4, 7.5)
    assert not speed.passed
    assert "MISSED" in speed.table()[1][4]


def test_what_a_source_leaves_out_is_kept_with_the_reason(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        noise(0).save(tmp_path / name / "00.png")
        (tmp_path / name / "notes.txt").write_text("notes")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "one" / "00.png", "00.png")
        tar.add(tmp_path / "one" / "notes.txt", "01.txt")
    folders = [str(tmp_path / name) for name in ("one", "two")]
    for source, names in (
        (folders[0], [f"{folders[0]}/notes.txt"]),
        (folders, [f"{folder}/notes.txt" for folder in folders]),
        (tmp_path / "a.tar", [f"{tmp_path / 'a.tar'}:01.txt"]),
    ):
        with pytest.warns(UserWarning, match="left out"):
            (row,) = open_dataset(source).left_out_summary()
        assert (row["count"], row["first"]) == (len(names), names) and row["reason"]
    assert open_dataset(tmp_path / "one" / "00.png").left_out_summary() == []
