"""Parity of RAE: encoders, latents with and without statistics and noise, and the decoder."""

import dataclasses
import re
from fnmatch import fnmatch

import numpy as np
import torch
from torch import Tensor

from ...models.rae import RAE, RAEConfig
from .case import Case, Outputs
from .detailflow import blended_pictures
from .fields import check_size
from .recorder import Recorder

FAMILIES = ("rae",)


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    config = RAEConfig.parse(case.config)
    model = _model(case, config)
    images, grid = blended_pictures(case), config.grid

    def square(rows: Tensor) -> Tensor:
        return rows.transpose(1, 2).unflatten(2, (grid, grid))  # [B, C, g, g]

    network = model.encoder.network
    layers = network.encoder.layers if config.encoder_type == "siglip2" else network.encoder.layer
    steps = Recorder(model.encoder, layers[0])
    tokens = model.patch_features(images)
    yield "pixels", case.subsample("pixels", steps.inputs[0])
    yield "encoder_in", case.subsample("encoder_in", steps.inputs[1])
    yield "encoder_block0", case.subsample("encoder_block0", steps.outputs[1])
    yield "tokens", case.subsample("tokens", tokens)
    yield "latent_plain", case.subsample("latent_plain", square(model.normalised(tokens)))
    yield "decoder_pos_embed", case.subsample("decoder_pos_embed", model.decoder.decoder_pos_embed)
    if "recon_other" in case.tensors:
        other = _drawn(case, "latent_other").flatten(2).transpose(1, 2)
        yield "recon_other", case.subsample("recon_other", model.pixels(other))
    model.set_statistics(_drawn(case, "latent_mean"), _drawn(case, "latent_var"))
    latents = model.latents(images)
    yield "latent", case.subsample("latent", square(latents))
    level, noise = _noise(case, tokens)
    noised = model.normalised(model.noised(tokens, level, noise))
    yield "latent_noised", case.subsample("latent_noised", square(noised))
    steps = Recorder(model.decoder.decoder_layers[0])
    recon = model.pixels(latents)
    yield "decoder_in", case.subsample("decoder_in", steps.inputs[0])
    yield "decoder_block0", case.subsample("decoder_block0", steps.outputs[0])
    yield "recon", case.subsample("recon", recon)


def _model(case: Case, config: RAEConfig) -> RAE:
    """The model of the case, without the weights that the original has and does not use."""

    def is_used(key: str) -> bool:
        kept = key == "decoder.decoder_pos_embed"
        return kept or not any(fnmatch(key, pattern) for pattern in RAE.checkpoint_ignores)

    state = {key: entry for key, entry in case.data.get("state_dict", {}).items() if is_used(key)}
    used = dataclasses.replace(case, data={**case.data, "state_dict": state})
    return used.build(lambda: RAE(config))


def _drawn(case: Case, name: str) -> Tensor:
    """An input of the recipe "(a + b * np.random.RandomState(seed).method(arguments)).astype(float32)"."""
    recipe = case.input(name)
    match = re.search(
        r"(?:([\d.]+)([*+]))?np\.random\.RandomState\((\d+)\)\.(standard_normal|uniform)\("
        r"(?:([\d.]+),\s*([\d.]+),\s*)?\(([\d,\s]+)\)\)",
        recipe,
    )
    if not match:
        raise case.refusal(f"cannot read the recipe of {name}")
    shape = tuple(int(side) for side in match[7].split(",") if side.strip())
    check_size(case.path.name, name, shape)
    random = np.random.RandomState(int(match[3]))
    if match[4] == "uniform":
        values = random.uniform(float(match[5]), float(match[6]), shape)
    else:
        values = random.standard_normal(shape)
    if match[1]:
        values = values * float(match[1]) if match[2] == "*" else values + float(match[1])
    return case.place(torch.from_numpy(values.astype(np.float32)))


def _noise(case: Case, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The level of noise per image [B, 1, 1] and the noise [B, N, C], from one generator."""
    random = case.draw(case.input("noise"))
    level = random.uniform(0, 1, (len(tokens), 1, 1)).astype(np.float32)
    noise = random.standard_normal(tuple(tokens.shape)).astype(np.float32)
    return case.place(torch.from_numpy(level)), case.place(torch.from_numpy(noise))
