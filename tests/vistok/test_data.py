"""Training pictures: a number always gives the same picture, and bad files and configs are refused."""

import importlib.util
import io
import tarfile
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.train import data
from vistok.train.data import Crops, Folder, Mixture, Photos, Scenes, Shards, build, loader
from vistok.train.scenes import scene

SIDE = 16
LEVELS = (20, 60, 100, 140, 180, 220)


class Numbers:
    """A source whose pictures say their own number, and which remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def sample(self, index):
        self.asked.append(index)
        return np.full((2, 2, 3), index % 256, dtype=np.uint8)


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def grey(level, size=(24, 20)):
    return Image.new("RGB", size, (level, level, level))


def level(pixels):
    """The level of a picture of one colour."""
    assert pixels.shape == (SIDE, SIDE, 3)
    assert pixels.dtype == np.uint8
    assert pixels.min() == pixels.max()
    return int(pixels.min())


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def webdataset(path, levels):
    """One sample a key, a picture and its caption each, as webdataset has it."""
    members = {}
    for number, value in enumerate(levels):
        members[f"{number:06}.png"] = encoded(grey(value))
        members[f"{number:06}.txt"] = b"a caption"
    return write_tar(path, members)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for number, value in enumerate(LEVELS):
        parent = tmp_path / ("", "deep", "deep/deeper")[number % 3]
        (parent / f"{number}.{('png', 'PNG')[number % 2]}").write_bytes(encoded(grey(value)))
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.fixture
def shards(tmp_path):
    for number in range(3):
        webdataset(tmp_path / f"train-{number:03}.tar", LEVELS[2 * number : 2 * number + 2])
    return tmp_path


@pytest.fixture(params=["scenes", "photos", "folder", "shards", "mixture"])
def make(request, folder):
    """Makes the same source twice."""
    webdataset(folder / "shard.tar", LEVELS)
    entries = {
        "scenes": {"kind": "scenes"},
        "photos": {"kind": "photos", "exclude": ["coffee", "chelsea"]},
        "crops": {"kind": "crops", "path": str(folder)},
        "folder": {"kind": "folder", "path": str(folder)},
        "shards": {"kind": "shards", "pattern": str(folder / "shard.tar")},
    }
    chosen = list(entries.values()) if request.param == "mixture" else [entries[request.param]]
    return lambda seed=3: build({"sources": chosen}, SIDE, seed)


# Every source -----------------------------------------------------------------------------------------------


def test_a_picture_depends_on_its_number_alone(make):
    first, second = make(), make()
    indices = [0, 1, 7, 1023, 1024, 5000]
    pictures = {index: first.sample(index).copy() for index in indices}
    for index in reversed(indices):
        assert pictures[index].shape == (SIDE, SIDE, 3)
        assert pictures[index].dtype == np.uint8
        np.testing.assert_array_equal(second.sample(index), pictures[index])


def test_another_seed_gives_other_pictures(make):
    first, second = make(), make(seed=4)
    assert any(not np.array_equal(first.sample(index), second.sample(index)) for index in range(10))


def test_a_picture_can_become_a_writable_tensor(make):
    source = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(6):
            torch.from_numpy(source.sample(index))


# The loader -------------------------------------------------------------------------------------------------


def test_the_first_batch_holds_the_first_pictures():
    source = Scenes(SIDE)
    batch = next(loader(source, 3))
    assert batch.shape == (3, 3, SIDE, SIDE)
    assert batch.dtype == torch.uint8
    for index in range(3):
        np.testing.assert_array_equal(batch[index].permute(1, 2, 0).numpy(), source.sample(index))


@pytest.mark.parametrize("start", [1, 3])
def test_a_resumed_loader_equals_one_that_was_never_stopped(make, start):
    uninterrupted = list(islice(loader(make(), 4), 5))[start:]
    resumed = islice(loader(make(), 4, start=start), 5 - start)
    for expected, batch in zip(uninterrupted, resumed, strict=True):
        assert torch.equal(batch, expected)


def test_ranks_share_the_sequence_without_overlap_or_gap():
    seen = []
    for rank in range(3):
        batches = islice(loader(Numbers(), 4, rank=rank, world_size=3), 5)
        seen += [int(value) for batch in batches for value in batch[:, 0, 0, 0]]
    assert sorted(seen) == list(range(60))


def test_one_step_of_all_ranks_is_one_larger_batch():
    together = list(islice(loader(Numbers(), 8, start=2), 2))
    halves = [islice(loader(Numbers(), 4, start=2, rank=rank, world_size=2), 2) for rank in range(2)]
    for whole, parts in zip(together, zip(*halves, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_a_worker_process_changes_nothing(folder):
    sources = [Scenes(SIDE, 1), Folder(SIDE, 2, path=folder)]
    alone = list(islice(loader(Mixture(sources, [1, 1]), 4, start=1), 4))
    helped = list(islice(loader(Mixture(sources, [1, 1]), 4, start=1, workers=1), 4))
    assert torch.equal(torch.stack(alone), torch.stack(helped))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"start": -1},
        {"workers": -1},
        {"rank": -1},
        {"rank": 2, "world_size": 2},
        {"world_size": 0},
    ],
)
def test_loader_refuses_numbers_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        loader(Numbers(), **{"batch_size": 2, **options})


# Mixtures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [1.0, 2.0, 5.0], [1, 1e-9]])
def test_a_mixture_shares_by_weight_and_reads_every_source_in_order(weights):
    sources = [Numbers() for _ in weights]
    mixture = Mixture(sources, weights)
    for index in range(2048):
        mixture.sample(index)
    for source, weight in zip(sources, weights, strict=True):
        assert len(source.asked) == pytest.approx(2048 * weight / sum(weights), abs=4)
        assert source.asked == list(range(len(source.asked)))
        assert len(source.asked) >= 2


def test_a_mixture_is_shuffled():
    mixture = Mixture([Numbers(), Numbers()], [1, 1])
    for index in range(100):
        mixture.sample(index)
    assert 25 < len(mixture.sources[0].asked) < 75


@pytest.mark.parametrize(
    "weights", [[], [1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1, "2"]]
)
def test_a_mixture_refuses_weights_it_cannot_use(weights):
    with pytest.raises(ValueError, match="finite weight above 0"):
        Mixture([Numbers(), Numbers()], weights)


def test_a_mixture_needs_sources_and_a_seed_from_zero():
    with pytest.raises(ValueError, match="0 sources"):
        Mixture([], [])
    with pytest.raises(ValueError, match="1025 sources"):
        Mixture([Numbers()] * 1025, [1] * 1025)
    with pytest.raises(ValueError, match="seed starts at 0"):
        Mixture([Numbers()], [1], seed=-1)


# Folders ----------------------------------------------------------------------------------------------------


def test_a_folder_shows_every_file_once_an_epoch_in_a_new_order(folder):
    source = Folder(SIDE, path=folder)
    epochs = [[level(source.sample(6 * epoch + place)) for place in range(6)] for epoch in range(4)]
    assert all(sorted(epoch) == list(LEVELS) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_a_broken_file_is_skipped_with_one_warning_that_names_it(folder):
    whole = encoded(Image.effect_noise((64, 64), 50))
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    source = Folder(SIDE, path=folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shown = [[level(source.sample(7 * epoch + place)) for place in range(7)] for epoch in range(3)]
    assert all(set(epoch) == set(LEVELS) for epoch in shown)
    assert [str(warning.message).split(": ")[0] for warning in caught] == [f"skipping {folder / 'cut.png'}"]


@pytest.mark.parametrize("seed", range(8))
def test_one_good_file_among_broken_ones_is_found_wherever_the_epoch_starts(tmp_path, seed):
    (tmp_path / "good.png").write_bytes(encoded(grey(77)))
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(b"no picture at all")
    source = Folder(SIDE, seed, path=tmp_path)
    with pytest.warns(UserWarning, match=r"\.jpg"):
        assert {level(source.sample(index)) for index in range(9)} == {77}


def test_only_broken_files_is_an_error(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    source = Folder(SIDE, path=tmp_path)
    with pytest.warns(UserWarning, match="skipping"), pytest.raises(OSError, match="none of the 2 pictures"):
        source.sample(0)


def test_a_missing_or_empty_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        Folder(SIDE, path=tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"notes\.txt is not a folder"):
        Folder(SIDE, path=tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"no picture under .*accepted are .*\.png"):
        Folder(SIDE, path=tmp_path)


def sixteen_bit(value):
    return Image.fromarray(np.full((20, 24), value * 257, dtype=np.uint16))


PICTURES = {  # name → content, level shown
    "grey.png": (encoded(Image.new("L", (24, 20), 90)), 90),
    "palette.png": (encoded(Image.new("L", (24, 20), 90).convert("P")), 90),
    "bits.png": (encoded(Image.new("1", (24, 20), 1)), 255),
    "deep.png": (encoded(sixteen_bit(90)), 90),
    "deep.tif": (encoded(sixteen_bit(90), "TIFF"), 90),
    "opaque.png": (encoded(Image.new("RGBA", (24, 20), (90, 90, 90, 255))), 90),
    "clear.png": (encoded(Image.new("RGBA", (24, 20), (90, 90, 90, 0))), 255),
    "grey_clear.webp": (encoded(Image.new("LA", (24, 20), (90, 0)), "WEBP", lossless=True), 255),
    "cmyk.jpg": (encoded(grey(90).convert("CMYK"), "JPEG", quality=95), 90),
    "small.bmp": (encoded(grey(90, (1, 1)), "BMP"), 90),
    "narrow.png": (encoded(grey(90, (1, 300))), 90),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_every_kind_become_rgb(tmp_path, name):
    content, expected = PICTURES[name]
    (tmp_path / name).write_bytes(content)
    assert level(Folder(SIDE, path=tmp_path).sample(0)) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("side", [SIDE, 16 * SIDE])
def test_exif_orientation_is_honoured_also_where_a_large_jpeg_is_read_small(tmp_path, side):
    pixels = np.zeros((side, side, 3), dtype=np.uint8)
    pixels[: side // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the top comes to the right
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    shown = Folder(SIDE, path=tmp_path, random_crop=False, flip=False).sample(0)
    assert shown[:, : SIDE // 2 - 1].max() < 40
    assert shown[:, SIDE // 2 + 1 :].min() > 215


def test_crop_and_mirror_are_random_only_where_asked(tmp_path):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp[None, :, None], (SIDE, 64, 3)).copy()).save(tmp_path / "ramp.png")
    still = Folder(SIDE, path=tmp_path, random_crop=False, flip=False)
    assert len({still.sample(index).tobytes() for index in range(8)}) == 1
    np.testing.assert_array_equal(still.sample(0)[0, :, 0], ramp[24:40])
    mirrored = Folder(SIDE, path=tmp_path, random_crop=False)
    assert len({mirrored.sample(index).tobytes() for index in range(32)}) == 2
    cropped = Folder(SIDE, path=tmp_path, flip=False)
    assert len({cropped.sample(index).tobytes() for index in range(32)}) > 20


# Shards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "train-{000..002}.tar",
        "train-00{0,1,2}.tar",
        "{train,train}-00{0..2}.tar",
        "{train-00{0..1},train-002}.tar",
        ["train-{000..002..2}.tar", "train-001.tar"],
        "train-*.tar",
        "train-00[012].tar",
        "**/train-*.tar",
        ["train-{000..001}.tar", "train-002.tar"],
        ["train-*.tar", "train-000.tar"],
    ],
)
def test_shards_are_found_by_braces_and_wildcards_each_once(shards, pattern):
    patterns = [pattern] if isinstance(pattern, str) else pattern
    source = Shards(SIDE, pattern=[str(shards / each) for each in patterns])
    assert len(source.files) == 3
    for epoch in range(2):
        assert sorted(level(source.sample(6 * epoch + place)) for place in range(6)) == list(LEVELS)


@pytest.mark.parametrize("name", ["part[1].tar", "part{1.tar", "part{0,1}.tar"])
def test_a_shard_may_be_given_as_a_path_whose_name_looks_like_a_pattern(tmp_path, name):
    path = webdataset(tmp_path / name, [50])
    assert level(Shards(SIDE, pattern=path).sample(0)) == 50


def test_a_broken_picture_in_a_shard_is_skipped_with_one_warning_that_names_it(tmp_path):
    members = {"0.jpg": b"no picture", "1.png": encoded(grey(50))}
    source = Shards(SIDE, pattern=write_tar(tmp_path / "a.tar", members))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert {level(source.sample(index)) for index in range(8)} == {50}
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"skipping {tmp_path / 'a.tar'}:0.jpg: ")


def test_a_shard_cut_off_anywhere_is_refused(tmp_path):
    content = webdataset(tmp_path / "whole.tar", LEVELS[:2]).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        tar.getmembers()
        end = tar.offset  # the marks that end a tar file start here
    for length in range(0, end + 1, 256):
        (tmp_path / "cut.tar").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.tar is .*fetch it again"):
            Shards(SIDE, pattern=tmp_path / "cut.tar")


def test_a_shard_with_a_damaged_header_is_refused(tmp_path):
    content = bytearray(webdataset(tmp_path / "bad.tar", LEVELS[:2]).read_bytes())
    second = content.index(b"000000.txt")
    content[second + 150] ^= 1  # its checksum
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(ValueError, match=f"damaged at byte {second}"):
        Shards(SIDE, pattern=tmp_path / "bad.tar")


def test_a_compressed_shard_is_refused_with_advice(tmp_path):
    write_tar(tmp_path / "a.tar.gz", {"0.png": encoded(grey(50))}, "w:gz")
    with pytest.raises(ValueError, match=r"unpack \.tar\.gz"):
        Shards(SIDE, pattern=tmp_path / "a.tar.gz")


def test_missing_shards_and_shards_without_pictures_are_errors(tmp_path):
    write_tar(tmp_path / "text.tar", {"0.txt": b"words"})
    with pytest.raises(FileNotFoundError, match=r"no picture in .*text\.tar: accepted are .*\.png"):
        Shards(SIDE, pattern=tmp_path / "text.tar")
    with pytest.raises(FileNotFoundError, match=r"no file .*none-\*\.tar"):
        Shards(SIDE, pattern=tmp_path / "none-*.tar")
    with pytest.raises(FileNotFoundError, match=r"no file .*b\.tar.* stands for 2 path"):
        Shards(SIDE, pattern=str(tmp_path / "{text,b}.tar"))
    with pytest.raises(FileNotFoundError, match="no file"):
        Shards(SIDE, pattern=tmp_path)
    with pytest.raises(ValueError, match=r"a-\{0\.\.9\.tar is not a file, .*brace without its partner"):
        Shards(SIDE, pattern="a-{0..9.tar")
    with pytest.raises(ValueError, match="empty list"):
        Shards(SIDE, pattern=[])


# Crops of a folder ------------------------------------------------------------------------------------------


def ramp(width, height):
    """A picture whose red grows from left to right and whose green grows from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).round().astype(np.uint8))


