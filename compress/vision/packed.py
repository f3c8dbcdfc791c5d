"""Merging in towers that pack images of any size into one sequence: Qwen's and Pixtral's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algorithms.merge import Matching
from ..reducer import VisionReducer
from .merging import MergeTrace, VisionMerging, log_size

_EXTRA = 4  # channels added to each half of a head: kernels need multiples of eight


@dataclass
class PackedTrace(MergeTrace):
    """A forward over a packed sequence: one row, in which segments never merge with each other.

    `images` holds the lengths of each image's segments, `shares` the tokens that each segment loses in each
    block, `lengths` what the segments have left. `order`
    [N] is which patch, as they enter the tower, is at each place of the sequence (None: they are in order),
    `first_exit` after how many blocks features first leave the tower (None: all). `bias` [M, 1] is for the
    attention that adds it.
    """

    images: list[list[int]] = field(default_factory=list)
    shares: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    order: Tensor | None = None
    first_exit: int | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        self.lengths = [length for image in self.images for length in image]
        self._edges = self.lengths

    def patch_groups(self, blocks: int | None = None) -> Tensor:
        """`groups` [1, N] of the patches in the order in which they enter the tower."""
        groups = self.groups(blocks)
        return groups if self.order is None else groups[:, self.order.to(groups.device).argsort()]

    def patches_left(self, blocks: int | None = None) -> Tensor:
        """Which patches are left [1, N], in the order in which they enter the tower."""
        left = super().patches_left(blocks)
        return left if self.order is None else left[:, self.order.to(left.device).argsort()]

    def exit_groups(self) -> Tensor:
        """`patch_groups` of patches equal in all features, those of early blocks (deepstack) included."""
        return self.patch_groups(self.first_exit)

    def unmerge(self, x: Tensor, blocks: int | None = None) -> Tensor:
        """Tokens [M, D] or [1, M, D] after the first `blocks` blocks → all N."""
        return super().unmerge(x[None], blocks)[0] if x.ndim == 2 else super().unmerge(x, blocks)

    def borders(self, cu_seqlens: Tensor) -> Tensor:
        """Borders of sequences among all N tokens → among those that are left."""
        before, now = (
            torch.tensor([0, *accumulate(lengths)], device=cu_seqlens.device, dtype=cu_seqlens.dtype)
            for lengths in (self._edges, self.lengths)
        )
        return now[torch.searchsorted(before, cu_seqlens)]


class PackedMerging(VisionMerging):
    """Merging of patches that lie in one sequence, image after image.

    Tokens merge within segments alone: the shortest stretches that any block's attention keeps apart
    (Qwen2-VL and Qwen3-VL: frames; Qwen2.5-VL: windows, also in blocks that attend to whole frames; Pixtral:
    images). The reducer plans for each image (or video) as if it were alone; what it merges there in a block
    is spread over the segments by their lengths, at most half of each. With `keep`, exactly that many of the
    image's patches are left, shared among the segments by length. A merged token has the rotary position of
    the token that the others merged into; keys are compared before rotation.
    """

    def layout(
        self, images: Sequence[Sequence[int]], order: Tensor | None = None, first_exit: int | None = None
    ) -> PackedTrace:
        """The trace of a forward over images with segments of these lengths, with its plan."""
        images = [list(lengths) for lengths in images]
        trace = PackedTrace(self.prefix, images=images, order=order, first_exit=first_exit)
        plans = [self._plan_image(lengths) for lengths in images]
        trace.shares = np.concatenate(plans, 1).tolist() if plans else [[] for _ in range(self.num_blocks)]
        trace.plan = [sum(block) for block in trace.shares]
        return trace

    def begin(self, trace: PackedTrace, x: Tensor) -> None:
        """Check the first block's input [N, D] or [1, N, D] against the layout."""
        trace.batch, trace.num_tokens, trace.device = 1, x.shape[-2], x.device
        if sum(trace.lengths) != trace.num_tokens:
            raise ValueError(
                f"{trace.num_tokens} patches entered the tower, but the grids describe {sum(trace.lengths)}"
            )

    def arguments(
        self, trace: PackedTrace, x: Tensor, kwargs: dict[str, Any], attention: nn.Module, sized: bool
    ) -> dict[str, Any]:
        """Position embeddings and borders of the tokens that are left."""
        if trace.origin is None:
            return kwargs
        embeddings = tuple(part[trace.origin[0].to(part.device)] for part in kwargs["position_embeddings"])
        borders = {
            name: trace.borders(kwargs[name])
            for name in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
            if kwargs.get(name) is not None
        }
        return {**kwargs, **borders, "position_embeddings": embeddings}

    def match(self, trace: PackedTrace, index: int, metric: Tensor, block: nn.Module) -> Matching:
        """The merges of each segment in block `index`, by `metric` [1, N, C]."""

        def match(places: Tensor, r: int) -> Matching:
            return self.match_rows(index, metric[0, places], r, block, places)

        shares = trace.shares[index]
        matching = match_segments(trace.lengths, shares, match, metric.device)
        trace.lengths = [length - r for length, r in zip(trace.lengths, shares, strict=True)]
        return matching

    def _merge(self, trace: PackedTrace, index: int, x: Tensor, block: nn.Module) -> Tensor:
        merged = super()._merge(trace, index, x if x.ndim == 3 else x[None], block)
        return merged if x.ndim == 3 else merged[0]

    def _plan_image(self, lengths: list[int]) -> np.ndarray:
        plan = self.plan(sum(lengths))
        try:
            return spread(plan, lengths, None if self.keep is None else self.depth)
        except ValueError as error:
            raise ValueError(f"{type(self.reducer).__name__}: {error}") from None


