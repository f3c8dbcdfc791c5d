"""Training files: every value is checked by type and range, and what has no effect is reported."""

import os
import subprocess
import sys

import pytest
import yaml

from vistok.train import recipe
from vistok.train.loop import train

VALID = {
    "tokenizer": {"name": "mini"},
    "data": {"sources": [{"kind": "scenes"}]},
    "steps": 10,
    "batch_size": 2,
    "precision": "no",
    "optimizer": {"warmup": 0},
}


def read(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump({**VALID, **text}))
    return recipe.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ema": 2.0}, r"ema is 2\.0; it must be 0 or more and below 1"),
        ({"ema": 1}, "ema is 1"),
        ({"ema": float("nan")}, "ema is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": -1}, "workers is -1"),
        ({"workers": 100_000}, "workers is 100000"),
        ({"nested_dropout": 1.5}, r"nested_dropout is 1\.5; it is a share"),
        ({"warm_start_images": -5}, "warm_start_images is -5"),
        ({"validation_tokens": [0]}, r"validation_tokens is \(0,\)"),
        ({"batch_size": 10**30}, "batch_size is 1000"),
        ({"tokenizer": {"name": 3}}, "name is 3"),
        ({"optimizer": {"learning_rate": -1}}, r"optimizer: learning_rate is -1\.0"),
        ({"optimizer": {"learning_rate": ".inf"}}, "learning_rate is"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"betas is \(0\.9, 1\.0\).*below 1"),
        ({"optimizer": {"warmup": -1}}, "warmup is -1"),
        ({"optimizer": {"clip_norm": -1}}, "clip_norm"),
        ({"optimizer": {"scales": {"*": -1}}}, "scales"),
        ({"optimizer": {"scales": {"*": "fast"}}}, r"scales: \* is 'fast'"),
        ({"loss": {"perceptual": "vgg"}}, "perceptual loss 'vgg' is not understood"),
        ({"loss": {"kl_weight": float("inf")}}, "kl_weight"),
        ({"loss": {"discriminator_start": -1}}, "discriminator_start is -1"),
        ({"loss": {"logvar": 1e6}}, "logvar"),
        ({"loss": {"perceptual_wieght": 1}}, "unknown key perceptual_wieght .did you mean perceptual_weight"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"run\.yaml.*{message}") as error:
        read(tmp_path, change)
    assert "\n" not in str(error.value)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2\n", "line 1: the key 'steps' is given twice"),
        ("tokenizer: {name: mini, name: titok}\n", "'name' is given twice"),
        ("a: [", "line 1"),
        (BOMB, "more than 10,000 values"),
        ("a: &a [*a]\n", "more than 10,000 values"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: !!python/object:os.system x\n", "not valid YAML"),
        ("a: 2020-99-99\n", "not valid YAML"),
        ("\0", "not valid YAML"),
        ("#" * (2**20 + 1), "1,048,577 bytes"),
    ],
)
def test_text_that_is_not_a_configuration_is_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_pipes_devices_and_bytes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", "/dev/zero"):
        with pytest.raises(OSError, match="which is not read from"):
            recipe.read(path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"bytes\.yaml is not valid YAML"):
        recipe.read(tmp_path / "bytes.yaml")


# ---- what has no effect ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"loss": {"perceptual": "lpips"}},
            r"loss\.perceptual has no effect, as .* is 0",
        ),
        ({"perceptual_weights": "download"}, "perceptual_weights has no effect"),
        ({"loss": {"discriminator_start": 5}}, r"loss\.discriminator_start has no effect"),
        ({"discriminator_optimizer": {"warmup": 0}}, "discriminator_optimizer has no effect"),
    ],
)
def test_a_part_of_the_loss_that_is_off_is_reported(tmp_path, change, message):
    with pytest.warns(UserWarning, match=message):
        read(tmp_path, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"loss": {"discriminator_weight": 0.1, "discriminator_start": 10}},
            r"discriminator_start is 10 and the run has 10 steps",
        ),
        ({"loss": {"reconstruction_weight": 0}}, "every weight of the loss is 0"),
        (
            {"teacher": "t", "loss": {"perceptual_weight": 0.1}},
            "no effect with a teacher",
        ),
        ({"validation_tokens": [65]}, "65"),
    ],
)
def test_what_no_step_would_use_is_refused_before_the_run(tmp_path, change, message):
    config = read(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", progress=False)
    assert not list(tmp_path.glob("run/*.pt"))


def test_one_photograph_may_be_excluded_as_text(tmp_path):
    sources = {"sources": [{"kind": "photos", "exclude": "astronaut"}]}
    config = read(tmp_path, {"data": sources, "validation": ["astronaut"], "validation_tokens": [65]})
    with pytest.raises(ValueError, match="65"):  # and not that astronaut trains
        train(config, tmp_path / "run", progress=False)


def test_the_command_refuses_in_one_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**VALID, "ema": 2.0}))
    done = subprocess.run(
        [sys.executable, "-m", "vistok.cli", "train", str(path), "-o", str(tmp_path / "run")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert "ema is 2.0; it must be 0 or more and below 1" in done.stderr and not (tmp_path / "run").exists()
