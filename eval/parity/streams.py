"""Parity of STC's cacher and pruner and of PVC's preprocessing: recorded recipes in, tokens out."""

import ast
import math
import re

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from ...compress.algorithms import pvc, stc
from ...compress.algorithms.vidcom2 import newline_order
from ...compress.streaming.cacher import CacherState, encode_chunk
from ...compress.streaming.pruner import PrunerState, prune_chunk
from .case import Case, Outputs

# STC --------------------------------------------------------------------------------------------------------


def run_cacher(case: Case) -> Outputs:
    """Outputs of the last layer chunk by chunk, recomputed tokens, and outputs without the cache."""
    config = case.config
    layers = case.build(lambda: nn.ModuleList(_tower_layer(case) for _ in range(config["num_layers"])))
    frames = _drifting(case)
    settings = {
        "interval": 1 if "none" in config.values() else config["cache_interval"],  # the strategy
        "update_ratio": config["update_token_ratio"],
    }
    count = stc.update_count(config["tokens"], settings["update_ratio"])
    case.check_stated("recomputed tokens", count, config.get("num_update", count))
    state, start = CacherState(), 0
    for number, size in enumerate(config["chunks"]):
        chunk = encode_chunk(layers, frames[start : start + size], state, **settings)
        state, start, name = chunk.state, start + size, f"chunk{number}"
        out = chunk.hidden_states[-1]
        yield f"{name}_out", _sampled(case, f"{name}_out", out)
        yield f"{name}_norm", out.norm(dim=-1)
        for layer, index in enumerate(chunk.recomputed):
            yield f"{name}_l{layer}_idx", index
    plain = encode_chunk(layers, frames, CacherState()).hidden_states[-1]
    yield "uncached_norm", plain.norm(dim=-1)


def _tower_layer(case: Case) -> nn.Module:
    config = case.config
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps")
    settings = SiglipVisionConfig(**{name: config[name] for name in names})
    settings._attn_implementation = "sdpa"
    return SiglipEncoderLayer(settings)


def _drifting(case: Case) -> Tensor:
    """Frames of noise of which some tokens drift more: float32 [frames, T, C]."""
    recipe = case.input("x")
    seeds = [int(seed) for seed in re.findall(r"RandomState\((\d+)\)", recipe)]
    numbers = re.search(r"<([\d.]+).*\+([\d.]+)\*float32\(drift\)\*\(([\d.]+)\+([\d.]+)\*m\)", recipe)
    if len(seeds) != 3 or numbers is None:
        raise case.refusal(f"cannot read the recipe of x, {recipe!r}")
    share, size, least, more = (float(number) for number in numbers.groups())
    frames, shape = sum(case.config["chunks"]), (case.config["tokens"], case.config["hidden_size"])
    base, drift, mask = (np.random.RandomState(seed) for seed in seeds)
    base = base.standard_normal(shape).astype(np.float32)
    drift = drift.standard_normal((frames, *shape)).astype(np.float32)
    moves = (mask.rand(frames, shape[0], 1) < share).astype(np.float32)
    values = base[None] + size * drift * (least + more * moves)
    return case.place(torch.from_numpy(values.astype(np.float32)))


def _sampled(case: Case, name: str, values: Tensor) -> Tensor:
    """The tokens and channels that are recorded, by the description's "tokens [::9], channels [::8]"."""
    match = re.search(r"tokens \[::(\d+)\], channels \[::(\d+)\]", case.description(name))
    return values if match is None else values[:, :: int(match[1]), :: int(match[2])]


def run_pruner(case: Case) -> Outputs:
    """Kept tokens, channels, memory and scores chunk by chunk."""
    config, state = case.config, PrunerState()
    tokens, count = config["tokens_per_frame"], config["token_per_frame"]
    fixed = bool(config.get("fixed_channels", False))
    for number, frames in enumerate(config["chunks"]):
        features = _streamed(case, number, frames)
        chunk = prune_chunk(features.unflatten(0, (frames, tokens)), state, count, fixed_channels=fixed)
        state, name = chunk.state, f"chunk{number}"
        starts = tokens * torch.arange(frames, device=chunk.index.device)[:, None]
        kept = (chunk.index + starts).flatten()
        if case.records(f"{name}_rows_sum"):  # equal rows: which of them is kept is not decided
            yield f"{name}_rows_sum", features[kept].sum(-1)
            kept = _as_recorded(case, f"{name}_idx", kept, features)
        if config["model"] == "llava_vid":
            mask = torch.zeros(frames, tokens, dtype=torch.bool)
            mask[torch.arange(frames)[:, None], chunk.index.cpu()] = True
            kept = newline_order(mask, math.isqrt(tokens))
        yield f"{name}_idx", kept
        yield f"{name}_channels", state.channels
        yield f"{name}_memory", state.memory
        yield f"{name}_score", chunk.scores


