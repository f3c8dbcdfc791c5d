"""Parity of the FlexTok family: whole tokenizers, and the parts they are made of."""

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ...models.flextok import (
    FlexTok,
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
from ...registry import create
from ..plain_flextok import attention_mask
from .case import CannotBuild, Case, Outputs

GRID, ROWS, MAP = "[:, ::4, ::4, ::8]", "[:, ::32, ::16]", "[:, :, ::2, ::2]"


def run(case: Case) -> Outputs:
    """Our outputs for every recorded tensor."""
    config = case.data.get("config", {})
    if "vae" in config or "encoder" in config:
        yield from _tokenizer(case)
    elif "fsq_a_z" in case.tensors or any(name.startswith(("fsq_", "rf_", "guid_")) for name in case.tensors):
        yield from _components(case)
    else:
        raise CannotBuild(
            f"{case.path.name} is a case of FlexTok's autoregressive generator "
            f"({case.data.get('reference')}), which this version does not have; it has the tokenizers"
        )


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?", text)]


def _after(text: str, word: str) -> float | None:
    """The number that follows a word in a description."""
    found = re.search(rf"{word}\s*=?\s*([-+]?\d*\.?\d+)", text)
    return float(found[1]) if found else None


# Tokenizers -------------------------------------------------------------------------------------------------


class _Blocks:
    """Catches the outputs of a trunk's blocks; the last is run once more for rows that the model skips."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.blocks, self.seen = blocks, {}
        self.hooks = [
            block.register_forward_hook(lambda m, i, out, depth=depth: self.seen.update({depth: out}))
            for depth, block in enumerate(blocks[:-1])
        ]
        self.hooks.append(
            blocks[-1].register_forward_pre_hook(lambda m, inputs: self.seen.update(last=inputs))
        )

    def __getitem__(self, depth: int) -> Tensor:
        for hook in self.hooks:
            hook.remove()
        if depth == len(self.blocks) - 1:
            return self.blocks[-1](*self.seen["last"])
        return self.seen[depth]


def _depths(case: Case, prefix: str) -> list[tuple[str, int]]:
    found = [(name, re.fullmatch(rf"{prefix}_block(\d+)", name)) for name in case.tensors]
    return [(name, int(match[1])) for name, match in found if match]


def _images(case: Case) -> Tensor:
    """Uniform noise in [-1, 1] with cells of 8×8 pixels, as [0, 1]."""
    recipe = case.data["inputs"]["images"]
    batch, size = int(recipe["B"]), int(recipe["N"])
    random = np.random.RandomState(int(recipe["S"]))
    cells = random.uniform(-1, 1, (batch, 3, size // 8, size // 8)).astype(np.float32)
    return (case.place(torch.from_numpy(cells.repeat(8, 2).repeat(8, 3))) + 1) / 2


def _noise(case: Case) -> Tensor:
    text = case.data["inputs"]["noise"]
    shape = re.search(r"standard_normal\(\(([\d, ]+)\)\)", text)
    if not shape:
        raise CannotBuild(f"{case.path.name}: no standard_normal((shape)) in {text!r}")
    drawn = case.draw(text).standard_normal([int(side) for side in shape[1].split(",")])
    return torch.from_numpy(drawn.astype(np.float32)).to(case.device)


def _tokenizer(case: Case) -> Outputs:
    model: FlexTok = case.build(lambda: create("flextok", **case.data["config"]))
    yield from _encoding(case, model, _images(case))
    indices, noise = case.recorded("indices").long(), _noise(case)
    quantized = model.quantizer.decode(indices).to(case.dtype)
    yield from _velocities(case, model, quantized, noise)
    yield from _decoding(case, model, indices, noise)


def _encoding(case: Case, model: FlexTok, images: Tensor) -> Outputs:
    if "vae_moments_0" in case.tensors:
        moments = model.autoencoder.posterior(2 * images[:1] - 1).parameters
        yield "vae_moments_0", case.subsample("vae_moments_0", moments)
    encoded = model.autoencoder.encode(2 * images - 1)
    yield "vae_latents", case.subsample("vae_latents", encoded)
    parts = model.encoder.module_dict
    if "enc_patches" in case.tensors:
        grid = tuple(side // model.config.patch_size for side in encoded.shape[2:])
        embedded = parts["enc_patch_emb"](patchify(encoded, model.config.patch_size))
        patches = parts["enc_posemb_module"](embedded, *grid)
        yield "enc_patches", case.subsample("enc_patches", patches.unflatten(1, grid), GRID)
    blocks = _Blocks(parts["enc_transformer"].blocks)
    latents = model.encoder(encoded, model.num_tokens)
    for name, depth in _depths(case, "enc"):
        yield name, case.subsample(name, blocks[depth], ROWS)
    yield "latents", case.subsample("latents", latents)
    # Where half precision lets a latent cross a boundary, everything after would differ: go on as recorded.
    recorded = latents if case.dtype.itemsize >= 4 else case.recorded("latents")
    yield "quantized", model.quantizer(recorded).latents
    yield "indices", model.quantizer.encode(latents)


def _velocities(case: Case, model: FlexTok, quantized: Tensor, noise: Tensor) -> Outputs:
    """The decoder's blocks and outputs, at one time an image."""
    batch, decoder = len(quantized), model.decoder
    times = torch.tensor(_numbers(case.description("dec_temb").split("[")[0])[-batch:], device=case.device)
    yield "dec_temb", case.subsample("dec_temb", decoder.module_dict["dec_time_embedder"](times))
    modulations = decoder.modulations(times)
    blocks = _Blocks(decoder.module_dict["dec_transformer"].blocks)
    (velocity,) = decoder(noise[:batch], modulations, [decoder.conditions(quantized)])
    for name, depth in _depths(case, "dec"):
        yield name, case.subsample(name, blocks[depth][0].unflatten(0, (batch, -1)), ROWS)
    if "dec_repa_patches" in case.tensors:
        depth = int(_after(case.description("dec_repa_patches"), "block"))
        grid = model.config.latent_size // model.config.patch_size
        patches = blocks[depth][0].unflatten(0, (batch, -1))[:, : grid**2].unflatten(1, (grid, grid))
        yield "dec_repa_patches", case.subsample("dec_repa_patches", patches, GRID)
    for name in [name for name in case.tensors if name.startswith("velocity_")]:
        if name != "velocity_full":
            lengths, null = _told(case, case.description(name), batch)
            conditions = decoder.conditions(quantized, lengths, null)
            (velocity,) = decoder(noise[:batch], modulations, [conditions])
        yield name, case.subsample(name, velocity, MAP)


def _told(case: Case, text: str, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Kept tokens and null flags of a description: "eval_keep_k=[5,200]", "null condition for sample 1
    only"."""
    kept, null = re.search(r"eval_keep_k=\[([\d, ]+)\]", text), None
    lengths = torch.tensor([int(k) for k in kept[1].split(",")], device=case.device) if kept else None
    if "null condition" in text:
        only = _after(text, "sample")
        images = torch.arange(batch, device=case.device)
        null = images >= 0 if only is None else images == int(only)
    return lengths, null


def _decoding(case: Case, model: FlexTok, indices: Tensor, noise: Tensor) -> Outputs:
    """Whole samplings, "decode_<guidance><scale>_T<steps>", of one image at several lengths."""
    names = [name for name in case.tensors if name.startswith("decode_")]
    told = " ".join(case.description(name) for name in names)
    kept = re.search(r"k=([\d,]+\d)", told)
    if not names or not kept:
        return
    row = int(_after(told, "image") or 0)
    lengths = torch.tensor([int(k) for k in kept[1].split(",")], device=case.device)
    latents = model.quantizer.decode(indices[row]).expand(len(lengths), -1, -1)
    for name in names:
        found = re.fullmatch(r"decode_(plain|cfg|apg)([\d.]*)_T(\d+)", name)
        if not found:
            raise CannotBuild(f"{case.path.name}: cannot tell guidance and steps from the name {name!r}")
        kind, scale, steps = found.groups()
        sampled = model.sample(
            latents,
            lengths,
            steps=int(steps),
            guidance=float(scale or 1),
            normalized=kind == "apg",
            noise=noise[: len(lengths)],
        )
        yield name, case.subsample(name, sampled, MAP)
        recon = name.replace("decode_", "recon_", 1)
        if recon in case.tensors:
            images = model.autoencoder.decode(sampled)
            yield recon, case.subsample(recon, images, "[:, :, ::4, ::4]")


# Components -------------------------------------------------------------------------------------------------


def _components(case: Case) -> Outputs:
    for part in (_quantizers, _masks, _tables, _guidance, _training):
        yield from part(case)


def _quantizers(case: Case) -> Outputs:
    for name in [name for name in case.tensors if re.fullmatch(r"fsq_\w+_z", name)]:
        owner = name.removesuffix("_z")
        levels = re.search(r"levels \[([\d, ]+)\]", case.description(name))[1]
        quantizer = FiniteScalarQuantizer([int(level) for level in levels.split(",")]).to(case.device)
        latents = case.recorded(name)
        yield f"{owner}_bounded", quantizer.bound(latents)
        yield f"{owner}_quant", quantizer(latents).latents
        yield f"{owner}_ids", quantizer.encode(latents)
        ids = case.recorded(f"{owner}_lookup_ids").long()
        yield f"{owner}_lookup", quantizer.decode(ids)


def _masks(case: Case) -> Outputs:
    for name in [name for name in case.tensors if name.startswith("mask_")]:
        samples = [(int(p), int(n)) for p, n in re.findall(r"\((\d+), (\d+)\)", case.description(name))]
        mode = name.removeprefix("mask_")
        packed = torch.zeros(case.tensors[name].shape, dtype=torch.bool)
        start = 0
        for patches, registers in samples:
            end = start + patches + registers
            packed[start:end, start:end] = attention_mask(mode, patches, registers)
            if mode == "causal_last":  # the rows that the encoder itself has a mask for
                packed[start + patches : end, start:end] = register_mask(patches, registers)
            start = end
        yield name, packed


def _tables(case: Case) -> Outputs:
    samples = re.findall(r"\((\d+) patches, ?(\d+) registers?\)", case.description("expand_out"))
    given = case.recorded("expand_in").unflatten(1, (2, -1))  # [B, 2, D]
    rows = [
        Layout(1, int(patches), (int(registers),)).rows(one[None])
        for one, (patches, registers) in zip(given, samples, strict=True)
    ]
    yield "expand_out", torch.cat(rows, 1)
    for name in [name for name in case.tensors if name.startswith("timefreq_")]:
        text = case.description(name)
        times = _numbers(re.search(r"t = ([-\d., ]+)", text)[1])
        size = case.tensors[name].shape[1]
        features = timestep_features(
            torch.tensor(times, device=case.device), _after(text, "max_timestep"), size
        )
        yield name, features
    _, dim, side, _ = (int(each) for each in _numbers(case.description("sincos").split("]")[0].split("[")[1]))
    yield "sincos", case.subsample("sincos", sincos_table(dim, side))
    image = case.recorded("patchify_in").permute(0, 3, 1, 2)
    _, height, _, channels = case.tensors["patchify_out"].shape
    size = round((channels / image.shape[1]) ** 0.5)
    yield "patchify_out", patchify(image, size).unflatten(1, (height, -1))


def _guidance(case: Case) -> Outputs:
    conditional, unconditional = case.recorded("guid_cond"), case.recorded("guid_uncond")
    text = case.description("guid_cfg")
    pairs = list(zip(conditional, unconditional, strict=True))
    plain = [flow.classifier_free_guidance(*pair, _after(text, "guidance")) for pair in pairs]
    stride = int(re.search(r"channels ::(\d+)", text)[1])
    yield "guid_cfg", torch.stack(plain)[:, :, ::stride]

    text = case.description("guid_apg")
    scale = _after(text, "scale")
    options = {word: _after(text, word) for word in ("momentum", "threshold", "eta")}
    average, guided = None, []
    for pair in pairs:
        velocity, average = flow.normalized_guidance(*pair, scale, average, **options)
        guided.append(velocity)
    yield "guid_apg", torch.stack(guided)

    text = case.description("guid_apg_eta_nomom")
    step = int(_after(text, "step"))
    velocity, _ = flow.normalized_guidance(
        *pairs[step], scale, None, momentum=0.0, threshold=0.0, eta=_after(text, "eta")
    )
    yield "guid_apg_eta_nomom", velocity


def _training(case: Case) -> Outputs:
    uniform, normal = case.recorded("rf_u"), case.recorded("rf_n")
    scale = _after(case.description("rf_sigma_mode"), "mode_scale")
    times = flow.mode_times(uniform, scale)
    yield "rf_sigma_mode", times
    yield "rf_noised_mode", flow.noised(case.recorded("rf_x0"), case.recorded("rf_noise"), times)
    variants: dict[str, Callable[[], Tensor]] = {
        "rf_sigma_uniform": lambda: flow.mode_times(uniform, 0.0),
        "rf_sigma_ln": lambda: flow.logit_normal_times(normal),
        "rf_sigma_strat": lambda: flow.stratified_times(uniform),
    }
    for name, compute in variants.items():
        yield name, compute()
    count = len(case.tensors["keep_uniform_pow2"])
    yield "keep_uniform_pow2", round_up_to_power(torch.arange(1, count + 1), count)
    yield "powers_of_two", powers_of_two(2 ** (len(case.tensors["powers_of_two"]) - 1))
