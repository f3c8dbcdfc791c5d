"""Parity of patch selection before the tower: masks of drawn pictures, and a whole Qwen3-VL."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...compress import attach
from ...compress.methods.pixelprune import PixelPrune
from ...compress.reducer import Patches
from .case import CannotBuild, Case, Outputs

SETTINGS = ("method", "metric", "threshold", "anchored", "skip_ratio", "rand", "align_compression")
MEAN = STD = (0.5, 0.5, 0.5)
PROBE = slice(None, None, 7), slice(None, None, 97)  # recorded pixel values


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor. Raises CannotBuild when counts differ from stated ones."""
    config = case.data["config"]
    if "model" in config:
        yield from _in_model(case)
        return
    patch, merge = config["patch"], config["merge"]
    random = np.random.RandomState(config["seed"])
    pictures = [_picture(random, **each) for each in config["images"]]
    rows = [case.place(_pixel_values(picture, patch, merge)) for picture in pictures]
    yield "pixel_values_probe", torch.cat(rows)[PROBE]
    for name, settings in config["runs"].items():
        for number, (kept, total) in enumerate(_selected(config, settings, pictures, rows)):
            case.check_stated(f"{name}: tokens of image {number}", total, settings["of"][number])
            case.check_stated(f"{name}: kept of image {number}", len(kept), settings["kept"][number])
            yield f"{name}.{number}.kept", kept
            if case.records(rf"{name}\.{number}\.patches"):
                patches = kept[:, None] * merge**2 + torch.arange(merge**2, device=kept.device)
                yield f"{name}.{number}.patches", patches.flatten()


