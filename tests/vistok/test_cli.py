"""The command line, run for real on the shipped tokenizer and photographs."""

import json
import math
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import GOLDEN
from PIL import Image
from tiny_tokenizers import shared

import vistok

ASSETS = Path(str(files("vistok.assets")))
PHOTO = ASSETS / "chelsea.jpg"


def test_help_answers_without_importing_torch():
    code = (
        "import sys, vistok.cli\nsys.argv = ['vistok', '--help']\n"
        "try: vistok.cli.main()\nfinally: assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "reconstruct" in result.stdout


def test_demo_in_a_process_of_its_own_writes_a_picture(tmp_path):
    command = [sys.executable, "-m", "vistok.cli", "demo"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "64" in result.stdout and "PSNR" in result.stdout
    rows = [line.split("│") for line in result.stdout.splitlines() if "correct" in line]
    assert [[cell.strip() for cell in row[1:3]] for row in rows[:2]] == [["none", "192"], ["divprune", "19"]]
    assert rows[0][4].strip() == "correct"
    picture = Image.open(tmp_path / "vistok-demo.png")
    assert picture.width >= 5 * 256 and picture.height >= 2 * 256


def test_demo_takes_your_own_picture(run, tmp_path):
    status, out, _ = run("demo", PHOTO, "--out", "mine/cat.png")
    assert status == 0 and "chelsea" in out and (tmp_path / "mine" / "cat.png").is_file()


def test_list_has_one_line_per_tokenizer_and_json_has_the_rest(run):
    status, out, _ = run("list")
    assert status == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert [row[0] for row in rows] == vistok.list_tokenizers()
    assert ["titok-l32", "32", "384", "2.21", "Apache-2.0", "✓"] in rows
    status, out, _ = run("list", "--json")
    row = next(row for row in json.loads(out) if row["name"] == "titok-l32")
    assert row["repo"] == "yucornetto/tokenizer_titok_l32_imagenet" and "latents" in row["compared"]


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("--reducers", ["divprune", "transprune"]),
        ("--metrics", ["psnr", "fid", "codebook-usage"]),
        ("--families", ["LlavaNext", "Qwen2_5_VL", "Llama4"]),
        ("--generators", ["maskgit-l32", "rar-b"]),
    ],
)
def test_list_shows_what_else_there_is(run, option, names):
    status, out, _ = run("list", option)
    assert status == 0 and all(f"│ {name} " in out for name in names)
    status, out, _ = run("list", option, "--json")
    assert status == 0 and set(names) <= {next(iter(row.values())) for row in json.loads(out)}


def test_two_lists_at_once_are_refused(run):
    status, _, err = run("list", "--reducers", "--metrics")
    assert status == 1 and "--reducers and --metrics are different lists" in err


LICENCES = {
    "flextok-d18-d28-dfn": "not open source: research only",
    "karl-vae-in100": "none stated",
    "instella-bae": "research-only",
    "vistok-mini": "Apache-2.0",
}


def test_list_fits_on_80_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    status, out, _ = run("list")
    assert status == 0 and max(map(len, out.splitlines())) <= 80
    lines = [line for line in out.splitlines() if "│" in line]
    assert len(lines) == len(vistok.list_tokenizers())
    for name, part in (
        ("karl-vae-in100", "none stated"),
        ("instella-bae", "research-only"),
        ("vistok-mini", "1–64"),
    ):
        assert any(name in line and part in line for line in lines), name


@pytest.mark.parametrize("name", LICENCES)
def test_info_shows_the_licence(run, name):
    status, out, _ = run("info", name)
    assert status == 0 and LICENCES[name] in out


def test_info_tells_one_and_refuses_the_unknown(run):
    status, out, _ = run("info", "titok-s128")
    assert status == 0 and "83.7 M" in out and '"num_latent_tokens": 128' in out
    status, out, _ = run("info", "karl-vqgan-vq")
    assert status == 0 and "up to 256" in out and "rights are reserved" in out
    status, _, err = run("info", "titok-s129")
    assert status == 1 and "Did you mean titok-s128" in err