def _as_recorded(case: Case, name: str, kept: Tensor, features: Tensor) -> Tensor:
    """The kept places, with a recorded place in the stead of one whose row is equal."""
    if name not in case.tensors or case.tensors[name].shape != kept.shape:
        return kept
    recorded = case.tensors[name].to(kept)
    inside = (recorded >= 0) & (recorded < len(features))
    is_equal = (features[kept] == features[recorded.clamp(0, len(features) - 1)]).all(-1) & inside
    return torch.where(is_equal, recorded, kept)


def _streamed(case: Case, number: int, frames: int) -> Tensor:
    """The features [frames · T, D] of a chunk: noise on a pattern that all frames share."""
    tokens, width = case.config["tokens_per_frame"], case.config["D"]
    recipe = case.input("x_i")
    match = re.match(
        r"RandomState\((\d+)\+i\).* \+ ([\d.]+)\*tile\(RandomState\((\d+)\).* \* "
        r"linspace\(([\d.]+),([\d.]+),",
        recipe,
    )
    if match is None:
        raise case.refusal(f"cannot read the recipe of x_i, {recipe!r}")
    noise = np.random.RandomState(int(match[1]) + number).standard_normal((frames * tokens, width))
    pattern = np.random.RandomState(int(match[3])).standard_normal((tokens, width)).astype(np.float32)
    slope = np.linspace(float(match[4]), float(match[5]), width).astype(np.float32)
    features = noise.astype(np.float32) + np.float32(match[2]) * np.tile(pattern, (frames, 1)) * slope
    if "set to row T//2 (ties)" in recipe:
        stretch = re.search(r"rows T//2\.\.T//2\+(\d+) are", recipe)
        if stretch is None:
            raise case.refusal(f"cannot read which rows are equal in the recipe of x_i, {recipe!r}")
        middle = tokens // 2
        features[middle : middle + int(stretch[1]) + 1] = features[middle]
    return case.place(torch.from_numpy(features.astype(np.float32)))


# PVC --------------------------------------------------------------------------------------------------------


def run_pvc(case: Case) -> Outputs:
    """Grids of tiles, numbers of frames, and the pixels of one picture."""
    config, side = case.config, case.config["input_size"]
    for limit in config["max_nums"]:
        grids = [pvc.pvc_grid(*size, limit, side) for size in config["image_sizes_wh"]]
        rows = [(i, j, i * j + (i * j > 1)) for i, j in grids]
        yield f"grid_max{limit}", torch.tensor(rows)
    for name in sorted(name for name in case.tensors if re.fullmatch(r"frames_\d+", name)):
        match = re.search(
            r"bound=(None|\(.*?\)), fps=([\d.]+), max_frame=(\d+), num_segments=(\d+)", case.description(name)
        )
        if match is None:
            raise case.refusal(f"cannot read bound, fps, max_frame and num_segments of {name}")
        bounds = ast.literal_eval(match[1])
        yield name, torch.tensor(pvc.pvc_frames(int(match[3]), float(match[2]), int(match[4]), bounds))
    if case.records("pixel_.*"):
        recipe, entry = case.input("image"), config["pixel_image"]
        shape = re.search(r"randint\(0,256,\((\d+),(\d+),3\)\)", recipe)
        if shape is None:
            raise case.refusal(f"cannot read the size of the picture in {recipe!r}")
        noise = case.draw(recipe).randint(0, 256, (int(shape[1]), int(shape[2]), 3)).astype(np.uint8)
        size = (entry["w"], entry["h"])
        image = Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR)
        tiles = pvc.pvc_tiles(image, entry["max_num"], side)
        step = re.search(r"\[::(\d+),::(\d+)\]", case.description("pixel_tiles"))
        if step is None:
            raise case.refusal("the description of pixel_tiles states no steps, as '[::16,::16]'")
        yield "pixel_tiles", tiles[:, :, :: int(step[1]), :: int(step[2])]
        yield "pixel_mean", tiles.mean((2, 3))
