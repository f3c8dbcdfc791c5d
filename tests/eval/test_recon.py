"""`vistok eval recon`: its numbers, and that neither a kill, nor processes, nor bad images change them."""

import dataclasses
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from evaluated import read, save, scenes
from filled_networks import backbone_file, inception_file
from tiny_tokenizers import pictures, shared

from vistok import create, load, to_tensor
from vistok.eval import commands
from vistok.eval.engine.decoding import captions
from vistok.eval.engine.record import write
from vistok.eval.metrics.image import psnr, ssim
from vistok.eval.metrics.perceptual import load_lpips
from vistok.eval.metrics.statistics import FeatureStatistics, frechet_distance
from vistok.eval.metrics.summary import summarise
from vistok.eval.options import ReconConfig, WeightFiles
from vistok.eval.report import records
from vistok.eval.tasks import reconstruction

pytest_plugins = ("quick_inception",)
pytestmark = pytest.mark.usefixtures("small_and_quick")
CPU = torch.device("cpu")
PLAIN = ("psnr", "ssim", "codes")


@pytest.fixture
def folder(tmp_path):
    """Eleven pictures, so that the last batch is not full."""
    return save(pictures(11, seed=1, side=40), tmp_path / "pictures")


def evaluate(data, out, model=None, **options):
    options = {"batch_size": 4, "workers": 0, "metrics": PLAIN, **options}
    config = ReconConfig("tiny", (str(data),), **options)
    return reconstruction.run(config, out, CPU, model=model or shared("mini"))


def metrics(*arguments, **options):
    return evaluate(*arguments, **options).record.metrics


def images_of(folder, side=32):
    return torch.cat([to_tensor(path, side) for path in sorted(folder.iterdir())])


# ---- the numbers -------------------------------------------------------------------------------------------


def test_means_are_those_of_the_images_one_by_one(folder, tmp_path):
    model, images = shared("mini"), images_of(folder)
    decoded = model.decode(model.encode(images))
    result = evaluate(folder, tmp_path / "out")
    assert result.record.n == 11
    for name, compare in (("psnr", psnr), ("ssim", ssim)):
        expected = summarise(compare(decoded, images), seed=0)
        found = result.record.metrics[name]
        assert found["value"] == pytest.approx(expected.value, rel=1e-6)
        assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-6)
        assert found["low"] < found["value"] < found["high"]
    assert result.record.metrics["bits-per-image"]["value"] == 6 * 4
    assert result.record.metrics["bits-per-pixel"]["value"] == 6 * 4 / 32**2
    assert result.values["bits"].tolist() == [24.0] * 11


@pytest.mark.parametrize("protocol", ["round", "titok"])
def test_rfid_is_the_distance_of_features_of_8_bit_images(folder, tmp_path, quick_inception, protocol):
    model, images = shared("mini"), images_of(folder)
    decoded = model.decode(model.encode(images)) * 255
    levels = [(images * 255).round(), decoded.round() if protocol == "round" else decoded.floor()]
    sets = []
    for each in levels:
        sets.append(FeatureStatistics(24))
        sets[-1].update(quick_inception(each.to(torch.uint8))[0])
    found = metrics(folder, tmp_path / "out", metrics=("fid",), protocol=protocol)
    assert found["fid"]["value"] == pytest.approx(frechet_distance(*sets), rel=1e-6)
    assert set(found) == {"fid"}


def test_all_metrics_of_sets_come_with_one_pass(folder, tmp_path, quick_inception):
    result = evaluate(folder, tmp_path / "out", metrics=("fid", "is", "kid", "pr"), kid_subset_size=8)
    found = result.record.metrics
    assert list(found) == ["fid", "is", "kid", "precision", "recall"]
    assert found["is"]["splits"] == 10 and found["kid"]["subset_size"] == 8
    assert 0 <= found["precision"]["value"] <= 1
    assert "11 images" in result.record.warnings[0]


