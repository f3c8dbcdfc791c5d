"""Where each Hugging Face VLM family keeps its parts, and how its visual tokens lie.

A family is a row of `FAMILIES`: most need no code beyond the function that returns the layout of an image's
tokens. Families that are not in the table work through `get_decoder` and `get_encoder` when their core merges
features at the language model's boundary; others are refused with the reason.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .algorithms.grid import Grid
from .hosts import ENCODES_BEFORE_FORWARD, check_parts, pattern_of

MEDIA = ("image", "video")


@dataclass
class Record:
    """Data recorded when features are produced, because later calls no longer carry it.

    `lengths` are the tokens of each item, `arguments` those of `get_image_features` (sizes, grids),
    `rows`, `states` and `keys` hold, per item, what reducers need of the tower, `groups` [tiles, n]
    records which patches were merged, `patches_left` [tiles, n] which of them are left where the tower drops
    the others, `entered` [N] per item which tokens' patches entered the tower (None:
    all), `seconds` the time that it took to choose them.
    """

    modality: str
    lengths: list[int]
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: dict[int, list[Tensor]] = field(default_factory=dict)
    states: list[Tensor] | None = None
    keys: list[Tensor] | None = None
    groups: Tensor | None = None
    patches_left: Tensor | None = None
    entered: list[Tensor] | None = None
    seconds: float = 0.0
    reduced: bool = False  # a functional call's features: nothing is left to drop


@dataclass(frozen=True)
class Family:
    """How one model family lays out its visual tokens.

    `grids(host, record)`: one Grid per item, or None where the layout is not known; `pool`: the side of the
    block of patches behind a token (a number or the field of the configuration that holds it); `order`: how
    patches lie in the tower; `segment`: what counts as one image in a prompt when it is not one item of
    `pooler_output`; `readable`: whether the tower's attention can be divided among the tokens.

    Orders: "raster" (a batch of tiles), "images" (one image after the other), "block" (units of pool²
    patches), "window" (the same, permuted by windows). Segments: "items", "runs" (of tiles), "tiles" (of a
    sample), "stretches" (of neighbouring tokens, whatever the items are; their layout is not known).
    """

    grids: Callable[["Host", Record], list[Grid | None]] | None = None
    pool: int | str | None = 1
    order: str = "raster"
    segment: str = "items"
    bidirectional: bool = False
    first_position: int = 0
    readable: bool = True


@dataclass
class Host:
    """The parts of one model: `core` merges features into embeddings, `lm` is the text backbone, `tower`
    encodes the image, `media_ids` are its placeholder tokens (image, then video). `frame_reader` names the
    reducer, if any, that compares the frames of videos, `media_sizes` how many pictures form each medium of
    the prompts (see `Session.media_sizes`)."""

    model: nn.Module
    core: nn.Module
    lm: nn.Module
    layers: nn.ModuleList
    tower: nn.Module
    media_ids: dict[str, int]
    family: Family
    name: str
    frame_reader: str | None = None
    media_sizes: Sequence[int] | None = None

    @property
    def config(self) -> Any:
        """The core's configuration."""
        return self.core.config

    @property
    def kernel(self) -> str:
        """The attention implementation of the language model: "sdpa", "eager", …"""
        return self.lm.config._attn_implementation.removeprefix("vistok_")

    @property
    def pool(self) -> int:
        """Side of the block of patches behind one visual token."""
        pool = self.family.pool
        if pool is None:  # Gemma 3 pools to a given number of tokens
            vision = self.config.vision_config
            return vision.image_size // vision.patch_size // math.isqrt(self.config.mm_tokens_per_image)
        return pool if isinstance(pool, int) else int(attrgetter(pool)(self.config))

    def layer_type(self, layer: int) -> str:
        """ "full_attention", "sliding_attention", … of a decoder layer."""
        return self._patterns[layer][0]

    def window(self, layer: int) -> int:
        """The number of tokens, itself included, that a token attends to in a sliding-attention layer."""
        return self._patterns[layer][1]

    @cached_property
    def attentions(self) -> list[nn.Module | None]:
        """The attention modules of the decoder layers; None for layers with a running state in their place
        (linear attention, convolutions)."""
        return [getattr(layer, "self_attn", None) for layer in self.layers]

    @cached_property
    def recurrent(self) -> list[str]:
        """The kinds of layers that keep a running state in place of keys ("linear_attention", "conv")."""
        kinds = [self.layer_type(i) for i, attention in enumerate(self.attentions) if attention is None]
        return sorted(set(kinds))

    @cached_property
    def first_attention(self) -> int:
        """The first decoder layer that keeps keys and values."""
        return next(i for i, attention in enumerate(self.attentions) if attention is not None)

    def check_attention(self, reducers: Sequence[Any]) -> None:
        """Raise TypeError, naming the first of the `reducers` inside the language model, where some layers
        keep a running state."""
        if self.recurrent:
            raise TypeError(
                f"the language model of {self.name} mixes attention with {', '.join(self.recurrent)}, whose "
                f"state is made of all tokens read, so {type(reducers[0]).__name__} cannot drop tokens "
                "inside it; use a reducer of features"
            )

    def key_width(self, layer: int) -> int:
        """Width of a layer's keys, heads times head width; that of values is the same. 0: it keeps none."""
        if self.attentions[layer] is None:
            return 0
        projection = getattr(self.attentions[layer], "k_proj", None)
        if isinstance(projection, nn.Linear):
            return projection.out_features
        config, attention = self.lm.config, self.attentions[layer]
        heads = config.num_attention_heads
        width = getattr(attention, "head_dim", None) or config.hidden_size // heads
        return (config.num_key_value_heads or heads) * width

    @cached_property
    def _patterns(self) -> list[tuple[str, int | None]]:
        return [pattern_of(self.lm.config, attention, i) for i, attention in enumerate(self.attentions)]

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        """Position embeddings [B, L, D] of a layer for new one-dimensional positions [B, L]."""
        rotary = self.lm.rotary_emb
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            return rotary(hidden, positions, self.layer_type(layer))
        return rotary(hidden, positions)

    def grids(self, record: Record) -> list[Grid | None]:
        """The layout of each item of a record. Raises ValueError for a video without one where its frames
        are compared."""
        grids: list[Grid | None] = [] if self.family.grids is None else self.family.grids(self, record)
        if len(grids) != len(record.lengths):  # of releases that do not divide features by picture
            grids = [None] * len(record.lengths)
        grids = [
            grid if grid is not None and grid.num_tokens == length else None
            for grid, length in zip(grids, record.lengths, strict=True)
        ]
        if self.frame_reader is not None and record.modality == "video" and None in grids:
            raise ValueError(
                f"{self.frame_reader} compares the frames of a video, and how the "
                f"{record.lengths[grids.index(None)]} tokens of this one are divided into frames is not "
                f"known for {self.name}; have the attached model make the features itself from "
                "pixel_values_videos, or use a reducer of pictures, such as divprune"
            )
        return grids


