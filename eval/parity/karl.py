"""Parity of KARL: encoder with halting, both base tokenizers, decoding of active tokens, a training step."""

import dataclasses
import math
import re

import numpy as np
import torch
from torch import Tensor

from ...models.karl import TARGETS, Karl, KarlConfig, TrainingPass
from ...registry import create
from .case import CannotBuild, Case, Outputs

STAGE1 = "latent_distillation_pretrain"
# What a recorded loss is called → what ours is called, the first that fits.
LOSSES = (("halt_loss", "halted"), ("active_loss", "active"), ("nll", "nll"), ("code_loss", "code"))


def run(case: Case) -> Outputs:
    """Our outputs for every recorded tensor, in the order they were made."""
    config = case.data["config"]
    if not config.get("factorize_latent", True):
        raise CannotBuild(f"{case.path.name}: factorize_latent is false; only factorized latents are known")
    fields = {field.name for field in dataclasses.fields(KarlConfig)} | {"model"}
    model = case.build(lambda: create("karl", **{k: v for k, v in config.items() if k in fields}))
    images = _images(case)
    if "runs" in config:
        for run in config["runs"]:
            yield from _reconstruction(case, model, images, *run)
    elif "stage" in config:
        yield from _training_step(case, model, images)
    else:
        raise CannotBuild(f"{case.path.name}: the configuration has neither runs nor a training stage")


def _images(case: Case) -> list[Tensor]:
    """The pictures of the recipe, each a batch of one: uniform noise, or uniform blocks."""
    recipe = case.data["inputs"]["images"]
    random, images = case.draw(recipe), []
    for text in re.findall(r"img\d+=([^;]+)", recipe):
        shapes = [tuple(map(int, found.split(","))) for found in re.findall(r"\((\d+(?:,\d+)+)\)", text)]
        if not shapes:
            raise CannotBuild(f"{case.path.name}: cannot read the image recipe {text!r}")
        picture = random.uniform(0, 1, shapes[0])
        if "kron" in text:
            picture = np.kron(picture, np.ones(shapes[1]))
        images.append(case.place(torch.from_numpy(picture.astype(np.float32)[None])))
    return images


def _noise(case: Case, model: Karl, images: Tensor) -> Tensor | None:
    """The posterior noise of the recipe, from the start of its stream."""
    if model.config.base != "vae":
        return None
    cells = [side // model.config.patch_size for side in images.shape[2:]]
    shape = (len(images), model.config.base_channels, *cells)
    drawn = case.draw(case.data["inputs"]["vae_noise"]).standard_normal(shape)
    return case.place(torch.from_numpy(drawn.astype(np.float32)))


def _reconstruction(
    case: Case, model: Karl, pictures: list[Tensor], image: int, count: int, target: float
) -> Outputs:
    prefix = f"im{image}.T{count}.e{target}"
    images, base, quantizer = pictures[image], model.base, model.quantizer

    def part(name: str, value: Tensor) -> tuple[str, Tensor]:
        return f"{prefix}.{name}", case.subsample(f"{prefix}.{name}", value)

    features = base.features(images, _noise(case, model, images))
    if model.config.base == "vae":
        yield part("vae_moments", base.moments(images))
    else:
        yield part("vqgan_z", features)
        yield part("vqgan_indices", base.quantize.encode(features.flatten(2).transpose(1, 2)))
    found = model.analyse(images, model.target_bins(target, len(images)), count, features)
    yield part("latent", found.hidden)
    yield part("halt_logits", found.halt_logits)
    yield part("factorized", found.values)
    yield part("active", found.active)
    yield part("kc", found.active.sum(1))
    places = torch.arange(count, device=case.device).expand(len(images), -1)
    values = found.values
    if model.config.quantize_latent:
        yield part("indices", model.quantize.encode(values))
        # One index or one halted token that rounds otherwise would change everything after it.
        values = model.quantize.decode(case.recorded(f"{prefix}.indices").long()).to(case.dtype)
        yield part("quantized", values)
    # Batches of one image: its active tokens are the whole batch, at their places.
    active = case.recorded(f"{prefix}.active").bool()[0]
    latents = quantizer.join(values, places)[:, active]
    kept, places = quantizer.split(latents)
    output = model.draw(kept, places)
    yield part("decoder_out" if model.config.base == "vae" else "decoder_logits", output)
    decoded = model.pixels(latents, active.sum()[None])
    yield part("recon", decoded)
    yield part("l1", (decoded - images).abs().mean((1, 2, 3)))


# Training ---------------------------------------------------------------------------------------------------


def _training_step(case: Case, model: Karl, pictures: list[Tensor]) -> Outputs:
    config = case.data["config"]
    chosen = re.search(r"image (\d+)\s*$", case.data["inputs"]["images"])
    images = pictures[int(chosen[1])] if chosen else torch.cat(pictures)
    model.train()
    if config["stage"] == STAGE1:
        model.base_tokenizer.requires_grad_(False)
    with torch.enable_grad():
        with torch.set_grad_enabled(not model.distils):
            features = model.base.features(images, _noise(case, model, images))
        first = model.training_pass(images, features, config["T"], config["epsilon"])
        model.update_targets(first.error)
        needed = min(config["T"], model.num_tokens)
        second = model.training_pass(images, features, model.num_tokens, first.error, needed)
        total = sum(first.losses.values()) + sum(second.losses.values())
        total.backward()
    levels = torch.tensor(TARGETS, device=case.device)
    yield "eic.bin", levels[first.bins]
    yield "eic.total", _recorded_shape(case, "eic.total", sum(first.losses.values()))
    yield "eic.rec_l1", first.error
    yield "eic.prob_after", model.target_probabilities
    yield "ltc.bin", levels[second.bins]
    yield "ltc.total", _recorded_shape(case, "ltc.total", total)
    computed = {"eic.bin", "eic.total", "eic.rec_l1", "eic.prob_after", "ltc.bin", "ltc.total"}
    for name in sorted(set(case.tensors) - computed):
        owner, _, term = name.partition(".")
        if owner == "grad":
            gradient = dict(model.named_parameters())[term].grad
            if gradient is None:
                raise CannotBuild(f"{case.path.name}: no gradient reaches {term}")
            value = gradient.norm()
        else:
            value = _loss(case, {"eic": first, "ltc": second}[owner], term)
        yield name, _recorded_shape(case, name, value)


def _loss(case: Case, passed: TrainingPass, term: str) -> Tensor:
    """The loss that the original logs under this name."""
    losses = passed.losses
    if "quantization" in term:  # continuous latents have none
        parts = [losses[name] for name in ("commitment", "codebook") if name in losses]
        return torch.stack(parts).sum() if parts else torch.zeros((), device=case.device)
    ours = next((name for part, name in LOSSES if part in term), None)
    if ours is None:  # what is left is the reconstruction: of the base's features, or of pixels
        ours = "code" if "code" in losses else "reconstruction"
    if ours not in losses:
        raise CannotBuild(f"{case.path.name}: this model has no loss for the recorded {term}")
    return losses[ours]


def _recorded_shape(case: Case, name: str, value: Tensor) -> Tensor:
    shape = case.tensors[name].shape
    return value.reshape(shape) if value.numel() == math.prod(shape) else value
