"""Prompts with answers behind them, and the reducers that rank by the text of a prompt."""

import torch

from vistok.compress import CDPruner, FastV, PyramidDrop, TransPrune

RANKED = {
    "CDPruner": CDPruner(),
    "FastV": FastV(k=1),
    "PyramidDrop": PyramidDrop(layer_list=(1, 2), image_token_ratio_list=(0.5, 0.25)),
    "TransPrune": TransPrune(
        accumulating_layer_list=(1,), pruning_layer_list=(1, 2), image_token_ratio_list=(0.5, 0.2)
    ),
}
ANSWERS = ([30, 31, 32], [40, 41, 42], [50, 35, 33])


def with_answer(inputs, answer):
    """The prompts with the answer behind, and labels for the answer alone."""
    ids = inputs["input_ids"]
    answer = torch.tensor(answer).expand(len(ids), -1)
    longer = {k: v for k, v in inputs.items() if not isinstance(v, torch.Tensor) or v.shape != ids.shape}
    for name, value in inputs.items():
        if name not in longer:
            more = answer if name == "input_ids" else torch.full_like(answer, int(name == "attention_mask"))
            longer[name] = torch.cat([value, more], 1)
    return longer, torch.cat([torch.full_like(ids, -100), answer], 1)


def continued(inputs, ids):
    """The inputs of a longer prompt [B, L'] over the same images."""
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    longer = dict(inputs) | {"input_ids": ids}
    for key in ("attention_mask", "mm_token_type_ids"):
        if key in longer:
            longer[key] = torch.nn.functional.pad(longer[key], (0, more), value=int(key == "attention_mask"))
    return longer