def test_reconstruct_writes_pictures_and_json_and_goes_on_after_a_bad_image(run, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(PHOTO.read_bytes()[:5000])
    status, out, err = run(
        "reconstruct", PHOTO, broken, ASSETS / "coffee.jpg", "--tokens", 16, "--out", "out"
    )
    assert status == 1 and "skipped" in err and "broken.jpg" in err and "1 image skipped" in err
    record = json.loads((tmp_path / "out" / "reconstructions.json").read_text())
    assert [Path(r["image"]).stem for r in record["images"]] == ["chelsea", "coffee"]
    assert all(r["bytes"] == 32 and 10 < r["psnr"] < 40 for r in record["images"])
    assert all(Image.open(r["picture"]).width > 256 for r in record["images"])
    assert "chelsea" in out


def test_a_picture_that_comes_back_exactly_makes_no_mean_infinite(run, tmp_path):
    """A tokenizer that answers black pictures gives a black one back exactly."""
    model = vistok.load("vistok-mini")
    for parameter in list(model.decoder.parameters())[-2:]:
        parameter.data.zero_()
    list(model.decoder.parameters())[-1].data.fill_(-5)
    model.save_pretrained(tmp_path / "black")
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    Image.new("RGB", (64, 64), (51, 51, 51)).save(tmp_path / "grey.png")
    status, out, err = run("reconstruct", "black.png", "grey.png", "--tokenizer", "./black", "--out", "both")
    assert status == 0, err
    record = json.loads((tmp_path / "both" / "reconstructions.json").read_text(), parse_constant=pytest.fail)
    assert record["mean"]["psnr"] == pytest.approx(20 * math.log10(5)) and record["mean"]["exact"] == 1
    assert [image["psnr"] for image in record["images"]] == ["inf", record["mean"]["psnr"]]
    assert "13.98, 1 exact" in out and "inf" not in out
    status, out, _ = run("reconstruct", "black.png", "--tokenizer", "./black", "--out", "one")
    assert status == 0 and "all exact" in out and "inf" not in out
    status, out, _ = run("encode", "black.png", "--tokenizer", "./black", "--target-psnr", 20, "-o", "a.vtok")
    assert status == 0 and "exact" in out and "inf" not in out


def test_reconstruct_keeps_both_of_two_images_with_one_name(run, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.open(PHOTO).save(tmp_path / folder / "photo.png")
    status, _, _ = run("reconstruct", "a", "b", "--out", "out")
    assert status == 0
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"photo.png", "photo-2.png"}


def test_encode_then_decode_gives_what_the_library_gives(run, tmp_path):
    status, out, _ = run("encode", PHOTO, ASSETS / "camera.jpg", "-o", "photos.vtok", "--resize")
    assert status == 0 and "2 images resized to 128×128, 64 tokens per image" in out
    tokens = vistok.Tokens.load(tmp_path / "photos.vtok")
    assert len(tokens) == 2 and tokens.bits_per_image.tolist() == [1024, 1024]
    assert (tmp_path / "photos.vtok").stat().st_size < 256 + 64
    status, out, _ = run("decode", "photos.vtok", "-o", "back")
    assert status == 0 and "2 images" in out
    expected = vistok.to_pil(vistok.load("vistok-mini").decode(tokens))
    for name, picture in zip(("chelsea", "camera"), expected, strict=True):
        assert Image.open(tmp_path / "back" / f"{name}.png").tobytes() == picture.tobytes()


# ---- tokens by quality -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def karl(tmp_path_factory, small_and_quick):
    """A folder with a small tokenizer that chooses lengths."""
    folder = tmp_path_factory.mktemp("karl")
    shared("karl-vae-vq").save_pretrained(folder)
    return folder


def test_a_target_quality_gives_each_photograph_its_own_length(run, tmp_path):
    photos = [PHOTO, ASSETS / "astronaut.jpg"]
    target = ["--target-psnr", 15, "--resize", "--batch-size", 1]
    status, out, err = run("encode", *photos, "-o", "two.vtok", *target)
    assert status == 0 and err == ""
    tokens = vistok.Tokens.load(tmp_path / "two.vtok")
    model = vistok.load("vistok-mini")
    pixels = torch.cat([vistok.to_tensor(photo, 128) for photo in photos])
    expected = model.encode(pixels, target_psnr=15)
    assert tokens == expected.tokens and len(set(tokens.lengths.tolist())) == 2
    for photo, length, psnr in zip(photos, tokens.lengths.tolist(), expected.psnr.tolist(), strict=True):
        assert f"{length:4d} tokens  {psnr:.2f} dB  {photo}\n" in out
    status, _, _ = run("decode", "two.vtok", "-o", "back", "--batch-size", 1)
    assert status == 0
    for name, picture in zip(("chelsea", "astronaut"), vistok.to_pil(model.decode(tokens)), strict=True):
        decoded = np.asarray(Image.open(tmp_path / "back" / f"{name}.png"), dtype=int)
        # Sums of another batch size may round to the next level.
        assert np.abs(decoded - np.asarray(picture, dtype=int)).max() <= 1


def test_an_unreachable_target_is_one_warning_and_no_failure(run, tmp_path):
    photos = [PHOTO, ASSETS / "astronaut.jpg", ASSETS / "coffee.jpg"]
    target = ["--target-psnr", 22, "--batch-size", 1]
    status, out, err = run("encode", *photos, "-o", "three.vtok", "--resize", *target)
    assert status == 0 and err.count("\n") == 1 and out.count("not reached") == 2
    assert err.startswith("warning: 2 of 3 images did not reach 22 dB") and "lower --target-psnr" in err
    status, out, err = run("reconstruct", *photos, *target, "--out", "out")
    assert status == 0 and err.count("\n") == 1 and "33%" in out
    record = json.loads((tmp_path / "out" / "reconstructions.json").read_text())
    assert record["target_psnr"] == 22 and record["mean"]["reached"] == pytest.approx(1 / 3)
    for image in record["images"]:
        assert image["reached"] == (image["psnr"] >= 22)
        assert image["bytes"] == 2 * image["tokens"] and (image["tokens"] < 64 or not image["reached"])


def test_tokens_is_the_most_a_target_may_take(run, tmp_path):
    status, _, err = run("encode", PHOTO, "-o", "one.vtok", "--target-psnr", 22, "--tokens", 8, "--resize")
    assert status == 0 and "1 of 1 image did not reach" in err
    assert vistok.Tokens.load(tmp_path / "one.vtok").lengths.item() <= 8


def test_a_target_error_goes_to_who_chooses_lengths(run, karl, tmp_path):
    photos = [PHOTO, ASSETS / "astronaut.jpg", ASSETS / "camera.jpg"]
    arguments = ["--tokenizer", karl, "--target", 0.2, "--resize"]
    status, out, _ = run("encode", *photos, "-o", "k.vtok", *arguments)
    tokens = vistok.Tokens.load(tmp_path / "k.vtok")
    model = vistok.load(karl)
    pixels = torch.cat([vistok.to_tensor(photo, 32) for photo in photos])
    assert status == 0 and tokens == model.encode(pixels, target=0.2)
    assert all(f"{length:4d} tokens  {p}" in out for length, p in zip(tokens.lengths, photos, strict=True))
    status, _, err = run("decode", "k.vtok", "-o", "back")
    assert status == 1 and "give --tokenizer" in err
    status, _, _ = run("decode", "k.vtok", "-o", "back", "--tokenizer", karl, "--batch-size", 2)
    assert status == 0 and len(list((tmp_path / "back").iterdir())) == 3
    errors = (model.decode(tokens) - pixels).abs().mean((1, 2, 3))
    target = float(errors.sort().values[1])
    status, _, err = run("reconstruct", *photos, "--tokenizer", karl, "--target", target, "--out", "out")
    images = json.loads((tmp_path / "out" / "reconstructions.json").read_text())["images"]
    short = [image["error"] > target for image in images]
    assert status == 0 and [not image["reached"] for image in images] == short
    assert f"{sum(short)} of 3 images did not reach" in err and "lower --target" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", 0.05], "--target is not for vistok-mini: any prefix of its tokens decodes"),
        (["--target", 0.05, "--target-psnr", 30], "give one of them"),
        (["--target-psnr", -3], "a positive number of dB"),
        (["--target-psnr", 30, "--tokens", 65], "1 to 64 tokens"),
        (["--tokenizer", "karl", "--target-psnr", 30], "not for karl: it chooses lengths by --target"),
        (["--tokenizer", "karl", "--target", 1.5], "a mean absolute error of 0 to 1"),
        (["--tokenizer", "karl", "--target", 0.1, "--tokens", 41], "1 to 40 tokens"),
        (["--tokenizer", "titok", "--target", 0.1], "titok: it has exactly 6 tokens per image"),
        (["--tokenizer", "titok", "--target-psnr", 30], "titok: it has exactly 6 tokens per image"),
    ],
)
@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_targets_that_a_tokenizer_cannot_take_say_what_it_takes(
    run, karl, tmp_path, command, arguments, message
):
    shared("titok-vq").save_pretrained(tmp_path / "titok")
    folders = {"karl": karl, "titok": tmp_path / "titok"}
    arguments = [folders.get(argument, argument) for argument in arguments]
    output = ["-o", "photo.vtok"] if command == "encode" else ["--out", "out"]
    status, _, err = run(command, PHOTO, *output, *arguments)
    assert status == 1 and err.count("\n") == 1 and message in err
    assert not (tmp_path / "photo.vtok").exists() and not (tmp_path / "out").exists()


