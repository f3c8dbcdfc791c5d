"""Parity of generators of LLaMA blocks: ELM's language model and DetailFlow's generator.

Each step of a recorded run of the sampler follows the recorded tokens before it, so that one wrong token is
one difference, in half precision as well.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...configuration import shorten
from ...generate.detailflow import DetailFlowGPT
from ...generate.elm import ELMLanguageModel
from ...generate.llama import LlamaGenerator, restrict
from .case import Case, Outputs
from .fields import check_size

SETTINGS = {
    "cfg_scale": "guidance",
    "gradual_cfg": "gradual",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}
"""Keys of a recorded run → arguments of `sample`."""


def run_elm(case: Case) -> Outputs:
    """ELM's logits of a prefix, and its likeliest tokens under each schedule of guidance."""
    model = case.build(lambda: ELMLanguageModel.create(**case.config))
    classes = case.array("cond")
    yield "logits", model.logits(case.array("idx"), classes).flatten(1, 2)
    for name in sorted(case.tensors):
        if not name.startswith("greedy_"):
            continue
        match = re.search(r"guidance ([\d.]*\d), schedule (\w+)", case.description(name))
        if not match:
            raise case.refusal(f"{name} does not state its guidance and schedule")
        values = {"guidance": float(match[1]), "schedule": match[2], "temperature": 1.0}
        yield name, _likeliest(case, model, name, classes, values)[0]


def run_detailflow(case: Case) -> Outputs:
    """DetailFlow's mask, rotations, logits of prefixes and their loss, and its likeliest tokens."""
    model = case.build(lambda: DetailFlowGPT.create(**case.config))
    indices, classes = _inputs(case)
    check_size(case.path.name, "mask", (model.num_tokens, model.num_tokens))
    yield "mask", model.attention_mask()
    yield "rope", model.rotations()
    count = model.num_tokens - model.config.group_size
    logits = model.logits(indices[:, :count], classes)
    case.data["tensors"]["logits"] = re.sub(r"ids\[[^]]*\]", "ids", case.description("logits"))
    yield "logits", case.subsample("logits", logits)
    yield "loss", F.cross_entropy(logits.flatten(0, 1).float(), indices.flatten()).view(1)
    prefixes = [name for name in sorted(case.tensors) if re.fullmatch(r"logits_prefix_\d+", name)]
    slices = next((text for text in map(case.description, prefixes) if "[" in text), "")
    for name in prefixes:
        length = int(name.rsplit("_", 1)[1])
        rows = 1 if length < model.config.first else model.config.group_size
        logits = model.logits(indices[:, :length], classes)[:, -rows:]
        yield name, case.subsample(name, logits, slices)  # that of the class alone states no slices
    for run, values in _runs(case).items():
        name, bound = f"gen_{run}", case.data.get("choice_margin")
        if bound is not None:
            case.data.setdefault("exact_where", {})[name] = f"{name}_margin > {bound}"
        codes, margins = _likeliest(case, model, name, classes, {"temperature": 1.0, **values})
        yield name, codes
        yield f"{name}_margin", margins


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Token indices [B, K] and classes [B] of a recipe of two draws from one stream."""
    random = case.draw(case.input("ids"))
    draws = []
    for name in ("ids", "cls"):
        match = re.search(r"randint\((\d+),\s*(\d+),\s*\(([\d,\s]+)\)\)", case.input(name))
        if not match:
            raise case.refusal(f"cannot read the recipe of {name}")
        shape = tuple(int(side) for side in match[3].split(",") if side.strip())
        check_size(case.path.name, name, shape)
        draws.append(case.place(torch.from_numpy(random.randint(int(match[1]), int(match[2]), shape))))
    return draws[0], draws[1]


def _runs(case: Case) -> Mapping[str, Mapping[str, Any]]:
    """The recorded runs by name, as arguments of `sample`."""
    runs = case.data.get("generation", {})
    if not isinstance(runs, dict) or not all(isinstance(run, dict) for run in runs.values()):
        raise case.refusal(f"generation is {shorten(runs)}; it maps names of runs to their settings")
    for name, run in runs.items():
        if unknown := sorted(set(run) - set(SETTINGS)):
            raise case.refusal(
                f"the run {name} has the settings {', '.join(unknown)}; known are {', '.join(SETTINGS)}"
            )
    return {name: {SETTINGS[key]: value for key, value in run.items()} for name, run in runs.items()}


def _likeliest(
    case: Case, model: LlamaGenerator, name: str, classes: Tensor, values: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The likeliest codes after the recorded ones, and how far the second lie behind in log-probability."""
    settings = model.check_settings(values)
    codes, margins = [], []
    for _, logits in model.guided_logits(classes, settings, case.recorded(name).long()):
        allowed = restrict(logits / settings.temperature, settings.top_k, settings.top_p)
        best = allowed.topk(2, -1).values
        codes.append(allowed.argmax(-1))
        margins.append(best[..., 0] - best[..., 1])
    return torch.cat(codes, 1), torch.cat(margins, 1)
