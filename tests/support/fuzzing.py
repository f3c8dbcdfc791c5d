"""Damaged inputs, thousands of them: run as a script, it prints what was not refused in one line."""

import copy
import io
import json
import os
import random
import signal
import sys
import tarfile
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

import vistok
from vistok import Tokens
from vistok.eval.data.dataset import batches, open_dataset
from vistok.eval.metrics.statistics import Gaussian
from vistok.images import load_image
from vistok.saved import read_state
from vistok.train import config as training
from vistok.train import recipe
from vistok.train.patterns import expand

REFUSED = (ValueError, OSError)
CASE_SECONDS = 8
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "ICO", "JPEG2000", "PCX", "SGI")
LONGEST = 3000
"""Characters of a message."""
STRANGE = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        7,
        2**31,
        2**63,
        10**40,
        -(2**63),
        0.5,
        1e308,
        float("inf"),
        float("nan"),
    ),
    *("", "x", "mini", "../x", "\0", "\x1b[2J", "9" * 5000, "\ud800", "é" * 300, "1e400", "!!python/name:os"),
    *([], [[]], [0], [-1, "a"], {}, {"name": "mini"}, {"a": {"b": []}}, [[[[[[]]]]]]),
)


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut, doubled, swapped or set to extremes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 40))
        kind = rng.randrange(6)
        if kind == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[place : place + size] = rng.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * size
        elif kind == 2:
            del data[place : place + size]
        elif kind == 3:
            data[place:place] = rng.randbytes(size)
        elif kind == 4:
            del data[place:]
        else:
            data[place:place] = data[: rng.randrange(200)]
    return bytes(data)


