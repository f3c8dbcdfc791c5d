"""Parity of ELM's binary autoencoder and its language model."""

import torch
from torch import Tensor

from ...models.elm import ELM
from .case import Case, Outputs
from .llama import run_elm

FAMILIES = ("elm",)


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    if not any(key.startswith("encoder.blocks.") for key in case.keys):
        yield from run_elm(case)
        return
    keys = case.data["state_dict"]
    for key in [key for key in keys if key.startswith("generator.logsigma.")]:  # a head that nothing uses
        del keys[key]
    model: ELM = case.build(lambda: ELM.create(**case.config))
    images = case.array("image")
    if images.min() < 0:  # the recipe draws from [-1, 1] and moves the result to [0, 1]
        images = (images + 1) / 2
    grid = model.encoder(images)
    yield "encoder_out", case.subsample("encoder_out", grid, "[:, ::4]")
    latents = grid.flatten(2).transpose(1, 2)
    probability = model.quantize.logits(latents).sigmoid()
    yield "bit_prob", _map(probability, grid)
    yield "bits", _map(model.quantize.encode(latents), grid)
    yield "bits_sampled", _drawn(case, _map(probability, grid))
    yield "code_loss", model.quantize.code_loss(probability).view(1)
    bits = case.recorded("bits").bool()
    rows = model.quantize.decode(bits.flatten(2).transpose(1, 2))
    quantized = _map(rows, grid)
    yield "quant", case.subsample("quant", quantized, "[:, ::4]")
    yield "recon", case.subsample("recon", model.draw(quantized), "")
    places = 2 ** torch.arange(bits.shape[1] - 1, -1, -1, device=bits.device)
    yield "indices", (bits.flatten(2).transpose(1, 2) * places).sum(-1, keepdim=True)


def _map(rows: Tensor, grid: Tensor) -> Tensor:
    """[B, h·w, n] → [B, n, h, w], of a grid."""
    return rows.transpose(1, 2).unflatten(2, grid.shape[2:])


def _drawn(case: Case, probability: Tensor) -> Tensor:
    """Bits that are set where the recipe's uniform numbers lie below the probability."""
    shape = tuple(probability.shape)
    uniforms = case.draw(case.input("uniforms")).rand(*shape).astype("float32")
    return torch.from_numpy(uniforms).to(probability) < probability