def test_crops_have_every_scale_and_place_and_every_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_jitter", lambda rng, pixels: pixels)
    ramp(96, 64).save(tmp_path / "ramp.png")
    Image.new("RGB", (40, 40), (0, 0, 200)).save(tmp_path / "blue.png")
    crops = [Crops(SIDE, path=tmp_path).sample(index).astype(int) for index in range(300)]
    ramps = [crop for crop in crops if crop[..., 2].max() == 0]
    assert 100 < len(ramps) < 200
    spans = np.array([np.ptp(crop[..., 1]) for crop in ramps])  # of 255 for the whole height
    assert spans.min() < 80 and spans.max() > 220
    middles = np.array([crop[8, 8, 0] for crop in ramps])
    assert middles.min() < 60 and middles.max() > 195


def test_large_pictures_are_kept_at_four_times_the_size(tmp_path):
    ramp(16 * SIDE + 40, 9 * SIDE).save(tmp_path / "large.png")
    ramp(5 * SIDE, 3 * SIDE).save(tmp_path / "small.png")
    source = Crops(SIDE, path=tmp_path)
    for index in range(40):
        source.sample(index)
    sizes = {file.rsplit("/", 1)[1]: levels[0].size for file, levels in source._levels.items()}
    assert sizes == {"large.png": (8 * SIDE + 20, 9 * SIDE // 2), "small.png": (5 * SIDE, 3 * SIDE)}


def test_a_folder_without_pictures_and_a_broken_picture_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no picture under"):
        Crops(SIDE, path=tmp_path)
    (tmp_path / "broken.png").write_bytes(encoded(grey(3))[:40])
    with pytest.raises(ValueError, match=r"broken\.png"):
        Crops(SIDE, path=tmp_path).sample(0)


# Photographs ------------------------------------------------------------------------------------------------


def test_no_crop_of_an_excluded_photograph_appears(monkeypatch):
    drawn = set()
    pyramid = data._pyramid
    monkeypatch.setattr(data, "_pyramid", lambda name: drawn.add(name) or pyramid(name))
    excluded = {"astronaut", "camera", "chelsea", "coffee"}
    source = Photos(SIDE, exclude=sorted(excluded))
    for index in range(1000):
        source.sample(index)
    assert drawn == set(data.photo_names()) - excluded == set(source.names)


def test_one_excluded_photograph_may_be_given_as_a_string():
    assert Photos(SIDE, exclude="coffee").names == [name for name in data.photo_names() if name != "coffee"]


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (["coffee", "tea"], "cannot exclude tea: the photographs are astronaut,"),
        ("cofee", "cannot exclude cofee"),
        ([3], "list of strings"),
        (None, "list of strings"),
    ],
)
def test_exclude_is_checked_at_once(exclude, message):
    with pytest.raises(ValueError, match=message):
        Photos(SIDE, exclude=exclude)


