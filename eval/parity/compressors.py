"""Parity of trained and video compressors, component by component: recorded inputs in, tokens out."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...compress.algorithms import langdc, quota, slowfast
from ...compress.algorithms.grid import best_resolution
from ...compress.trained import m3, slowfast_layer
from ...compress.trained.ldp import LDP, LDPConfig, LDPv2
from ...extras import needs
from . import streams
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


def _slowfast_layer(case: Case) -> Outputs:
    with needs("transformers", None, "building a decoder layer"):
        from transformers import DynamicCache, Qwen2Config
        from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

        from ...compress.hosts import cache_parameter
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "rms_norm_eps")
    config = Qwen2Config(
        **{name: case.config[name] for name in names},
        rope_parameters={"rope_type": "default", "rope_theta": case.config["rope_theta"]},
        attn_implementation="sdpa",
    )
    settings = slowfast_layer.SlowFastConfig(
        layers=(0,),
        cross_attn_implementation=case.config["cross_attn_implementation"],
        cross_attn_gating_type=case.config["cross_attn_gating_type"],
    )
    sessions = []

    def make() -> nn.Module:
        layer = Qwen2DecoderLayer(config, 0)
        sessions.append(slowfast_layer.SlowFast([layer], settings))
        return layer

    layer = case.build(make)
    session = sessions[-1]
    rotation = Qwen2RotaryEmbedding(config).to(case.device)
    types, real = case.recorded("token_type"), case.recorded("attention_mask").bool()
    slow_mask = case.recorded("cross_mask").bool()
    x = case.array("x") * real[..., None]
    slow = case.array("visual") * slow_mask[..., None]
    cache = cache_parameter(layer.forward)

    def run(hidden: Tensor, start: int = 0, **options: Any) -> Tensor:
        places = torch.arange(start, start + hidden.shape[1], device=case.device)[None]
        return layer(hidden, position_embeddings=rotation(hidden, places), **options)

    causal = torch.ones(2 * x.shape[1:2], dtype=torch.bool, device=case.device).tril()
    mask = (causal & real[:, None])[:, None]
    session.trace = {}
    with torch.no_grad():
        with session.reading(slow, types, slow_mask):
            yield "prefill_out", run(x, attention_mask=mask) * real[..., None]
        yield "cross_context", session.trace["layer 0"]
        yield "prefill_out_no_cross", run(x, attention_mask=mask) * real[..., None]
        length, steps, past = int(real[0].sum()), case.array("decode_x"), DynamicCache()
        with session.reading(slow[:1], types[:1, :length], slow_mask[:1]):
            run(x[:1, :length], attention_mask=mask[:1, :, :length, :length], **{cache: past})
            outputs = [
                run(steps[:, [step]], length + step, attention_mask=None, **{cache: past})
                for step in range(steps.shape[1])
            ]
        yield "decode_out", torch.cat(outputs, 1)


# M3 ---------------------------------------------------------------------------------------------------------


def _m3_pool(case: Case) -> Outputs:
    tokens = case.array("x")
    for scale in case.config["scales"]:
        yield f"out_{scale}", m3.nested_pool(tokens, scale, exact=False)


def _m3_anyres(case: Case) -> Outputs:
    config = case.config
    kind = config["mm_patch_merge_type"]
    if kind not in ("spatial", "spatial_unpad") or config["image_aspect_ratio"] != "anyres":
        raise case.refusal(
            f"it merges {config['image_aspect_ratio']} tiles by {kind!r}; this version takes anyres and "
            "spatial or spatial_unpad"
        )
    pixels = config["tower_image_size"]
    pinpoints = [(height, width) for width, height in config["image_grid_pinpoints"]]
    sizes = [(height, width) for width, height in config["image_sizes_wh"]]
    unpads = kind == "spatial_unpad"
    newline = case.array("image_newline") if unpads else None
    features = case.array("features").split(config["tiles"])
    table, ids = case.array("embed_tokens.weight"), case.recorded("input_ids")
    real = case.recorded("attention_mask").bool()
    for scale in config["scales"]:
        rows = []
        for number, (size, tiles) in enumerate(zip(sizes, features, strict=True)):
            height, width = best_resolution(size, pinpoints)
            grid = height // pixels, width // pixels
            if len(tiles) > 1:
                case.check_stated("tiles of a picture", [*grid[::-1]], config["grids_wh"][number])
            pooled = m3.nested_pool(tiles, scale, exact=False)
            visual = m3.merged_tiles(pooled, *grid, image_size=size if unpads else None, newline=newline)
            own = ids[number][real[number]].long()
            rows.append(langdc.spliced(table[own.clamp_min(0)], own, _PLACEHOLDER, visual))
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=case.device)
        yield f"embeds_{scale}", padded
        yield f"mask_{scale}", (torch.arange(padded.shape[1], device=case.device) < lengths[:, None]).int()


# LangDC -----------------------------------------------------------------------------------------------------


def _langdc_ldp(case: Case) -> Outputs:
    kinds = {"ldp": LDP, "ldpv2": LDPv2}
    kind = case.config["kind"]
    if kind not in kinds:
        raise case.refusal(f"its projector is {kind!r}; this version takes {', '.join(kinds)}")
    states = case.array("x")
    case.check_stated("tokens per frame", states.shape[1], case.config["side"] ** 2)
    config = LDPConfig(case.config["mm_hidden_size"], case.config["hidden_size"])
    yield "out", case.build(lambda: kinds[kind](config))(states)


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
    "slowfast_layer": _slowfast_layer,
    "m3_pool": _m3_pool,
    "m3_anyres": _m3_anyres,
    "langdc_assemble": _langdc_assemble,
    "langdc_ldp": _langdc_ldp,
    "stc_cacher": streams.run_cacher,
    "stc_pruner": streams.run_pruner,
    "pvc_preprocess": streams.run_pvc,
}
"""By the beginning of a case's name."""
