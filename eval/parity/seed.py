"""Parity of SEED-1 and SEED-2: encoder, quantizer and the conditions that codes decode to."""

import re

from torch import Tensor

from ...configuration import build
from ...models.seed import CAUSAL_QUERIES, CODEBOOK_COST, SEED, SEEDConfig
from .case import Case, Outputs
from .recorder import Recorder

FAMILIES = ("seed",)
MEMORY, ROWS = "[:, ::29, ::31]", "[:, :, ::5]"


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    # The original is causal at 32 queries and at no other number.
    causal = case.config.get("num_query_token", CAUSAL_QUERIES) == CAUSAL_QUERIES
    model = case.build(lambda: SEED(build(SEEDConfig, {"causal": causal, **case.config}, "config")))
    yield from _encoded(case, model)
    codes = case.recorded("indices").long()
    latents = model.quantize.decode(codes).to(case.dtype)
    names = {"up": "decode_task_layer", "reverse": "Reverse_Qformer"}
    names |= {name: name for name in ("blocks_text", "blocks_image")}
    parts = {name: getattr(model, part) for name, part in names.items() if hasattr(model, part)}
    recorder = Recorder(*parts.values())
    text, image = model.conditions_of(latents)
    for name, output in zip(parts, recorder.outputs, strict=True):
        yield name, case.subsample(name, output, "[:, ::3, ::7]" if name == "reverse" else ROWS)
    if text is None:
        yield "image_embeds", case.subsample("image_embeds", image)
    else:
        yield "text_embeds", case.subsample("text_embeds", text, "[:, :, ::7]")
    yield from _random(case, model)


def _encoded(case: Case, model: SEED) -> Outputs:
    parts = {f"vit_block{i}": block for i, block in enumerate(model.visual_encoder.blocks)}
    parts["ln_vision"] = model.ln_vision
    parts |= {f"q_layer{i}": layer for i, layer in enumerate(model.Qformer.bert.encoder.layer)}
    recorder = Recorder(*parts.values())
    states = model.states_of_normalised(case.array("x"))
    for name, output in zip(parts, recorder.outputs, strict=True):
        yield name, case.subsample(name, output, "[:, :, ::17]" if name.startswith("q_") else MEMORY)
    yield "q_out", case.subsample("q_out", states, ROWS)
    z = model.encode_task_layer(states)
    quantized = model.quantize(z)
    yield "z", case.subsample("z", z)
    yield "indices", quantized.codes
    loss = quantized.losses["commitment"] + CODEBOOK_COST * quantized.losses["codebook"]
    yield "vq_loss", loss.reshape(1)


def _random(case: Case, model: SEED) -> Outputs:
    """Random vectors through the codebook, and random codes through the decoder."""
    inputs = case.data.get("inputs", {})
    if "vq_random" in inputs:
        yield "vq_random.indices", model.quantize.encode(_vectors(case))
    if "rand_codes" in inputs:
        codes = _codes(case, model)
        text, image = model.conditions_of(model.quantize.decode(codes).to(case.dtype))
        name = "rand_image_embeds" if text is None else "rand_text_embeds"
        yield name, case.subsample(name, image if text is None else text, "[:, :, ::7]")


def _vectors(case: Case) -> Tensor:
    """The random vectors, standard normal times the factor that the recipe ends with."""
    recipe = case.input("vq_random")
    match = re.search(r"standard_normal\(\((\d+),\s*(\d+),\s*(\d+)\)\)\s*\*\s*([.\d]+)", recipe)
    if match is None:
        return case.array("vq_random")
    return case.normal(recipe, tuple(int(side) for side in match.groups()[:3])) * float(match[4])


def _codes(case: Case, model: SEED) -> Tensor:
    codes = case.array("rand_codes")
    if bool((codes < 0).any()) or bool((codes >= model.config.codebook).any()):
        raise case.refusal(f"rand_codes lie outside 0..{model.config.codebook - 1}, the codebook")
    return codes
