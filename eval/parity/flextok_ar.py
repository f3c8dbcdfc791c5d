"""Parity of FlexTok's generators, of a class and of a text.

Each step of a recorded run of the sampler follows the recorded tokens before it, so that one wrong token is
one difference, in half precision as well.
"""

import ast
import re
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...configuration import shorten
from ...generate.flextok_ar import FlexARClass, FlexARGenerator, FlexARText, TextCondition
from ...generate.llama import restrict
from ...nn.text_features import TextFeatures
from .case import Case, Outputs
from .fields import check_size

_SAME = (
    *("embed_dim", "num_blocks", "num_heads", "codebook_size", "num_tokens", "swiglu_hidden"),
    *("pos_embed", "qkv_bias", "use_bias", "post_trunk_norm", "head_bias"),
)
"""Options of a case that have the names of the configuration's fields."""
_DESCRIBED = {"norm", "qk_norm", "head_norm", "text_mlp", "text_masks", "text_tokens", "c2i", "t2i"}
MODELS = {"c2i": (FlexARClass, ["num_classes"]), "t2i": (FlexARText, ["text_dim"])}
"""Names of models in a case → class, and fields that the class alone has."""
FILTERS = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    tables = case.data.get("state_dict", {})
    if unknown := sorted(set(tables) - set(MODELS)):
        raise case.refusal(f"its state_dict has {shorten(unknown)}; it holds one table for c2i, t2i or both")
    if tables:
        ids = case.array("ids")
        yield "c2i_ids", ids
    if "c2i" in tables:
        yield from _class_outputs(case, _build(case, "c2i"), ids)
    if "t2i" in tables:
        yield from _text_outputs(case, _build(case, "t2i"), ids)
    yield from _filters(case)


# Models -----------------------------------------------------------------------------------------------------


def _build(case: Case, name: str) -> Any:
    """The model of that name with its own keys filled."""
    family, own_fields = MODELS[name]
    keep = case.data.get("keep", {})
    data = {
        **case.data,
        "state_dict": case.data["state_dict"][name],
        "keep": keep.get(name, []) if isinstance(keep, dict) else keep,
    }
    fields = _fields(case, name, own_fields)
    return replace(case, data=data).build(lambda: family.create(**fields))


def _fields(case: Case, name: str, own_fields: list[str]) -> dict[str, Any]:
    """The configuration of a model of the case; CannotBuild for options that are not in this version."""
    own = case.config.get(name, {})
    if not isinstance(own, dict):
        raise case.refusal(f"config has {name} as {shorten(own)}; it takes a mapping")
    config = {**case.config, **own}
    every = {*_SAME, *_DESCRIBED, *(field for _, fields in MODELS.values() for field in fields)}
    if unknown := sorted(set(config) - every):
        raise case.refusal(f"config has {', '.join(unknown)}; known are {', '.join(sorted(every))}")
    if config.get("head_norm"):
        raise case.refusal(f"head_norm is {shorten(config['head_norm'])}; this version has heads without it")
    norms = {"norm": config.get("norm"), "qk_norm": config.get("qk_norm")}
    eps = {_epsilon(case, key, value) for key, value in norms.items() if value}
    if len(eps) != 1 or norms["norm"] is None:
        raise case.refusal("norm and qk_norm state other epsilons than one; this version has one for both")
    fields = {field: config[field] for field in (*_SAME, *own_fields) if field in config}
    fields.update(qk_norm=bool(norms["qk_norm"]), norm_eps=eps.pop())
    if text := config.get("text_mlp"):
        if not isinstance(text, str) or "GELU tanh" not in text:
            raise case.refusal(f"text_mlp is {shorten(text)}; this version has two layers with GELU tanh")
        fields.update(text_bias="no bias" not in text)
    return fields


def _epsilon(case: Case, name: str, text: Any) -> float:
    """The epsilon of a LayerNorm that a case describes; CannotBuild for another norm."""
    match = re.search(r"eps (\d[\d.e-]*\d)", text) if isinstance(text, str) else None
    if match is None or not text.startswith("LayerNorm") or "with weight and bias" not in text:
        raise case.refusal(f"{name} is {shorten(text)}; this version has LayerNorm with weight and bias")
    return float(match[1])


# Outputs ----------------------------------------------------------------------------------------------------


def _class_outputs(case: Case, model: FlexARClass, ids: Tensor) -> Outputs:
    """Inputs of the trunk, logits, their loss, and the likeliest tokens."""
    classes = _classes(case, model, "c2i_embeds")
    rows = model.rows(model.start(classes), ids[:, :-1])
    rows = rows + model.image_model.preprocessor.positional_embedding
    yield "c2i_embeds", case.subsample("c2i_embeds", rows)
    logits = model.logits(ids[:, :-1], classes)
    yield "c2i_logits", case.subsample("c2i_logits", logits)
    yield "c2i_loss", F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).view(1)
    for name, guidance, fixed in _runs(case, "c2i"):
        values = {"guidance": guidance, "reference_compat": not fixed}
        yield name, _likeliest(case, model, name, _classes(case, model, name), values)


