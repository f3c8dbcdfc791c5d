"""Parity of MingTok: its three stages, streamed features, preprocessing, and the flow head."""

import re

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...configuration import build
from ...images import to_tensor
from ...models.mingtok import FlowHead, FlowHeadConfig, MingTok, MingTokConfig
from .case import Case, Outputs
from .fields import check_size
from .recorder import Recorder

FAMILIES = ("mingtok",)


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    if any(key.startswith("net.") for key in case.keys):
        yield from _flow_head(case)
        return
    config = MingTokConfig.parse(case.config)
    model = case.build(lambda: MingTok(config))
    images = (case.array("image") + 1) / 2
    encoder, semantic, pixel = model.low_level_encoder, model.semantic_decoder, model.pixel_decoder
    steps = Recorder(encoder.blocks[0][0], semantic.blocks[0][0], pixel.blocks[0][0], pixel)
    raw = model.raw_latents(images)
    yield "encoder_tokens_in", _part(case, "encoder_tokens_in", steps.inputs[0])
    yield "encoder_tokens_in_last", _part(case, "encoder_tokens_in_last", steps.inputs[0][:, -1:])
    yield "encoder_block0", _part(case, "encoder_block0", steps.outputs[0])
    yield "latent_raw", _part(case, "latent_raw", raw)
    yield "latent", _part(case, "latent", model.normalised(raw))
    # The class token's latent comes last: no other feature depends on it.
    features = semantic(raw)[:, :-1]
    yield "semantic_block0", _part(case, "semantic_block0", steps.outputs[1])
    yield "features", _part(case, "features", features)
    painted = model.paint(features, model.grid_of(images))
    yield "pixel_in", _part(case, "pixel_in", steps.inputs[2])
    yield "pixel_head", _part(case, "pixel_head", steps.outputs[3])
    yield "recon", _part(case, "recon", (2 * painted - 1).clamp(-1, 1))
    yield from _streamed(case, model, model.normalised(raw))
    for name in sorted(case.tensors):
        if re.fullmatch(r"pre_\d+", name):
            yield name, _preprocessed(case, name)
        if name.startswith("pos_embed_"):
            yield name, _part(case, name, _positions(case, name, model))


def _part(case: Case, name: str, value: Tensor) -> Tensor:
    """The recorded part of rows [B, N, C] or images: all, if that has its shape; else what the description
    names: "first 8 tokens", "tokens ::2", "channels ::8", "rows and columns ::4"."""
    if name in case.tensors and case.tensors[name].shape == value.shape:
        return value
    text = case.description(name)
    step = {match[1]: int(match[2]) for match in re.finditer(r"(tokens|channels|columns) ::(\d+)", text)}
    if value.ndim == 4:
        return value[:, :, :: step.get("columns", 1), :: step.get("columns", 1)]
    first = re.search(r"first (\d+) tokens", text)
    count = int(first[1]) if first else value.shape[1]
    return value[:, : count : step.get("tokens", 1), :: step.get("channels", 1)]


def _streamed(case: Case, model: MingTok, latents: Tensor) -> Outputs:
    for name in ("stream_features", "chunk_features"):
        if name not in case.tensors:
            continue
        stated = re.search(r"(?:first|same) (\d+) latents", case.description(name))
        if not stated:
            raise case.refusal(f"{name} does not state of how many latents it is")
        some = latents[:, : int(stated[1])]
        if name == "stream_features":
            stream = model.stream()
            features = torch.cat([stream(row) for row in some.split(1, 1)], 1)
        else:
            features = model.expand(some)[:, :-1]  # The original takes the last for a class token.
        yield name, _part(case, name, features)


def _preprocessed(case: Case, name: str) -> Tensor:
    """A drawn 8-bit picture as the tokenizer takes it, [3, H, W] in [-1, 1]."""
    size = re.search(r"image_size=(\d+)", case.description(name))
    match = re.search(
        r"RandomState\((\d+)\)\.randint\(0,\s*256,\s*\((\d+),\s*(\d+),\s*3\)\)", case.input(name)
    )
    if not match or not size:
        raise case.refusal(f"cannot read the recipe or the size of {name}")
    seed, height, width = map(int, match.groups())
    check_size(case.path.name, name, (height, width, 3))
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    return 2 * to_tensor(Image.fromarray(pixels), size=int(size[1]))[0] - 1


def _positions(case: Case, name: str, model: MingTok) -> Tensor:
    sides = re.search(r"for an? (\d+)x(\d+) image", case.description(name))
    if not sides:
        raise case.refusal(f"{name} does not state the size of its image")
    rows, columns = (int(side) // model.factor for side in sides.groups())
    return model.low_level_encoder.positions(rows, columns)


# The flow head ----------------------------------------------------------------------------------------------


def _flow_head(case: Case) -> Outputs:
    config = build(FlowHeadConfig, case.config, "the flow head")
    head = case.build(lambda: FlowHead(config))
    conditions, noise = case.array("z"), case.array("x")
    yield "velocity", head.net(noise, case.array("t"), conditions)
    for name in sorted(case.tensors):
        if name.startswith("sample"):
            yield name, _sampled(case, name, head, conditions, noise)


def _sampled(case: Case, name: str, head: FlowHead, conditions: Tensor, noise: Tensor) -> Tensor:
    """A sample by the guidance that the description states; the original returns it once per row."""
    text = case.description(name)

    def stated(pattern: str, default: float) -> float:
        match = re.search(pattern + r" ([\d.]*\d)", text)
        return float(match[1]) if match else default

    settings = {
        "temperature": stated("temperature", 1.0),
        "shift": stated("shift", 1.0),
        "renormalise": "renorm" in name or "renorm" in text,
    }
    rows = re.match(r"(\d) rows", _first_description(case, name))
    if not rows:
        return head.sample(conditions, noise, **settings)
    count = int(rows[1])
    others = dict(zip(("unconditional", "image_conditions"), conditions[1:count].split(1), strict=False))
    first = _first_description(case, name)
    for option, label in (("guidance", "text_cfg"), ("image_guidance", "image_cfg")):
        if match := re.search(label + r" ([\d.]*\d)", f"{text} {first}"):
            settings[option] = float(match[1])
    return head.sample(conditions[:1], noise[:1], **others, **settings).expand(count, -1)


def _first_description(case: Case, name: str) -> str:
    """The description of a tensor, or where it begins with "same" the one that it continues."""
    text = case.description(name)
    return case.description(name.rpartition("_")[0]) if text.startswith("same") else text
