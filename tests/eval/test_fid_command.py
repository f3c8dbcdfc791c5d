"""`vistok eval fid`: two sets of images, or their statistics, and what is refused before any long work."""

import shutil
import sys

import numpy as np
import pytest
import torch
from evaluated import read, save
from PIL import Image
from tiny_tokenizers import pictures

from vistok import to_tensor
from vistok.eval import commands
from vistok.eval.metrics.distribution import inception_score, kernel_distance, precision_recall
from vistok.eval.metrics.statistics import FeatureStatistics, Gaussian, frechet_distance
from vistok.eval.options import FidConfig
from vistok.eval.tasks import fid

pytest_plugins = ("quick_inception",)
pytestmark = pytest.mark.usefixtures("small_and_quick")
CPU = torch.device("cpu")
SETS = {"limit": None, "kid_subset_size": 8, "workers": 0, "batch_size": 4}


@pytest.fixture
def folders(tmp_path):
    """Two folders of eleven pictures of 24 x 24."""
    return [str(save(pictures(11, seed, side=24), tmp_path / name)) for name, seed in (("a", 1), ("b", 2))]


def compare(a, b, out, **options):
    return fid.run(FidConfig(str(a), str(b), **{**SETS, **options}), out, CPU)


def features(folder, inception):
    """Features and logits of a folder's images, at their own size."""
    from pathlib import Path

    images = torch.cat([to_tensor(path, None) for path in sorted(Path(folder).iterdir())])
    return inception((images * 255).round().to(torch.uint8))


def statistics(values):
    found = FeatureStatistics(values.shape[1])
    found.update(values)
    return found


# ---- the numbers -------------------------------------------------------------------------------------------


def test_two_folders_measure_what_their_features_measure(folders, tmp_path, quick_inception):
    (a, logits), (b, _) = (features(folder, quick_inception) for folder in folders)
    record = compare(*folders, tmp_path / "out").record
    found = record.metrics
    assert found["fid"]["value"] == pytest.approx(frechet_distance(statistics(a), statistics(b)), rel=1e-6)
    kid = kernel_distance(a, b, subset_size=8, seed=0)
    assert (found["kid"]["value"], found["kid"]["std"]) == pytest.approx((kid.mean, kid.std), rel=1e-6)
    assert found["is"]["value"] == pytest.approx(inception_score(logits, seed=0).mean, rel=1e-6)
    judged = precision_recall(a, b)
    assert found["precision"]["value"] == judged.precision and found["recall"]["value"] == judged.recall
    assert record.n == 11 and record.tokenizer is None
    assert "11 images" in record.warnings[0]


def test_a_set_is_at_no_distance_from_itself(folders, tmp_path, quick_inception):
    assert compare(folders[0], folders[0], tmp_path / "out").record.metrics["fid"]["value"] < 1e-9


def test_statistics_stand_for_the_images_they_were_saved_of(folders, tmp_path, quick_inception):
    direct = compare(*folders, tmp_path / "out", save_statistics=True)
    a, b = (tmp_path / "out" / f"statistics-{name}.npz" for name in "ab")
    assert Gaussian.load(a).count == 11
    for sides in ((a, b), (folders[0], b), (a, folders[1])):
        found = compare(*sides, tmp_path / "again").record
        assert found.metrics["fid"] == direct.record.metrics["fid"]
        assert "of statistics has none" in found.metrics["kid"]["skipped"]
        assert ("value" in found.metrics["is"]) == (sides[0] != a)
        assert found.n == 11


def test_a_reference_file_without_a_count_is_judged_by_all_the_same(folders, tmp_path, quick_inception):
    """As ADM's reference files are: mu, sigma, and arrays that are not looked at."""
    known = statistics(features(folders[1], quick_inception)[0]).gaussian()
    arrays = {"mu": known.mean.numpy(), "sigma": known.covariance.numpy(), "arr_0": np.zeros((2, 4, 4, 3))}
    np.savez(tmp_path / "reference.npz", **arrays)
    found = compare(folders[0], tmp_path / "reference.npz", tmp_path / "out").record
    expected = compare(*folders, tmp_path / "out2").record
    assert found.metrics["fid"]["value"] == pytest.approx(expected.metrics["fid"]["value"], rel=1e-6)
    assert found.data["b"] == {"source": str(tmp_path / "reference.npz"), "n": None}


def test_statistics_alone_need_no_weights(folders, tmp_path, quick_inception, monkeypatch):
    compare(*folders, tmp_path / "out", save_statistics=True)
    monkeypatch.undo()
    a, b = (tmp_path / "out" / f"statistics-{name}.npz" for name in "ab")
    assert compare(a, b, tmp_path / "again", metrics=("fid",)).record.metrics["fid"]["value"] > 0