def test_too_few_images_for_a_metric_skip_it(folder, tmp_path, quick_inception):
    found = metrics(folder, tmp_path / "out", metrics=("fid", "is", "kid", "pr"), limit=3)
    assert found["fid"]["value"] > 0
    assert "--kid-subset-size" in found["kid"]["skipped"]
    assert all("skipped" in found[name] for name in ("is", "precision", "recall"))


def test_an_image_given_back_exactly_has_infinite_psnr_in_the_json(folder, tmp_path):
    class Identity(type(shared("mini"))):
        def decode(self, tokens, **_):
            return self.seen

        def encode(self, images, num_tokens=None):
            self.seen = images
            return super().encode(images, num_tokens)

    model = Identity(shared("mini").config)
    evaluate_command(folder, tmp_path / "out", model)
    record = read(tmp_path / "out" / "reconstruction.json")
    assert record["metrics"]["psnr"]["value"] == "inf"
    assert record["metrics"]["ssim"]["value"] == pytest.approx(1)


def evaluate_command(folder, out, model):
    """As the command does it, with a model that no name stands for."""
    from vistok.eval.engine import record

    result = evaluate(folder, out, model)
    record.write(out / "reconstruction.json", result.record)


def test_prefixes_and_sizes_of_their_own(folder, tmp_path):
    assert metrics(folder, tmp_path / "a", tokens=2)["bits-per-image"]["value"] == 8
    result = evaluate(folder, tmp_path / "b", shared("maskgit-vqgan"), size=48)
    assert result.record.protocol["size"] == 48
    assert result.record.metrics["tokens-per-image"]["value"] == 9


