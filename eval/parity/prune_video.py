"""Parity of token selection in videos: EVS with its positions, and VidCom²."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...compress.algorithms import evs, vidcom2
from .case import Case, Outputs

Sub = dict[str, Any]


def run_evs(case: Case) -> Outputs:
    """Counts, scores and kept tokens of EVS, and the positions of pruned prompts."""
    config = case.config
    for tokens, frames, q, count_evs, count_vidcom2 in config["counts"]:
        what = f"{frames} frames of {tokens} tokens at q = {q}"
        case.check_stated(f"EVS: {what}", evs.evs_count(frames, tokens, 1 - q), count_evs)
        case.check_stated(f"VidCom2: {what}", vidcom2.vidcom2_count(frames, tokens, 1 - q), count_vidcom2)
    for sub in config["subcases"]:
        frames, tokens = _size(sub)
        features = _walk(np.random.RandomState(sub["seed"]), frames, tokens, sub["D"], sub["kind"])
        video = case.place(torch.from_numpy(features.astype(np.float32)))
        yield f"{sub['tag']}.score", evs.evs_scores(video)[1:].flatten()
        count = evs.evs_count(frames, tokens, 1 - sub["q"])
        case.check_stated(f"{sub['tag']}: tokens kept", count, sub["kept"])
        mask = evs.evs_select(video, count)
        if case.dtype.itemsize >= 4:  # scores in half precision are equal for many tokens
            case.check_stated(f"{sub['tag']}: tokens kept per frame", mask.sum(1).tolist(), sub["per_frame"])
        yield f"{sub['tag']}.kept", mask.flatten().nonzero().squeeze(1)
    for prompt in config["prompts"]:
        yield from _positions(case, prompt)


def _positions(case: Case, prompt: Sub) -> Outputs:
    """One prompt: texts (numbers of tokens) and media between markers."""
    random, tag, names = np.random.RandomState(prompt["seed"]), prompt["tag"], case.config["tokens"]
    ids: list[int] = []
    media = []
    for part in prompt["layout"]:
        if isinstance(part, int):
            ids += random.randint(1, 900, part).tolist()
            continue
        frames, tokens = _size({"merge": 2} | part)
        sites = np.arange(frames * tokens)
        if "keep" in part:
            sites = np.sort(random.permutation(frames * tokens)[: part["keep"]])
        seconds = part.get("tokens_per_second", 1.0) * int(part.get("second_per_grid", 1.0))
        height, width = part["thw"][1] // 2, part["thw"][2] // 2
        media.append(evs.MediumSites(torch.from_numpy(sites), frames, height, width, seconds))
        case.check_stated(f"{tag}: sites of a medium", sites.tolist(), prompt["kept_sites"][len(media) - 1])
        placeholder = names["video" if part.get("video") else "image"]
        ids += [names["vision_start"], *[placeholder] * len(sites), names["vision_end"]]
    tokens = torch.tensor(ids)
    yield f"{tag}.input_ids", tokens
    placeholders = [names["image"], names["video"]]
    positions = evs.evs_positions(tokens, media, placeholders, restart="evs")
    case.check_stated(f"{tag}: delta", int(positions.max()) + 1 - len(ids), prompt["delta"])
    yield f"{tag}.positions", positions
    if "chunk" in prompt:
        first = evs.evs_positions(tokens[: prompt["chunk"]], media, placeholders, restart="evs")
        whole = evs.evs_positions(tokens, media, placeholders, restart="evs", computed=first)
        case.check_stated(f"{tag}: delta in chunks", int(whole.max()) + 1 - len(ids), prompt["delta_chunked"])
        yield f"{tag}.positions_chunked", whole


def run_vidcom2(case: Case) -> Outputs:
    """Channels, scores, budgets and kept tokens of VidCom², in float64."""
    for sub in case.config["subcases"]:
        frames, tokens = _size(sub)
        video = _clip(np.random.RandomState(sub["seed"]), frames, tokens, sub["D"]).to(case.device)
        share, tag = 1.0 - sub["q"], sub["tag"]
        yield f"{tag}.channels", vidcom2.stable_channels(video)
        video_score, frame_score = vidcom2.vidcom2_scores(video)
        yield f"{tag}.video_score", video_score
        yield f"{tag}.frame_score", frame_score
        shares = vidcom2.frame_shares(video_score, share)
        yield f"{tag}.scales", shares.scales
        yield f"{tag}.budgets", shares.budgets
        reference = vidcom2.vidcom2_select(video, share)
        case.check_stated(f"{tag}: tokens of the paper", int(reference.sum()), sub["reference_count"])
        yield f"{tag}.reference_kept", reference.flatten().nonzero().squeeze(1)
        count = vidcom2.vidcom2_count(frames, tokens, share)
        case.check_stated(f"{tag}: exact count", count, sub["exact_count"])
        exact = vidcom2.vidcom2_select(video, share, count)
        case.check_stated(f"{tag}: tokens per frame", exact.sum(1).tolist(), sub["per_frame_exact"])
        yield f"{tag}.exact_kept", exact.flatten().nonzero().squeeze(1)
    if (sub := case.config.get("llava_vid")) is not None:
        video = _clip(np.random.RandomState(sub["seed"]), sub["T"], sub["n"], sub["D"]).to(case.device)
        kept = vidcom2.vidcom2_select(video, sub["base"])
        yield "llava_vid.order", vidcom2.newline_order(kept.cpu(), int(sub["n"] ** 0.5))


def _size(sub: Sub) -> tuple[int, int]:
    """Frames and tokens per frame of a grid of patches."""
    frames, height, width = sub["thw"]
    return frames, (height // sub["merge"]) * (width // sub["merge"])


def _walk(random: "np.random.RandomState", frames: int, tokens: int, width: int, kind: str) -> np.ndarray:
    """Frames [T, n, D] in which tokens wander, with cuts, or signs that give exact ties."""
    if kind == "ties":
        return random.choice([-1.0, 1.0], (frames, tokens, width))
    first = random.standard_normal((1, tokens, width)) + 0.3 * random.standard_normal((1, 1, width))
    video = [first[0]]
    for _ in range(1, frames):
        is_cut = random.uniform() < 0.15
        motion = random.uniform(size=(tokens, 1)) ** 2
        noise = random.standard_normal((tokens, width))
        video.append(noise if is_cut else video[-1] + motion * noise)
    return np.stack(video)


def _clip(random: "np.random.RandomState", frames: int, tokens: int, width: int) -> Tensor:
    """Frames [T, n, D] in float64 that share a scene, drift, and have channels of different scales."""
    scale = np.exp(0.5 * random.standard_normal(width))
    scene = random.standard_normal((1, tokens, width))
    drift = random.uniform(size=(frames, 1, 1)) ** 2 * random.standard_normal((frames, 1, width))
    spread = random.uniform(0.1, 1.0, (frames, tokens, 1))
    noise = spread * random.standard_normal((frames, tokens, width))
    return torch.from_numpy((scene + drift + noise + 0.5) * scale)
