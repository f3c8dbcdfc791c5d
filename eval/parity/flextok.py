"""Parity of the FlexTok family: whole tokenizers, and the parts they are made of."""

import dataclasses
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...configuration import shorten
from ...models.flextok.model import FlexTok, FlexTokConfig, patchify
from . import flextok_ar
from .case import Case, Outputs
from .descriptions import number_after, numbers
from .fields import check_size, whole
from .flextok_components import RECORDED, components
from .meta import remove_unfilled

FAMILIES = ("flextok",)

MOST_STEPS = 1000
GRID, ROWS, MAP = "[:, ::4, ::4, ::8]", "[:, ::32, ::16]", "[:, :, ::2, ::2]"


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor."""
    if any(key.startswith(("vae.", "module_dict.")) or ".module_dict." in key for key in case.keys):
        yield from _Tokenizer(case).outputs()
    elif case.records(*RECORDED):
        yield from components(case)
    elif case.records("(c2i|t2i|filter)_.*"):
        yield from flextok_ar.run(case)
    else:
        raise case.refusal("it holds neither weights of a FlexTok nor components that this version has")


# Tokenizers -------------------------------------------------------------------------------------------------


class _Blocks:
    """Catches the outputs of a trunk's blocks; the last is run again for rows that the model skips."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.blocks, self.recorded = blocks, {}
        self.hooks = [
            block.register_forward_hook(lambda m, i, out, depth=depth: self.recorded.update({depth: out}))
            for depth, block in enumerate(blocks[:-1])
        ]
        self.hooks.append(
            blocks[-1].register_forward_pre_hook(lambda m, inputs: self.recorded.update(last=inputs))
        )

    def __getitem__(self, depth: int) -> Tensor:
        for hook in self.hooks:
            hook.remove()
        if depth == len(self.blocks) - 1:
            return self.blocks[-1](*self.recorded["last"])
        return self.recorded[depth]


def _part(key: str) -> str:
    """The part of the model that a key belongs to: half of the VAE, or a module of encoder or decoder."""
    return ".".join(key.split(".")[:3])


