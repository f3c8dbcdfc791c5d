"""Parity of token selection between encoder and LLM: scores in, indices out."""

import hashlib
import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...compress.algorithms.anyres import (
    TileSelection,
    globalcom2,
    globalcom2_ratios,
    globalcom2_scores,
    hired,
    unrounded,
)
from ...compress.algorithms.dpp import dpp_order, text_relevance
from ...compress.algorithms.fold import prumerge, visionzip, visionzip_order
from ...compress.algorithms.grid import Grid
from ...compress.algorithms.important_diverse import important_and_diverse
from ...compress.algorithms.select import cosine_distances, farthest_first, top_k
from . import prune_in_model, prune_pixels, prune_video
from .case import CannotBuild, Case, Outputs

FAMILIES = ("prune",)

Subcase = dict[str, Any]
Array = np.ndarray


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    config = case.data["config"]
    if str(config.get("algorithm", "")).startswith("PixelPrune"):
        yield from prune_pixels.run(case)
        return
    if "model" in config:
        from .prune_models import run as run_models

        yield from run_models(case)
        return
    algorithm = str(config.get("algorithm", ""))
    known = {
        "DivPrune": _divprune,
        "HiRED": _hired,
        "GlobalCom2": _globalcom2,
        "VisionZip": _visionzip,
        "PruMerge": _prumerge,
        "CDPruner": _cdpruner,
        "VisPruner": _vispruner,
        "in-LLM selectors": prune_in_model.select,
        "EVS": prune_video.run_evs,
        "VidCom2": prune_video.run_vidcom2,
    }
    for name, outputs in known.items():
        if algorithm.startswith(name):
            yield from outputs(case)
            return
    raise CannotBuild(f"{case.path.name}: no adapter for the algorithm {algorithm!r}")


# DivPrune ---------------------------------------------------------------------------------------------------


def _divprune(case: Case) -> Outputs:
    for ratio, tokens, keep in case.data["config"].get("keep_rule", ()):
        case.check_stated(f"tokens kept of {tokens} at {ratio}", round(ratio * tokens), keep)
    exact = "permutation" in case.data["inputs"]
    inputs, orders = {}, {}
    for sub in case.data["config"]["subcases"]:
        tag, features = sub["tag"], _ternary(sub) if exact else _clusters(sub)
        _check_digest(case, sub, features)
        inputs[tag] = x = torch.from_numpy(features).to(case.device)
        orders[tag] = order = farthest_first(x, sub["keep_max"])
        _same_picks(case, f"{tag} with every token kept", order, farthest_first(x, len(x))[: len(order)])
        for keep in sub.get("keeps", ()):
            _same_picks(case, f"{tag} with {keep} kept", order[:keep], farthest_first(x, keep))
        if exact:
            half = farthest_first(x.half(), len(order), compute_dtype="input")
            _same_picks(case, f"{tag} in float16", order, half)
        if "unique" in sub:
            yield f"{tag}.order_reference", _with_repeats(case, sub, order)
            continue
        yield f"{tag}.order", order
        if not exact:
            yield f"{tag}.first_score", cosine_distances(x).fill_diagonal_(torch.inf).amin(1)
            yield f"{tag}.margin", _margins(case, sub, features, order)
    members = [tag for tag in orders if re.fullmatch(r"b\d+", tag)]
    if members:
        together = farthest_first(torch.stack([inputs[tag] for tag in members]), len(orders[members[0]]))
        for tag, order in zip(members, together, strict=True):
            _same_picks(case, f"{tag} in a batch", orders[tag], order)


def _clusters(sub: Subcase) -> Array:
    n, d = sub["n"], sub["d"]
    random = np.random.RandomState(sub["seed"])
    centres = random.standard_normal((40, d))
    which = random.randint(0, 40, n)
    return (centres[which] + 0.5 * random.standard_normal((n, d))).astype(np.float32)