def test_excluding_every_photograph_is_an_error():
    with pytest.raises(ValueError, match="exclude names all"):
        Photos(SIDE, exclude=data.photo_names())


@pytest.mark.parametrize("size", [1, 128, 700])
def test_crops_have_the_size_asked_for(size):
    assert {Photos(size).sample(index).shape for index in range(6)} == {(size, size, 3)}


def test_a_photograph_by_name_is_whole_and_rgb():
    picture = data.photo("coffee")
    assert (picture.mode, picture.size) == ("RGB", (600, 400))
    picture.paste((0, 0, 0), (0, 0, 600, 400))
    assert data.photo("coffee").getextrema() != picture.getextrema()
    with pytest.raises(ValueError, match="no photograph 'tea'; there are astronaut,"):
        data.photo("tea")


@pytest.mark.parametrize(
    ("package", "distribution"), [("skimage", "scikit-image"), ("sklearn", "scikit-learn")]
)
def test_without_the_photographs_packages_the_error_says_what_to_install(monkeypatch, package, distribution):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    data._photo_paths.cache_clear()
    for use in (
        data.photo_names,
        lambda: Photos(SIDE),
        lambda: build({"sources": [{"kind": "photos"}]}, 16, 0),
    ):
        with pytest.raises(ImportError, match=rf'{distribution}.*pip install "vistok\[train\]"'):
            use()