def test_adaptive_tokens_have_an_interval_and_continuous_ones_no_codebook(folder, tmp_path):
    found = metrics(folder, tmp_path / "a", shared("karl-vqgan-vq"))
    assert found["bits-per-image"]["low"] < found["bits-per-image"]["high"]
    assert len(found["perplexity"]["codebooks"]) == 2
    found = metrics(folder, tmp_path / "b", shared("titok-vae"))
    assert found["bits-per-image"]["value"] == 6 * 8 * 32
    assert "perplexity" not in found and "codebook-usage" not in found
    assert "bit-entropy" in metrics(folder, tmp_path / "c", shared("instella"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are Unicode")
def test_names_of_files_may_be_no_unicode(tmp_path):
    (tmp_path / "pictures").mkdir()
    path = os.fsdecode(os.fsencode(tmp_path / "pictures") + b"/\xff.png")
    shutil.copy(save(pictures(1, seed=1, side=40), tmp_path / "one") / "00.png", path)
    result = evaluate(tmp_path / "pictures", tmp_path / "out")
    assert result.record.n == 1 and result.picture(0).name == "\udcff.png"


def test_whole_pictures_keep_their_aspect_where_the_tokenizer_takes_them(tmp_path):
    folder = save(pictures(3, side=32).repeat(1, 1, 1, 2)[..., :50], tmp_path / "wide")
    result = evaluate(folder, tmp_path / "out", shared("instella"), crop=False)
    assert result.picture(0).original.shape == (3, 32, 48)
    assert result.record.metrics["bits-per-pixel"]["value"] == 6 * 12 / (32 * 48)
    with pytest.raises(ValueError, match="takes 32×32 only: leave --no-crop out"):
        evaluate(folder, tmp_path / "out", crop=False)


# ---- what must not change them -----------------------------------------------------------------------------


def test_a_stochastic_decoder_draws_by_image_whatever_the_batch(folder, tmp_path):
    model = shared("flextok")
    options = {"model": model, "steps": 2, "metrics": ("psnr",), "limit": 3}
    together = evaluate(folder, tmp_path / "a", **options).values["psnr"]
    alone = evaluate(folder, tmp_path / "b", batch_size=1, **options).values["psnr"]
    assert alone == pytest.approx(together, rel=1e-5)
    other = evaluate(folder, tmp_path / "c", seed=1, **options).values["psnr"]
    assert abs(other - together).min() > 1e-3


def test_the_record_and_the_report_hold_what_was_left_out(folder, tmp_path):
    for name in ("b.txt", "a.txt", "c.csv"):
        (folder / name).write_text("a,b")
    with pytest.warns(UserWarning, match="left out 3 files"):
        result = evaluate(folder, tmp_path / "out")
    write(tmp_path / "out" / "record.json", result.record)
    records.write_reconstruction(tmp_path / "out" / "report.html", result)
    found = read(tmp_path / "out" / "record.json")["left_out"]
    assert [(row["count"], row["first"], row["source"]) for row in found] == [
        (2, [str(folder / "a.txt"), str(folder / "b.txt")], str(folder)),
        (1, [str(folder / "c.csv")], str(folder)),
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "3 files left out" in page and "c.csv" in page


def test_unreadable_and_repeated_images_are_named_and_change_nothing_else(folder, tmp_path, quick_inception):
    options = {"metrics": None, "kid_subset_size": 8}
    first = sorted(folder.iterdir())[0]
    shutil.copy(first, folder / "copy of the first.png")
    clean = evaluate(folder, tmp_path / "clean", **options).record
    assert clean.duplicates == [["00.png", "copy of the first.png"]] and clean.n == 12
    (folder / "04.broken.png").write_bytes(first.read_bytes()[:100])
    (folder / "zz.jpg").write_bytes(b"")
    found = evaluate(folder, tmp_path / "bad", **options).record
    assert found.n == 12
    assert [(row["index"], row["name"]) for row in found.bad_images] == [(4, "04.broken.png"), (13, "zz.jpg")]
    assert found.duplicates == clean.duplicates
    for name in ("psnr", "ssim", "fid", "kid", "is", "precision"):
        assert found.metrics[name]["value"] == pytest.approx(clean.metrics[name]["value"], rel=1e-6)


class Killed(BaseException):
    """Stands in for a kill: nothing handles it."""


def killed_after(batches, monkeypatch):
    """Let an evaluation end in the batch after so many; returns the list of those measured."""
    measured, measure = [], reconstruction._Reconstruction._measure

    def measure_or_end(self, batch):
        if len(measured) == batches:
            raise Killed
        measure(self, batch)
        measured.append(batch.indices.tolist())

    monkeypatch.setattr(reconstruction._Reconstruction, "_measure", measure_or_end)
    return measured


@pytest.mark.parametrize("killed", [0, 1, 2, 3, 5])
def test_a_killed_run_continues_with_the_identical_result(
    folder, tmp_path, quick_inception, killed, monkeypatch
):
    (folder / "05.broken.png").write_bytes(b"no image")
    settings = {"metrics": None, "kid_subset_size": 8, "pfid": True, "pfid_alpha": (0.5,), "pfid_delta": (9,)}
    settings |= {"batch_size": 2, "checkpoint_every": 2}
    whole = evaluate(folder, tmp_path / "whole", **settings)
    with monkeypatch.context() as patched:
        before = killed_after(killed, patched)
        with pytest.raises(Killed):
            evaluate(folder, tmp_path / "out", **settings)
    with monkeypatch.context() as patched:
        after = killed_after(99, patched)
        resumed = evaluate(folder, tmp_path / "out", **settings)
    assert len(before) == killed and len(after) == 6 - killed + killed % 2
    for name in ("n", "metrics", "bad_images", "duplicates", "warnings", "protocol"):
        assert getattr(resumed.record, name) == getattr(whole.record, name)
    resumed.state.remove()
    assert not list((tmp_path / "out").iterdir())


def test_an_unfinished_run_of_other_settings_is_refused_and_told_apart(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        killed_after(2, patched)
        with pytest.raises(Killed):
            evaluate(folder, tmp_path / "out", checkpoint_every=1)
    with pytest.raises(ValueError, match=r"batch_size was 4 and is now 2.*another --out"):
        evaluate(folder, tmp_path / "out", batch_size=2)
    with pytest.raises(ValueError, match="weights was"):
        evaluate(folder, tmp_path / "out", create("mini", **dataclasses.asdict(shared("mini").config)))
    settings = tmp_path / "out" / "state" / "settings.json"
    settings.write_text(settings.read_text().replace('"processes": 1', '"processes": 3'))
    with pytest.raises(ValueError, match="processes was 3 and is now 1"):
        evaluate(folder, tmp_path / "out")
    settings.write_text(settings.read_text().replace('"processes": 3', '"processes": 1'))
    assert evaluate(folder, tmp_path / "out", workers=1).record.n == 11  # how it is computed may change


class Threads:
    """Processes that are threads, with what `State` asks of accelerate's PartialState."""

    def __init__(self, number, barrier):
        self.process_index, self.num_processes = number, barrier.parties
        self.is_main_process, self.wait_for_everyone = number == 0, barrier.wait


@pytest.mark.parametrize("count", [2, 7])
def test_the_batches_of_several_processes_add_up(folder, tmp_path, quick_inception, count):
    """Also where there are more of them than batches."""
    settings = {"metrics": None, "kid_subset_size": 8, "pfid": True, "pfid_alpha": (0.5,), "pfid_delta": (9,)}
    settings |= {"batch_size": 2}
    (folder / "05.broken.png").write_bytes(b"no image")
    (folder / "zz.png").write_bytes((folder / "00.png").read_bytes())
    whole = evaluate(folder, tmp_path / "whole", **settings).record
    config = ReconConfig("tiny", (str(folder),), workers=0, **settings)
    barrier = threading.Barrier(count, timeout=60)

    def work(number):
        process = Threads(number, barrier)
        return reconstruction._Reconstruction(config, tmp_path / "state", process, CPU, shared("mini")).run()

    with ThreadPoolExecutor(count) as pool:
        first, *others = pool.map(work, range(count))
    assert others == [None] * (count - 1)
    found = first.record
    assert (found.n, found.bad_images, found.duplicates) == (12, whole.bad_images, whole.duplicates)
    for name, metric in whole.metrics.items():
        exact = name in ("psnr", "ssim", "perplexity", "codebook-usage", "bits-per-image", "is", "kid")
        tolerance = 0 if exact else 1e-6
        if "value" in metric:
            assert found.metrics[name]["value"] == pytest.approx(metric["value"], rel=tolerance, abs=0)
    assert found.metrics["pfid"]["cells"][0]["changed"] == whole.metrics["pfid"]["cells"][0]["changed"]


# ---- pFID --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "delta"), [(0.0, 9), (0.9, 1)])
def test_pfid_without_perturbation_is_exactly_rfid(folder, tmp_path, quick_inception, alpha, delta):
    settings = {"pfid": True, "pfid_alpha": (alpha,), "pfid_delta": (delta,)}
    found = metrics(folder, tmp_path / "out", **settings)
    assert found["pfid"]["value"] == found["fid"]["value"] > 0
    assert found["pfid"]["cells"][0]["changed"] == 0


def test_pfid_grows_with_alpha_and_delta_and_tells_every_cell(tmp_path, quick_inception):
    folder = save(scenes(24), tmp_path / "scenes")
    settings = {"pfid": True, "pfid_alpha": (0.9, 0.3), "pfid_delta": (4, 2000)}
    found = metrics(folder, tmp_path / "out", load("vistok-mini"), **settings)
    cells = {(cell["alpha"], cell["delta"]): cell for cell in found["pfid"]["cells"]}
    values = {setting: cell["value"] for setting, cell in cells.items()}
    assert found["fid"]["value"] < values[0.3, 2000] < values[0.9, 2000]
    assert values[0.9, 4] < values[0.9, 2000]
    assert found["pfid"]["value"] == sum(values.values()) / 4
    for (alpha, delta), cell in cells.items():
        share = alpha * (1 - 1 / delta)
        assert abs(cell["changed"] - share) < 3 * math.sqrt(share * (1 - share) / (24 * 64))


def test_pfid_needs_inception_and_discrete_codes(folder, tmp_path, no_weights):
    found = metrics(folder, tmp_path / "a", pfid=True, pfid_delta=(9,))
    assert "--inception-weights" in found["pfid"]["skipped"]
    with pytest.raises(ValueError, match="continuous"):
        evaluate(folder, tmp_path / "b", shared("titok-vae"), pfid=True)
    with pytest.raises(ValueError, match="16 or less"):
        evaluate(folder, tmp_path / "c", pfid=True)


# ---- what cannot be measured -------------------------------------------------------------------------------


def test_metrics_without_their_weights_are_skipped_with_a_line_each(folder, tmp_path, no_weights):
    found = metrics(folder, tmp_path / "out", metrics=None)
    skipped = {name for name, metric in found.items() if "skipped" in metric}
    assert skipped == {"lpips-alex", "lpips-vgg", "clip", "fid", "is", "kid", "precision", "recall"}
    for name, option in (("fid", "--inception"), ("lpips-vgg", "--lpips"), ("clip", "--clip")):
        assert f"{option}-weights" in found[name]["skipped"] and "\n" not in found[name]["skipped"]
        assert set(found[name]) == {"skipped"}
    assert found["psnr"]["value"] > 0


def test_one_lpips_file_is_for_the_network_in_its_name(folder, tmp_path, no_weights):
    model, images = shared("mini"), images_of(folder)
    path = backbone_file("alex", tmp_path)
    found = metrics(
        folder, tmp_path / "out", metrics=("lpips-alex", "lpips-vgg"), files=WeightFiles(lpips=path)
    )
    expected = load_lpips("alex", path)(model.decode(model.encode(images)), images).double()
    assert found["lpips-alex"]["value"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert "vgg16" in found["lpips-vgg"]["skipped"]
    with pytest.raises(FileNotFoundError, match=r"--lpips-weights .*nowhere"):
        evaluate(folder, tmp_path / "out2", files=WeightFiles(lpips=tmp_path / "nowhere"))
    path.rename(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="published name"):
        evaluate(folder, tmp_path / "out2", metrics=None, files=WeightFiles(lpips=tmp_path / "weights.pth"))


def test_a_tokenizer_that_gives_nan_stops_the_run(folder, tmp_path):
    broken = create("mini", **dataclasses.asdict(shared("mini").config)).eval()
    torch.nn.init.constant_(broken.decoder.head.weight, math.nan)
    with pytest.raises(FloatingPointError, match=r"not finite for 1 of 1 images \(00.png\)"):
        evaluate(folder, tmp_path / "out", broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ()}, "no metric was named; there are psnr"),
        ({"metrics": ("psnr", "rfid")}, "no metric rfid"),
        ({"protocol": "floor"}, "'round' or 'titok'|'round', or 'titok'"),
        ({"tokens": 99}, "1 to 6"),
        ({"size": 48}, "give another --size"),
        ({"pfid": True, "pfid_alpha": (2.0,)}, "0 to 1"),
        ({"limit": 0}, "1 or more"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_image_is_read(folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(folder, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_readable_image_is_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="no picture"):
        evaluate(empty, tmp_path / "out")
    (empty / "a.png").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"none of the 1 images .* can be read: a.png"):
        evaluate(empty, tmp_path / "out")
    assert not (tmp_path / "out" / "state").exists()


def test_a_disk_too_full_for_features_is_told_at_the_start(folder, tmp_path, quick_inception, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(ValueError, match="leave is, kid and pr out"):
        evaluate(folder, tmp_path / "out", metrics=None)


def test_what_the_tokenizer_cannot_decode_is_told_before_a_state_is_begun(folder, tmp_path):
    with pytest.raises(ValueError, match="steps and guidance do not apply"):
        evaluate(folder, tmp_path / "out", steps=3)
    assert not (tmp_path / "out").exists()
    assert evaluate(folder, tmp_path / "out").record.n == 11


def test_protocols_say_whose_captions_are_empty():
    assert captions(shared("tatitok-vq"), shared("mini")) == {"captions": "empty (tatitok)"}
    assert captions(shared("mini")) == {}


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_json_and_report(tmp_path, no_weights, capfd, monkeypatch):
    folder, out = save(scenes(5), tmp_path / "scenes"), tmp_path / "out"
    arguments = ["recon", "--tokenizer", "vistok-mini", "--data", str(folder), "--out", str(out)]
    arguments += ["--workers", "0", "--tokens", "16"]
    monkeypatch.setattr(sys, "argv", ["vistok", "eval", *arguments])
    commands.app(arguments, standalone_mode=False)
    told = capfd.readouterr()
    assert "n = 5" in told.out and "PSNR" in told.out and "skipped" in told.out
    assert told.err.count("--inception-weights") == 1
    record = read(out / "reconstruction.json")
    assert record["command"] == ["vistok", "eval", *arguments]
    assert {"python", "vistok", "torch", "torch_fidelity", "lpips"} <= set(record["versions"])
    assert (record["n"], record["seed"], record["tokenizer"]) == (5, 0, "vistok-mini")
    assert record["protocol"]["tokens"] == 16 and record["metrics"]["bits-per-image"]["value"] == 256
    assert {"encode", "decode", "psnr", "waiting for images"} <= set(record["seconds"]) and record["rate"] > 0
    page = (out / "report.html").read_text()
    assert "skipped" in page and "data:image" in page
    assert sorted(path.name for path in out.iterdir()) == ["reconstruction.json", "report.html"]


def test_a_grid_without_pfid_is_refused(tmp_path):
    arguments = ["recon", "--tokenizer", "vistok-mini", "--data", str(tmp_path), "--pfid-alpha", "0.5"]
    with pytest.raises(ValueError, match="give that as well"):
        commands.app(arguments, standalone_mode=False)


# ---- real processes, with torch-fidelity's network ---------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of 15 scenes, Inception weights, and what one undisturbed process makes of them."""
    root = tmp_path_factory.mktemp("prepared")
    save(scenes(15, 64), root / "scenes")
    inception_file(root)
    finish([sys.executable, "-m", "vistok.cli", *command(root, root / "whole")])
    return root, read(root / "whole" / "reconstruction.json")


def command(root, out):
    settings = [
        "--batch-size",
        "3",
        "--checkpoint-every",
        "2",
        "--workers",
        "1",
        "--no-html",
        "--device",
        "cpu",
    ]
    settings += ["--metrics", "psnr,ssim,fid,is,kid,codes", "--kid-subset-size", "12"]
    weights = ["--inception-weights", str(root)]
    source = ["--tokenizer", "vistok-mini", "--data", str(root / "scenes"), "--out", str(out)]
    return ["eval", "recon", *source, *settings, *weights]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "VISTOK_TRACEBACK": "1"}


def finish(arguments):
    result = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
def test_a_process_killed_after_a_checkpoint_ends_where_another_does(prepared, tmp_path):
    root, whole = prepared
    arguments = [sys.executable, "-m", "vistok.cli", *command(root, tmp_path)]
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    saved = tmp_path / "state" / "process-0.pt"
    while not saved.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "reconstruction.json").exists()
    assert 0 < torch.load(saved, weights_only=True)["done"] < 5
    finish(arguments)
    assert read(tmp_path / "reconstruction.json")["metrics"] == whole["metrics"]


@pytest.mark.slow
def test_two_processes_give_the_same_psnr_to_the_bit_and_fid_to_a_millionth(prepared, tmp_path):
    root, whole = prepared
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    finish([*launch, "--main_process_port", "0", "-m", "vistok.cli", *command(root, tmp_path)])
    found = read(tmp_path / "reconstruction.json")
    assert found["n"] == 15
    for name in ("psnr", "ssim", "bits-per-image", "perplexity"):
        assert found["metrics"][name] == whole["metrics"][name]
    for name in ("fid", "is", "kid"):
        assert found["metrics"][name]["value"] == pytest.approx(whole["metrics"][name]["value"], rel=1e-6)
