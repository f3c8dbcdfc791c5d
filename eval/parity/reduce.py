"""Parity of token reducers: matchings, merging in vision transformers and towers, and costs.

Cases inside language models are in `reduce_llm`.
"""

import re
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...compress.algorithms.energy import energy, merged_count, pitome_matching, text_energy
from ...compress.algorithms.merge import (
    Matching,
    bipartite_soft_matching,
    compose,
    kth_bipartite_soft_matching,
    r_schedule,
)
from ...compress.methods.pitome import PiToMe
from ...compress.methods.tome import ToMe
from ...compress.report.accounting import llm_block_macs, vit_block_macs
from ...compress.vision import timm as timm_host
from ...compress.vision import tower as tower_host
from .case import CannotBuild, Case, Outputs

FAMILIES = ("reduce",)

WIDTHS = {"deit-s": 384, "vit-l": 1024}


def run(case: Case) -> Outputs:
    """Every recorded tensor of a `reduce` case, recomputed. Raises CannotBuild naming an unknown method."""
    config = case.data["config"]
    if isinstance(config, list):
        first = config[0]
        if "kind" in first:
            return _chain(_tome_matching(case, entry) for entry in config)
        if "mode" in first:
            return _chain(_pitome_matching(case, entry) for entry in config)
        if "form" in first:
            return _schedules(config)
    elif "vit" in config:
        return _vit(case)
    elif "clip_vision" in config:
        return _clip(case)
    elif "llm_block" in config:
        return _accounting(case)
    elif "llama" in config:
        from . import reduce_llm

        return reduce_llm.run(case)
    elif set(config) & {"h2o", "promptdistill", "tokenselect"}:
        from . import reduce_cache

        return reduce_cache.run(case)
    elif "i_stage" in config:
        from . import reduce_zerotprune

        return reduce_zerotprune.run(case)
    raise CannotBuild(f"{case.path.name}: this version does not verify {', '.join(_names(config))}")


def _names(config: dict[str, Any] | list[dict[str, Any]]) -> list[str]:
    return list(config if isinstance(config, dict) else config[0])


def _chain(outputs: Any) -> Outputs:
    for output in outputs:
        yield from output


# Matchings --------------------------------------------------------------------------------------------------


def _tome_matching(case: Case, entry: dict[str, Any]) -> Outputs:
    name = f"c{entry['case']}"
    x = case.recorded(f"{name}.x")
    class_token = entry.get("class_token", False)
    if entry["kind"] == "chain":
        size, matchings = None, []
        for step, r in enumerate(entry["r"]):
            matchings.append(bipartite_soft_matching(x, r, class_token=class_token))
            x, size = matchings[-1].merge_weighted(x, size)
            yield f"{name}.x{step}", x
            yield f"{name}.size{step}", size
        yield f"{name}.source", _adjacency(compose(matchings))
        return
    metric = case.recorded(f"{name}.metric")
    if entry["kind"] == "kth_bipartite_soft_matching":
        matching = kth_bipartite_soft_matching(metric, entry["k"])
        yield f"{name}.dst_idx", matching.destination
        yield f"{name}.mean", matching.merge(x)
        yield f"{name}.unmerge", matching.unmerge(matching.merge(x))
    elif entry["kind"] == "ties":
        merged, size = bipartite_soft_matching(metric, entry["r"], class_token=class_token).merge_weighted(x)
        yield f"{name}.wavg_x", merged
        yield f"{name}.size_total", size.sum(1)
    elif entry["kind"] == "bipartite_soft_matching":
        distill = entry["distill_token"]
        matching = bipartite_soft_matching(metric, entry["r"], class_token=class_token, distill_token=distill)
        if matching.source.shape[1]:
            batch = len(x)
            yield f"{name}.unm_idx", matching.kept[matching.kept % 2 == 0].reshape(batch, -1) // 2
            yield f"{name}.src_idx", matching.source // 2
            yield f"{name}.dst_idx", matching.kept.gather(1, matching.destination) // 2
        yield from _merges(case, name, matching, ("mean", "amax"))
        if not distill:
            yield f"{name}.unmerge", matching.unmerge(matching.merge(x))
    else:
        raise CannotBuild(f"{case.path.name}: unknown matching {entry['kind']!r}")