# Configurations ---------------------------------------------------------------------------------------------


def test_one_source_stands_alone_and_several_are_mixed():
    assert isinstance(build({"sources": [{"kind": "scenes", "weight": 2}]}, SIDE, 0), Scenes)
    mixed = build({"sources": [{"kind": "scenes"}, {"kind": "scenes", "weight": 2}]}, SIDE, 0)
    assert isinstance(mixed, Mixture)
    assert mixed.weights == [1.0, 2]
    assert mixed.sources[0].seed != mixed.sources[1].seed


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "give .*sources"),
        (None, "give .*sources"),
        ({"sources": []}, "not empty"),
        ({"sources": "scenes"}, "give .*sources"),
        ({"sources": [{"kind": "scenes"}], "weights": [1]}, "give .*sources"),
        ({"sources": ["scenes"]}, "source 'scenes' is not a mapping"),
        (
            {"sources": [{}]},
            "unknown kind of source None: accepted are scenes, photos, crops, folder, shards",
        ),
        ({"sources": [{"kind": "imagenet"}]}, "unknown kind of source 'imagenet'"),
        ({"sources": [{"kind": ["scenes"]}]}, "unknown kind of source"),
        ({"sources": [{"kind": "scenes", "exclude": []}]}, "given exclude: accepted are weight"),
        ({"sources": [{"kind": "scenes", "size": 64}]}, "given size"),
        ({"sources": [{"kind": "scenes", 3: 4}]}, "given 3"),
        ({"sources": [{"kind": "folder"}]}, "given nothing: .*needed is path"),
        ({"sources": [{"kind": "folder", "path": None}]}, "path is None"),
        ({"sources": [{"kind": "crops"}]}, "given nothing: .*needed is path"),
        ({"sources": [{"kind": "crops", "path": 3}]}, "path is 3"),
        ({"sources": [{"kind": "folder", "path": ".", "flip": "no"}]}, "flip is 'no': give true or false"),
        ({"sources": [{"kind": "shards", "pattern": 3}]}, "pattern is 3"),
        ({"sources": [{"kind": "photos", "exclude": ["tea"]}]}, "cannot exclude tea"),
        ({"sources": [{"kind": "scenes", "weight": 0}]}, "finite weight above 0"),
        ({"sources": [{"kind": "scenes", "weight": "1"}]}, "finite weight above 0"),
    ],
)
def test_a_bad_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build(config, SIDE, 0)


