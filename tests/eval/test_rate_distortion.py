"""`vistok eval tokens`: points are those of the images decoded at every length, and of real files."""

import io
import math
import shutil

import pytest
import torch
from evaluated import read, save, scenes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_tokenizers import fresh, pictures, shared

from vistok import load, to_pil, to_tensor
from vistok.eval import commands
from vistok.eval.engine import passes
from vistok.eval.metrics.image import psnr, ssim
from vistok.eval.metrics.statistics import FeatureStatistics, frechet_distance
from vistok.eval.options import BASELINES, CurvesConfig
from vistok.eval.report import curves
from vistok.eval.tasks import codecs, rate_distortion, sweeps

pytest_plugins = ("quick_inception",)
pytestmark = [pytest.mark.usefixtures("small_and_quick"), pytest.mark.slow]
CPU = torch.device("cpu")
PLAIN = ("psnr", "ssim")


def quality(point):
    return point.metrics["psnr"]["value"]


@pytest.fixture
def folder(tmp_path):
    """Seven pictures, so that the last batch is not full."""
    return save(pictures(7, seed=1, side=32), tmp_path / "pictures")


def measure(data, out, *models, **options):
    options = {"batch_size": 4, "workers": 0, "metrics": PLAIN, "baselines": (), **options}
    config = CurvesConfig((), (str(data),), **options)
    return rate_distortion.run(config, out, CPU, models=models or [shared("mini")])


def points(*arguments, **options):
    return measure(*arguments, **options).record.points


def images_of(folder, side=32):
    return torch.cat([to_tensor(path, side) for path in sorted(folder.iterdir())])


# ---- tokenizers --------------------------------------------------------------------------------------------


def test_every_prefix_of_an_ordered_tokenizer_is_a_point(folder, tmp_path):
    model, images = shared("mini"), images_of(folder)
    found = points(folder, tmp_path / "out")
    assert [point.setting for point in found] == ["1 token", "2 tokens", "4 tokens", "6 tokens"]
    for point, length in zip(found, (1, 2, 4, 6), strict=True):
        tokens = model.encode(images).prefix(length)
        decoded = model.decode(tokens)
        assert point.bytes == float(tokens.bits_per_image.double().mean()) / 8
        assert quality(point) == pytest.approx(float(psnr(decoded, images).mean()), rel=1e-6)
        assert point.metrics["ssim"]["value"] == pytest.approx(float(ssim(decoded, images).mean()), rel=1e-6)
        assert point.metrics["psnr"]["low"] < quality(point) < point.metrics["psnr"]["high"]


def test_lengths_that_were_asked_for(folder, tmp_path):
    model, options = shared("mini"), {"baselines": (), "metrics": PLAIN, "lengths": (3, 1, 3, 99)}
    record = measure(folder, tmp_path / "out", model, **options).record
    assert [point.setting for point in record.points] == ["1 token", "3 tokens"]
    assert "mini has 6 tokens: without --lengths 99" in record.warnings


def test_adaptive_tokenizers_have_a_point_for_each_target_and_fixed_ones_one(folder, tmp_path):
    karl, fixed = shared("karl-vqgan-vq"), shared("titok-vq")
    found = points(folder, tmp_path / "out", karl, fixed, targets=(0.1, 0.9))
    images = images_of(folder)
    assert [point.setting for point in found] == ["error 0.9", "error 0.1", "6 tokens"]
    for point, target in zip(found, (0.9, 0.1), strict=False):
        tokens = karl.encode(images, target=target)
        assert point.bytes == pytest.approx(float(tokens.bits_per_image.double().mean()) / 8)
        assert quality(point) == pytest.approx(float(psnr(karl.decode(tokens), images).mean()), rel=1e-5)


def test_a_smaller_tokenizer_is_compared_at_the_size_of_the_larger_one(folder, tmp_path):
    result = measure(folder, tmp_path / "out", shared("titok-vq"), shared("mini", image_size=64))
    small, *_ = result.record.points
    assert result.record.protocol["resized"].endswith("at 32²")
    assert result.pictures()[0].original.shape == (3, 64, 64)
    images = images_of(folder, 64)
    resize = sweeps._resized
    decoded = resize(shared("titok-vq").reconstruct(resize(images, 32)), 64)
    assert quality(small) == pytest.approx(float(psnr(decoded, images).mean()), rel=1e-5)