def changed_values(values: object, rng: random.Random) -> object:
    """A nested value with one to three parts replaced, removed or added."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice((1, 1, 2, 3))):
        part = values
        while True:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(part[key], dict | list) and part[key] and rng.random() < 0.7:
                part = part[key]
                continue
            if rng.random() < 0.15:
                del part[key]
            elif rng.random() < 0.1 and isinstance(part, dict):
                part[rng.choice(("x", "\0", "sizes", key + "s"))] = rng.choice(STRANGE)
            else:
                part[key] = rng.choice(STRANGE)
            break
    return values


# What is damaged: each takes a folder and a generator, and uses one damaged input. --------------------

MINI = {
    "image_size": 32,
    "patch_size": 8,
    "thumbnail_size": 8,
    "levels": [[2, [8, 8]], [2, [4, 4, 4]]],
    "width": 32,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "heads": 2,
}
RUN = {
    "tokenizer": {"name": "mini", **MINI},
    "data": {"sources": [{"kind": "scenes", "weight": 1.0}, {"kind": "photos", "exclude": ["coffee"]}]},
    "steps": 4,
    "batch_size": 2,
    "precision": "no",
    "optimizer": {"learning_rate": 1e-3, "warmup": 0, "betas": [0.9, 0.99], "scales": {"*": 0.1}},
    "loss": {"reconstruction": "l2", "perceptual": "lpips", "kl_weight": 1e-6, "discriminator_start": 3},
    "validation": ["coffee"],
    "validation_tokens": [1],
    "freeze": ["x"],
}


def prepare(root: Path) -> dict[str, bytes]:
    """Valid inputs by name."""
    torch.manual_seed(0)
    model = vistok.create("mini", **MINI).eval()
    model.save_pretrained(root / "model")
    images = torch.rand(3, 3, 32, 32)
    model.encode(images).save(root / "valid.vistok")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8))
    valid = {"tokens": (root / "valid.vistok").read_bytes()}
    for format in (
        "PNG",
        "JPEG",
        "GIF",
        "WEBP",
        "TIFF",
        "BMP",
        "PPM",
        "TGA",
        "ICO",
        "JPEG2000",
        "PCX",
        "SGI",
    ):
        file = io.BytesIO()
        picture.save(file, format)
        valid[f"image {format}"] = file.getvalue()
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("0.png", "0.txt", "sub/1.png", "é" * 120 + ".png"):
            info = tarfile.TarInfo(name)
            info.size = len(valid["image PNG"])
            tar.addfile(info, io.BytesIO(valid["image PNG"]))
    valid["tar"] = file.getvalue()
    file = io.BytesIO()
    np.savez(file, mu=np.zeros(4), sigma=np.eye(4), count=9)
    valid["statistics"] = file.getvalue()
    file = io.BytesIO()
    torch.save({"done": 3, "bad": [], "sums": {"a": {"mean": torch.rand(9)}}}, file)
    valid["state"] = file.getvalue()
    return valid


def tokens(root: Path, valid: dict[str, bytes], rng: random.Random) -> None:
    path = root / "case.vistok"
    path.write_bytes(changed_bytes(valid["tokens"], rng))
    Tokens.load(path)


def images(root: Path, valid: dict[str, bytes], rng: random.Random) -> None:
    name = rng.choice([name for name in valid if name.startswith("image ")])
    load_image(changed_bytes(valid[name], rng))


def tokenizer_config(root: Path, valid: dict[str, bytes], rng: random.Random) -> None:
    folder = root / "model"
    config = json.loads(valid.setdefault("config", (folder / "config.json").read_bytes()))
    text = json.dumps(changed_values(config, rng))
    if rng.random() < 0.2:
        text = changed_bytes(text.encode(), rng).decode(errors="surrogateescape")
    (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    vistok.load(folder)


def training_file(root: Path, valid: dict[str, bytes], rng: random.Random) -> None:
    text = yaml.safe_dump(changed_values(RUN, rng), allow_unicode=False).encode(errors="surrogateescape")
    path = root / "case.yaml"
    path.write_bytes(changed_bytes(text, rng) if rng.random() < 0.3 else text)
    config = recipe.read(path)
    training_data(config)


def training_data(config: training.TrainConfig) -> None:
    from vistok.train import data

    data.build(config.data, 16, config.seed % 2**32).sample(0)


def shards(root: Path, valid: dict[str, bytes], rng: random.Random) -> None:
    path = root / "case.tar"
    path.write_bytes(changed_bytes(valid["tar"], rng))
    for _ in batches(open_dataset(path), 16, 2, workers=0):
        pass


def statistics(root: Path, valid: dict[str, bytes], rng: random.Random) -> None:
    path = root / "case.npz"
    path.write_bytes(changed_bytes(valid["statistics"], rng))
    Gaussian.load(path)


def states(root: Path, valid: dict[str, bytes], rng: random.Random) -> None:
    path = root / "case.pt"
    path.write_bytes(changed_bytes(valid["state"], rng))
    read_state(path)


def names(root: Path, valid: dict[str, bytes], rng: random.Random) -> None:
    parts = (
        "a",
        "{0..9999999}",
        "{b,c}",
        "*",
        "**",
        "[",
        "]",
        "?",
        "\x1b[31m",
        "\n",
        "é",
        "..",
        "{",
        "}",
        "~",
    )
    name = "".join(rng.choice(parts) for _ in range(rng.randrange(1, 6)))
    line = json.dumps(changed_values({"image": name, "text": "x"}, rng))
    (root / "case.jsonl").write_text(line, encoding="utf-8", errors="surrogateescape")
    if rng.random() < 0.5:
        for _ in batches(open_dataset(root / "case.jsonl"), 16, 2, workers=0):
            pass
    else:
        expand(f"{root}/{name}")


TARGETS = (tokens, images, tokenizer_config, training_file, shards, statistics, states, names)


def attempt(target, root: Path, valid: dict[str, bytes], seed: int) -> str | None:
    """Use one damaged input; what is wrong with how it ended, or None."""
    signal.alarm(CASE_SECONDS)
    try:
        target(root, valid, random.Random(f"{target.__name__} {seed}"))
    except REFUSED as error:
        text = str(error)
        if "\n" in text.strip() or not text or len(text) > LONGEST:
            size = f"{len(text.splitlines())} lines, {len(text)} letters"
            return f"{type(error).__name__} of {size}: {text[:300]!r}"
    except BaseException as error:
        trace, where = error.__traceback__, ""
        while trace is not None:
            file = trace.tb_frame.f_code.co_filename
            where = f"{file}:{trace.tb_lineno}" if "vistok" in file or "/eval/" in file else where
            trace = trace.tb_next
        return f"{type(error).__name__}: {str(error)[:300]!r} at {where}"
    finally:
        signal.alarm(0)
    return None


class Slow(BaseException):
    """A case that takes too long."""


def alarm(*_) -> None:
    raise Slow(f"not done after {CASE_SECONDS} s")


def main(seconds: float, first: int) -> None:
    """Print one JSON object per target: cases, problems by kind, and the memory in MB at the end."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, alarm)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.chdir(root)
        valid = prepare(root)
        for target in TARGETS:
            end, case, problems = time.monotonic() + seconds, 0, {}
            while time.monotonic() < end:
                if problem := attempt(target, root, valid, first + case):
                    problems.setdefault(problem, first + case)
                case += 1
            status = Path("/proc/self/status").read_text()  # ru_maxrss would be at least that of its parent
            memory = int(status.split("VmHWM:")[1].split()[0]) // 1024
            result = {"target": target.__name__, "cases": case, "problems": problems, "megabytes": memory}
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
