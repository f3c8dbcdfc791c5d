"""The command line, run for real on the shipped tokenizer and photographs."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image

import vistok
from vistok import cli

ASSETS = Path(str(files("vistok.assets")))
PHOTO = ASSETS / "chelsea.jpg"


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """`run("list")` → (exit status, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vistok", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
            sys.exit(0)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return stop.value.code or 0, out, err

    return call


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
    picture = Image.open(tmp_path / "vistok-demo.png")
    assert picture.width >= 5 * 256 and picture.height >= 256


def test_demo_takes_your_own_picture(run, tmp_path):
    status, out, _ = run("demo", PHOTO, "--out", "mine/cat.png")
    assert status == 0 and "chelsea" in out and (tmp_path / "mine" / "cat.png").is_file()


def test_list_shows_every_tokenizer_with_licence_and_figures(run):
    status, out, _ = run("list")
    assert status == 0
    assert all(name in out for name in vistok.list_tokenizers())
    assert "rFID 2.21" in out and "Apache-2.0" in out and "yucornetto/tokenizer_titok_l32_imagenet" in out
    status, out, _ = run("list", "--json")
    assert {row["name"] for row in json.loads(out)} == set(vistok.list_tokenizers())


def test_info_tells_one_and_refuses_the_unknown(run):
    status, out, _ = run("info", "titok-s128")
    assert status == 0 and "83.7 M" in out and '"num_latent_tokens": 128' in out
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


def test_reconstruct_keeps_both_of_two_images_with_one_name(run, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.open(PHOTO).save(tmp_path / folder / "photo.png")
    status, _, _ = run("reconstruct", "a", "b", "--out", "out")
    assert status == 0
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"photo.png", "photo-2.png"}


def test_encode_then_decode_gives_what_the_library_gives(run, tmp_path):
    status, out, _ = run("encode", PHOTO, ASSETS / "camera.jpg", "-o", "photos.vtok")
    assert status == 0 and "2 images" in out
    tokens = vistok.Tokens.load(tmp_path / "photos.vtok")
    assert len(tokens) == 2 and tokens.bits_per_image.tolist() == [1024, 1024]
    assert (tmp_path / "photos.vtok").stat().st_size < 256 + 64
    status, out, _ = run("decode", "photos.vtok", "-o", "back")
    assert status == 0 and "2 images" in out
    expected = vistok.to_pil(vistok.load("vistok-mini").decode(tokens))
    for number, picture in enumerate(expected):
        assert Image.open(tmp_path / "back" / f"{number:05d}.png").tobytes() == picture.tobytes()


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
    golden = Path(__file__).parent / "golden"
    status, out, _ = run("verify", golden / "preprocess.json")
    assert status == 0 and "all within tolerance" in out
    case = json.loads((golden / "train_step_stage1_s128.json").read_text())
    (tmp_path / "case.json").write_text(json.dumps(case | {"seed": case["seed"] + 1}))
    (tmp_path / "case.safetensors").write_bytes((golden / "train_step_stage1_s128.safetensors").read_bytes())
    status, out, _ = run("verify", "case.json")
    assert status == 1 and "MISS" in out
    (tmp_path / "case.json").write_text(json.dumps(case | {"family": "nobody"}))
    status, _, err = run("verify", "case.json", golden / "preprocess.json")
    assert status == 2 and "nobody" in err


def test_eval_speed_compares_with_the_straightforward_implementation(run, tmp_path):
    status, out, _ = run(
        "eval", "speed", "--tokenizer", "titok-s128", "--batch-size", 1, "--repeats", 1, "--out", "speed.json"
    )
    assert status == 0 and "straightforward" in out
    (result,) = json.loads((tmp_path / "speed.json").read_text())["results"]
    by_name = {variant["name"]: variant for variant in result["variants"]}
    assert by_name["vistok float32"]["codes_equal"] == 1.0
    assert len(by_name["vistok float32"]["ratio"]) == 1


def test_eval_tokens_draws_the_rate_distortion_plot(run, tmp_path):
    pytest.importorskip("matplotlib")
    status, out, _ = run("eval", "tokens", PHOTO, ASSETS / "coffee.jpg", "--out", "rd")
    assert status == 0 and "JPEG" in out and "thumbnail" in out
    points = json.loads((tmp_path / "rd" / "rate_distortion.json").read_text())["points"]
    ours = [p["psnr"] for p in points if p["codec"] == "vistok-mini"]
    assert len(ours) == 7 and ours == sorted(ours)
    assert Image.open(tmp_path / "rd" / "rate_distortion.png").width > 500


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