def _ternary(sub: Subcase) -> Array:
    rows = sub.get("unique", sub["n"])
    random = np.random.RandomState(sub["seed"])
    x = np.zeros((rows, sub["d"]), np.float32)
    for row in x:
        places = random.permutation(sub["d"])[:16]
        row[places] = random.randint(0, 2, 16) * 2 - 1
    return np.tile(x, (sub["n"] // rows, 1))


def _margins(case: Case, sub: Subcase, features: Array, order: Tensor) -> Tensor:
    """The margin of each pick in float64; the least margin and the distances reached must be those stated."""
    unit = torch.from_numpy(features).double()
    unit = unit / unit.norm(dim=1, keepdim=True)
    distances = (1 - unit @ unit.T).fill_diagonal_(torch.inf)
    score, margins, reached = distances.amin(1), [], []
    order = order.cpu()
    for step, pick in enumerate(order.tolist()):
        rest = score.index_fill(0, order[step], -torch.inf)
        # With one token left there is no second; the recording compared it with picked ones, at -1.
        second = rest.max().clamp_min(-1)
        margins.append(score[pick] - second)
        reached.append(float(score[pick]) if step else math.inf)
        score = distances[pick].clone() if step == 0 else torch.minimum(score, distances[pick])
        score[order[: step + 1]] = -torch.inf
    for keep, distance in zip(sub["keeps"], sub["min_pairwise_cosine_distance"], strict=True):
        if distance is not None:
            case.check_stated(f"{sub['tag']}: distance at {keep}", min(reached[1:keep]), distance, 1e-6)
    return torch.stack(margins).float()


def _with_repeats(case: Case, sub: Subcase, order: Tensor) -> Tensor:
    """The reference's picks with duplicates: once distinct rows are exhausted, place 0 repeatedly."""
    unique = sub["unique"]
    rest = sorted(set(range(sub["n"])) - set(order[:unique].tolist()))
    lowest = torch.tensor(rest[: len(order) - unique], device=order.device)
    _same_picks(case, f"{sub['tag']} after its distinct rows", order[unique:], lowest)
    return torch.cat([order[:unique], torch.zeros_like(order[unique:])])


# HiRED ------------------------------------------------------------------------------------------------------


def _hired(case: Case) -> Outputs:
    config = case.data["config"]
    side = math.isqrt(config["tokens_per_crop"])
    for sub in config["subcases"]:
        rows = _class_rows(sub, config["tokens_per_crop"] + 1)
        _check_digest(case, sub, rows)
        early, late = torch.from_numpy(rows)[..., 1:].to(case.device)
        start = 0
        for number, image in enumerate(sub["images"]):
            name, crops = f"{sub['tag']}.img{number}", image["crops"]
            grid = _anyres(config["grid_pinpoints_hw"], image["size_hw"], side)
            case.check_stated(f"{name}: arrangement", [grid.rows, grid.cols], image["grid_rows_cols"])
            case.check_stated(f"{name}: crops", grid.num_tiles, crops)
            part = slice(start, start + crops)
            start += crops
            settings = {"rate": sub["rate"], "alpha": sub["alpha"]}
            published = hired(early[part], late[part], grid, geometry="reference", **settings)
            corrected = hired(early[part], late[part], grid, **settings)
            case.check_stated(f"{name}: kept", _per_tile(published, grid), image["kept_per_crop"])
            case.check_stated(f"{name}: kept in all", len(published.kept), image["kept_total"])
            case.check_stated(f"{name}: after unpadding", len(published.packed), image["after_unpad"])
            case.check_stated(
                f"{name}: kept, corrected", _per_tile(corrected, grid), image["fixed_kept_per_crop"]
            )
            yield f"{name}.kept", published.kept
            yield f"{name}.packed", published.packed
            yield f"{name}.packed_fixed", corrected.packed


def _class_rows(sub: Subcase, tokens: int) -> Array:
    random, crops = np.random.RandomState(sub["seed"]), sub["P"]
    z = 1.2 * random.standard_normal((2, crops, sub["H"], tokens))
    z = z + 1.5 * np.sin(np.arange(tokens) / 37.0 + random.rand(2, crops, 1, 1) * 6)
    e = np.exp(z - z.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


def _per_tile(selection: TileSelection, grid: Grid) -> list[int]:
    return (selection.kept // grid.tokens_per_tile).bincount(minlength=grid.num_tiles).tolist()


# GlobalCom2 -------------------------------------------------------------------------------------------------


def _globalcom2(case: Case) -> Outputs:
    config = case.data["config"]
    side = config["side"]
    pinpoints = [size[::-1] for size in config["grid_pinpoints_wh"]]
    for sub in config["subcases"]:
        tag, logits = sub["tag"], _class_logits(sub, side)
        _check_digest(case, sub, logits)
        scores = torch.from_numpy(logits).to(case.device)
        grid = _anyres(pinpoints, sub["size_wh"][::-1], side)
        case.check_stated(f"{tag}: arrangement", [grid.cols, grid.rows], sub["grid_cols_rows"])
        selection = globalcom2(scores, grid, ratio=sub["ratio"], geometry="reference")
        ratios = globalcom2_ratios(scores, grid, sub["ratio"], config["temperature"])
        combined, guide = globalcom2_scores(scores, unrounded(grid))
        kept = _per_tile(selection, grid)
        valid = (combined > -torch.inf).sum(1).tolist()
        thumbnail = selection.packed[: kept[0]]
        sequence = selection.packed[kept[0] :]
        case.check_stated(f"{tag}: unpadded tokens", valid, sub["valid_per_crop"])
        case.check_stated(f"{tag}: kept", kept[1:], sub["kept_per_crop"])
        case.check_stated(f"{tag}: newlines", int((sequence == -1).sum()), sub["newlines"])
        case.check_stated(f"{tag}: LLM tokens", len(selection.packed), sub["llm_tokens"])
        yield f"{tag}.thumb", thumbnail
        yield f"{tag}.scales", ratios
        yield f"{tag}.sequence", sequence
        for crop, count in enumerate(kept[1:]):
            inside = combined[crop] > -torch.inf
            yield f"{tag}.crop{crop}.global", guide[crop, inside]
            yield f"{tag}.crop{crop}.rank", top_k(combined[crop, inside], count)


def _class_logits(sub: Subcase, side: int) -> Array:
    random, crops = np.random.RandomState(sub["seed"]), sub["P"]
    y, x = np.mgrid[0:side, 0:side]
    waves = [
        np.sin(x / random.uniform(2, 8) + random.uniform(0, 6))
        + np.cos(y / random.uniform(2, 8) + random.uniform(0, 6))
        for _ in range(crops)
    ]
    smooth = np.stack(waves).reshape(crops, -1)
    noise = random.standard_normal(smooth.shape)
    return (sub["scale"] * (0.5 * smooth + 0.7 * noise) + sub["shift"]).astype(np.float32)


# VisionZip and PruMerge -------------------------------------------------------------------------------------


def _visionzip(case: Case) -> Outputs:
    for sub in case.data["config"]["subcases"]:
        random, batch = np.random.RandomState(sub["seed"]), sub["B"]
        hidden = _mixture(random, batch, 577, sub["C"])
        attention = _softmax(random, (batch, sub["H"], 577), 1.0)
        metric = _mixture(random, batch, 577, sub["dk"])
        arrays = (torch.from_numpy(x.astype(np.float32)).to(case.device) for x in (hidden, attention, metric))
        folded = visionzip(*arrays, sub["dominant"], sub["contextual"])
        yield f"{sub['tag']}.kept", folded.kept
        yield f"{sub['tag']}.out", folded.tokens
        if "grid_cols_rows" in sub:
            cols, rows = sub["grid_cols_rows"]
            grid = Grid.tiled(rows, cols, 24, 24, thumbnail="first")
            order = visionzip_order(folded.kept, sub["contextual"], grid)
            made = 1000 + torch.arange(sub["contextual"], device=case.device).expand(batch, -1)
            names = torch.cat([folded.kept, made], 1)
            names = names + 10000 * torch.arange(batch, device=case.device)[:, None]
            yield f"{sub['tag']}.sequence", names.flatten()[order]


def _prumerge(case: Case) -> Outputs:
    for sub in case.data["config"]["subcases"]:
        tag, random, channels = sub["tag"], np.random.RandomState(sub["seed"]), sub["C"]
        features = _mixture(random, 1, 577, channels)
        query = sub["temp"] * random.standard_normal((1, 577, channels))
        keys = _mixture(random, 1, 577, channels)
        x, q, k = (torch.from_numpy(v[0].astype(np.float32)).to(case.device) for v in (features, query, keys))
        attention = (q[0] @ k.T * channels**-0.5).softmax(0)[1:]
        for name, plus in (("plain", False), ("plus", True)):
            folded = prumerge(x[1:], attention, k[1:], plus=plus)
            case.check_stated(f"{tag}: tokens of {name}", len(folded.tokens), sub[f"{name}_tokens"])
            if not plus:
                share = len(folded.kept) / (len(x) - 1)
                case.check_stated(f"{tag}: share of outliers", share, sub["outlier_ratio"], 1e-9)
            yield f"{tag}.{name}", folded.tokens.unsqueeze(0)


# CDPruner and VisPruner -------------------------------------------------------------------------------------


def _cdpruner(case: Case) -> Outputs:
    for sub in case.data["config"]["subcases"]:
        random, batch, n = np.random.RandomState(sub["seed"]), sub["B"], sub["N"]
        arrays = (
            _mixture(random, batch, n, sub["D"], k=80, noise=1.0),
            _mixture(random, batch, n, sub["E"]),
            random.standard_normal((sub["M"], sub["E"])),
        )
        features, image, text = (torch.from_numpy(x.astype(np.float32)).to(case.device) for x in arrays)
        orders = {}
        for dtype in (torch.float32, torch.float64):
            x, y, z = features.to(dtype), image.to(dtype), text.to(dtype)
            relevance = text_relevance(y.flatten(0, 1), z, sign=-1).view(batch, n)  # one range for all crops
            picks = [dpp_order(tile, own, sub["keep"]) for tile, own in zip(x, relevance, strict=True)]
            orders[dtype] = torch.stack(picks)
        yield f"{sub['tag']}.kept", orders[torch.float32].sort(1).values
        yield f"{sub['tag']}.order64", orders[torch.float64]


def _vispruner(case: Case) -> Outputs:
    for sub in case.data["config"]["subcases"]:
        random, batch, n = np.random.RandomState(sub["seed"]), sub["B"], sub["N"]
        features = torch.from_numpy(_mixture(random, batch, n, sub["C"], k=60))
        attention = torch.from_numpy(_softmax(random, (batch, sub["H"], n), 1.0)).mean(1)
        kept = [
            important_and_diverse(own, tile, sub["keep"], sub["ratio"])
            for own, tile in zip(attention, features, strict=True)
        ]
        yield f"{sub['tag']}.kept", torch.stack(kept)


def _softmax(random: "np.random.RandomState", shape: tuple[int, ...], temperature: float) -> Array:
    z = temperature * random.standard_normal(shape)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _mixture(
    random: "np.random.RandomState", batch: int, n: int, d: int, k: int = 30, noise: float = 0.6
) -> Array:
    centres = random.standard_normal((k, d))
    return centres[random.randint(0, k, (batch, n))] + noise * random.standard_normal((batch, n, d))


# Other values that a case states ---------------------------------------------------------------------------


def _anyres(pinpoints: list[list[int]], size: list[int], side: int) -> Grid:
    tile_pixels = min(min(resolution) for resolution in pinpoints)
    return Grid.anyres(tuple(size), pinpoints, side, tile_pixels=tile_pixels)


def _check_digest(case: Case, sub: Subcase, array: Array) -> None:
    digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    if digest != sub.get("sha256_16", digest):
        raise CannotBuild(f"{case.path.name}: {sub['tag']}: the recipe gave other inputs than were recorded")


def _same_picks(case: Case, what: str, expected: Tensor, picks: Tensor) -> None:
    if not torch.equal(expected, picks):
        first = int((expected != picks).nonzero()[0])
        raise CannotBuild(f"{case.path.name}: {what}: picks differ from number {first} on")
