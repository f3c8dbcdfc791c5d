"""Parity of One-D-Piece: every prefix of its tokens, and a training step with a dropped tail."""

import re

import numpy as np
import torch
from torch import Tensor

from ...loading import create
from ...models.one_d_piece import OneDPiece
from ...train.losses import proxy_code_loss
from .case import Case, Outputs
from .fields import whole
from .titok import Trunk, column, part, quantized_outputs, quantizer_losses

FAMILIES = ("onedpiece", "one-d-piece")
LOGITS = "[:, ::64, ::2, ::2]"
PIXELS = "[:, :, ::8, ::8]"


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    model: OneDPiece = case.build(lambda: create("one-d-piece", **case.config), part=part)
    if "grad_keys" in case.data:
        yield from _training_step(case, model)
        return
    trunk = Trunk(model.encoder)
    latents = model.latents(case.images())
    yield from trunk.outputs(case, "enc")
    yield "z", case.subsample("z", column(latents))
    for name, value in quantized_outputs(model, latents):
        yield name, value.view(len(latents), -1) if name == "margin" else value
    codes = case.recorded("indices").long().squeeze(1)
    quantized = model.quantize.decode(codes).to(case.dtype)
    yield "z_q", case.subsample("z_q", column(quantized))
    for length in _prefixes(case):
        yield from _prefix(case, model, quantized, length)
    if "recon_from_ids" in case.tensors:
        length = whole(case.path.name, case.data, "prefix_of_recon_from_ids", 1, model.num_tokens)
        recipe = case.input("ids", dict)
        shape = (whole(case.path.name, recipe, "B", 1, 4096), model.num_tokens)
        random = np.random.RandomState(whole(case.path.name, recipe, "S", 0, 2**32 - 1))
        ids = torch.from_numpy(random.randint(0, model.config.codebook_size, size=shape)).to(case.device)
        images = model.pixels(model.quantize.decode(ids[:, :length]).to(case.dtype))
        yield "recon_from_ids", case.subsample("recon_from_ids", images, PIXELS)


def _prefixes(case: Case) -> list[int]:
    names = (re.fullmatch(r"(?:dec|recon\.|code_logits\.)(\d+)(?:\..*)?", name) for name in case.tensors)
    return sorted({int(match[1]) for match in names if match})


def _prefix(case: Case, model: OneDPiece, quantized: Tensor, length: int) -> Outputs:
    """The decoder and the image on the first `length` latents of `quantized` [B, K, C]."""
    trunk = Trunk(model.decoder)
    logits = model.decoder(quantized[:, :length])
    if any(name.startswith(f"dec{length}.") for name in case.tensors):
        yield from trunk.outputs(case, f"dec{length}")
    yield f"code_logits.{length}", case.subsample(f"code_logits.{length}", logits, LOGITS)
    images = model.pixels(quantized, torch.full((len(quantized),), length, device=case.device))
    yield f"recon.{length}", case.subsample(f"recon.{length}", images, PIXELS)
    yield f"recon_mean.{length}", images.mean((2, 3))


def _training_step(case: Case, model: OneDPiece) -> Outputs:
    images = case.images()
    seed = whole(case.path.name, case.data["inputs"], "torch_seed", 0, 2**63)
    torch.manual_seed(seed)
    yield "draws", torch.cat([torch.randint(1, model.num_tokens + 1, (1,)) for _ in range(8)])
    recipe = case.input("target_codes", dict)
    random = np.random.RandomState(whole(case.path.name, recipe, "S", 0, 2**32 - 1))
    side = model.config.crop_size // model.config.vit_dec_patch_size
    targets = torch.from_numpy(random.randint(0, 1024, size=(len(images), side, side))).to(case.device)
    torch.manual_seed(seed)
    with torch.enable_grad():
        output = model.train()(images)
        weight = float(case.config["losses"]["quantizer_weight"])
        quantizer_loss = sum(output.losses.values())
        total, parts = proxy_code_loss(output.images, targets, quantizer_loss, weight)
        total.backward()
    yield "code_logits", case.subsample("code_logits", output.images, LOGITS)
    quantizer, commitment, codebook = quantizer_losses(output.losses)
    yield "loss", torch.stack([total, parts["cross_entropy"], weight * quantizer, commitment, codebook])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    yield "grad_norms", torch.stack([gradients[key].norm() for key in case.data["grad_keys"]])
    yield "grad_latent_pos_rows", gradients["decoder.latent_token_positional_embedding"].norm(dim=1)
    yield "grad_latent_tokens", case.subsample("grad_latent_tokens", gradients["latent_tokens"])
    yield "indices", output.codes.unsqueeze(1)