def test_weights_that_are_not_open_say_so_when_they_are_asked_for(run, offline):
    status, _, err = run("encode", PHOTO, "-o", "photo.vtok", "--tokenizer", "flextok-d12-d12-in1k")
    assert status == 1
    warning, error = err.splitlines()
    assert warning.startswith("warning: ") and "not open source: research only" in warning
    assert "EPFL-VILAB/flextok_d12_d12_in1k" in error


def test_a_damaged_token_file_is_one_line_of_advice(run, tmp_path):
    run("encode", PHOTO, "-o", "photo.vtok")
    data = bytearray((tmp_path / "photo.vtok").read_bytes())
    data[-10] ^= 1
    (tmp_path / "photo.vtok").write_bytes(data)
    status, _, err = run("decode", "photo.vtok")
    assert status == 1 and err.count("\n") == 1 and "photo.vtok" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reconstruct", "nowhere.png"], "nowhere.png"),
        (["reconstruct", PHOTO, "--tokenizer", "titok-l33"], "titok-l32"),
        (["reconstruct", PHOTO, "--tokens", "65"], "1 to 64"),
        (["reconstruct", PHOTO, "--device", "cuda:99"], "--device cpu"),
        (["decode", "nowhere.vtok"], "nowhere.vtok"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["verify", PHOTO.parent / "vistok-mini.yaml", "--dtype", "int8"], "bfloat16"),
    ],
)
def test_mistakes_end_in_one_line_that_says_what_to_do(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == 1 and message in err


def test_verify_exits_0_on_a_match_1_on_a_miss_and_2_on_what_it_cannot_build(run, tmp_path):
    golden = GOLDEN
    status, out, _ = run("verify", golden / "flextok_components.json")
    assert status == 0 and "all within tolerance" in out
    case = json.loads((golden / "train_step_stage1_s128.json").read_text())
    (tmp_path / "case.json").write_text(json.dumps(case | {"seed": case["seed"] + 1}))
    (tmp_path / "case.safetensors").write_bytes((golden / "train_step_stage1_s128.safetensors").read_bytes())
    status, out, _ = run("verify", "case.json")
    assert status == 1 and "MISS" in out
    (tmp_path / "case.json").write_text(json.dumps(case | {"family": "nobody"}))
    status, _, err = run("verify", "case.json", golden / "flextok_components.json")
    assert status == 2 and "nobody" in err


@pytest.mark.slow
def test_eval_speed_compares_with_the_straightforward_implementation_over_batch_sizes(run, tmp_path):
    sizes = ["--batch-size", 2, "--batch-size", 1]
    status, out, _ = run("eval", "speed", "--tokenizer", "titok-s128", *sizes, "--repeats", 1)
    assert status == 0 and "straightforward" in out and "n = 1 paired runs" in out
    record = json.loads((tmp_path / "speed" / "speed.json").read_text())
    assert {"command", "versions", "threads", "protocol", "n", "seed"} <= set(record)
    assert [result["batch_size"] for result in record["results"]] == [1, 2]
    for result in record["results"]:
        by_name = {variant["name"]: variant for variant in result["variants"]}
        ours = by_name["vistok float32"]
        assert ours["codes_equal"] == 1.0 and len(ours["ratio"]) == 1
        rate = result["batch_size"] / ours["encode_seconds"][0]
        assert ours["encode_images_per_second"] == pytest.approx(rate)
        assert result["parameters"] == sum(p.numel() for p in vistok.create("titok-s128").parameters())
    page = (tmp_path / "speed" / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 3 and "titok-s128" in page


def test_eval_tokens_draws_the_rate_distortion_plot(run, tmp_path):
    status, out, _ = run("eval", "tokens", PHOTO, ASSETS / "coffee.jpg", "--out", "rd")
    assert status == 0 and "JPEG" in out and "thumbnail" in out
    points = json.loads((tmp_path / "rd" / "rate_distortion.json").read_text())["points"]
    ours = [p["metrics"]["psnr"]["value"] for p in points if p["codec"] == "vistok-mini"]
    assert len(ours) == 7 and ours == sorted(ours)
    assert Image.open(tmp_path / "rd" / "rate_distortion.png").width > 500


@pytest.mark.slow
def test_the_shipped_recipe_trains(run, tmp_path):
    recipe = (
        (ASSETS / "vistok-mini.yaml")
        .read_text()
        .replace("warm_start_images: 20000", "warm_start_images: 600")
    )
    recipe = recipe.replace("batch_size: 32", "batch_size: 4").replace("compile: true", "compile: false")
    (tmp_path / "recipe.yaml").write_text(recipe)
    status, out, _ = run("train", "recipe.yaml", "--steps", 50, "-o", "run")
    assert status == 0 and "vistok.load" in out
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 50 and rows[-1]["validation_psnr_64"] > rows[-1]["validation_psnr_1"] + 2
    model = vistok.load(tmp_path / "run" / "model")
    assert model.encode(torch.rand(1, 3, 128, 128)).num_tokens == 64
    assert list((tmp_path / "run" / "samples").glob("*.png"))