def test_sizes_and_seeds_out_of_range_are_refused_at_once(folder):
    with pytest.raises(ValueError, match="size starts at 16"):
        Scenes(15)
    of_folder = (lambda size, seed=0, kind=kind: kind(size, seed, path=folder) for kind in (Folder, Crops))
    for make in (Photos, *of_folder):
        with pytest.raises(ValueError, match="size starts at 1 "):
            make(0)
        with pytest.raises(ValueError, match="seed at 0"):
            make(SIDE, seed=-1)
    with pytest.raises(ValueError, match="seed starts at 0"):
        build({"sources": [{"kind": "scenes"}]}, SIDE, -1)


# Scenes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 33, 64])
def test_scenes_have_the_size_asked_for_and_differ(size):
    pictures = [scene(0, index, size) for index in range(40)]
    assert {picture.shape for picture in pictures} == {(size, size, 3)}
    assert {picture.dtype for picture in pictures} == {np.dtype(np.uint8)}
    assert len({picture.tobytes() for picture in pictures}) == 40
    assert all(picture.std() > 0 for picture in pictures)


def test_scenes_vary_as_photographs_do():
    """Their average is mid-grey with wide spread, and most pictures have contrast and colour of their own."""
    pictures = np.stack([scene(5, index, 32) for index in range(80)]).astype(float)  # [N, H, W, C]
    means, contrasts = pictures.mean(axis=(1, 2, 3)), pictures.std(axis=(1, 2, 3))
    assert 60 < means.mean() < 190
    assert means.std() > 25
    assert np.median(contrasts) > 25
    assert np.median(np.abs(pictures[..., 0] - pictures[..., 2]).mean(axis=(1, 2))) > 5


def test_scenes_of_two_seeds_are_unrelated():
    first = np.stack([scene(1, index, 16) for index in range(60)]).astype(float)
    second = np.stack([scene(2, index, 16) for index in range(60)]).astype(float)
    assert not any(np.array_equal(a, b) for a in first for b in second)
    assert abs(np.corrcoef(first.mean(axis=(1, 2, 3)), second.mean(axis=(1, 2, 3)))[0, 1]) < 0.4


@pytest.mark.parametrize("arguments", [(-1, 0, 32), (0, -1, 32), (0, 0, 15)])
def test_scene_refuses_numbers_out_of_range(arguments):
    with pytest.raises(ValueError, match="seed and index start at 0, size at 16"):
        scene(*arguments)