# Layouts ----------------------------------------------------------------------------------------------------


def _square(host: Host, record: Record) -> list[Grid | None]:
    sides = [math.isqrt(n) for n in record.lengths]
    return [
        Grid.single(side, side) if side * side == n and record.modality == "image" else None
        for side, n in zip(sides, record.lengths, strict=True)
    ]


def _anyres(host: Host, record: Record) -> list[Grid | None]:
    """LLaVA-NeXT: the thumbnail, then the unpadded tiles with a newline per row."""
    sizes = record.arguments.get("image_sizes")
    if sizes is None:
        return [None] * len(record.lengths)
    vision = host.config.vision_config
    side = vision.image_size // vision.patch_size
    pinpoints = [tuple(size) for size in host.config.image_grid_pinpoints]
    return [
        Grid.anyres(tuple(size), pinpoints, side, tile_pixels=vision.image_size)
        for size in torch.as_tensor(sizes).tolist()
    ]


def _next_video(host: Host, record: Record) -> list[Grid | None]:
    """LLaVA-NeXT-Video: frames are pooled in blocks; what fills no block at the edge is left out."""
    if record.modality == "image":
        return _anyres(host, record)
    side = _tower_side(host) // host.config.spatial_pool_stride
    return [_square_frames(length, side, separators=0) for length in record.lengths]


