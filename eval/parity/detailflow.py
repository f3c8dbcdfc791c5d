"""Parity of DetailFlow's tokenizer: both networks, prefixes, corrected codes, preprocessing, resolutions;
and of its generator."""

import re
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...images import adm_center_crop
from ...models.detailflow import DetailFlow, DetailFlowConfig, ResolutionMap
from .case import Case, Outputs
from .fields import check_size
from .llama import run_detailflow
from .recorder import Recorder
from .titok import margin

FAMILIES = ("detailflow",)
DRAW = r"RandomState\((\d+)\)\.{}\(([^()]*),\s*\(([\d,\s]+)\)\)"


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    if not case.keys:
        yield from _resolutions(case)
        return
    if "tok_embeddings.weight" in case.keys:
        yield from run_detailflow(case)
        return
    config = DetailFlowConfig.parse(case.config)
    model = case.build(lambda: DetailFlow(config))
    if "index_margin" in case.data:
        case.data["exact_where"] = {"indices": f"margin > {case.data['index_margin']}"}
    images = blended_pictures(case)
    yield from _encoded(case, model, images)
    yield from _decoded(case, model)
    yield from _prefixes(case, model)
    yield from _corrected(case, model, images)
    for name in sorted(case.tensors):
        if match := re.fullmatch(r"target_(\d+)", name):
            target = model.prefix_target(images, int(match[1]))
            yield name, case.subsample(name, target)
        if re.fullmatch(r"pre_\d+", name):
            yield name, case.subsample(name, _preprocessed(case, name, config.image_size))


def blended_pictures(case: Case) -> Tensor:
    """The pictures of a recipe of two draws, "0.7 * nearest-upsampled coarse + 0.3 * fine": [B, 3, H, W]."""
    recipe = case.input("image")
    layers = {}
    for name in ("fine", "coarse"):
        match = re.search(rf"\b{name} = np\.random\.{DRAW.format('uniform')}", recipe)
        weight = re.search(rf"([\d.]+) \* (?:nearest-upsampled )?{name}\b", recipe)
        if not match or not weight:
            raise case.refusal(f"the recipe of the images has no {name} with a seed, a shape and a weight")
        low, high = (float(number) for number in match[2].split(","))
        shape = tuple(int(side) for side in match[3].split(","))
        check_size(case.path.name, name, shape)
        values = np.random.RandomState(int(match[1])).uniform(low, high, shape).astype(np.float32)
        layers[name] = (float(weight[1]), torch.from_numpy(values))
    (share, fine), (other, coarse) = layers["fine"], layers["coarse"]
    return case.place(other * F.interpolate(coarse, fine.shape[2:], mode="nearest") + share * fine)


def _encoded(case: Case, model: DetailFlow, images: Tensor) -> Outputs:
    visual, count = model.encoder.visual_model, model.num_tokens
    steps = Recorder(visual.encoder.layers[0], visual)
    h = model.latents((images + 1) / 2)
    cells = steps.inputs[0].shape[1] - count
    for name, rows in (("encoder_in_patches", slice(cells)), ("encoder_in_latents", slice(cells, None))):
        yield name, _some(case, name, steps.inputs[0], rows)
    yield (
        "encoder_block0_latents",
        _some(case, "encoder_block0_latents", steps.outputs[0], slice(-count, None)),
    )
    yield "latent_token", case.subsample("latent_token", steps.outputs[1])
    yield "h", h
    yield "indices", model.quantize.encode(h)
    yield "margin", margin(model.quantize, h)
    quantized = model.quantize(h).latents
    yield "quant", quantized
    yield "group_cosine", _group_cosine(quantized, model.config.group_size)
    for name in sorted(case.tensors):
        if match := re.fullmatch(r"indices_max_(\d+)", name):
            yield name, model.quantize.encode(model.latents((images + 1) / 2, int(match[1])))


def _some(case: Case, name: str, sequence: Tensor, rows: slice) -> Tensor:
    """The recorded part of a sequence of patches and latents: slices count in the whole sequence."""
    part = case.subsample(name, sequence)
    return part if part.shape[1] < sequence.shape[1] else sequence[:, rows]


def _group_cosine(quantized: Tensor, group: int) -> Tensor:
    """The mean cosine of pairs of different tokens of a group, [1]."""
    unit = F.normalize(quantized, dim=-1).unflatten(1, (-1, group))  # [B, G, g, C]
    similar = unit @ unit.mT
    pairs = ~torch.eye(group, dtype=torch.bool, device=unit.device)
    return similar[..., pairs].mean().unsqueeze(0)


