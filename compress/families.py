"""Where each Hugging Face VLM family keeps its parts, and how its visual tokens lie.

A family is a row of `FAMILIES`: most need no code beyond the function that returns the layout of an image's
tokens. Families that are not in the table work through `get_decoder` and `get_encoder` when their core merges
features at the language model's boundary; others are refused with the reason.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
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
    records which patches were merged.
    """

    modality: str
    lengths: list[int]
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: dict[int, list[Tensor]] = field(default_factory=dict)
    states: list[Tensor] | None = None
    keys: list[Tensor] | None = None
    groups: Tensor | None = None
    reduced: bool = False  # a functional call's features: nothing is left to drop


@dataclass(frozen=True)
class Family:
    """How one model family lays out its visual tokens.

    `grids(host, record)`: one Grid per item, or None where the layout is not known; `pool`: the side of the
    block of patches behind a token; `order`: how patches lie in the tower; `segment`: what counts as one
    image in a prompt when it is not one item of `pooler_output`.

    Orders: "raster" (a batch of tiles), "images" (one image after the other), "block" (units of pool²
    patches), "window" (the same, permuted by windows). Segments: "items", "runs" (of tiles), "tiles" (of a
    sample).
    """

    grids: Callable[["Host", Record], list[Grid | None]] | None = None
    pool: int | str | None = 1
    order: str = "raster"
    segment: str = "items"
    bidirectional: bool = False
    first_position: int = 0


@dataclass
class Host:
    """The parts of one model: `core` merges features into embeddings, `lm` is the text backbone, `tower`
    encodes the image, `media_ids` are its placeholder tokens (image, then video)."""

    model: nn.Module
    core: nn.Module
    lm: nn.Module
    layers: nn.ModuleList
    tower: nn.Module
    media_ids: dict[str, int]
    family: Family
    name: str

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
        return pool if isinstance(pool, int) else int(getattr(self.config, pool))

    def layer_type(self, layer: int) -> str:
        """ "full_attention", "sliding_attention", … of a decoder layer."""
        return self._patterns[layer][0]

    def window(self, layer: int) -> int:
        """The number of tokens, itself included, that a token attends to in a sliding-attention layer."""
        return self._patterns[layer][1]

    @cached_property
    def attentions(self) -> list[nn.Module]:
        """The attention modules of the decoder layers."""
        return [layer.self_attn for layer in self.layers]

    def key_width(self, layer: int) -> int:
        """Width of a layer's keys, heads times head width; that of values is the same."""
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
        """The layout of each item of a record."""
        if self.family.grids is None:
            return [None] * len(record.lengths)
        grids = self.family.grids(self, record)
        return [
            grid if grid is not None and grid.num_tokens == length else None
            for grid, length in zip(grids, record.lengths, strict=True)
        ]


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
    if record.modality == "video" or sizes is None:
        return [None] * len(record.lengths)
    vision = host.config.vision_config
    side = vision.image_size // vision.patch_size
    pinpoints = [tuple(size) for size in host.config.image_grid_pinpoints]
    return [
        Grid.anyres(tuple(size), pinpoints, side, tile_pixels=vision.image_size)
        for size in torch.as_tensor(sizes).tolist()
    ]


def _qwen(host: Host, record: Record) -> list[Grid | None]:
    grids = record.arguments.get(f"{record.modality}_grid_thw")
    if grids is None:
        return [None] * len(record.lengths)
    merge = host.config.vision_config.spatial_merge_size
    return [_frames(t, h // merge, w // merge) for t, h, w in torch.as_tensor(grids).tolist()]


def _frames(frames: int, height: int, width: int) -> Grid:
    tokens = height * width
    return Grid(
        tile=torch.arange(frames).repeat_interleave(tokens),
        index=torch.arange(tokens).repeat(frames),
        height=height,
        width=width,
        rows=1,
        cols=frames,
        thumbnail=None,
        first=0,
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


FAMILIES: dict[str, Family] = {
    "llava": Family(_square),
    "vipllava": Family(_square),
    "video_llava": Family(_square),
    "deepseek_vl": Family(_square),
    "llava_next": Family(_anyres),
    "llava_next_video": Family(_anyres),
    "llava_onevision": Family(_anyres),
    "qwen2_vl": Family(_qwen, pool=2, order="block"),
    "qwen2_5_vl": Family(_qwen, pool=2, order="window"),
    "qwen3_vl": Family(_qwen, pool=2, order="block"),
    "qwen3_vl_moe": Family(_qwen, pool=2, order="block"),
    "internvl": Family(pool=2, segment="runs"),
    "idefics3": Family(pool="scale_factor", segment="tiles"),
    "smolvlm": Family(pool="scale_factor", segment="tiles"),
    "paligemma": Family(_square, bidirectional=True, first_position=1),
    "gemma3": Family(_square, pool=None, bidirectional=True),
    "mistral3": Family(_mistral3, pool="spatial_merge_size", order="images"),
    "lighton_ocr": Family(_mistral3, pool="spatial_merge_size", order="images"),
}

_ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}

_OTHER_CUTS = {"mllama", "blip-2", "instructblip"}

_REFUSED = {
    "llama4": "its vision features are projected inside the model's own forward, out of reach of hooks",
    "phi4_multimodal": "it merges features inside its own embedding layer, out of reach of hooks",
}


def register_family(model_type: str, family: Family) -> None:
    """Describe how the visual tokens of models with this `config.model_type` lie, for a family that vistok
    does not know. Raises ValueError for a known one."""
    if model_type in FAMILIES or model_type in _OTHER_CUTS:
        raise ValueError(f"the family {model_type!r} is known already; see `vistok list --families`")
    FAMILIES[model_type] = family


def described_families() -> list[dict[str, str]]:
    """One row per model family that is known by name: its `config.model_type` and where reducers act."""
    rows = {name: "features, layers, cache, and the tower where its class is known" for name in FAMILIES}
    rows |= dict.fromkeys(_OTHER_CUTS, "features at its Q-Former or cross-attention")
    rows |= {name: f"none: {reason}" for name, reason in _REFUSED.items()}
    return [{"model type": name, "reducers of": where} for name, where in sorted(rows.items())]


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
    if kind in _REFUSED:
        raise TypeError(f"reducers cannot attach to {name}: {_REFUSED[kind]}")
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
    unknown = set(getattr(lm.config, "layer_types", None) or ()) - _ATTENTIONS
    if unknown or not all(hasattr(layer, "self_attn") for layer in lm.layers):
        what = ", ".join(sorted(unknown)) or "other modules than self_attn"
        raise TypeError(
            f"reducers cannot attach to {name}: its language model mixes attention with {what}, whose state "
            "cannot be shortened"
        )
    tower = core.get_encoder(modality="image")
    if not isinstance(tower, nn.Module) or tower is core:
        raise TypeError(f"reducers cannot attach to {name}: it has no vision tower")
    parts = {"core": core, "language model": lm}
    kinds = {type(layer): layer for layer in lm.layers}
    replaced = [layer for layer in lm.layers if "forward" in vars(layer)]
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