def _merges(case: Case, name: str, matching: Matching, modes: tuple[str, ...]) -> Outputs:
    x = case.recorded(f"{name}.x")
    for mode in modes:
        if f"{name}.{mode}" in case.tensors:
            yield f"{name}.{mode}", matching.merge(x, mode)
    yield from _pair(f"{name}.wavg", matching.merge_weighted(x))
    yield from _pair(f"{name}.wavg_sized", matching.merge_weighted(x, case.recorded(f"{name}.size")))
    if f"{name}.source" in case.tensors:
        yield f"{name}.source", _adjacency(matching.groups)


def _pair(name: str, merged: tuple[Tensor, Tensor]) -> Outputs:
    yield f"{name}_x", merged[0]
    yield f"{name}_size", merged[1]


def _adjacency(groups: Tensor) -> Tensor:
    """Groups [B, N] → [B, M, N], 1 where an output token holds an input token."""
    return F.one_hot(groups).transpose(1, 2).float()


def _pitome_matching(case: Case, entry: dict[str, Any]) -> Outputs:
    name, rule = f"c{entry['case']}", entry["mode"]
    metric = case.recorded(f"{name}.metric")
    protected = int(entry["class_token"])
    free = metric.shape[1] - protected
    r = merged_count(metric.shape[1] if rule == "bsm" else free, entry["ratio"])
    if r != entry["r"]:
        raise CannotBuild(f"{case.path.name}: case {entry['case']} merges {entry['r']} tokens, vistok {r}")
    margin, alpha = entry["margin"], entry["alpha"]
    matching = pitome_matching(metric, r, margin, protected=protected, alpha=alpha, rule=rule)
    if rule != "bsm":
        patches = metric[:, protected:]
        scores = text_energy(patches, margin) if rule == "text" else energy(patches, margin, alpha)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        yield f"{name}.energy", scores
        yield f"{name}.order", order
        b = free // 2 if rule == "pitome_bsm" else r  # the destinations come last
        yield f"{name}.dst_idx", matching.destination - (matching.kept.shape[1] - b)
        if rule == "pitome_bsm":
            rank = order.argsort(-1)
            unmerged = matching.kept[:, protected : matching.kept.shape[1] - b]
            yield f"{name}.src_idx", rank.gather(1, matching.source - protected) // 2
            yield f"{name}.unm_idx", rank.gather(1, unmerged - protected) // 2
    yield from _merges(case, name, matching, ("mean", "prune"))


def _schedules(config: list[dict[str, Any]]) -> Outputs:
    right = 0
    for entry in config:
        r = tuple(entry["r"]) if entry["form"] == "tuple" else entry["r"]
        right += r_schedule(entry["layers"], r) == entry["per_layer"]
    yield "n", torch.tensor([right])


# Vision transformers ----------------------------------------------------------------------------------------


def _vit(case: Case) -> Outputs:
    config = case.data["config"]
    model = case.build(lambda: _vision_transformer(case))
    images = _images(case)
    yield "logits_unpatched", _logits(model, images)
    if "r" in config:
        r = tuple(config["r"]) if config["r_form"] == "tuple" else config["r"]
        reducer = ToMe(r=r, prop_attn=config["prop_attn"])
    elif "ratio" in config:
        reducer = PiToMe(
            ratio=config["ratio"],
            margin=config["margins"],
            use_bsm_pitome=config["use_bsm_pitome"],
            prop_attn=config["prop_attn"],
        )
    else:
        raise CannotBuild(f"{case.path.name}: a vision transformer with neither r (ToMe) nor ratio (PiToMe)")
    blocks: dict[int, Tensor] = {}
    for index in (0, len(model.blocks) - 1):
        model.blocks[index].register_forward_hook(lambda m, i, out, index=index: blocks.update({index: out}))
    merging = timm_host.install(model, reducer)
    yield "logits", _logits(model, images)
    trace = merging.trace
    case.check_config("tokens_after_block", trace.tokens)
    entering = [trace.num_tokens, *trace.tokens[:-1]]
    case.check_config("total_flop", sum(vit_block_macs(n, model.embed_dim) for n in entering))
    yield "tokens_last_block", blocks[len(model.blocks) - 1]
    yield "size", trace.size
    yield "group", trace.groups()
    yield "tokens_block0", blocks[0][:, :: max(1, blocks[0].shape[1] // 16)]


def _vision_transformer(case: Case) -> nn.Module:
    """timm's class for a case, with a distillation token or a norm after pooling if its weights have one."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    sizes, keys = dict(case.data["config"]["vit"]), case.keys
    eps, pool = sizes.pop("norm_eps"), sizes.pop("pool")
    sizes.pop("distilled", None)  # the weights show that, too
    sizes.pop("fc_norm", None)
    norm = {"norm_layer": lambda dim, **kw: nn.LayerNorm(dim, eps=eps, **kw)}
    if "dist_token" in keys:
        return VisionTransformerDistilled(**sizes, global_pool=pool, **norm)
    return VisionTransformer(**sizes, global_pool=pool, fc_norm="fc_norm.weight" in keys, **norm)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [B, classes], or [2, B, classes] of the two heads of a distilled model."""
    if not hasattr(model, "head_dist"):
        return model(images)
    tokens = model.forward_features(images)
    return torch.stack([model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])])