def _decoded(case: Case, model: DetailFlow) -> Outputs:
    codes = case.recorded("indices").long()
    latents = model.quantize.decode(codes).to(case.dtype)
    visual, side = model.decoder.visual_model, model.image_size
    steps = Recorder(visual.encoder.layers[0])
    recon = 2 * model.draw(latents, side) - 1
    cells = steps.inputs[0].shape[1] - latents.shape[1]
    for name, rows in (("decoder_in_patches", slice(cells)), ("decoder_in_latents", slice(cells, None))):
        yield name, _some(case, name, steps.inputs[0], rows)
    yield "recon", case.subsample("recon", recon)
    levels = (127.5 * recon.float() + 128).clamp(0, 255).to(torch.uint8)
    yield "recon_codes_u8", case.subsample("recon_codes_u8", levels)


def _prefixes(case: Case, model: DetailFlow) -> Outputs:
    codes = case.recorded("indices").long()
    for name in sorted(case.tensors):
        if match := re.fullmatch(r"prefix_(\d+)(_fullsize)?", name):
            stated = re.search(r"size (\d+)", case.description(name))
            latents = model.quantize.decode(codes[:, : int(match[1])]).to(case.dtype)
            if not match[2] and stated:
                patch = model.config.dec_patch_size
                own = model.config.resolutions.side(int(match[1]), patch)
                case.check_stated(f"the side of {name}", own, int(stated[1]))
            side = int(stated[1]) if match[2] and stated else model.image_size if match[2] else None
            yield name, case.subsample(name, 2 * model.draw(latents, side) - 1)


def _corrected(case: Case, model: DetailFlow, images: Tensor) -> Outputs:
    pictures = (images + 1) / 2
    for name in sorted(case.tensors):
        match = re.fullmatch(r"noise_(\d+)_codes", name)
        if not match:
            continue
        start, prefix = int(match[1]), name.removesuffix("codes")
        ranks = _ranks(case, name, (len(images), model.num_tokens))
        yield name, model.corrected_codes(pictures, start, ranks=ranks)
        rows = model.quantize.decode(case.recorded(name)[..., 1].long()).to(case.dtype)
        yield f"{prefix}quant", rows
        second = model.latents(pictures, prefix=rows[:, : model.error_end(start)])
        yield f"{prefix}margin", margin(model.quantize, second)
        if f"{prefix}recon" in case.tensors:
            recon = 2 * model.draw(rows, model.image_size) - 1
            yield f"{prefix}recon", case.subsample(f"{prefix}recon", recon)


def _ranks(case: Case, name: str, shape: tuple[int, int]) -> Tensor:
    """The drawn ranks among the nearest codes, int64 [B, K]."""
    match = re.search(
        r"RandomState\((\d+)\)\.randint\((\d+),\s*(\d+),\s*\((\d+),?\)\)", case.description(name)
    )
    if not match or int(match[4]) != shape[0] * shape[1]:
        raise case.refusal(f"{name} states no draw of one rank for each of {shape[0]} x {shape[1]} tokens")
    seed, low, high, count = map(int, match.groups())
    return torch.from_numpy(np.random.RandomState(seed).randint(low, high, (count,))).view(shape)


def _preprocessed(case: Case, name: str, size: int) -> Tensor:
    """A drawn 8-bit picture cropped as in evaluation, [3, H, W] in [-1, 1]."""
    match = re.search(
        r"RandomState\((\d+)\)\.randint\(0,\s*256,\s*\((\d+),\s*(\d+),\s*3\)\)", case.input(name)
    )
    if not match:
        raise case.refusal(f"cannot read the recipe of {name}")
    seed, height, width = map(int, match.groups())
    check_size(case.path.name, name, (height, width, 3))
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    crop = np.asarray(adm_center_crop(Image.fromarray(pixels), size))
    return torch.from_numpy(crop.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1


# The resolutions of prefixes --------------------------------------------------------------------------------


def _resolutions(case: Case) -> Outputs:
    fields = {
        "max_size": r"max size (\d+)",
        "num_tokens": r"(\d+) tokens",
        "group_size": r"group (\d+)",
        "causal_num": r"causal_num (\d+)",
        "power": r"power ([\d.]*\d)",
    }
    for name in sorted(case.tensors):
        if name.endswith("_sizes"):
            continue
        text = case.description(name)
        values = {field: re.search(pattern, text) for field, pattern in fields.items()}
        patch = re.search(r"patch (\d+)", text)
        if values["causal_num"] is None:
            values["causal_num"] = values["group_size"]
        if patch is None or None in values.values():
            raise case.refusal(f"{name} does not state size, tokens, group, power and patch")
        numbers = {field: int(match[1]) for field, match in values.items() if field != "power"}
        map_ = ResolutionMap(**numbers, power=float(values["power"][1]))
        side = partial(map_.side, patch=int(patch[1]))
        rows = [(length, map_.resolution(length), *[side(length)] * 3) for length in map_.lengths]
        yield name, torch.tensor(rows)
        sizes = []
        for size in dict.fromkeys(side(length) for length in map_.lengths):
            drawn = [length for length in map_.lengths if side(length) == size]
            sizes.append((size, map_.best_length(size, int(patch[1])), drawn[0], drawn[-1]))
        yield f"{name}_sizes", torch.tensor(sizes)