def test_noise_of_a_stochastic_decoder_does_not_depend_on_the_batch(folder, tmp_path):
    options = {"steps": 2, "lengths": (2,), "batch_size": 7}
    (together,) = points(folder, tmp_path / "a", shared("flextok"), **options)
    beside = shared("flextok"), shared("titok-vq")  # which has no steps
    apart, _ = points(folder, tmp_path / "b", *beside, **{**options, "batch_size": 2})
    (other,) = points(folder, tmp_path / "c", shared("flextok"), **options, seed=1)
    assert quality(together) == pytest.approx(quality(apart), rel=1e-5)
    assert quality(together) != pytest.approx(quality(other), rel=1e-5)


# ---- FID ---------------------------------------------------------------------------------------------------


def test_rate_fid_is_of_the_8_bit_images_of_each_setting(folder, tmp_path, quick_inception):
    model, images = shared("mini"), images_of(folder)
    found = points(folder, tmp_path / "out", metrics=("fid",), baselines=("JPEG",))
    real = FeatureStatistics(24)
    real.update(quick_inception((images * 255).round().to(torch.uint8))[0])
    for point, length in zip(found, (1, 2, 4, 6), strict=False):
        seen = FeatureStatistics(24)
        decoded = model.decode(model.encode(images).prefix(length))
        seen.update(quick_inception((decoded * 255).round().to(torch.uint8))[0])
        assert point.metrics["fid"]["value"] == pytest.approx(frechet_distance(seen, real), rel=1e-6)
    assert all(point.metrics["fid"]["value"] > 0 for point in found if point.baseline)


def test_metrics_without_weights_are_skipped_once_and_no_point_has_them(folder, tmp_path, no_weights):
    record = measure(folder, tmp_path / "out", metrics=None).record
    assert set(record.skipped) == {"lpips-alex", "lpips-vgg", "clip", "fid"}
    own_weights = {"stlpips-alex", "stlpips-vgg"}  # they come with their package
    assert all(set(point.metrics) == {"psnr", "ssim", *own_weights} for point in record.points)


def test_a_metric_that_no_point_has_is_skipped_with_the_reason_and_has_no_chart(
    folder, tmp_path, quick_inception
):
    record = measure(folder, tmp_path / "out", metrics=("fid",), limit=1).record
    assert "fid" in record.skipped and all(set(point.metrics) == {"psnr"} for point in record.points)
    assert [chart.title for chart in curves.charts(record)] == ["PSNR for bytes"]


# ---- codecs ------------------------------------------------------------------------------------------------


def busy(count, side=48):
    """Smooth pictures with a little noise, as photographs are."""
    drawn = pictures(count, seed=2, side=side)
    noise = torch.rand(drawn.shape, generator=torch.Generator().manual_seed(0))
    return to_pil((0.9 * drawn + 0.1 * noise).clamp(0, 1))


@pytest.mark.parametrize("codec", ["JPEG", "WebP", "AVIF"])
def test_bytes_are_those_of_the_file_and_the_picture_is_what_it_decodes_to(codec):
    if codecs.missing(codec):
        pytest.skip(codecs.missing(codec))
    (picture,) = busy(1)
    setting = codecs.FileSetting(codec, 40, 2)
    decoded, size = setting(picture)
    file = io.BytesIO()
    small = picture.resize((24, 24), Image.Resampling.BICUBIC)
    small.save(file, codec, quality=40, **codecs.OPTIONS[codec])
    assert size == len(file.getvalue()) and decoded.size == (48, 48)
    expected = Image.open(file).convert("RGB").resize((48, 48), Image.Resampling.BICUBIC)
    assert decoded.tobytes() == expected.tobytes()


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(40, 1500), min_size=1, max_size=4))
def test_settings_are_the_best_that_fit(budgets):
    shown = busy(2, 32)
    originals = torch.cat([to_tensor(picture, None) for picture in shown])
    everything = []
    for setting in codecs._files("JPEG"):
        decoded, sizes = codecs.apply(setting, shown)
        error = float((decoded.double() - originals).square().mean())
        everything.append((float(sizes.double().mean()), error, setting))
    chosen = codecs.best_within("JPEG", shown, budgets)
    expected = []
    for budget in sorted(budgets):
        within = [(error, size, setting) for size, error, setting in everything if size <= budget]
        if within:
            expected.append(min(within, key=lambda each: each[:2])[2])
    assert chosen == list(dict.fromkeys(expected))


@given(st.floats(0, 4000))
def test_thumbnails_fit_their_bytes(budget):
    for setting in codecs._thumbnails([budget]):
        assert 3 * setting.width * setting.height <= budget


