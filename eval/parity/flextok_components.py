"""Parity of the parts that a FlexTok is made of, recorded without weights."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ...models.flextok.model import (
    Layout,
    patchify,
    powers_of_two,
    register_mask,
    round_up_to_power,
    sincos_table,
    timestep_features,
)
from ...nn import flow
from ...quantizers import FiniteScalarQuantizer
from ..speed.plain_flextok import attention_mask
from .case import Case, Outputs
from .descriptions import number_after, numbers
from .fields import check_size

RECORDED = (r"(fsq|mask|timefreq|guid|rf)_.*", "expand_out", "sincos", "patchify_out", "keep_uniform_pow2")
"""Names of tensors by which a case of components is recognised."""


def components(case: Case) -> Outputs:
    """vistok's outputs for every recorded component."""
    yield from _quantizers(case)
    yield from _masks(case)
    yield from _tables(case)
    if case.records(r"guid_.*"):
        yield from _guidance(case)
    yield from _training(case)


def _quantizers(case: Case) -> Outputs:
    for name in [name for name in case.tensors if re.fullmatch(r"fsq_\w+_z", name)]:
        owner = name.removesuffix("_z")
        levels = re.search(r"levels \[([\d, ]+)\]", case.description(name))
        if not levels:
            raise case.refusal(f"the description of {name} states no levels [8, 8, …]")
        quantizer = FiniteScalarQuantizer([int(level) for level in levels[1].split(",")]).to(case.device)
        latents = case.recorded(name)
        yield f"{owner}_bounded", quantizer.bound(latents)
        yield f"{owner}_quant", quantizer(latents).latents
        yield f"{owner}_ids", quantizer.encode(latents)
        if f"{owner}_lookup" in case.tensors:
            ids = case.recorded(f"{owner}_lookup_ids").long()
            yield f"{owner}_lookup", quantizer.decode(ids)


def _masks(case: Case) -> Outputs:
    for name in [name for name in case.tensors if name.startswith("mask_")]:
        samples = [(int(p), int(n)) for p, n in re.findall(r"\((\d+), (\d+)\)", case.description(name))]
        mode = name.removeprefix("mask_")
        packed = torch.zeros(case.tensors[name].shape, dtype=torch.bool)
        start = 0
        for patches, registers in samples:
            check_size(case.path.name, name, (patches + registers,) * 2)
            end = start + patches + registers
            packed[start:end, start:end] = attention_mask(mode, patches, registers)
            if mode == "causal_last":  # the rows that the encoder itself has a mask for
                packed[start + patches : end, start:end] = register_mask(patches, registers)
            start = end
        yield name, packed


def _tables(case: Case) -> Outputs:
    if "expand_out" in case.tensors:
        samples = re.findall(r"\((\d+) patches, ?(\d+) registers?\)", case.description("expand_out"))
        halves = case.recorded("expand_in").unflatten(1, (2, -1))  # [B, 2, D]
        for sample in samples:
            check_size(case.path.name, "expand_out", (sum(map(int, sample)), halves.shape[2]))
        rows = [
            Layout(1, int(patches), (int(registers),)).rows(one[None])
            for one, (patches, registers) in zip(halves, samples, strict=True)
        ]
        yield "expand_out", torch.cat(rows, 1)
    for name in [name for name in case.tensors if name.startswith("timefreq_")]:
        text = case.description(name)
        times = numbers(re.search(r"t = ([-\d., ]+)", text)[1])
        features = timestep_features(
            torch.tensor(times, device=case.device),
            number_after(text, "max_timestep"),
            case.tensors[name].shape[1],
        )
        yield name, features
    if "sincos" in case.tensors:
        stated = case.description("sincos").split("]")[0].split("[")[1]
        _, dim, side, _ = (int(each) for each in numbers(stated))
        check_size(case.path.name, "sincos", (dim, side, side))
        yield "sincos", case.subsample("sincos", sincos_table(dim, side))
    if "patchify_out" in case.tensors:
        image = case.recorded("patchify_in").permute(0, 3, 1, 2)
        _, height, _, channels = case.tensors["patchify_out"].shape
        size = round((channels / image.shape[1]) ** 0.5)
        yield "patchify_out", patchify(image, size).unflatten(1, (height, -1))


def _guidance(case: Case) -> Outputs:
    conditional, unconditional = case.recorded("guid_cond"), case.recorded("guid_uncond")
    text = case.description("guid_cfg")
    pairs = list(zip(conditional, unconditional, strict=True))
    plain = [flow.classifier_free_guidance(*pair, number_after(text, "guidance")) for pair in pairs]
    stride = int(re.search(r"channels ::(\d+)", text)[1])
    yield "guid_cfg", torch.stack(plain)[:, :, ::stride]

    text = case.description("guid_apg")
    scale = number_after(text, "scale")
    options = {word: number_after(text, word) for word in ("momentum", "threshold", "eta")}
    average, guided = None, []
    for pair in pairs:
        velocity, average = flow.normalized_guidance(*pair, scale, average, **options)
        guided.append(velocity)
    yield "guid_apg", torch.stack(guided)

    text = case.description("guid_apg_eta_nomom")
    step = int(number_after(text, "step"))
    velocity, _ = flow.normalized_guidance(
        *pairs[step], scale, None, momentum=0.0, threshold=0.0, eta=number_after(text, "eta")
    )
    yield "guid_apg_eta_nomom", velocity


def _training(case: Case) -> Outputs:
    if "rf_sigma_mode" in case.tensors:
        scale = number_after(case.description("rf_sigma_mode"), "mode_scale")
        times = flow.mode_times(case.recorded("rf_u"), scale)
        yield "rf_sigma_mode", times
        if "rf_noised_mode" in case.tensors:
            yield "rf_noised_mode", flow.noised(case.recorded("rf_x0"), case.recorded("rf_noise"), times)
    variants: dict[str, Callable[[], Tensor]] = {
        "rf_sigma_uniform": lambda: flow.mode_times(case.recorded("rf_u"), 0.0),
        "rf_sigma_ln": lambda: flow.logit_normal_times(case.recorded("rf_n")),
        "rf_sigma_strat": lambda: flow.stratified_times(case.recorded("rf_u")),
    }
    for name, compute in variants.items():
        if name in case.tensors:
            yield name, compute()
    if "keep_uniform_pow2" in case.tensors:
        count = len(case.tensors["keep_uniform_pow2"])
        yield "keep_uniform_pow2", round_up_to_power(torch.arange(1, count + 1), count)
    if "powers_of_two" in case.tensors:
        count = len(case.tensors["powers_of_two"])
        if not 1 <= count <= 62:
            raise case.refusal(f"powers_of_two has {count} entries; it takes 1 to 62")
        yield "powers_of_two", powers_of_two(2 ** (count - 1))