def _text_outputs(case: Case, model: FlexARText, ids: Tensor) -> Outputs:
    """Projected text, logits, and the likeliest tokens."""
    states, mask = _texts(case)
    yield "t2i_text_embeddings", case.subsample("t2i_text_embeddings", model.project(states))
    condition = model.check_condition(TextFeatures(states, mask))
    logits = model.logits(ids[:, :-1], condition)
    yield "t2i_logits", case.subsample("t2i_logits", logits, _slices(case, "c2i_logits"))
    empty = TextFeatures(states[-1:], mask[-1:])
    for name, guidance, _ in _runs(case, "t2i"):
        batch = len(case.tensors[name])
        condition = model.check_condition(TextCondition(TextFeatures(states[:batch], mask[:batch]), empty))
        yield name, _likeliest(case, model, name, condition, {"guidance": guidance})


def _slices(case: Case, name: str) -> str:
    """The slices in the description of another tensor."""
    slices = re.findall(r"\[[-:.,\d\s]*:[-:.,\d\s]*\]", case.description(name))
    return slices[0] if slices else ""


def _runs(case: Case, model: str) -> list[tuple[str, float, bool]]:
    """Names of recorded runs, with their guidance and whether the original's error is corrected in them."""
    runs = []
    for name in sorted(case.tensors):
        if name.startswith(f"{model}_greedy"):
            match = re.fullmatch(rf"{model}_greedy(?:_cfg(\d+(?:\.\d+)?))?(_fixed)?", name)
            if match is None:
                raise case.refusal(f"cannot read the guidance from the name {name!r}")
            runs.append((name, float(match[1] or 1), match[2] is not None))
    return runs


def _classes(case: Case, model: FlexARClass, name: str) -> Tensor:
    """The classes that a description names, "for class ids 1, 5, -1 (none)"."""
    text = case.description(name.removesuffix("_fixed"))  # that of the corrected run refers to the other
    match = re.search(r"for class(?:es| ids)? (-?\d+(?:, -?\d+)*)", text)
    if match is None:
        raise case.refusal(f"the description of {name} does not name its classes")
    classes = [int(text) for text in match[1].split(", ")]
    if not all(-1 <= each < model.num_classes for each in classes):
        raise case.refusal(f"{name} is of the classes {classes}; the model has {model.num_classes}")
    return torch.tensor([model.num_classes if each == -1 else each for each in classes], device=case.device)


def _texts(case: Case) -> tuple[Tensor, Tensor]:
    """Text features [B, T, D] and masks [B, T], the empty text last."""
    inputs, masks = case.data.get("inputs"), case.config.get("text_masks")
    masks = case.config.get("t2i", {}).get("text_masks", masks)
    names = [key for key in inputs if key.startswith("text encoder outputs")]
    recipe = case.input(names[0]) if names else ""
    match = re.search(r"RandomState\((\d+(?:\+\d+)*)\+i\)\.standard_normal\(\((\d+),\s*(\d+)\)\)", recipe)
    if match is None or not isinstance(masks, dict) or not masks:
        raise case.refusal("it needs a recipe of text encoder outputs, RandomState(seed+i), and text_masks")
    seed, shape = sum(map(int, match[1].split("+"))), (int(match[2]), int(match[3]))
    check_size(case.path.name, "text features", (len(masks), *shape))
    states = [case.normal(f"RandomState({seed + number})", shape) for number in range(len(masks))]
    mask = torch.tensor(list(masks.values()), device=case.device).bool()
    if mask.shape != (len(masks), shape[0]):
        raise case.refusal(f"text_masks are {list(mask.shape)}; the features have {shape[0]} tokens")
    return case.place(torch.stack(states)), mask


def _likeliest(
    case: Case, model: FlexARGenerator, name: str, condition: Any, values: dict[str, Any]
) -> Tensor:
    """The likeliest codes after the recorded ones; in half precision the recorded code, where no other is
    likelier by more than the rounding of a logit."""
    settings = model.check_settings({"temperature": 1.0, **values})
    codes, likeliest = case.recorded(name).long(), []
    for place, logits in model.guided_logits(condition, settings, codes):
        best, code = logits.max(-1)
        if case.dtype.itemsize < 4:
            recorded = codes[:, place : place + 1]
            behind = best - logits.gather(-1, recorded[..., None])[..., 0]
            code = torch.where(behind <= 2 * torch.finfo(case.dtype).eps * best.abs(), recorded, code)
        likeliest.append(code)
    return torch.cat(likeliest, 1)


def _filters(case: Case) -> Outputs:
    """Probabilities after temperature, top-k and top-p, in float32 whatever the dtype of the run."""
    for name in sorted(case.tensors):
        if not name.startswith("filter_") or name == "filter_logits":
            continue
        case.recorded("filter_logits")
        logits = case.tensors["filter_logits"].to(case.device)[:, -1]
        match = re.search(r"\{[^}]*\}", case.description(name))
        try:
            values = {**FILTERS, **ast.literal_eval(match[0])}
        except (TypeError, ValueError, SyntaxError) as error:
            raise case.refusal(f"{name} does not state its settings") from error
        if set(values) != set(FILTERS):
            raise case.refusal(f"{name} has the settings {', '.join(values)}; known are {', '.join(FILTERS)}")
        allowed = restrict(logits / values["temperature"], values["top_k"], values["top_p"])
        yield name, allowed.softmax(-1)
