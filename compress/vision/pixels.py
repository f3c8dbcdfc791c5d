"""Dropping patches of pictures before the vision tower, so that its blocks run on fewer.

For towers that pack pictures into one sequence and take their positions and borders as arguments: those of
the whole picture are computed as ever, and the tower gets the entries of the patches that stay.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families import Host
from ..hosts import check_checkpointing, keywords, release
from ..reducer import Budget, Patches, PixelReducer, keeps_everything
from ..undo import InModel, Undo

TOWERS = {
    "Qwen2VisionTransformerPretrainedModel": "Qwen2-VL",
    "Qwen2_5_VisionTransformerPretrainedModel": "Qwen2.5-VL",
    "Qwen3VLVisionModel": "Qwen3-VL",
    "Qwen3VLMoeVisionModel": "Qwen3-VL-MoE",
    "Qwen3_5VisionModel": "Qwen3.5",
    "Qwen3_5MoeVisionModel": "Qwen3.5-MoE",
}
"""Class of a tower → the models that have it."""


@dataclass
class Entering:
    """Which visual tokens' patches enter the tower, one mask [N] per picture (None: all), and the time in
    seconds that it took to choose them."""

    masks: list[Tensor] | None = None
    seconds: float = 0.0


class PixelPruning(InModel):
    """A reducer of pixels in a model. Features leave the tower at full length, with zeros for dropped tokens,
    which must not enter the language model.

    Pictures attend to their own patches only, as before. Windows (Qwen2.5-VL) lie where they lie in the whole
    picture: a patch attends to what is left in its window, and windows without patches are left out.

    Raises TypeError for other towers, by name, and ValueError where patches would leave after more blocks
    than there are.
    """

    def __init__(self, host: Host, reducer: PixelReducer, keep: Callable[[], Budget]) -> None:
        kind = type(host.tower).__name__
        if kind not in TOWERS:
            raise TypeError(
                f"{type(reducer).__name__} cannot act in {host.name}: its {kind} does not take the positions "
                f"of single patches and the borders of pictures as arguments. It acts in "
                f"{', '.join(TOWERS.values())}; use a reducer of features, such as divprune"
            )
        depth, first = len(host.tower.blocks), reducer.after_blocks
        if isinstance(first, bool) or not isinstance(first, int) or not -1 <= first <= depth:
            raise ValueError(f"after_blocks is {first!r}; the tower has {depth} blocks: give -1 to {depth}")
        reducer.check(host.config.vision_config)
        self.host, self.reducer, self.keep = host, reducer, keep
        self.first = depth if first == -1 else first
        self._local = threading.local()

    def attach(self, undo: Undo) -> None:
        """Register the hooks of the tower; `undo` removes them."""
        tower = self.host.tower
        if self.first == 0:
            undo.pre_hook(tower, self._before)
            undo.hook(tower, self._after)
        elif self.first < len(tower.blocks):
            undo.pre_hook(tower, self._before_blocks)
            for number, block in enumerate(tower.blocks[self.first :]):
                undo.pre_hook(block, self._before_first_block if number == 0 else self._before_block)
            for outlet in (tower.merger, *getattr(tower, "deepstack_merger_list", ())):
                undo.hook(outlet, self._after_outlet)

    @contextmanager
    def running(self, modality: str, arguments: Mapping[str, Any]) -> Iterator[Entering]:
        """Context of one call of the features' function with `arguments`: what enters the tower."""
        entering = Entering()
        if modality == "image" and not keeps_everything(self.keep()):
            start = time.perf_counter()
            masks = self._choose(arguments)
            if not all(bool(mask.all()) for mask in masks):
                entering.masks = masks
            entering.seconds = time.perf_counter() - start
        self._local.mask = None if entering.masks is None else torch.cat(entering.masks)
        try:
            yield entering
        finally:
            self._local.mask = None

    @property
    def _mask(self) -> Tensor | None:
        return getattr(self._local, "mask", None)

    @torch.no_grad()
    def _choose(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        if arguments.get("image_grid_thw") is None:
            raise ValueError(
                "pixel_values came without image_grid_thw; give what the model's processor returns"
            )
        pixels, sizes = arguments["pixel_values"], arguments["image_grid_thw"].tolist()
        vision = self.host.config.vision_config
        merge, side, depth = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
        counts = [frames * height * width for frames, height, width in sizes]
        shape = (sum(counts), vision.in_channels * depth * side**2)
        if pixels.shape != shape:
            raise ValueError(
                f"pixel_values has the shape {tuple(pixels.shape)}; image_grid_thw and the model's patches "
                f"of {side} × {side} pixels make it {shape}: use the model's own processor"
            )
        frames = pixels.unflatten(1, (vision.in_channels, depth, side, side)).unflatten(0, (-1, merge**2))
        masks = []
        for number, (size, rows) in enumerate(
            zip(sizes, frames.split([n // merge**2 for n in counts]), strict=True)
        ):
            if size[0] != 1:
                raise ValueError(
                    f"image_grid_thw has {size[0]} frames for image {number}; give frames as images of their "
                    "own, or as a video (pixel_values_videos), which stays whole"
                )
            if not all(torch.equal(rows[:, :, :, 0], rows[:, :, :, i]) for i in range(1, depth)):
                raise ValueError(
                    f"image {number} has different pixels in its {depth} temporal slices, of which "
                    f"{type(self.reducer).__name__} compares the first; give moving pictures as a video"
                )
            patches = Patches(rows[:, :, :, 0], size[1] // merge, size[2] // merge)
            mask = self.reducer.select(patches)
            if mask.shape != (len(rows),) or mask.dtype != torch.bool or not mask.any():
                raise ValueError(
                    f"{type(self.reducer).__name__} returned a {mask.dtype} of shape {tuple(mask.shape)}; it "
                    f"must be a bool mask of {len(rows)} tokens with at least one True"
                )
            masks.append(mask)
        return masks

    # Hooks --------------------------------------------------------------------------------------------------

    def _before(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._mask is None:
            return None
        return (), shortened(tower, keywords(tower, args, kwargs), self._mask)

    def _after(self, tower: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._mask is None:
            return None
        mask = self._mask
        output.pooler_output = _spread(output.pooler_output, mask)
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [_spread(layer, mask) for layer in output.deepstack_features]
        return output

    # Where patches leave between two blocks ----------------------------------------------------------------

    def _before_blocks(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._mask is not None:
            self._local.mask = _in_order_of_blocks(tower, keywords(tower, args, kwargs), self._mask)

    def _before_first_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._mask is None:
            return None
        arguments = keywords(block, args, kwargs)
        hidden = arguments["hidden_states"]
        return self._before_block(block, (), {**arguments, "hidden_states": hidden[self._patches(hidden)]})

    def _before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._mask is None:
            return None
        check_checkpointing(block)
        arguments = keywords(block, args, kwargs)
        patches = self._patches(arguments["hidden_states"])
        arguments["position_embeddings"] = tuple(part[patches] for part in arguments["position_embeddings"])
        arguments["cu_seqlens"] = _borders(arguments["cu_seqlens"], patches).unique_consecutive()
        return (), arguments

    def _after_outlet(self, outlet: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        # Outlets before the first block of these get every patch.
        if self._mask is None or len(args[0]) == len(self._patches(output)):
            return None
        return _spread(output, self._mask)

    def _patches(self, like: Tensor) -> Tensor:
        return self._mask.to(like.device).repeat_interleave(self.host.tower.spatial_merge_size**2)


def _in_order_of_blocks(tower: nn.Module, arguments: dict[str, Any], mask: Tensor) -> Tensor:
    """A mask [N] of tokens in the order in which the blocks get them."""
    if not hasattr(tower, "window_size"):
        return mask
    from transformers.vision_utils import get_vision_window_index

    order, _ = get_vision_window_index(
        arguments["grid_thw"], tower.spatial_merge_size, tower.window_size, tower.patch_size
    )
    return mask[order.to(mask.device)]


def shortened(tower: nn.Module, arguments: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    """The arguments of a tower for the patches of some tokens, by their mask [N] among all.

    Raises TypeError where the tower is not called as expected.
    """
    from transformers import vision_utils

    if not {"hidden_states", "grid_thw"} <= set(arguments):
        raise TypeError(
            f"{type(tower).__name__} of {release()} is called with {', '.join(arguments)}; reducers of "
            "pixels need hidden_states and grid_thw"
        )
    arguments = dict(arguments)
    grid, merge = arguments["grid_thw"], tower.spatial_merge_size
    mask = mask.to(arguments["hidden_states"].device)
    patches = mask.repeat_interleave(merge**2)
    # Each function takes what the caller may have computed out of the arguments.
    positions = vision_utils.get_vision_position_ids(grid, merge, kwargs=arguments)
    borders = vision_utils.get_vision_cu_seqlens(grid, kwargs=arguments)
    fewer = {
        "hidden_states": arguments["hidden_states"][patches],
        "position_ids": positions[patches.to(positions.device)],
        "cu_seqlens": _borders(borders, patches),
    }
    if hasattr(tower, "window_size"):
        order, windows = vision_utils.get_vision_window_index(
            grid, merge, tower.window_size, tower.patch_size, kwargs=arguments
        )
        stay = mask[order.to(mask.device)]
        fewer["window_index"] = order_of(order, mask)
        windows = _borders(windows, stay.repeat_interleave(merge**2))
        fewer["cu_window_seqlens"] = windows.unique_consecutive()
    if hasattr(tower, "pos_embed"):
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
            kwargs=arguments,
        )
        stay = patches.to(indices.device)
        fewer |= {"interp_indices": indices[stay], "interp_weights": weights[stay]}
    return {**arguments, **fewer}


def order_of(order: Tensor, mask: Tensor) -> Tensor:
    """An order [N] of all tokens as an order of those in `mask` [N], numbered among themselves."""
    mask = mask.to(order.device)
    return (mask.cumsum(0) - 1)[order[mask[order]]]


def _borders(borders: Tensor, stay: Tensor) -> Tensor:
    """Borders of stretches of a sequence → of what stays [N] of them."""
    before = F.pad(stay.cumsum(0), (1, 0)).to(borders.device)
    return before[borders.long()].to(borders.dtype)


def _spread(x: Tensor, mask: Tensor) -> Tensor:
    """Features [n, D] of the tokens in `mask` [N] at their places among all [N, D], with zeros elsewhere."""
    places = mask.to(x.device).nonzero().squeeze(1)
    return x.new_zeros(len(mask), x.shape[1]).index_copy(0, places, x)
