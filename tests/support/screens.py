"""Prompts whose pictures repeat, as screens do, and an oracle of a tower that sees some of their tokens."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import AttentionInterface
from transformers.vision_utils import get_vision_window_index

MERGE = 2
UNIT = MERGE**2  # patches behind a token


def screens(model: hf.PreTrainedModel, inputs: Any, colours: int = 3, seed: int = 0) -> Any:
    """The inputs with pictures of few kinds of 2 × 2 patches; both temporal slices are equal."""
    random = torch.Generator().manual_seed(seed)
    vision, changed = model.config.vision_config, type(inputs)(dict(inputs))
    side = vision.patch_size
    tokens = len(inputs["pixel_values"]) // UNIT
    levels = torch.randint(0, 256, (colours, UNIT, 3, 1, side, side), generator=random) / 255
    palette = ((levels - 0.5) / 0.5).expand(-1, -1, -1, 2, -1, -1).flatten(2)
    chosen = torch.randint(0, colours, (tokens,), generator=random)
    changed["pixel_values"] = palette[chosen].flatten(0, 1)
    return changed


@contextmanager
def tower_without(model: hf.PreTrainedModel, inputs: Any, entered: Sequence[Tensor], first: int = 0) -> Any:
    """Let no patch attend to those of tokens outside the masks `entered` [N] per picture, in the blocks of
    the stock tower from the `first` on.

    Yields what each patch received on average from the patches that are left, layer by layer, in the order of
    the tokens [heads, 4 N].
    """
    mask = torch.cat(list(entered))
    order = torch.arange(len(mask))
    tower = model.base_model.visual
    if hasattr(tower, "window_size"):
        order, _ = get_vision_window_index(
            inputs["image_grid_thw"], MERGE, tower.window_size, tower.patch_size
        )
    patches = mask[order].repeat_interleave(UNIT)
    back = (order[:, None] * UNIT + torch.arange(UNIT)).flatten().argsort()
    received: list[list[Tensor]] = []
    state = {"start": 0}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any):
        start, count = state["start"], query.shape[2]
        state["start"] = (start + count) % len(patches)
        if start == 0:
            received.append([])
        visible = patches[start : start + count] | ((len(received) - 1) % len(tower.blocks) < first)
        logits = (query @ key.transpose(-1, -2)) * kwargs["scaling"]
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0)
        rows = weights[0, :, visible]
        received[-1].append(rows.mean(1) if len(rows[0]) else rows.new_zeros(len(rows), count))
        return (weights @ value).transpose(1, 2), weights

    AttentionInterface.register("kept_keys", attend)
    stock = model.config.vision_config._attn_implementation
    model.set_attn_implementation({"vision_config": "kept_keys"})
    layers: list[Tensor] = []
    try:
        yield layers
    finally:
        model.set_attn_implementation({"vision_config": stock})
        layers += [torch.cat(parts, -1)[:, back] for parts in received]