def test_baselines_at_matched_bytes_take_no_more_bytes(tmp_path):
    folder, models = save(scenes(3, 32), tmp_path / "scenes"), (shared("mini"), shared("titok-vae"))
    record = measure(folder, tmp_path / "out", *models, baselines=BASELINES, batch_size=3).record
    for point in record.points:
        for name, other in record.matched(point).items():
            rivals = [p for p in record.points if p.codec == name and p.bytes <= point.bytes]
            assert (other is None) == (not rivals)
            if other:
                assert other.mse == min(rival.mse for rival in rivals)
    (dearest,) = (point for point in record.points if point.codec == models[1].label)
    assert record.matched(dearest)["thumbnail"].bytes > record.matched(dearest)["WebP"].bytes > 50
    assert record.matched(record.points[0])["JPEG"] is None


def test_a_codec_that_pillow_lacks_is_skipped_with_a_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(codecs.features, "check", lambda name: name != "avif")
    record = measure(folder, tmp_path / "out", baselines=("JPEG", "AVIF")).record
    assert "without AVIF" in record.skipped["AVIF"] and "pip install" in record.skipped["AVIF"]
    assert {point.codec for point in record.points} == {"mini", "JPEG"}


# ---- runs --------------------------------------------------------------------------------------------------


def test_a_stopped_run_continues_with_the_identical_result(folder, tmp_path, quick_inception, monkeypatch):
    options = {"metrics": None, "baselines": ("JPEG", "thumbnail"), "batch_size": 2, "checkpoint_every": 1}
    whole = measure(folder, tmp_path / "whole", **options).record

    def interrupted(read, clock, real=passes._timed):
        for number, batch in enumerate(real(read, clock)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(passes, "_timed", interrupted)
        measure(folder, tmp_path / "out", **options)
    again = measure(folder, tmp_path / "out", **options)
    assert again.state.done == 4 and again.record.points == whole.points
    with pytest.raises(ValueError, match="holds an unfinished run with other settings"):
        measure(folder, tmp_path / "out", **options, lengths=(2,))


def test_bad_images_are_named_and_do_not_stop_the_run(folder, tmp_path):
    (folder / "00.png").write_bytes(b"no image")
    shutil.copy(folder / "01.png", folder / "99.png")
    record = measure(folder, tmp_path / "out", baselines=("JPEG",)).record
    assert record.n == 7 and [row["name"] for row in record.bad_images] == ["00.png"]
    assert record.duplicates == [["01.png", "99.png"]]


def test_a_baseline_that_is_never_small_enough_says_so(folder, tmp_path):
    record = measure(folder, tmp_path / "out", lengths=(1,), baselines=("thumbnail",)).record
    assert "none of its settings fits" in record.skipped["thumbnail"]
    assert {point.codec for point in record.points} == {"mini"}


def test_more_images_than_settings_were_chosen_on_still_find_one_that_fits(tmp_path):
    folder = save(scenes(8, 32), tmp_path / "scenes")
    options = {"baselines": ("WebP",), "batch_size": 2}
    record = measure(folder, tmp_path / "out", shared("titok-vae"), **options).record
    point = record.points[0]
    assert record.protocol["files"].startswith("whole files; settings chosen on the first 2 images")
    assert 0.5 * point.bytes < record.matched(point)["WebP"].bytes <= point.bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baselines": ("GIF",)}, "no baseline GIF; there are thumbnail, JPEG, WebP, AVIF"),
        ({"metrics": ("kid",)}, "no metric kid here"),
        ({"lengths": (0,)}, "one token at least"),
        ({"lengths": (64,)}, "1 to 6 tokens"),
        ({"targets": (0.1,)}, "is for adaptive tokenizers"),
        ({"steps": 3}, "are for stochastic decoders; mini has none"),
    ],
)
def test_what_nothing_takes_is_refused_before_any_work(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        measure(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_tokenizers_are_named_once_and_lengths_are_for_those_with_a_choice(folder, tmp_path):
    with pytest.raises(ValueError, match="is there twice"):
        measure(folder, tmp_path / "out", shared("mini"), shared("mini"))
    with pytest.raises(ValueError, match="of variable length; titok"):
        measure(folder, tmp_path / "out", shared("titok-vq"), lengths=(2,))


def test_two_tokenizers_of_one_family_are_called_as_they_were_given(folder, tmp_path):
    given = []
    for seed in range(2):
        given.append(str(tmp_path / f"run-{seed}"))
        torch.manual_seed(seed)
        fresh("mini").save_pretrained(given[-1])
    config = CurvesConfig(tuple(given), (str(folder),), baselines=(), metrics=PLAIN, workers=0)
    record = rate_distortion.run(config, tmp_path / "out", CPU).record
    assert list(dict.fromkeys(point.codec for point in record.points)) == given
    assert record.tokenizer == ", ".join(given)


def test_a_folder_of_no_readable_image_is_told(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the 1 images"):
        measure(tmp_path / "a", tmp_path / "out")


def test_a_blank_picture_makes_no_baseline_exact_and_chooses_no_smaller_file(tmp_path, capfd):
    """It comes back exactly from every codec, and a mean PSNR with it would be infinite for all settings."""
    pictures_alone = save(scenes(4, 64), tmp_path / "alone")
    with_blank = save(torch.cat([scenes(4, 64), torch.ones(1, 3, 64, 64)]), tmp_path / "with")
    options = {"baselines": ("JPEG", "WebP"), "batch_size": 5, "size": 64}
    alone, blank = (
        measure(folder, tmp_path / folder.name / "out", shared("mini"), **options).record
        for folder in (pictures_alone, with_blank)
    )
    exact = [point for point in blank.points if point.metrics["psnr"].get("exact")]
    assert exact and all(point.baseline and point.metrics["psnr"]["exact"] == 1 for point in exact)
    assert all(math.isfinite(quality(point)) for point in blank.points)
    for point in blank.points:
        if not point.baseline:
            for other in filter(None, blank.matched(point).values()):
                rivals = [p for p in blank.points if p.codec == other.codec and p.bytes <= point.bytes]
                assert other.mse == min(rival.mse for rival in rivals)
    largest = max(point.bytes for point in alone.points if point.codec == "WebP")
    assert max(point.bytes for point in blank.points if point.codec == "WebP") > 0.5 * largest
    shown = [cell for table in curves.tables(blank) for row in table.rows for cell in row]
    assert not [cell for cell in shown if "inf" in cell] and [cell for cell in shown if "1 exact" in cell]


def test_blank_pictures_alone_are_called_exact(tmp_path):
    folder = save(torch.ones(2, 3, 64, 64), tmp_path / "blank")
    options = {"baselines": ("WebP",), "lengths": (1,), "batch_size": 2}
    result = measure(folder, tmp_path / "out", shared("mini"), **options)
    baseline = [point for point in result.record.points if point.baseline]
    assert baseline and all(point.metrics["psnr"] == {"value": math.inf, "exact": 2} for point in baseline)
    matched, _ = curves.tables(result.record)
    assert all("all exact" in row[-1] or row[-1] == "–" for row in matched.rows)
    curves.chart(result.record, "psnr").save(tmp_path / "chart.png")


def test_the_report_shows_pictures_at_their_lengths_and_files_at_matched_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    folder, model = save(scenes(5), tmp_path / "scenes"), load("vistok-mini")
    result = measure(folder, tmp_path / "out", model, baselines=("JPEG", "WebP"), batch_size=5)
    shown = result.pictures()
    assert len(shown) == 4
    told = [caption for caption, _ in shown[0].versions]
    assert told[0] == "vistok-mini, 1 token, 2 bytes" and told[3] == "vistok-mini, 64 tokens, 128 bytes"
    image = to_tensor(folder / "00.png", 128)
    expected = model.decode(model.encode(image).prefix(64))
    assert torch.equal(shown[0].versions[3][1], (expected[0] * 255).round().to(torch.uint8))
    matched = curves.matched_table(result.record)
    assert [row[0] for row in matched.rows][-1] == "vistok-mini, 64 tokens"
    chart = curves.chart(result.record, "psnr")
    ours, *_ = chart.figure.axes[0].lines
    assert ours.get_ydata().tolist() == [quality(p) for p in result.record.points if not p.baseline]


def test_the_command_writes_json_plot_and_report(tmp_path, no_weights, capfd):
    pytest.importorskip("matplotlib")
    folder, out = save(scenes(3), tmp_path / "scenes"), tmp_path / "out"
    arguments = ["tokens", str(folder), "--out", str(out), "--workers", "0", "--baselines", "JPEG,AVIF"]
    commands.app([*arguments, "--lengths", "16,64"], standalone_mode=False)
    told = capfd.readouterr()
    assert "n = 3" in told.out and "matched bytes" in told.out and told.err.count("--inception-weights") == 1
    record = read(out / "rate_distortion.json")
    ours = [point for point in record["points"] if not point["baseline"]]
    assert [point["setting"] for point in ours] == ["16 tokens", "64 tokens"]
    assert ours[0]["metrics"]["psnr"]["value"] < ours[1]["metrics"]["psnr"]["value"]
    assert {"versions", "protocol", "n", "seed", "command"} <= set(record)
    assert sorted(path.name for path in out.iterdir()) == [
        "rate_distortion.json",
        "rate_distortion.png",
        "report.html",
    ]
    with pytest.raises(ValueError, match="give whole numbers"):
        commands.app([*arguments, "--lengths", "few"], standalone_mode=False)
