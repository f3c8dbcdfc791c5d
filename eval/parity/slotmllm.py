"""Parity of Slot-MLLM's tokenizer: slots in all variants, residual codes, and both conditions."""

import dataclasses
import fnmatch

from torch import Tensor

from ...configuration import build
from ...models.slotmllm import SlotMLLM, SlotMLLMConfig
from .case import Case, Outputs
from .recorder import Recorder

FAMILIES = ("slotmllm",)


SLOT_PARTS = ("gru", "mlp", "norm_slots", "norm_mlp")


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    config = _config(case)
    model = _model(case, config)
    memory = model.adapted(case.array("features"))
    yield "encoder_states", case.subsample("encoder_states", memory)
    recorder = Recorder(model.qformer.bert.encoder.layer[0].crossattention.self)
    slots = model.slots(memory)
    yield "slots_layer0", case.subsample("slots_layer0", recorder.outputs[0])
    yield "qformer_slots", case.subsample("qformer_slots", slots)
    for name, change in (
        ("qformer_slots_half", {"use_half_slot": True}),
        ("qformer_plain", {"use_slot": False}),
    ):
        if case.records(name):  # the same weights in another variant
            variant = _model(case, dataclasses.replace(config, **change))
            yield name, case.subsample(name, variant.slots(memory))
    yield from _decoded(case, model, slots)


def _config(case: Case) -> SlotMLLMConfig:
    """The case's configuration, and what its weights show beside it."""
    values = dict(case.config)
    values.pop("patches", None)  # the features' own number of rows
    shapes = {key: entry[1] for key, entry in case.data.get("state_dict", {}).items()}
    down = [shape[0] for key, shape in shapes.items() if key.startswith("image_down.")]
    positions = shapes.get("image_tokenizer.model.Qformer.bert.embeddings.position_ids", [1, 512])[1]
    return build(SlotMLLMConfig, {"down": down, "positions": positions, **values}, "config")


def _model(case: Case, config: SlotMLLMConfig) -> SlotMLLM:
    """The model filled with the weights that it has; the original lists parts that it never runs."""
    table = case.data.get("state_dict", {})

    def is_used(key: str) -> bool:
        if any(fnmatch.fnmatch(key, pattern) for pattern in SlotMLLM.checkpoint_ignores):
            return key.endswith("position_ids")
        return config.use_slot or not any(f".crossattention.self.{part}." in key for part in SLOT_PARTS)

    used = {key: entry for key, entry in table.items() if is_used(key)}
    trimmed = dataclasses.replace(case, data={**case.data, "state_dict": used})
    return trimmed.build(lambda: SlotMLLM(config))


def _decoded(case: Case, model: SlotMLLM, slots: Tensor) -> Outputs:
    quantized = model.quantize(slots)
    yield "indices", quantized.codes
    yield "quantized", case.subsample("quantized", quantized.latents)
    codes = case.recorded("indices").long()
    latents = model.quantize.decode(codes).to(case.dtype)
    yield "from_indices", case.subsample("from_indices", latents)
    yield "after_blocks", case.subsample("after_blocks", model.rebuilt(latents))
    states, embedding = model.conditions_of(latents)
    yield "prompt_embeds", case.subsample("prompt_embeds", states)
    yield "image_embeds", case.subsample("image_embeds", embedding)