def test_images_of_one_shape_that_is_no_square_stay_whole(tmp_path, quick_inception):
    wide = [str(save(pictures(4, seed, side=24)[:, :, :16], tmp_path / f"{seed}")) for seed in (1, 2)]
    a, b = (statistics(features(folder, quick_inception)[0]) for folder in wide)
    found = compare(*wide, tmp_path / "out", metrics=("fid",)).record
    assert found.metrics["fid"]["value"] == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_a_killed_run_continues_with_the_identical_result(folders, tmp_path, quick_inception, monkeypatch):
    whole = compare(*folders, tmp_path / "whole").record
    measured, measure = [], fid._Side._measure

    def measure_or_end(self, batch):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measure(self, batch)
        measured.append(batch)

    with monkeypatch.context() as patched:
        patched.setattr(fid._Side, "_measure", measure_or_end)
        with pytest.raises(KeyboardInterrupt):
            compare(*folders, tmp_path / "out", checkpoint_every=1)
        measured.clear()
        resumed = compare(*folders, tmp_path / "out", checkpoint_every=1)
    assert len(measured) == 2  # of three batches a side
    assert resumed.record.metrics == whole.metrics
    for state in resumed.states:
        state.remove()
    assert not list((tmp_path / "out").iterdir())


# ---- what is refused, and what is said ---------------------------------------------------------------------


def test_sets_of_different_numbers_are_refused_unless_it_is_meant(folders, tmp_path, quick_inception):
    folder = tmp_path / "a"
    (folder / "00.png").unlink()
    with pytest.raises(ValueError, match=r"10 images and .* 11: .*--limit 10, or --allow-different-counts"):
        compare(*folders, tmp_path / "out")
    found = compare(*folders, tmp_path / "out", allow_different_counts=True).record
    assert any("A has 10 images and B 11" in warning for warning in found.warnings)
    assert compare(*folders, tmp_path / "out2", limit=10).record.n == 10


def test_an_unreadable_image_is_named_and_the_numbers_told(folders, tmp_path, quick_inception):
    (tmp_path / "a" / "03.png").write_bytes(b"no image")
    found = compare(*folders, tmp_path / "out").record
    assert found.bad_images[0]["name"] == "03.png" and found.n == 10
    assert any("A has 10 images and B 11" in warning for warning in found.warnings)


@pytest.mark.parametrize("where", ["inside one folder", "between both"])
def test_several_sizes_need_one_to_be_chosen(folders, tmp_path, quick_inception, where):
    files = ["07.png"] if where == "inside one folder" else [f"{number:02d}.png" for number in range(11)]
    for name in files:
        with Image.open(tmp_path / "b" / name) as image:
            larger = image.resize((48, 40))
        larger.save(tmp_path / "b" / name)
    with pytest.raises(ValueError, match=r"2 sizes, such as 24×24 .* and 48×40 .*--size"):
        compare(*folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert compare(*folders, tmp_path / "out", size=16).record.metrics["fid"]["value"] > 0


def test_sizes_are_those_of_upright_pictures(tmp_path, quick_inception):
    for name in ("a", "b"):
        save(pictures(2, side=24)[:, :, :16], tmp_path / name)
    turned = Image.open(tmp_path / "b" / "00.png").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    turned.save(tmp_path / "b" / "00.png", exif=exif)
    assert compare(tmp_path / "a", tmp_path / "b", tmp_path / "out", metrics=("fid",)).record.n == 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda root: root / "nowhere", FileNotFoundError, "nowhere"),
        (lambda root: root / "nowhere.npz", FileNotFoundError, "nowhere.npz"),
        (lambda root: root / "empty", FileNotFoundError, "no picture under"),
        (lambda root: root / "samples.npz", ValueError, "batch of samples"),
        (lambda root: root / "few.npz", ValueError, "different features, .*few.npz of 3"),
    ],
)
def test_sides_that_are_none_are_told_at_once(folders, tmp_path, quick_inception, make, error, message):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "few.npz", mu=np.zeros(3), sigma=np.eye(3))
    for sides in ((folders[0], make(tmp_path)), (make(tmp_path), folders[0])):
        with pytest.raises(error, match=message):
            compare(*sides, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_absent_weights_are_an_error_that_says_what_to_fetch(folders, tmp_path, no_weights):
    with pytest.raises(FileNotFoundError, match=r"pt_inception.*--inception-weights"):
        compare(*folders, tmp_path / "out")


def test_metrics_of_pairs_are_none_of_sets(folders, tmp_path):
    with pytest.raises(ValueError, match="no metric psnr here; there are fid, is, kid, pr"):
        compare(*folders, tmp_path / "out", metrics=("psnr",))


def test_the_command_prints_a_table_and_writes_json_and_report(
    folders, tmp_path, quick_inception, capfd, monkeypatch
):
    out = tmp_path / "out"
    arguments = [
        "fid",
        *folders,
        "--out",
        str(out),
        "--workers",
        "0",
        "--metrics",
        "fid,kid",
        "--save-statistics",
    ]
    monkeypatch.setattr(sys, "argv", ["vistok", "eval", *arguments])
    shutil.copy(tmp_path / "a" / "00.png", tmp_path / "a" / "01.png")
    commands.app(arguments, standalone_mode=False)
    told = capfd.readouterr()
    printed = " ".join(told.out.split())  # a long path may wrap the title
    assert "n = 11" in printed and "FID" in printed and "skipped KID: " in told.err
    assert "more than once" in told.err
    record = read(out / "fid.json")
    assert record["command"] == ["vistok", "eval", *arguments] and record["n"] == 11
    assert record["duplicates"] == [["00.png", "01.png"]]
    names = ["fid.json", "report.html", "statistics-a.npz", "statistics-b.npz"]
    assert sorted(path.name for path in out.iterdir()) == names