def _onevision(host: Host, record: Record) -> list[Grid | None]:
    """LLaVA-OneVision: frames are resampled to half their side, and a newline ends the video."""
    if record.modality == "image":
        return _anyres(host, record)
    side = -(-_tower_side(host) // 2)
    return [_square_frames(length, side, separators=1) for length in record.lengths]


def _tower_side(host: Host) -> int:
    """The side of the map of patches that the tower makes of a picture."""
    vision = host.config.vision_config
    return vision.image_size // vision.patch_size


def _square_frames(length: int, side: int, separators: int) -> Grid | None:
    frames = (length - separators) // side**2
    return frames_grid(frames, side, side, video=True, separators=separators) if frames else None


def _qwen(host: Host, record: Record) -> list[Grid | None]:
    grids = record.arguments.get(f"{record.modality}_grid_thw")
    if grids is None:
        return [None] * len(record.lengths)
    merge = host.config.vision_config.spatial_merge_size
    is_video = record.modality == "video"
    return [frames_grid(t, h // merge, w // merge, is_video) for t, h, w in torch.as_tensor(grids).tolist()]


def _merged_by_image(host: Host, record: Record) -> list[Grid | None]:
    """VideoLLaMA 3: each image states by how much its patches are merged."""
    grids = record.arguments.get(f"{record.modality}_grid_thw")
    merges = record.arguments.get(f"{record.modality}_merge_sizes")
    if grids is None or merges is None:
        return [None] * len(record.lengths)
    pairs = zip(torch.as_tensor(grids).tolist(), torch.as_tensor(merges).tolist(), strict=True)
    is_video = record.modality == "video"
    return [frames_grid(t, h // merge, w // merge, is_video) for (t, h, w), merge in pairs]


def _kimi(host: Host, record: Record) -> list[Grid | None]:
    grids = record.arguments.get(f"{record.modality}_grid_thw")
    if grids is None:
        return [None] * len(record.lengths)
    rows, columns = host.config.vision_config.merge_kernel_size
    return [frames_grid(1, h // rows, w // columns) for _, h, w in torch.as_tensor(grids).tolist()]


def _shapes(host: Host, record: Record) -> list[Grid | None]:
    """LFM2-VL: the patches of each tile, of which blocks are merged."""
    shapes = record.arguments.get("spatial_shapes")
    if shapes is None:
        return [None] * len(record.lengths)
    unit = host.config.downsample_factor
    return [Grid.single(height // unit, width // unit) for height, width in torch.as_tensor(shapes).tolist()]


def frames_grid(frames: int, height: int, width: int, video: bool = False, separators: int = 0) -> Grid:
    """Frames of height × width tokens, one after the other, and `separators` behind the last."""
    tokens, ends = height * width, torch.full((separators,), -1)
    return Grid(
        tile=torch.cat([torch.arange(frames).repeat_interleave(tokens), ends]),
        index=torch.cat([torch.arange(tokens).repeat(frames), ends]),
        height=height,
        width=width,
        rows=1,
        cols=frames,
        thumbnail=None,
        first=0,
        video=video,
    )


def _mistral3(host: Host, record: Record) -> list[Grid | None]:
    sizes = record.arguments.get("image_sizes")
    if sizes is None:
        return [None] * len(record.lengths)
    unit = host.config.vision_config.patch_size * host.config.spatial_merge_size
    return [Grid.single(height // unit, width // unit) for height, width in torch.as_tensor(sizes).tolist()]


def tiled(lengths: list[int], columns: int | None, thumbnail_last: bool) -> Grid | None:
    """Tiles of equal square size in prompt order; the last one shows the whole image when there are
    several."""
    side = math.isqrt(lengths[0])
    if any(length != side * side for length in lengths):
        return None
    tiles = len(lengths)
    cut = tiles - (thumbnail_last and tiles > 1)
    columns = columns if columns and cut % columns == 0 else cut
    return Grid(
        tile=torch.arange(tiles).repeat_interleave(side * side),
        index=torch.arange(side * side).repeat(tiles),
        height=side,
        width=side,
        rows=cut // columns,
        cols=columns,
        thumbnail=tiles - 1 if cut < tiles else None,
        first=0,
    )


_PACKED = Family(_qwen, pool="vision_config.spatial_merge_size", readable=False)
_SHUFFLED = Family(_square, pool="downsample_factor")
_STRETCHES = Family(segment="stretches", readable=False)

FAMILIES: dict[str, Family] = {
    "llava": Family(_square),
    "vipllava": Family(_square),
    "video_llava": Family(_square),
    "deepseek_vl": Family(_square),
    "deepseek_vl_hybrid": Family(_square, readable=False),  # a token is one of each tower
    "janus": Family(_square),
    "llava_next": Family(_anyres),
    "llava_next_video": Family(_next_video),
    "llava_onevision": Family(_onevision),
    "qwen2_vl": Family(_qwen, pool=2, order="block"),
    "qwen2_5_vl": Family(_qwen, pool=2, order="window"),
    "qwen3_vl": Family(_qwen, pool=2, order="block"),
    "qwen3_vl_moe": Family(_qwen, pool=2, order="block"),
    "qwen3_5": _PACKED,
    "qwen3_5_moe": _PACKED,
    "qwen2_5_omni_thinker": _PACKED,
    "qwen3_omni_moe_thinker": _PACKED,
    "glm4v": _PACKED,
    "glm4v_moe": _PACKED,
    "glm46v": _PACKED,
    "glmga": _PACKED,
    "glm_ocr": _PACKED,
    "ernie4_5_vl_moe": _PACKED,
    "paddleocr_vl": _PACKED,
    "exaone4_5": _PACKED,
    "hyperclovax_vision_v2": _PACKED,
    "cosmos3_edge": _PACKED,
    "cosmos3_omni": _PACKED,
    "minimax_m3_vl": _PACKED,
    "video_llama_3": Family(_merged_by_image, readable=False),
    "kimi_k25": Family(_kimi, readable=False),
    "lfm2_vl": Family(_shapes, pool="downsample_factor", readable=False),
    "gemma4": Family(readable=False),
    "gemma3n": Family(readable=False),
    "internvl": Family(pool=2, segment="runs"),
    "qianfan_ocr": Family(pool=2, segment="runs"),
    "idefics2": _STRETCHES,
    "granite_docling": _STRETCHES,
    "perception_lm": _STRETCHES,
    "idefics3": Family(pool="scale_factor", segment="tiles"),
    "smolvlm": Family(pool="scale_factor", segment="tiles"),
    "paligemma": Family(_square, bidirectional=True, first_position=1),
    "gemma3": Family(_square, pool=None, bidirectional=True),
    "mistral3": Family(_mistral3, pool="spatial_merge_size", order="images"),
    "lighton_ocr": Family(_mistral3, pool="spatial_merge_size", order="images"),
    "aya_vision": _SHUFFLED,
    "cohere2_vision": _SHUFFLED,
    "ovis2": Family(_square, pool="vision_config.hidden_stride"),
    "got_ocr2": Family(_square, readable=False),  # convolutions behind the tower overlap
    "pp_chart2table": Family(_square, readable=False),
    "step3p7": Family(_square, readable=False),
    "aria": Family(readable=False),
    "molmo2": Family(readable=False),
}

_ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}
_RUNNING = {"linear_attention", "conv"}  # layers that keep a running state in place of keys

_OTHER_CUTS = {"mllama", "blip-2", "instructblip"}

_UNTESTED = "no reducer has been tested in it"
_ENCODER_DECODER = "it is an encoder-decoder, and its pictures enter the encoder"
_INDEXED = "its attention picks keys by an index of its own (indexed_attention), which cannot be shortened"
_SLIDING = "its language model mixes attention with hybrid_sliding, whose state cannot be shortened"
_MASKED = "no placeholder token marks the places of a picture in its prompt"
_VOCABULARY = "pictures enter as codes of a tokenizer, which are text to its language model"
_CROSSING = "pictures enter by cross-attention layers of its own, which reducers do not know"

_REFUSED = {
    "apertus1p5": _VOCABULARY,
    "blip": _CROSSING,
    "chameleon": _VOCABULARY,
    "cohere_compass": _UNTESTED,
    "deepseek_ocr2": _UNTESTED,
    "diffusion_gemma": "it writes blocks of tokens by diffusion and not one after the other",
    "dots3_note": _INDEXED,
    "emu3": _VOCABULARY,
    "evolla": "it reads proteins and not pictures",
    "fast_vlm": _UNTESTED,
    "florence2": _ENCODER_DECODER,
    "fuyu": "it has no vision tower: patches enter the language model as they are",
    "gemma4_unified": _UNTESTED,
    "git": _MASKED,
    "glm5_next": _INDEXED,
    "granite4_vision": _UNTESTED,
    "hunyuan_vl": _UNTESTED,
    "hy_v4_vl": _INDEXED,
    "idefics": _CROSSING,
    "inkling2": _SLIDING,
    "inkling2_loop": _SLIDING,
    "inkling_mm_model": _SLIDING,
    "instructblipvideo": "its Q-Former reads the frames of a video, in which no reducer has been tested",
    "kosmos-2": _MASKED,
    "kosmos-2.5": _MASKED,
    "lfm3_vl": _UNTESTED,
    "llama4": "its vision features are projected inside the model's own forward, out of reach of hooks",
    "minicpm_ocr": _UNTESTED,
    "minicpmv4_6": _UNTESTED,
    "minicpmv4_7": _UNTESTED,
    "mistral4": "it is a language model without a vision tower",
    "mistral_large4": _INDEXED,
    "muse_glimmer": _UNTESTED,
    "muse_spark": _UNTESTED,
    "nemotron_h_omni": _UNTESTED,
    "phi4_multimodal": "it merges features inside its own embedding layer, out of reach of hooks",
    "pi0": "it generates actions and not text",
    "pix2struct": _ENCODER_DECODER,
    "pp_formulanet": _ENCODER_DECODER,
    "qwen4_exp": _UNTESTED,
    "shieldgemma2": "it classifies pictures and generates no text",
    "t5gemma2": _ENCODER_DECODER,
    "udop": _ENCODER_DECODER,
    "unlimited_ocr": (
        "its language model mixes attention with reference_sliding_attention, whose state cannot be shortened"
    ),
    "vision-encoder-decoder": _ENCODER_DECODER,
}

_UNDIVIDED = "its features come as one sequence that is not divided by picture"
_SINCE_5_18 = {"idefics2": _UNDIVIDED, "minimax_m3_vl": _UNDIVIDED}


def register_family(model_type: str, family: Family) -> None:
    """Describe how the visual tokens of models with this `config.model_type` lie, for a family that vistok
    does not know. Raises ValueError for a known one."""
    if model_type in known_families():
        raise ValueError(f"the family {model_type!r} is known already; see `vistok list --families`")
    FAMILIES[model_type] = family


def known_families() -> list[str]:
    """Every `config.model_type` that is known by name, refused ones included, in alphabetical order."""
    return sorted({*FAMILIES, *_OTHER_CUTS, *_REFUSED})


def refusal(model_type: str) -> str | None:
    """Why reducers are refused for all models of a `config.model_type`; None: they are not."""
    if not ENCODES_BEFORE_FORWARD and model_type in _SINCE_5_18:
        return f"before transformers 5.18, {_SINCE_5_18[model_type]}"
    return _REFUSED.get(model_type)


def resolve(model: nn.Module) -> Host:
    """The parts of a Hugging Face VLM. Raises TypeError, naming the class and the reason, for what cannot
    host a reducer."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        hint = "; give the unwrapped model (model.module)" if hasattr(model, "module") else ""
        raise TypeError(f"{name} is not a transformers model or a timm VisionTransformer{hint}")
    kind = model.config.model_type
    if (
        hasattr(model, "vision_model")
        and not hasattr(model, "language_model")
        and kind.endswith("vision_model")
    ):
        raise TypeError(f"{name} wraps a tower; attach to the tower itself: model.vision_model")
    if (reason := refusal(kind)) is not None:
        raise TypeError(f"reducers cannot attach to {name}: {reason}")
    core = model.base_model
    if kind not in FAMILIES:
        _check_unknown(model, core)
    lm = core.get_decoder()
    while not hasattr(lm, "layers") and hasattr(lm, "model"):
        lm = lm.model
    if not hasattr(lm, "layers"):
        raise TypeError(
            f"reducers cannot attach to {name}: its language model {type(lm).__name__} has no `layers`"
        )
    attending = _attending_layers(name, lm)
    tower = core.get_encoder(modality="image")
    if not isinstance(tower, nn.Module) or tower is core:
        raise TypeError(f"reducers cannot attach to {name}: it has no vision tower")
    parts = {"core": core, "language model": lm}
    kinds = {type(layer): layer for layer in attending}
    replaced = [layer for layer in attending if "forward" in vars(layer)]
    for layer in [*kinds.values(), *replaced]:
        check_parts(name, {**parts, "decoder layer": layer, "attention": layer.self_attn})
    ids = {
        modality: int(token)
        for modality in MEDIA
        if (token := getattr(model.config, f"{modality}_token_id", None)) is not None
    }
    return Host(
        model=model,
        core=core,
        lm=lm,
        layers=lm.layers,
        tower=tower,
        media_ids=ids,
        family=FAMILIES.get(kind, Family()),
        name=name,
    )


def _attending_layers(name: str, lm: nn.Module) -> list[nn.Module]:
    """The decoder layers with attention. Raises TypeError where others are of a kind that is not known."""
    types = list(getattr(lm.config, "layer_types", None) or ())
    unknown = set(types) - _ATTENTIONS - _RUNNING
    attending = [layer for layer in lm.layers if hasattr(layer, "self_attn")]
    running = [i for i, kind in enumerate(types[: len(lm.layers)]) if kind in _RUNNING]
    if unknown or not attending or len(attending) + len(running) != len(lm.layers):
        what = ", ".join(sorted(unknown)) or "other modules than self_attn"
        raise TypeError(
            f"reducers cannot attach to {name}: its language model mixes attention with {what}, whose state "
            "cannot be shortened"
        )
    return attending


def _check_unknown(model: nn.Module, core: nn.Module) -> None:
    """A family outside the table must have what every family of the table has."""
    name, kind = type(model).__name__, model.config.model_type
    parameters = inspect.signature(core.forward).parameters
    reasons = []
    if core.get_decoder() is core:
        reasons.append("no separate language model (get_decoder)")
    tower = core.get_encoder(modality="image")
    if tower is core or not isinstance(tower, nn.Module):
        reasons.append("no vision tower (get_encoder)")
    if not hasattr(core, "get_image_features"):
        reasons.append("no get_image_features")
    if getattr(model.config, "image_token_id", None) is None:
        reasons.append("no image_token_id in its config")
    if ENCODES_BEFORE_FORWARD and "mm_encoder_outputs" not in parameters:
        reasons.append("its core takes no mm_encoder_outputs")
    if reasons:
        known = ", ".join(sorted({*FAMILIES, *_OTHER_CUTS}))
        raise TypeError(
            f"reducers cannot attach to {name} ({kind}): {'; '.join(reasons)}. Families with a table entry: "
            f"{known}; timm VisionTransformers and CLIP or SigLIP towers take the merging reducers (ToMe, "
            "PiToMe)"
        )
