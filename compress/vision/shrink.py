"""Encoding a picture again at fewer tokens, by the model's own tower and projector.

The picture is taken from the pixel values that its features were made of, as the processor normalised them.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algorithms.grid import Grid
from ..attention import watch
from ..families import Host, Record
from ..layout import Span

Connect = Callable[[Host, Tensor, Grid], Tensor]


def check(host: Host) -> None:
    """Raises TypeError, naming the family and the reason, where no smaller picture can be encoded."""
    kind, tower = host.model.config.model_type, type(host.tower).__name__
    reason = None
    if kind not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        reason = f"{_REASONS.get(kind, 'how it encodes one is not known')} (families that can: {known})"
    elif kind in _INTERPOLATING and not _interpolates(host):
        reason = f"its tower {tower} takes pictures of one size only"
    if reason is not None:
        raise TypeError(f"{host.name} ({kind}) cannot encode a smaller picture: {reason}")


def encoder(host: Host, record: Record, span: Span) -> Callable[[Grid], list[Tensor]] | None:
    """A function that encodes an image in the layout of a smaller grid; None if no pixel values were kept.

    The smaller grid holds tokens of the image's tiles (or of some of them) under the same numbers, and no
    separators. Each of its tiles is resized from the same tile of the image, by an antialiasing bicubic
    filter. The function returns the features [n, D] and, for models that add features inside their first
    layers (Qwen3-VL), those of each such layer [n, D].

    Raises TypeError for families that cannot and images whose layout is not known, ValueError where tokens
    merge inside the tower.
    """
    if _pixels(record) is None:
        return None
    check(host)
    if span.grid is None:
        raise TypeError(
            f"this {record.modality} cannot be encoded at a smaller size: {host.name} does not record the "
            f"layout of its {len(span.places)} tokens"
        )
    if record.modality == "video" and host.family.order == "raster":
        raise TypeError(
            f"this video cannot be encoded at a smaller size: {host.name} pools its frames behind the tower"
        )
    if record.groups is not None:
        raise ValueError(
            "tokens merge inside the tower, so a smaller picture cannot be encoded there; attach one of the "
            "two reducers"
        )
    family = _FAMILIES[host.model.config.model_type]

    def encode(grid: Grid) -> list[Tensor]:
        with _unobserved():
            return family(host, record, span, grid.to("cpu"))

    return encode


@contextmanager
def _unobserved() -> Iterator[None]:
    """No attention reports to probes inside: those are for the picture itself."""
    before = watch(None)
    try:
        yield
    finally:
        watch(before)


def _pixels(record: Record) -> Tensor | None:
    names = ("pixel_values", "pixel_values_videos")
    return next((record.arguments[name] for name in names if record.arguments.get(name) is not None), None)


def _interpolates(host: Host) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(type(host.tower).forward).parameters


def _unit(host: Host) -> int:
    """Side, in pixels, of the square behind one visual token."""
    patch = host.config.vision_config.patch_size
    return (patch if isinstance(patch, int) else patch[0]) * host.pool


def _resized(pictures: Tensor, height: int, width: int) -> Tensor:
    """Pictures [P, C, H, W] at another size, within each one's range of values (as 8-bit pictures stay)."""
    if pictures.shape[-2:] == (height, width):
        return pictures
    exact = pictures.float()
    small = F.interpolate(exact, (height, width), mode="bicubic", antialias=True)
    low, high = exact.amin((-2, -1), keepdim=True), exact.amax((-2, -1), keepdim=True)
    return small.clamp(low, high).to(pictures)


# Towers that take tiles of one size -------------------------------------------------------------------------


def _tiles(host: Host, record: Record, span: Span) -> Tensor:
    """The encoder's inputs of one image [P, C, H, W], in the order of its grid's numbers."""
    pixels, count = _pixels(record), span.grid.num_tiles
    if host.family.segment == "tiles":  # [samples, most tiles, C, H, W], filled up with zeros
        pixels = pixels.flatten(0, 1)
        pixels = pixels[pixels.flatten(1).any(1)]
        first = (sum(record.lengths[: span.item]) + span.offset) // span.grid.tokens_per_tile
    elif host.family.segment == "runs":
        first = span.item
    elif pixels.ndim == 5:
        return pixels[span.item, :count]
    else:
        first = sum(1 if grid is None else grid.num_tiles for grid in host.grids(record)[: span.item])
    return pixels[first : first + count]


def _by_tiles(host: Host, record: Record, span: Span, grid: Grid, *, connect: Connect) -> list[Tensor]:
    used, where = torch.unique(grid.tile, return_inverse=True)
    unit, full = _unit(host), span.grid
    tiles = _tiles(host, record, span)[used.tolist(), :, : full.height * unit, : full.width * unit]
    states = _states(host, record, _resized(tiles, grid.height * unit, grid.width * unit))
    patches = grid.tokens_per_tile * host.pool**2
    features = connect(host, states[:, -patches:], grid)  # without the class token
    return [features[where.to(features.device), grid.index.to(features.device)]]


