"""Parity of KARL: encoder with halting, both base tokenizers, decoding of active tokens, a training step."""

import dataclasses
import math
import re
from collections.abc import Generator, Iterable

import numpy as np
import torch
from torch import Tensor

from ...configuration import shorten
from ...loading import create
from ...models.karl.config import TARGETS, KarlConfig
from ...models.karl.model import Karl
from ...models.karl.network import Analysis, TrainingPass
from .case import Case, Outputs
from .fields import check_size, whole

FAMILIES = ("karl",)

STAGE1 = "latent_distillation_pretrain"
# Name of a recorded loss → name of vistok's loss, the first that fits.
LOSSES = (("halt_loss", "halted"), ("active_loss", "active"), ("nll", "nll"), ("code_loss", "code"))


RUN = re.compile(r"im(\d+)\.T(\d+)\.e(\d+(?:\.\d+)?)\.(\w+)")


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    config = case.config
    if config.get("factorize_latent", True) is not True:
        raise case.refusal(
            f"factorize_latent is {shorten(config['factorize_latent'])}; only factorized latents, true, are "
            "known"
        )
    fields = {field.name for field in dataclasses.fields(KarlConfig)} | {"model"}
    known = {name: value for name, value in config.items() if name in fields}
    runs = dict.fromkeys(match.groups()[:3] for name in case.tensors if (match := RUN.fullmatch(name)))
    if not runs and not case.records(r"(eic|ltc|grad)\..*"):
        raise case.refusal("it records neither runs (im0.T256.e0.05.…) nor a training step (eic.…, ltc.…)")
    _check_runs(case, runs)
    model = case.build(lambda: create("karl", **known), part=_part)
    for image, count, target in runs:
        yield from _Run(case, model, int(image), int(count), target).outputs()
    if case.records(r"(eic|ltc|grad)\..*"):
        yield from _training_step(case, model, _images(case))


def _check_runs(case: Case, recorded: Iterable[tuple[str, str, str]]) -> None:
    """Raise CannotBuild unless the configuration's runs, where it lists them, are those recorded."""
    if "runs" not in case.config:
        return
    runs = case.config["runs"]
    try:
        stated = {(int(image), int(count), float(target)) for image, count, target in runs}
    except (TypeError, ValueError, OverflowError):
        raise case.refusal(
            f"runs is {shorten(runs)}; it lists [image, number of tokens, target error] of each run"
        ) from None
    names = {(int(image), int(count), float(target)) for image, count, target in recorded}
    if stated != names:
        raise case.refusal(f"runs lists {sorted(stated)}; the recorded tensors are of {sorted(names)}")


def _part(key: str) -> str:
    """The part of the model that a key belongs to; the base tokenizer has an encoder and a decoder."""
    return ".".join(key.split(".")[: 3 if key.startswith("base_tokenizer.") else 1])


def _images(case: Case) -> list[Tensor]:
    """The pictures of the recipe, one per batch: uniform noise, or uniform blocks."""
    recipe = case.input("images")
    random, images = case.draw(recipe), []
    for text in re.findall(r"img\d+=([^;]+)", recipe):
        shapes = [
            tuple(map(int, shape_text.split(","))) for shape_text in re.findall(r"\((\d+(?:,\d+)+)\)", text)
        ]
        if not shapes or ("kron" in text and len(shapes) < 2):
            raise case.refusal(f"cannot read the image recipe {text!r}")
        sides = shapes[0] if "kron" not in text else tuple(map(math.prod, zip(*shapes[:2], strict=False)))
        check_size(case.path.name, "an image", sides)
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
    return case.place(case.normal(case.input("vae_noise"), (len(images), model.config.base_channels, *cells)))