class _Tokenizer:
    """A case of the tokenizer, or of its VAE, encoder or decoder.

    Its images have one size and go as one batch, whose tensors have plain names, or several sizes and go one
    by one: then a tensor of image i is `name_i`, and those of one shape may be recorded together as `name`.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        config = dict(case.config)
        modules = config.get("module_dict")
        alone = None
        if isinstance(modules, dict):  # one side by itself, whose keys do not name it
            alone = "encoder" if any(name.startswith("enc_") for name in modules) else "decoder"
            config = {alone: config, **{name: config[name] for name in ("regularizer",) if name in config}}
        try:
            parsed = FlexTokConfig.parse(config, whole=False)
        except ValueError as error:
            raise case.refusal(f"this configuration cannot be built: {error}") from error
        self.has_levels = "regularizer" in config or "levels" in config
        sides = ("vae", "encoder", "decoder")
        self.sides = {alone} if alone else {side for side in sides if self._names(f"{side}.")}
        parsed = dataclasses.replace(parsed, vae="vae" in self.sides)
        if alone:
            with torch.device("meta"):
                self.model = FlexTok(parsed)
            remove_unfilled(self.model)
            setattr(self.model, alone, case.build(lambda: getattr(FlexTok(parsed), alone), part=_part_alone))
        else:
            self.model = case.build(lambda: FlexTok(parsed), part=_part)

    def _names(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.case.keys)

    def outputs(self) -> Outputs:
        """The encoder's side, then the decoder's."""
        case = self.case
        if self.sides & {"vae", "encoder"} and case.records("vae_.*", "enc_.*", "latents.*", "indices.*"):
            batches = self._images() if "vae" in self.sides else self._stored("vae_latents")
            yield from self._by_image([dict(self._encoding(batch)) for batch in batches])
            yield from self._moments(batches)
        if "decoder" not in self.sides or not case.records("dec_.*", "velocity_.*", "decode_.*", "recon_.*"):
            if self.has_levels and not self.sides & {"encoder"} and case.records("quantized", "indices"):
                yield "quantized", self.model.quantizer.decode(case.recorded("indices").long())
            return
        registers, noise = self._registers(), self._noise()
        if case.records("dec_.*", "velocity_.*"):
            yield from self._velocities(registers, noise)
        yield from self._decoding(registers, noise)

    def _by_image(self, outputs: list[dict[str, Tensor]]) -> Outputs:
        if len(outputs) == 1:
            yield from outputs[0].items()
            return
        for name in outputs[0]:
            values = [output[name] for output in outputs]
            for number, value in enumerate(values):
                recorded = self.case.tensors.get(f"{name}_{number}")
                squeezed = recorded is not None and recorded.ndim == value.ndim - 1
                yield f"{name}_{number}", value[0] if squeezed else value
            if len({value.shape for value in values}) == 1:
                yield name, torch.cat(values)

    # Inputs -------------------------------------------------------------------------------------------------

    def _images(self) -> list[Tensor]:
        """Uniform noise in [-1, 1] with cells of 8×8 pixels, as stored or drawn: [B, 3, H, W], as [0, 1]."""
        case = self.case
        if case.records(r"images?(_\d+)?"):
            return [
                (batch + 1) / 2 for batch in self._stored("images" if case.records("images.*") else "image")
            ]
        recipe = case.input("images", dict)
        random = np.random.RandomState(whole(case.path.name, recipe, "S", 0, 2**32 - 1))
        sizes = self._sizes(recipe)
        same = len(set(sizes)) == 1
        groups = [(len(sizes), sizes[0])] if same else [(1, size) for size in sizes]
        images = []
        for batch, (height, width) in groups:
            check_size(case.path.name, "images", (batch, 3, height, width))
            cells = random.uniform(-1, 1, (batch, 3, height // 8, width // 8)).astype(np.float32)
            images.append((case.place(torch.from_numpy(cells.repeat(8, 2).repeat(8, 3))) + 1) / 2)
        for batch in images:
            self.model.check_image_size(*batch.shape[2:], "the case draws them")
        return images

    def _sizes(self, recipe: dict[str, Any]) -> list[tuple[int, int]]:
        """Height and width of each image: B of N, of [H, W] or of H and W, or a list with one [H, W] each."""
        listed = recipe.get("sizes", recipe.get("N"))
        if listed is None:
            listed = [recipe.get("H"), recipe.get("W")]
        if not isinstance(listed, list):
            listed = [listed, listed]
        if not any(isinstance(each, list) for each in listed):
            listed = [listed] * whole(self.case.path.name, recipe, "B", 1, 4096)
        for size in listed:
            pair = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
            if not pair or any(not 8 <= side <= 2**16 or side % 8 for side in size):
                raise self.case.refusal(f"an image has size {shorten(size)}; it takes multiples of 8 pixels")
        return [tuple(size) for size in listed]

    def _stored(self, name: str) -> list[Tensor]:
        """A recorded batch, or the recorded `name_0`, `name_1`, … as batches of one."""
        case = self.case
        if name in case.tensors or f"{name}_0" not in case.tensors:
            return [case.array(name)]
        numbers = sorted(
            int(match[1]) for key in case.tensors if (match := re.fullmatch(rf"{name}_(\d+)", key))
        )
        values = [case.recorded(f"{name}_{number}") for number in numbers]
        return [value if value.ndim == 4 else value[None] for value in values]

    def _noise(self) -> list[Tensor]:
        """Initial noise: one batch, or one image each."""
        case = self.case
        if case.records(r"noise(_\d+)?"):
            return self._stored("noise")
        text = case.input("noise")
        shapes = [
            tuple(int(side) for side in re.findall(r"\d+", text_shape))
            for text_shape in re.findall(r"standard_normal\(\(([\d, ]+)\)\)", text)
        ]
        if not shapes or any(len(shape) not in (3, 4) for shape in shapes):
            raise case.refusal(f"no standard_normal((shape)) of images [B, C, h, w] in {shorten(text)}")
        random, noise = case.draw(text), []
        for shape in shapes:
            check_size(case.path.name, "noise", shape)
            batch = torch.from_numpy(random.standard_normal(shape).astype(np.float32)).to(case.device)
            noise.append(batch if batch.ndim == 4 else batch[None])
        return noise

    def _registers(self) -> Tensor:
        """Quantized latents [B, K, D]: of the recorded indices, or as recorded or drawn."""
        case, inputs = self.case, self.case.data.get("inputs", {})
        if self.has_levels and ("indices" in case.tensors or "indices" in inputs):
            return self.model.quantizer.decode(case.array("indices").long()).to(case.dtype)
        return case.array("quantized")

    def _times(self, batch: int) -> Tensor:
        """The time of every image, stored, stated, or in descriptions ("t = 0.75 and 0.3")."""
        case = self.case
        for name in ("timesteps", "times", "t"):
            if name in case.tensors:
                return case.recorded(name).flatten()
            values = case.data["inputs"].get(name) if isinstance(case.data.get("inputs"), dict) else None
            if isinstance(values, list) and all(isinstance(each, int | float) for each in values):
                return torch.tensor(values, dtype=torch.float32, device=case.device)
        values = numbers(case.description("dec_temb").split("[")[0])
        for name in case.data["tensors"] if not values else ():
            times = re.findall(r"\bt ?= ?(\d*\.?\d+)", case.description(name))
            values = values or [float(number) for number in times]
        if len(values) < batch:
            raise case.refusal(f"its descriptions state {len(values)} times for {batch} images")
        return torch.tensor(values[-batch:], device=case.device)

    # Outputs ------------------------------------------------------------------------------------------------

    def _encoding(self, batch: Tensor) -> Outputs:
        """Of images [B, 3, H, W] in [0, 1], or without a VAE of its latents [B, C, h, w]."""
        case, model = self.case, self.model
        encoded = batch
        if "vae" in self.sides:
            encoded = model.autoencoder.encode(2 * batch - 1)
            yield "vae_latents", case.subsample("vae_latents", encoded)
        if "encoder" not in self.sides:
            return
        parts = model.encoder.module_dict
        grid = tuple(side // model.config.patch_size for side in encoded.shape[2:])
        if case.records(r"enc_patches(_\d+)?"):
            embedded = parts["enc_patch_emb"](patchify(encoded, model.config.patch_size))
            patches = parts["enc_posemb_module"](embedded, *grid)
            yield "enc_patches", case.subsample("enc_patches", patches.unflatten(1, grid), GRID)
        blocks = _Blocks(parts["enc_transformer"].blocks)
        latents = model.encoder(encoded, model.num_tokens)
        for name, depth in _depths(case, "enc"):
            yield name, case.subsample(name, blocks[depth], ROWS)
        yield "latents", case.subsample("latents", latents)
        if self.has_levels:
            # Where half precision lets a latent cross a boundary, all after it differs: continue as recorded.
            recorded = latents if case.dtype.itemsize >= 4 else case.recorded("latents")
            yield "quantized", model.quantizer(recorded).latents
            yield "indices", model.quantizer.encode(latents)

    def _moments(self, batches: list[Tensor]) -> Outputs:
        """The VAE's moments of single images, `vae_moments_i`."""
        images = [image[None] for batch in batches for image in batch]
        for name in self.case.tensors:
            match = re.fullmatch(r"vae_moments_(\d+)", name)
            if match and "vae" in self.sides and int(match[1]) < len(images):
                moments = self.model.autoencoder.posterior(2 * images[int(match[1])] - 1).parameters
                yield name, self.case.subsample(name, moments)

    def _velocities(self, registers: Tensor, noise: list[Tensor]) -> Outputs:
        """The decoder's blocks and outputs, at one time per image."""
        batch = len(registers)
        times = self._times(batch)
        embedder = self.model.decoder.module_dict
        if "dec_temb" in self.case.tensors:
            yield "dec_temb", self.case.subsample("dec_temb", embedder["dec_time_embedder"](times))
        if len(noise) == 1:
            yield from self._velocity(registers, noise[0][:batch], times, slice(0, batch), batch)
            return
        if len(noise) < batch:
            raise self.case.refusal(f"noise is of {len(noise)} images; there are {batch}")
        rows = [slice(row, row + 1) for row in range(batch)]
        yield from self._by_image(
            [dict(self._velocity(registers[row], noise[row.start], times[row], row, batch)) for row in rows]
        )

    def _velocity(self, registers: Tensor, x: Tensor, times: Tensor, rows: slice, batch: int) -> Outputs:
        case, decoder = self.case, self.model.decoder
        modulations = decoder.modulations(times)
        blocks = _Blocks(decoder.module_dict["dec_transformer"].blocks)
        (velocity,) = decoder(x, modulations, [decoder.conditions(registers)])
        for name, depth in _depths(case, "dec"):
            yield name, case.subsample(name, blocks[depth][0].unflatten(0, (len(x), -1)), ROWS)
        if case.records(r"dec_repa_patches(_\d+)?"):
            depth = int(number_after(case.description("dec_repa_patches"), "block"))
            grid = tuple(side // self.model.config.patch_size for side in x.shape[2:])
            output = blocks[depth][0].unflatten(0, (len(x), -1))
            patches = output[:, : grid[0] * grid[1]].unflatten(1, grid)
            yield "dec_repa_patches", case.subsample("dec_repa_patches", patches, GRID)
        for name in self._bases("velocity_", batch):
            description = case.description(name) or case.description(f"{name}_{rows.start}")
            lengths, null = _lengths_and_nulls(case, description, batch)
            result = velocity
            if lengths is not None or null is not None:
                chosen = (None if each is None else each[rows] for each in (lengths, null))
                (result,) = decoder(x, modulations, [decoder.conditions(registers, *chosen)])
            yield name, case.subsample(name, result, MAP)

    def _bases(self, prefix: str, batch: int) -> list[str]:
        """Recorded names with a prefix, without the number of an image."""
        names = [name for name in self.case.tensors if name.startswith(prefix)]
        numbered = {f"_{number}" for number in range(batch)}
        bases = {
            name: name[: -len(end)]
            for name in names
            if (end := "_" + name.rpartition("_")[2]) in numbered and name.count("_") > 1
        }
        return list(dict.fromkeys(bases.get(name, name) for name in names))

    def _decoding(self, registers: Tensor, noise: list[Tensor]) -> Outputs:
        """Whole samplings, "decode_<guidance><scale>_T<steps>": of one image at several lengths, or with the
        number of an image at its end of that image."""
        case = self.case
        names = [name for name in case.tensors if name.startswith("decode_")]
        for name in names:
            match = re.fullmatch(r"decode_(plain|cfg|apg)([\d.]*)_T(\d+)(?:_(\d+))?", name)
            if not match:
                raise case.refusal(f"cannot read guidance and steps from the name {name!r}")
            kind, scale, steps, image = match.groups()
            if int(steps) > MOST_STEPS:
                raise case.refusal(f"{name} takes {steps} steps; this version runs up to {MOST_STEPS}")
            latents, lengths, start = self._start(registers, noise, names, image)
            sampled = self.model.sample(
                latents,
                lengths,
                size=tuple(self._pixels(side) for side in start.shape[2:]),
                steps=int(steps),
                guidance=float(scale or 1),
                normalized=kind == "apg",
                noise=start,
            )
            yield name, case.subsample(name, sampled, MAP)
            recon = name.replace("decode_", "recon_", 1)
            if recon in case.tensors:
                images = self.model.autoencoder.decode(sampled)
                yield recon, case.subsample(recon, images, "[:, :, ::4, ::4]")

    def _pixels(self, side: int) -> int:
        return side * self.model.config.size_multiple // self.model.config.patch_size

    def _start(
        self, registers: Tensor, noise: list[Tensor], names: list[str], image: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, lengths and noise that a sampling starts from."""
        case = self.case
        texts = [case.description(name) for name in names]
        description = " ".join(texts)
        if image is not None:
            row, kept = int(image), None
            if row >= len(registers) or (len(noise) > 1 and row >= len(noise)):
                raise case.refusal(f"there is no image {row} to decode")
            start = noise[row] if len(noise) > 1 else noise[0][row : row + 1]
        else:
            row = int(number_after(description, "image") or 0)
            kept = re.search(r"k=([\d,]+\d|\d)", description)
            start = noise[0]
        counts = [int(k) for k in kept[1].split(",")] if kept else [registers.shape[1]]
        if row >= len(registers) or len(start) < len(counts):
            raise case.refusal(f"noise or tokens are missing for image {row} at {len(counts)} lengths")
        lengths = torch.tensor(counts, device=case.device)
        return registers[row].expand(len(counts), -1, -1), lengths, start[: len(counts)]


def _part_alone(key: str) -> str:
    """The module that a key of an encoder or a decoder alone belongs to."""
    return ".".join(key.split(".")[:2])


def _depths(case: Case, prefix: str) -> list[tuple[str, int]]:
    """Recorded outputs of blocks, and the depth of each."""
    matches = [re.fullmatch(rf"({prefix}_block(\d+))(_\d+)?", name) for name in case.tensors]
    return list(dict.fromkeys((match[1], int(match[2])) for match in matches if match))


def _lengths_and_nulls(case: Case, text: str, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Kept tokens and null flags of a description: "eval_keep_k=[5,200]", "null condition for sample 1
    only"."""
    kept, null = re.search(r"eval_keep_k=\[([\d, ]+)\]", text), None
    lengths = torch.tensor([int(k) for k in kept[1].split(",")], device=case.device) if kept else None
    if lengths is not None and len(lengths) != batch:
        raise case.refusal(f"eval_keep_k has {len(lengths)} numbers for {batch} images")
    if "null condition" in text:
        only = number_after(text, "sample")
        images = torch.arange(batch, device=case.device)
        null = images >= 0 if only is None else images == int(only)
    return lengths, null