def _states(host: Host, record: Record, tiles: Tensor) -> Tensor:
    """What the family takes from its tower, [P, 1 + n, C] (n without a class token)."""
    options = {"interpolate_pos_encoding": True} if _interpolates(host) else {}
    output = host.tower(
        pixel_values=tiles.to(host.tower.dtype), output_hidden_states=True, return_dict=True, **options
    )
    layer = record.arguments.get("vision_feature_layer")
    layer = getattr(host.config, "vision_feature_layer", None) if layer is None else layer
    if layer is None or (layer == -1 and host.model.config.model_type == "internvl"):
        return output.last_hidden_state
    if isinstance(layer, int):
        return output.hidden_states[layer]
    return torch.cat([output.hidden_states[index] for index in layer], -1)


def _project(host: Host, states: Tensor, grid: Grid) -> Tensor:
    return host.core.multi_modal_projector(states)


def _shuffle(host: Host, states: Tensor, grid: Grid) -> Tensor:
    """Each block of patches side by side in one vector, row by row: [P, n, C] → [P, h · w, C · pool²]."""
    pool = host.pool
    blocks = states.unflatten(1, (grid.height, pool, grid.width, pool))
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


def _internvl(host: Host, states: Tensor, grid: Grid) -> Tensor:
    return host.core.multi_modal_projector(_shuffle(host, states, grid))


def _idefics3(host: Host, states: Tensor, grid: Grid) -> Tensor:
    return host.core.connector.modality_projection(_shuffle(host, states, grid))


def _gemma3(host: Host, states: Tensor, grid: Grid) -> Tensor:
    projector, pool = host.core.multi_modal_projector, host.pool
    maps = states.transpose(1, 2).unflatten(2, (grid.height * pool, grid.width * pool))
    pooled = F.avg_pool2d(maps, pool).flatten(2).transpose(1, 2)
    return (projector.mm_soft_emb_norm(pooled) @ projector.mm_input_projection_weight).type_as(states)


# Towers that take pictures of any size ----------------------------------------------------------------------


def _mistral3(host: Host, record: Record, span: Span, grid: Grid) -> list[Tensor]:
    unit = _unit(host)
    picture = _pixels(record)[span.item, None, :, : span.grid.height * unit, : span.grid.width * unit]
    size = (grid.height * unit, grid.width * unit)
    chosen = {name: record.arguments[name] for name in ("vision_feature_layer",) if name in record.arguments}
    output = type(host.core).get_image_features(  # the class's: the instance's records
        host.core,
        pixel_values=_resized(picture, *size),
        image_sizes=torch.tensor([size], device=picture.device),
        return_dict=True,
        **chosen,
    )
    return [output.pooler_output[0]]


def _qwen(host: Host, record: Record, span: Span, grid: Grid) -> list[Tensor]:
    vision = host.config.vision_config
    merge, patch, depth = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
    sizes = record.arguments[f"{record.modality}_grid_thw"]
    pixels = _pixels(record).split(sizes.prod(-1).tolist())[span.item]
    frames, height, width = sizes[span.item].tolist()
    # Patches come in blocks of merge²: [frames, h, w, merge, merge, C, depth, patch, patch]
    blocks = pixels.view(frames, height // merge, width // merge, merge, merge, -1, depth, patch, patch)
    pictures = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(
        frames * depth, -1, height * patch, width * patch
    )
    small = _resized(pictures, grid.height * merge * patch, grid.width * merge * patch)
    blocks = small.view(frames, depth, -1, grid.height, merge, patch, grid.width, merge, patch)
    output = type(host.core).get_image_features(  # the class's: the instance's records
        host.core,
        pixel_values=blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, pixels.shape[1]),
        image_grid_thw=sizes.new_tensor([[frames, grid.height * merge, grid.width * merge]]),
        return_dict=True,
    )
    layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    return [
        item[grid.flat.to(item.device)]
        for item in (x if isinstance(x, Tensor) and x.ndim == 2 else x[0] for x in layers)
    ]


_FAMILIES: dict[str, Callable[[Host, Record, Span, Grid], list[Tensor]]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _qwen),
    **dict.fromkeys(
        ("llava", "vipllava", "llava_next", "llava_next_video", "paligemma"),
        partial(_by_tiles, connect=_project),
    ),
    **dict.fromkeys(("idefics3", "smolvlm"), partial(_by_tiles, connect=_idefics3)),
    "internvl": partial(_by_tiles, connect=_internvl),
    "gemma3": partial(_by_tiles, connect=_gemma3),
    "mistral3": _mistral3,
}
_INTERPOLATING = ("llava", "vipllava", "llava_next", "llava_next_video", "paligemma", "gemma3")
_REASONS = {"llava_onevision": "it resamples its features after the projector"}
