"""Parity of trained and video compressors, component by component: recorded inputs in, tokens out."""

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ...compress.algorithms import langdc, quota, slowfast
from .case import Case, Outputs

FAMILIES = ("compressors",)


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor. Raises CannotBuild for a component without an adapter."""
    name = str(case.data.get("case", case.path.stem))
    for component, outputs in COMPONENTS.items():
        if name.startswith(component):
            yield from outputs(case)
            return
    raise case.refusal(
        f"its component {name!r} has no adapter; there are adapters for {', '.join(COMPONENTS)}"
    )


# QuoTA ------------------------------------------------------------------------------------------------------


def _quota(case: Case) -> Outputs:
    config = case.config
    features, newline = case.array("features"), case.array("image_newline")
    case.recorded("scores")
    scores = case.tensors["scores"].double()  # in half precision other frames would get the tokens
    total = config["enhance_total"] * config["enhance_tokens"]
    case.check_stated("tokens per frame", features.shape[1], config["side"] ** 2)
    weights = quota.quota_weights(scores)
    yield "weights", (100 * scores).square()
    yield "weights_norm", weights
    yield "budget_int", quota.quota_budgets(weights, total)
    for version in config["versions"]:
        _, is_capped, is_halved = quota.VERSIONS[version]
        side = -(-config["side"] // 2) if is_halved else config["side"]
        if is_capped:
            yield f"{version}_capped_weights", quota.frame_weights(scores, side * side, total, True)
        frames = quota.quota_frames(features, scores, total, version)
        if frames[0].ndim == 2:
            yield f"{version}_n", torch.tensor([len(frame) for frame in frames])
            yield f"{version}_seq", torch.cat(frames)
        else:
            yield f"{version}_hw", torch.tensor([frame.shape[:2] for frame in frames])
            yield f"{version}_seq", torch.cat([_with_newlines(frame, newline) for frame in frames])


def _with_newlines(frame: Tensor, newline: Tensor) -> Tensor:
    """A frame [h, w, D] with a newline vector after each row, [h · (w + 1), D]."""
    return torch.cat([frame, newline.expand(len(frame), 1, -1)], 1).flatten(0, 1)


# Slow-Fast --------------------------------------------------------------------------------------------------


def _slowfast_split(case: Case) -> Outputs:
    channels = case.config["C"]
    for number, sub in enumerate(case.config["cases"]):
        shape = (sub["frames"], sub["side"] ** 2, channels)
        features = _drawn(case, case.input("x_i"), shape, i=number)
        strides = {
            "temporal_stride": sub["temporal_stride"],
            "spatial_stride": sub["spatial_stride"],
            "sampling_stride": sub["temporal_sampling_stride"],
            "min_frames": sub["min_fast_frames"],
        }
        yield f"fast_{number}", slowfast.fast_tokens(features, **strides)
        yield f"slow_n_{number}", torch.tensor([features.flatten(0, 1).shape[0]])
        frames = slowfast.sampled_frames(
            sub["frames"], sub["temporal_sampling_stride"], sub["min_fast_frames"]
        )
        yield f"idx_{number}", frames
    if case.records("image_fast"):
        stride = re.search(r"spatial stride (\d+)", case.description("image_fast"))
        if stride is None:
            raise case.refusal("the description of image_fast states no spatial stride")
        yield "image_fast", slowfast.spatial_means(case.array("image"), int(stride[1]))


# LangDC -----------------------------------------------------------------------------------------------------


def _langdc_assemble(case: Case) -> Outputs:
    config = case.config
    kind, last_kind = config["projectors"], config["llm_projector_type"]
    wide, narrow = config["hidden_size"], config["cap_hidden_size"]
    video_width, image_width = config["mm_hidden_size"], config["image_mm_hidden_size"]
    # The video encoder returns the frames of a clip one after the other.
    clips, frames = config["clips"], config["frames_per_clip"]
    video = case.array("video_features").unflatten(1, (frames, -1)).flatten(0, 1)
    image = case.array("context_features")
    projectors = case.build(
        lambda: nn.ModuleDict(
            {
                "mm_projector": _projector(case, kind, video_width, wide),
                "image_mm_projector": _projector(case, kind, image_width, wide),
                "cap_mm_projector": _projector(case, kind, video_width, narrow),
                "cap_image_mm_projector": _projector(case, kind, image_width, narrow),
                "llm_projector": _projector(case, last_kind, narrow, wide),
            }
        )
    )
    to_llm = projectors["llm_projector"]
    base = langdc.base_tokens(projectors["image_mm_projector"](image), projectors["mm_projector"](video))
    yield "base_norm", base.norm(dim=-1)[None]
    yield "base_tokens", _channels(case, "base_tokens", base[None])
    clip_image, clip_video = projectors["cap_image_mm_projector"], projectors["cap_mm_projector"]
    clip_tokens = langdc.caption_inputs(clip_image(image), clip_video(video), frames)
    yield "cap_visual", _channels(case, "cap_visual", clip_tokens)

    sequences = case.recorded("sequences")
    steps = _caption_steps(case, clips, sequences.shape[1], config["caption_layers_incl_embedding"], narrow)
    ids = torch.tensor(case.input("input_ids", list)[0], device=case.device)
    embeddings = case.array("embed_tokens")[ids.clamp_min(0)]
    for name in [key for key in case.tensors if key.startswith("capbranch_") and key.endswith("_embeds")]:
        layer = int(re.fullmatch(r"capbranch_l(-?\d+)_embeds", name)[1])
        tokens, is_attended = langdc.padded_captions(langdc.caption_states(steps, layer), sequences)
        sequence = langdc.spliced(embeddings, ids, _PLACEHOLDER, to_llm(tokens))
        mask = langdc.spliced(
            torch.ones(len(ids), 1, device=case.device), ids, _PLACEHOLDER, is_attended[:, None].float()
        )
        yield name, _channels(case, name, sequence[None])
        yield name.replace("_embeds", "_mask"), mask.T.int()
    # Parity: the branch with both reads the embeddings, whatever layer is asked for.
    soft = to_llm(langdc.cut_captions(langdc.caption_states(steps, 0), sequences))
    both = langdc.spliced(embeddings, ids, _PLACEHOLDER, torch.cat([base, soft]))
    yield "dual_embeds", _channels(case, "dual_embeds", both[None])
    yield "dual_len", torch.tensor([len(both), len(both)])


_PLACEHOLDER = -200


def _projector(case: Case, kind: str, width: int, out: int) -> nn.Module:
    """Linear layers from `width` to `out` channels, with GELU between them: "linear" or "mlp2x_gelu"."""
    match = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if kind == "linear":
        return nn.Linear(width, out)
    if match is None:
        raise case.refusal(f"a projector is {kind!r}; this version takes 'linear' and 'mlp2x_gelu'")
    rest = [layer for _ in range(int(match[1]) - 1) for layer in (nn.GELU(), nn.Linear(out, out))]
    return nn.Sequential(nn.Linear(width, out), *rest)


def _caption_steps(case: Case, clips: int, steps: int, layers: int, width: int) -> list[list[Tensor]]:
    """The states that the captioning model returns, step by step and layer by layer."""
    recipe = case.input("hidden_states[s][l]")
    match = re.search(r"(\d+) if s==0 else (\d+)", recipe)
    if match is None:
        raise case.refusal("the recipe of hidden_states states no lengths, as '7 if s==0 else 1'")
    lengths = [int(match[1 if step == 0 else 2]) for step in range(steps)]
    return [
        [_drawn(case, recipe, (clips, length, width), s=step, l=layer) for layer in range(layers)]
        for step, length in enumerate(lengths)
    ]


# Reading a case ---------------------------------------------------------------------------------------------


def _drawn(case: Case, recipe: str, shape: tuple[int, ...], **numbers: int) -> Tensor:
    """Normal noise from the generator of a recipe whose seed is a sum, as `RandomState(50+100*s+l)`."""
    match = re.search(r"RandomState\(([^)]*)\)", recipe)
    if match is None:
        raise case.refusal(f"no RandomState(seed) in {recipe!r}")
    seed = sum(_product(case, term, numbers) for term in match[1].split("+"))
    values = np.random.RandomState(seed).standard_normal(shape)
    return case.place(torch.from_numpy(values.astype(np.float32)))


def _product(case: Case, term: str, numbers: dict[str, int]) -> int:
    product = 1
    for factor in term.split("*"):
        factor = factor.strip()
        if not factor.isdecimal() and factor not in numbers:
            raise case.refusal(f"cannot read {factor!r} in the seed of a recipe")
        product *= int(factor) if factor.isdecimal() else numbers[factor]
    return product


def _channels(case: Case, name: str, values: Tensor) -> Tensor:
    """The channels of `values` [..., D] that are recorded, by the description's "channels [::8]"."""
    match = re.search(r"channels \[::(\d+)\]", case.description(name))
    return values if match is None else values[..., :: int(match[1])]


COMPONENTS: dict[str, Callable[[Case], Outputs]] = {
    "quota_alloc": _quota,
    "slowfast_split": _slowfast_split,
    "langdc_assemble": _langdc_assemble,
}
"""By the beginning of a case's name."""
