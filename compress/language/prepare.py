"""Reducing the inputs instead of hooking the language model: shorter prompts with their features already
made.

Works with any cache and any way of decoding (static caches, `torch.compile`, chunked prefill), for reducers
that act in the tower or on its features.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families import MEDIA, Host, Record
from ..hosts import ENCODES_BEFORE_FORWARD, release
from ..layout import compact, gather
from .boundary import Border, choose, closed
from .call import Call, read_prompt
from .spreading import spread_positions


@dataclass(frozen=True)
class Prepared:
    """Inputs for `model.generate(**prepared.inputs)` or `model(**prepared.inputs)`, and the prompt they stand
    for.

    Families whose features are one tensor (InternVL, PaliGemma, Gemma 3, VipLLaVA) need equal counts in all
    images for beam search. With position ids kept, an unpadded batch must be generated with a cache.
    """

    inputs: dict[str, Any]
    input_ids: Tensor

    def restore(self, sequences: Tensor) -> Tensor:
        """Generated sequences [B·n, L' + new] with the full prompt in front, as code that cuts off
        `input_ids` expects: [B·n, L + new]."""
        new = sequences[:, self.inputs["input_ids"].shape[1] :]
        repeats = len(sequences) // len(self.input_ids)
        return torch.cat([self.input_ids.repeat_interleave(repeats, 0), new], 1)


@torch.no_grad()
def prepare(host: Host, border: Border, inputs: Mapping[str, Any]) -> Prepared:
    """The inputs of a processor, reduced by what acts at the border (see `Session.prepare`)."""
    if not ENCODES_BEFORE_FORWARD:
        raise NotImplementedError(
            f"{release()} takes no features made before the forward, so inputs cannot be prepared; install "
            "transformers 5.18 or later, or generate with the session attached"
        )
    if "input_ids" not in inputs:
        raise ValueError(
            f"inputs hold {', '.join(inputs)}; prepare needs what the processor returns, with input_ids"
        )
    call, rest = _encode(host, inputs)
    ids = call.ids
    if not call.outputs:
        return Prepared(dict(inputs), ids)
    read_prompt(host, call, ids.shape[1])
    embeds = host.model.get_input_embeddings()(ids.clamp(min=0))
    for modality, output in call.outputs.items():
        is_placeholder = ids == host.media_ids[modality]
        features = torch.cat([item.reshape(-1, item.shape[-1]) for item in output.pooler_output])
        embeds = embeds.masked_scatter(is_placeholder[..., None], features.to(embeds))
    stay, changed, call.kept = choose(host, call, embeds, border)
    index, valid, _ = compact(stay)
    short: dict[str, Any] = {}
    pad = host.lm.config.pad_token_id or 0
    for key, value in rest.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            value = gather(value, index).masked_fill(~valid, pad if key == "input_ids" else 0)
        short[key] = value
    short["attention_mask"] = valid.long()
    if not border.renumbered:
        short["position_ids"] = _positions(host, call, inputs, index, valid, border)
    short["mm_encoder_outputs"] = {
        modality: _shortened(call, modality, output, changed, call.kept)
        for modality, output in call.outputs.items()
    }
    return Prepared(short, ids)


def _encode(host: Host, inputs: Mapping[str, Any]) -> tuple[Call, dict[str, Any]]:
    """Make the features of all media; returns a call that holds them and the inputs that are left."""
    call, used = Call(host, prefill=True, ids=inputs["input_ids"], mask=inputs.get("attention_mask")), set()
    for modality in MEDIA:
        encode = getattr(host.core, f"get_{modality}_features", None)
        if encode is None:
            continue
        names = [name for name in inspect.signature(encode).parameters if name in inputs]
        used.update(names)
        if any(name.startswith("pixel_values") and inputs[name] is not None for name in names):
            output = encode(**{name: inputs[name] for name in names}, return_dict=True)
            call.outputs[modality] = output
    return call, {key: value for key, value in inputs.items() if key not in used}


def _positions(
    host: Host, call: Call, inputs: Mapping[str, Any], index: Tensor, valid: Tensor, border: Border
) -> Tensor:
    """Position ids of the whole prompt at the kept places."""
    mask = call.start.valid.long()
    plain = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0) + host.family.first_position
    if not hasattr(host.core, "get_rope_index"):
        return spread_positions(host, call, plain, index, valid) if border.spread else plain.gather(1, index)
    parameters = inspect.signature(host.core.get_rope_index).parameters
    arguments = {name: inputs[name] for name in parameters if name in inputs and name != "attention_mask"}
    planes, host.core.rope_deltas = host.core.get_rope_index(**arguments, attention_mask=mask)
    planes = torch.cat([plain[None], planes.to(plain)])
    if border.spread:
        return spread_positions(host, call, planes, index, valid)
    planes = closed(call, planes) if border.closes_gaps else planes
    return planes.gather(2, index.expand(len(planes), *index.shape))


def _shortened(call: Call, modality: str, output: Any, embeds: Tensor, kept: list[Tensor]) -> Any:
    """The features that are left, in the container that the model expects."""
    items: dict[int, list[Tensor]] = {}
    numbers: dict[int, list[Tensor]] = {}
    deepstack: dict[int, list[Tensor]] = {}
    for span, tokens in zip(call.prompt.spans, kept, strict=True):
        if span.record.modality == modality:
            places = span.places.to(tokens.device)[tokens]
            items.setdefault(span.item, []).append(embeds[span.row, places.to(embeds.device)])
            numbers.setdefault(span.item, []).append(tokens + span.offset)
            if span.deepstack is not None:
                deepstack[span.item] = span.deepstack
    order = sorted(items)
    pooled: Any = [torch.cat(items[i]) for i in order]
    made = {"pooler_output": pooled}
    if isinstance(output.pooler_output, Tensor):
        equal = len({len(item) for item in pooled}) == 1
        made["pooler_output"] = torch.stack(pooled) if equal else torch.cat(pooled)[None]
    if getattr(output, "deepstack_features", None) is not None:
        left = [torch.cat(numbers[i]) for i in order]
        made["deepstack_features"] = [
            [
                deepstack[i][depth].to(item) if i in deepstack else item[tokens.to(item.device)]
                for i, item, tokens in zip(order, layer, left, strict=True)
            ]
            for depth, layer in enumerate(output.deepstack_features)
        ]
    short = type(output)(**made)
    short.vistok_record = Record(modality, [len(item) for item in pooled], reduced=True)
    return short