class _Run:
    """One picture with up to `count` tokens at a target error; its tensors begin with its name."""

    def __init__(self, case: Case, model: Karl, image: int, count: int, target: str) -> None:
        self.case, self.model, self.image, self.count, self.target = case, model, image, count, float(target)
        self.prefix = f"im{image}.T{count}.e{target}"
        model.check_num_tokens(count)

    def has(self, *names: str) -> bool:
        return any(f"{self.prefix}.{name}" in self.case.tensors for name in names)

    def recorded(self, name: str) -> Tensor:
        return self.case.recorded(f"{self.prefix}.{name}")

    def part(self, name: str, value: Tensor) -> tuple[str, Tensor]:
        return f"{self.prefix}.{name}", self.case.subsample(f"{self.prefix}.{name}", value)

    def images(self) -> Tensor:
        pictures = _images(self.case)
        if self.image >= len(pictures):
            raise self.case.refusal(f"{self.prefix} is of image {self.image}; the recipe has {len(pictures)}")
        return pictures[self.image]

    def _size(self) -> tuple[int, int] | None:
        """Height and width of the image, None in a case that records no images."""
        inputs = self.case.data.get("inputs")
        if not isinstance(inputs, dict) or "images" not in inputs:
            return None
        return tuple(self.images().shape[2:])

    def outputs(self) -> Outputs:
        """The outputs of the encoder, then of the decoder on recorded codes."""
        analysis = None
        if "encoder" in {_part(key) for key in self.case.keys}:
            analysis = yield from self._encoded(self.images())
        if not self.has("decoder_out", "decoder_logits", "recon", "l1", "quantized"):
            return
        model = self.model
        if model.config.quantize_latent and self.has("indices"):
            # One index or one halted token that rounds otherwise would change everything after it.
            values = model.quantize.decode(self.recorded("indices").long()).to(self.case.dtype)
            yield self.part("quantized", values)
        elif model.config.quantize_latent:
            values = self.recorded("quantized")
        else:
            values = self.recorded("factorized") if analysis is None else analysis.values
        yield from self._decoded(values)

    def _encoded(self, images: Tensor) -> Generator[tuple[str, Tensor], None, Analysis]:
        model, base = self.model, self.model.base
        features = base.features(images, _noise(self.case, model, images))
        if model.config.base == "vae":
            yield self.part("vae_moments", base.moments(images))
        else:
            yield self.part("vqgan_z", features)
            if self.has("vqgan_indices"):
                indices = base.quantize.encode(features.flatten(2).transpose(1, 2))
                yield self.part("vqgan_indices", indices)
        analysis = model.analyse(images, model.target_bins(self.target, len(images)), self.count, features)
        yield self.part("latent", analysis.hidden)
        yield self.part("halt_logits", analysis.halt_logits)
        yield self.part("factorized", analysis.values)
        yield self.part("active", analysis.active)
        yield self.part("kc", analysis.active.sum(1))
        if model.config.quantize_latent and self.has("indices"):
            yield self.part("indices", model.quantize.encode(analysis.values))
        return analysis

    def _decoded(self, values: Tensor) -> Outputs:
        model, count = self.model, values.shape[1]
        if not self.has("decoder_out", "decoder_logits", "recon", "l1"):
            return
        places = torch.arange(count, device=self.case.device).expand(len(values), -1)
        # Batches of one image: its active tokens are the whole batch, at their places.
        active = self.recorded("active").bool()[0]
        latents = model.quantizer.join(values, places)[:, active]
        size = self._size()
        output = model.draw(*model.quantizer.split(latents), size=size)
        yield self.part("decoder_out" if model.config.base == "vae" else "decoder_logits", output)
        if self.has("recon", "l1"):
            decoded = model.pixels(latents, active.sum()[None], size=size)
            yield self.part("recon", decoded)
            if self.has("l1"):
                yield self.part("l1", (decoded - self.images()).abs().mean((1, 2, 3)))


# Training ---------------------------------------------------------------------------------------------------


def _training_step(case: Case, model: Karl, pictures: list[Tensor]) -> Outputs:
    config = case.config
    count = whole(case.path.name, config, "T", 1, model.config.max_latent_tokens)
    target = config.get("epsilon")
    if not isinstance(target, int | float) or isinstance(target, bool):
        raise case.refusal(f"epsilon is {shorten(target)}; it is the target error, a number from 0 to 1")
    if not isinstance(config.get("stage"), str):
        raise case.refusal(f"stage is {shorten(config.get('stage'))}; it is text such as {STAGE1!r}")
    chosen = re.search(r"image (\d+)\s*$", case.input("images"))
    if chosen and int(chosen[1]) >= len(pictures):
        raise case.refusal(f"image {chosen[1]} is not one of the recipe's {len(pictures)}")
    images = pictures[int(chosen[1])] if chosen else torch.cat(pictures)
    model.train()
    if config["stage"] == STAGE1:
        model.base_tokenizer.requires_grad_(False)
    with torch.enable_grad():
        with torch.set_grad_enabled(not model.distils):
            features = model.base.features(images, _noise(case, model, images))
        first = model.training_pass(images, features, count, target)
        model.update_targets(first.error)
        needed = min(count, model.num_tokens)
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
            gradient = getattr(dict(model.named_parameters()).get(term), "grad", None)
            if gradient is None:
                raise case.refusal(f"no gradient reaches {term}")
            value = gradient.norm()
        elif owner not in ("eic", "ltc"):
            continue
        else:
            value = _loss(case, {"eic": first, "ltc": second}[owner], term)
        yield name, _recorded_shape(case, name, value)


def _loss(case: Case, passed: TrainingPass, term: str) -> Tensor:
    """The loss that the original logs under this name."""
    losses = passed.losses
    if "quantization" in term:  # continuous latents have none
        parts = [losses[name] for name in ("commitment", "codebook") if name in losses]
        return torch.stack(parts).sum() if parts else torch.zeros((), device=case.device)
    loss = next((name for part, name in LOSSES if part in term), None)
    if loss is None:  # what is left is the reconstruction: of the base's features, or of pixels
        loss = "code" if "code" in losses else "reconstruction"
    if loss not in losses:
        raise case.refusal(f"this model has no loss for the recorded {term}")
    return losses[loss]


def _recorded_shape(case: Case, name: str, value: Tensor) -> Tensor:
    shape = case.tensors[name].shape if name in case.tensors else value.shape
    return value.reshape(shape) if value.numel() == math.prod(shape) else value