def _selected(
    config: dict[str, Any], settings: dict[str, Any], pictures: list[np.ndarray], rows: list[Tensor]
) -> Iterator[tuple[Tensor, int]]:
    """The tokens kept of each picture, and how many it has."""
    patch, merge = config["patch"], config["merge"]
    reducer = _reducer(settings)
    for picture, values in zip(pictures, rows, strict=True):
        pixels = values.view(-1, merge**2, 3, 2, patch, patch)[:, :, :, 0]
        unit = patch * merge
        mask = reducer.select(Patches(pixels, picture.shape[0] // unit, picture.shape[1] // unit))
        yield mask.nonzero().squeeze(1), len(mask)


def _reducer(settings: dict[str, Any], **options: Any) -> PixelPrune:
    chosen = {name: settings[name] for name in SETTINGS if name in settings}
    return PixelPrune(image_mean=MEAN, image_std=STD, **chosen, **options)


def _picture(random: "np.random.RandomState", kind: str, H: int, W: int) -> np.ndarray:
    """A picture of the case's recipe, uint8 [H, W, 3]."""
    if kind == "page":
        picture = np.full((H, W, 3), 255)
        for _ in range(7):
            y, x = random.randint(0, H), random.randint(0, W)
            h, w = random.randint(8, H // 2), random.randint(8, W // 2)
            picture[y : y + h, x : x + w] = random.randint(0, 256, 3)
        for _ in range(5):
            y, x = random.randint(0, H - 6), random.randint(0, W - 40)
            picture[y : y + 6, x : x + 40] = random.randint(0, 2, (6, 40, 1)) * 255
    elif kind == "grid":
        picture = np.full((H, W, 3), 200)
        for _ in range(6):
            y, x = random.randint(0, H // 32), random.randint(0, W // 32)
            h, w = random.randint(1, 4), random.randint(1, 4)
            picture[32 * y : 32 * (y + h), 32 * x : 32 * (x + w)] = random.randint(0, 256, 3)
    elif kind == "corner":
        picture = np.full((H, W, 3), 240)
        picture[:32, :32] = random.randint(0, 200, 3)
    elif kind == "drift":
        steps = np.cumsum(random.randint(-3, 4, (H // 32, W // 32, 1)), 1)
        steps = steps + np.cumsum(random.randint(-3, 4, (H // 32, 1, 1)), 0)
        blocks = np.kron(steps, np.ones((32, 32, 3), int))
        picture = np.clip(128 + blocks + random.randint(-1, 2, (H, W, 3)), 0, 255)
    else:
        raise CannotBuild(f"no recipe for a picture of the kind {kind!r}")
    return picture.astype(np.uint8)


def _pixel_values(picture: np.ndarray, patch: int, merge: int) -> Tensor:
    """The rows [patches, 3 · 2 · p · p] that a Qwen processor makes of a picture."""
    height, width = picture.shape[:2]
    values = ((picture.astype(np.float64) / 255 - MEAN[0]) / STD[0]).astype(np.float32).transpose(2, 0, 1)
    unit = patch * merge
    blocks = np.stack([values, values]).reshape(
        2, 3, height // unit, merge, patch, width // unit, merge, patch
    )
    rows = blocks.transpose(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, 3 * 2 * patch * patch)
    return torch.from_numpy(np.ascontiguousarray(rows))


# In the model -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _in_model(case: Case) -> Outputs:
    import transformers

    config = case.data["config"]
    if "Qwen3-VL" not in config["algorithm"]:
        raise CannotBuild(f"{case.path.name}: no adapter for {config['algorithm']!r}")
    settings = transformers.Qwen3VLConfig(**config["model"])
    model = case.build(lambda: transformers.Qwen3VLForConditionalGeneration(settings))
    inputs = _inputs(case)
    yield "input_ids", inputs["input_ids"]
    with _entering(model) as calls:
        logits = model(**inputs).logits[0, -3:]
    yield "full.logits", logits
    yield "full.positions", calls[0]["position_ids"][-3:, 0]
    for name, run in config["runs"].items():
        with attach(model, _reducer(run)) as session, _entering(model) as calls:
            logits = model(**inputs).logits[0, -3:]
            images = [each.tokens for each in session.explain()]
        entered, positions = calls[0], calls[0]["position_ids"][-3:, 0]
        delta = int(positions.max()) + 1 - inputs["input_ids"].shape[1]
        case.check_stated(f"{name}: kept", [len(each) for each in images], run["kept"])
        case.check_stated(f"{name}: length", positions.shape[1], run["length"])
        case.check_stated(f"{name}: rope delta", delta, run["rope_delta"])
        with attach(model, _reducer(run, positions="engine")), _entering(model) as calls:
            model(**inputs)
        engine = calls[0]["position_ids"][-3:, 0]
        # An engine goes on counting behind the shortened prompt.
        engine_delta = int(engine.max()) + 1 - engine.shape[1]
        case.check_stated(f"{name}: engine's delta", engine_delta, run["engine_delta"])
        case.check_stated(
            f"{name}: engine's positions are the same",
            torch.equal(engine, positions),
            run["engine_positions_equal"],
        )
        yield from ((f"{name}.{number}.kept", kept) for number, kept in enumerate(images))
        yield f"{name}.positions", positions
        yield f"{name}.engine_positions", engine
        yield f"{name}.rope_delta", torch.tensor([delta])
        yield f"{name}.visual", entered["inputs_embeds"][entered["visual_pos_masks"]]
        yield f"{name}.deepstack0", entered["deepstack_visual_embeds"][0]
        yield f"{name}.logits", logits


def _inputs(case: Case) -> dict[str, Tensor]:
    """Pictures between text, by the case's recipe."""
    config = case.data["config"]
    model, vision = config["model"], config["model"]["vision_config"]
    patch, merge = vision["patch_size"], vision["spatial_merge_size"]
    random = np.random.RandomState(config["seed"])
    pictures = [_picture(random, **each) for each in config["images"]]
    sizes = [[1, each.shape[0] // patch, each.shape[1] // patch] for each in pictures]
    ids: list[int] = []
    for number, length in enumerate(config["text_lengths"]):
        ids += random.randint(1, 200, length).tolist()
        if number < len(sizes):
            tokens = sizes[number][1] * sizes[number][2] // merge**2
            ids += [model["vision_start_token_id"], *[model["image_token_id"]] * tokens]
            ids.append(model["vision_end_token_id"])
    prompt = torch.tensor([ids], device=case.device)
    return {
        "input_ids": prompt,
        "mm_token_type_ids": (prompt == model["image_token_id"]).int(),
        "pixel_values": case.place(torch.cat([_pixel_values(each, patch, merge) for each in pictures])),
        "image_grid_thw": torch.tensor(sizes, device=case.device),
    }


@contextmanager
def _entering(model: Any) -> Iterator[list[dict[str, Any]]]:
    """Collects the arguments of the language model, call by call."""
    calls: list[dict[str, Any]] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()