def _clip(case: Case) -> Outputs:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = case.data["config"]
    # The class lost the prefix that the recorded keys, and so the weights, carry.
    model = case.build(
        lambda: nn.ModuleDict({"vision_model": CLIPVisionModel(CLIPVisionConfig(**config["clip_vision"]))})
    )
    tower = model["vision_model"]
    images = _images(case)
    plain = tower(images, output_hidden_states=True).hidden_states[-2]
    yield "feature_unpatched_mean", plain[:, 1:].mean(1)
    last = int(re.search(r"index <= (\d+)", config["bsm_layers"])[1])
    reducer = PiToMe.clip(ratio=config["ratio"], margin=config["margins"], use_bsm=last + 1)
    merging = tower_host.install(tower, reducer, unmerge=False)
    output = tower(images, output_hidden_states=True)
    case.check_config("tokens_per_hidden_state", [state.shape[1] for state in output.hidden_states])
    width, trace = config["clip_vision"]["hidden_size"], merging.trace
    entering = [trace.num_tokens, *trace.tokens[:-1]]
    case.check_config("total_flops", sum(vit_block_macs(n, width) for n in entering))
    yield "feature", output.hidden_states[-2]
    yield "last_hidden_state", output.last_hidden_state
    yield "pooler_output", output.pooler_output


def _images(case: Case) -> Tensor:
    """The recipe's picture: kron(normal blocks, ones) + 0.3 times normal noise."""
    recipe = case.data["inputs"]
    draws = re.findall(r"RandomState\((\d+)\)\.standard_normal\(\(([\d,]+)\)\)", recipe)
    tile = re.search(r"ones\(\(([\d,]+)\)\)", recipe)
    factor = re.search(r"\+ ([.\d]+)\*", recipe)
    if len(draws) != 2 or not tile or not factor:
        raise CannotBuild(f"{case.path.name}: cannot read the image recipe {recipe!r}")
    blocks, noise = (np.random.RandomState(int(seed)).standard_normal(_shape(shape)) for seed, shape in draws)
    picture = np.kron(blocks, np.ones(_shape(tile[1]))) + float(factor[1]) * noise
    return case.place(torch.from_numpy(picture.astype(np.float32)))


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


# Costs ------------------------------------------------------------------------------------------------------


def _accounting(case: Case) -> Outputs:
    config = case.data["config"]
    macs = []
    for row in config["rows"]:
        macs.append(sum(blocks * llm_block_macs(n, config["d"], config["m"]) for blocks, n in row["stages"]))
        if macs[-1] != row["macs"]:
            raise CannotBuild(f"{case.path.name}: {row['name']} is {macs[-1]}, recorded {row['macs']}")
    for row in config["vit_rows"]:
        model = row["name"].split(" ")[0]
        if model not in WIDTHS:
            raise CannotBuild(f"{case.path.name}: the width of {model} is not known")
        width = WIDTHS[model]
        total = sum(vit_block_macs(n, width) for n in row["tokens_into_block"])
        if total != row["macs"]:
            raise CannotBuild(f"{case.path.name}: {row['name']} is {total}, recorded {row['macs']}")
    yield "macs", torch.tensor(macs, dtype=torch.float64) / 1e9