class PixtralMerging(PackedMerging):
    """Merging in Pixtral's tower, whose attention takes a mask: one block per image."""

    def start(
        self, tower: nn.Module, pixel_values: Tensor, image_sizes: Any = None, **kwargs: Any
    ) -> tuple[PackedTrace, tuple, dict[str, Any]]:
        """One segment per image."""
        sizes = [pixel_values.shape[-2:]] * len(pixel_values) if image_sizes is None else image_sizes
        patch = tower.patch_size
        trace = self.layout([[int(height // patch * (width // patch))] for height, width in sizes])
        return trace, (pixel_values,), {"image_sizes": image_sizes, **kwargs}

    def arguments(
        self, trace: PackedTrace, x: Tensor, kwargs: dict[str, Any], attention: nn.Module, sized: bool
    ) -> dict[str, Any]:
        """Also the rows and columns of the mask."""
        kwargs = super().arguments(trace, x, kwargs, attention, sized)
        mask = kwargs["attention_mask"]
        if trace.origin is not None and mask is not None:
            origin = trace.origin[0].to(mask.device)
            mask = mask[..., origin, :][..., origin]
        if sized:
            bias = log_size(trace.size, x, attention)
            mask = bias if mask is None else mask + bias
        return {**kwargs, "attention_mask": mask}


class QwenMerging(PackedMerging):
    """Merging in the towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whose attention takes borders and no mask.

    Proportional attention uses channels of its own: queries get a 1 there and keys log(size), so that any
    kernel adds the bias. The channels do not rotate, and they leave before the output projection.
    """

    def __init__(
        self, reducer: VisionReducer, blocks: Sequence[nn.Module], *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(reducer, blocks, *args, **kwargs)
        for block in blocks if reducer.prop_attn else ():
            attention = block.attn
            self.undo.hook(attention.qkv, self._widen(attention), with_kwargs=False)
            self.undo.pre_hook(attention.proj, self._narrow(attention), with_kwargs=False)

    def start(
        self, tower: nn.Module, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any
    ) -> tuple[PackedTrace, tuple, dict[str, Any]]:
        """Segments are what lies between any two borders; the tower takes the borders computed here."""
        from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

        borders = get_vision_cu_seqlens(grid_thw, kwargs=kwargs)
        kwargs["cu_seqlens"], order = borders, None
        images = [0, *accumulate(grid_thw.prod(-1).tolist())]
        edges = {*images, *borders.tolist()}
        if hasattr(tower, "window_size"):
            units, windows = get_vision_window_index(
                grid_thw, tower.spatial_merge_size, tower.window_size, tower.patch_size, kwargs=kwargs
            )
            kwargs |= {"window_index": units, "cu_window_seqlens": windows}
            edges.update(windows.tolist())
            unit = tower.spatial_merge_unit
            order = (units[:, None] * unit + torch.arange(unit, device=units.device)).flatten()
        cuts = sorted(edges)
        segments = [
            [b - a for a, b in pairwise(cuts) if first <= a < last] for first, last in pairwise(images)
        ]
        deepstack = getattr(tower, "deepstack_visual_indexes", None)
        trace = self.layout(segments, order, min(deepstack) + 1 if deepstack else None)
        return trace, (hidden_states,), {"grid_thw": grid_thw, **kwargs}

    def arguments(
        self, trace: PackedTrace, x: Tensor, kwargs: dict[str, Any], attention: nn.Module, sized: bool
    ) -> dict[str, Any]:
        """Also the channels of the bias."""
        kwargs = super().arguments(trace, x, kwargs, attention, sized)
        if sized:
            trace.bias = trace.size[0].log()
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = _wider(cos, 1.0), _wider(sin, 0.0)
        return kwargs

    def _keep_keys(self) -> Callable:
        def hook(module: nn.Module, args: tuple, qkv: Tensor) -> None:
            if self.running is not None:
                self._local.keys = qkv.unflatten(-1, (3, -1))[None, :, 1]

        return hook

    def _widen(self, attention: nn.Module) -> Callable:
        def hook(module: nn.Module, args: tuple, qkv: Tensor) -> Tensor | None:
            if self.running is None or self.running.bias is None:
                return None
            half = attention.head_dim // 2
            wide = F.pad(qkv.unflatten(-1, (3, attention.num_heads, 2, half)), (0, _EXTRA))
            wide[:, 0, :, 0, half] = 1
            wide[:, 1, :, 0, half] = (self.running.bias / attention.scaling).to(wide.dtype)
            return wide.flatten(1)

        return hook

    def _narrow(self, attention: nn.Module) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self.running is None or self.running.bias is None:
                return None
            heads = args[0].unflatten(-1, (attention.num_heads, 2, -1))
            return heads[..., :-_EXTRA].flatten(1), *args[1:]

        return hook


def _wider(x: Tensor, value: float) -> Tensor:
    """Position embeddings [N, d] with room for the extra channels in both halves."""
    return F.pad(x.unflatten(-1, (2, -1)), (0, _EXTRA), value=value).flatten(1)


def match_segments(
    lengths: Sequence[int],
    shares: Sequence[int],
    match: Callable[[Tensor, int], Matching],
    device: torch.device,
) -> Matching:
    """One matching over a sequence of segments, each of which merges its own share.

    `match(places [B, n], r)` merges r of the n tokens of each row; segments that are alike go to it together.
    """
    left = [length - r for length, r in zip(lengths, shares, strict=True)]
    starts = torch.tensor([0, *accumulate(lengths)], device=device)
    places = torch.tensor([0, *accumulate(left)], device=device)
    alike: dict[tuple[int, int], list[int]] = {}
    for number, kind in enumerate(zip(lengths, shares, strict=True)):
        alike.setdefault(kind, []).append(number)
    kept = torch.empty(sum(left), dtype=torch.long, device=device)
    sources, destinations = [], []
    for (length, r), numbers in alike.items():
        first, place = starts[numbers][:, None], places[numbers][:, None]
        rows = first + torch.arange(length, device=device)
        matching = match(rows, r) if r else Matching.identity(len(numbers), length, device)
        kept[place + torch.arange(length - r, device=device)] = first + matching.kept
        sources.append((first + matching.source).flatten())
        destinations.append((place + matching.destination).flatten())
    return Matching(kept[None], torch.cat(sources)[None], torch.cat(destinations)[None], sum(lengths))


def spread(plan: Sequence[int], lengths: Sequence[int], depth: int | None = None) -> np.ndarray:
    """Tokens that each segment of an image merges in each block [blocks, segments], where blocks merge `plan`
    tokens of the whole image: by length, at most half of each segment.

    With `depth`, the number of blocks that merge, exactly what the plan leaves of the image is left: each
    segment has a goal by its length, and blocks make up for what segments could not merge in others. Raises
    ValueError if the segments cannot be that short.
    """
    lengths = left = np.array(lengths)
    goal = None if depth is None else _goals(int(lengths.sum()) - sum(plan), lengths, depth)
    merged = []
    for block, (r, total) in enumerate(zip(plan, accumulate(plan), strict=True)):
        room, least = left // 2, np.zeros_like(left)
        if goal is not None:
            # Later blocks can at most halve a segment each; what they could not merge must be merged here.
            within_reach = goal * 2 ** min(max(depth - 1 - block, 0), 32)
            room, least = np.minimum(room, left - goal), np.maximum(0, left - within_reach)
            r = int(left.sum()) - (int(lengths.sum()) - total)
        weights = left if goal is None else left - goal
        merged.append(least + _apportion(r - int(least.sum()), weights, room - least))
        left = left - merged[-1]
    return np.stack(merged)


def _goals(keep: int, lengths: np.ndarray, depth: int) -> np.ndarray:
    """How many of each segment's tokens stay when `keep` of the image's do."""
    fewest = -(-lengths // 2 ** min(depth, 32))
    if keep < fewest.sum():
        raise ValueError(
            f"{depth} blocks cannot leave {keep} of {lengths.sum()} patches: each merges at most half of "
            f"each of {len(lengths)} windows or frames, which stay apart; the fewest are {fewest.sum()}"
        )
    return fewest + _apportion(keep - int(fewest.sum()), lengths - fewest, lengths - fewest)


def _apportion(total: int, weights: np.ndarray, room: np.ndarray) -> np.ndarray:
    """`total` in whole numbers by weight, largest remainders first, at most `room` each."""
    shares = np.zeros_like(room)
    total = min(total, int(room.sum()))
    while total > 0:
        free = np.where(shares < room, weights, 0)
        share, rest = np.divmod(total * free, free.sum())
        share = np.minimum(share, room - shares)
        shares, total = shares + share, total - int(share.sum())
        order = np.argsort(-rest, kind="stable")
        order = order[shares[order] < room[order]][:total]
        shares[order] += 1
        total -= len(order)
    return shares
