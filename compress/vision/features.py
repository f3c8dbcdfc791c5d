"""Records made while a tower makes features: sizes and grids, and the attention rows that reducers
need."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algorithms.grid import Grid
from ..attention import attention_rows, column_sums, probing
from ..earlier import EarlierCalls
from ..families import FAMILIES, MEDIA, Host, Record
from ..hosts import lengths_of_samples, takes
from ..layout import Span
from ..reducer import TowerLayer, VisionReducer
from ..undo import Undo
from . import shrink
from .packed import PackedMerging
from .pixels import Entering, PixelPruning, order_of

_PACKED = ("grid_thw", "cu_seqlens", "image_sizes", "spatial_shapes", "pixel_position_ids")
_ENCODING: ContextVar[bool] = ContextVar("vistok_encoding", default=False)


@contextmanager
def _encoding() -> Iterator[None]:
    token = _ENCODING.set(True)
    try:
        yield
    finally:
        _ENCODING.reset(token)


def tower_attentions(tower: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a vision tower, first layer first."""
    return [
        module
        for module in tower.modules()
        if type(module).__name__.endswith("Attention") and not isinstance(module, nn.MultiheadAttention)
    ]


class FeatureRecorder:
    """Wraps `get_image_features` and `get_video_features` of a model's core as instance attributes.

    `layers` maps tower layers to what is recorded: probabilities (True), logits (False) or "joined"
    probabilities; `states` adds a layer's keys and the states that are projected, `pixels` the pixel
    values in the record's arguments. `done(modality, output, record)` gets what was made.
    """

    def __init__(
        self,
        host: Host,
        layers: dict[TowerLayer, bool | Literal["joined"]],
        states: TowerLayer | None,
        done: Callable[[str, Any, Record], None],
        earlier: EarlierCalls,
        *,
        pixels: bool = False,
    ) -> None:
        self.host, self.layers, self.states, self.done, self.merging = host, layers, states, done, None
        self.pixels, self.earlier = pixels, earlier
        self.pruning: PixelPruning | None = None
        reads = bool(layers) or states is not None
        if reads:
            _check_readable(host)
        if pixels:
            shrink.check(host)
        self.attentions = tower_attentions(host.tower) if reads else []
        for layer in [*layers, "features" if states is None else states]:
            if layer != "features" and not -len(self.attentions) <= layer < len(self.attentions):
                raise ValueError(
                    f"the reducer reads attention of tower layer {layer}, but {type(host.tower).__name__} "
                    f"has {len(self.attentions)} layers"
                )

    def attach(self, undo: Undo) -> None:
        """Put the wrappers in place; undoing restores what a user may have put there."""
        for modality in MEDIA:
            name = f"get_{modality}_features"
            stock = getattr(self.host.core, name, None)
            if stock is not None:
                undo.attribute(self.host.core, name, self._wrapper(modality, stock))

    def _wrapper(self, modality: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(stock)

        @wraps(stock)  # generate reads the signature
        def get_features(*args: Any, **kwargs: Any) -> Any:
            if self.earlier.include_this_one():
                return stock(*args, **kwargs)
            if _ENCODING.get():  # some families make features of videos by those of images
                return stock(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            arguments = {**arguments.pop("kwargs", {}), **arguments}
            if self.merging is not None:
                self.merging.reset()
            pruning = (
                nullcontext(Entering()) if self.pruning is None else self.pruning.running(modality, arguments)
            )
            with _encoding(), self._watching() as rows, pruning as entering:
                output = stock(*args, **{**kwargs, "return_dict": True})
            record = self._record(modality, output, arguments, rows, entering)
            if not self.pixels:  # or the record would keep pictures in memory
                record.arguments = {k: v for k, v in arguments.items() if not k.startswith("pixel_values")}
            self.done(modality, output, record)
            return output

        return get_features

    @contextmanager
    def _watching(self) -> Any:
        watched: dict[TowerLayer, list[Tensor]] = {layer: [] for layer in self.layers}
        keys: list[Tensor] = []
        probes: dict[nn.Module, list[Callable[..., None]]] = {}
        layers: dict[nn.Module, list[TowerLayer]] = {}  # a layer may have several names
        for layer in self.layers:
            layers.setdefault(self._attention(layer), []).append(layer)

        def rows(module: nn.Module, *observed: Any) -> None:
            tower_rows = _TowerRows(*observed)
            for layer in layers[module]:
                watched[layer].append(tower_rows.of_kind(self.layers[layer]))

        for module in layers:
            probes.setdefault(module, []).append(rows)
        if self.states is not None and not self.packed and self.host.pool == 1:
            probe = lambda module, query, key, *_: keys.append(key.transpose(1, 2))  # noqa: E731
            probes.setdefault(self._attention(self.states), []).append(probe)
        with ExitStack() as stack:
            if probes:
                stack.enter_context(probing({m: _all(functions) for m, functions in probes.items()}))
            yield watched, keys

    def _attention(self, layer: TowerLayer) -> nn.Module:
        return self.attentions[self.depth - 1 if layer == "features" else layer]

    @property
    def used_layers(self) -> list[int]:
        """After how many tower layers features are taken (hidden_states[i] is the output of i layers)."""
        count = len(tower_attentions(self.host.tower))
        chosen = getattr(self.host.config, "vision_feature_layer", -1)
        return sorted(layer % (count + 1) for layer in ([chosen] if isinstance(chosen, int) else chosen))

    @property
    def depth(self) -> int:
        """How many tower layers it takes to make the features."""
        return self.used_layers[-1]

    def tokens_left(self, span: Span) -> Tensor | None:
        """Which of an image's tokens go on from a tower in which patches merge or go, bool [N]: the first of
        those that are made of the same merged patches, or those of which a patch is left. None where the
        layout of the tokens is not known."""
        if span.record.patches_left is not None:
            patches = self._behind_tokens(span, span.record.patches_left)
            return None if patches is None else patches[:, -(self.host.pool**2) :].any(1)
        groups = self.token_groups(span)
        if groups is None:
            return None
        rows, inverse = torch.unique(groups, dim=0, return_inverse=True)
        places = torch.arange(len(groups))
        first = torch.full((len(rows),), len(groups)).scatter_reduce(0, inverse, places, "amin")
        return torch.zeros(len(groups), dtype=torch.bool).index_fill(0, first, True)

    def token_groups(self, span: Span) -> Tensor | None:
        """The patches behind each of an image's tokens, by the groups that merging made of them
        [N, pool²]; tokens with equal rows are equal. None where the layout of the tokens is not known."""
        return self._behind_tokens(span, span.record.groups)

    def _behind_tokens(self, span: Span, values: Tensor) -> Tensor | None:
        """Values of the tower's patches [tiles, n] at those behind each of an image's tokens [N, pool²], with
        the number of the tile in front where there are several. Separators get negative numbers, each
        another. None where the layout of the tokens is not known."""
        grid, record = span.grid, span.record
        if isinstance(self.merging, PackedMerging):
            patches = self._packed_patches(span)
            return self._unknown(span) if patches is None else values.cpu()[0, patches]
        if grid is None or values.shape[1] != grid.tokens_per_tile * self.host.pool**2:  # frames are pooled
            return self._unknown(span)
        first = self._tiles(record)[span.item][0]
        if self.host.family.segment == "tiles":
            first += span.offset // grid.tokens_per_tile
        pool, width = self.host.pool, grid.width
        rows, cols = grid.index.clamp_min(0) // width, grid.index.clamp_min(0) % width
        offsets = torch.arange(pool)
        patch_rows = (rows[:, None] * pool + offsets)[:, :, None]
        patch_cols = (cols[:, None] * pool + offsets)[:, None, :]
        patches = (patch_rows * width * pool + patch_cols).flatten(1)  # [N, pool²]
        tile = (first + grid.tile.clamp_min(0))[:, None]
        behind = torch.cat([tile, values.cpu()[tile, patches]], 1)
        separators = grid.tile < 0
        behind[separators] = -1 - torch.arange(int(separators.sum()))[:, None]  # no two are equal
        return behind

    def _unknown(self, span: Span) -> None:
        warnings.warn(
            f"which patches stand behind the {len(span.places)} tokens of this {span.record.modality} is not "
            f"known for {self.host.name}, so all stay in the prompt although patches merged in the tower",
            stacklevel=2,
        )

    def _packed_patches(self, span: Span) -> Tensor | None:
        """The places [N, pool²], among all that entered a packed tower, of the patches behind an image's
        tokens."""
        record, pool = span.record, self.host.pool
        sizes = record.arguments.get("image_sizes")
        if sizes is None:  # units of pool² patches, one after the other
            first = sum(record.lengths[: span.item])
            return (first * pool**2 + torch.arange(len(span.places) * pool**2)).unflatten(0, (-1, pool**2))
        patch = self.host.config.vision_config.patch_size
        shapes = [(int(height) // patch, int(width) // patch) for height, width in sizes]
        height, width = shapes[span.item]
        places = torch.arange(height * width).view(height, width) + sum(h * w for h, w in shapes[: span.item])
        blocks = places.unfold(0, pool, pool).unfold(1, pool, pool).flatten(2).flatten(0, 1)
        return blocks if len(blocks) == len(span.places) else None

    def _record(
        self, modality: str, output: Any, arguments: dict[str, Any], watched: Any, entering: Entering
    ) -> Record:
        rows, keys = watched
        lengths = [len(item) for item in output.pooler_output]
        if self.host.family.segment == "tiles":
            lengths = lengths_of_samples(lengths, arguments)
        record = Record(modality, lengths, arguments, entered=entering.masks, seconds=entering.seconds)
        tiles = self._tiles(record)
        for layer, parts in rows.items():
            if not self.packed and sum(map(len, parts)) != tiles[-1][1]:
                continue  # frames that are pooled to tokens: which rows belong to which token is not known
            record.rows[layer] = self._per_item(torch.cat(parts, -1 if self.packed else 0), record, tiles)
        chosen = getattr(self.host.config, "vision_feature_layer", None)
        if len(keys) == 1 and isinstance(chosen, int):
            states = output.hidden_states[chosen] if output.hidden_states is not None else None
            frames = [grid for grid in self.host.grids(record) if grid is not None and grid.video]
            patches = keys[0].shape[1] - (keys[0].shape[1] > math.isqrt(keys[0].shape[1]) ** 2)
            resampled = any(grid.tokens_per_tile != patches for grid in frames)
            if states is not None and len(states) == tiles[-1][1] and not resampled:
                record.states = [states[a:b] for a, b in tiles]
                record.keys = [keys[0][a:b] for a, b in tiles]
        if self.merging is not None:
            first, last = self.used_layers[0], self.used_layers[-1]
            trace = self.merging.trace
            if trace is None:
                raise TypeError(
                    f"{type(self.merging.reducer).__name__} merges in the {type(self.host.tower).__name__}, "
                    f"which did not run for the {modality} features of {self.host.name}; use a reducer of "
                    "features, such as divprune"
                )
            record.groups = trace.patch_groups(first) if first < last else trace.exit_groups()
            if self.merging.reducer.prunes:
                record.patches_left = trace.patches_left()
        return record

    def _tiles(self, record: Record) -> list[tuple[int, int]]:
        """The tiles of each item, as ranges of the tower's batch."""
        if self.host.family.segment == "tiles":
            vision = self.host.config.vision_config
            tokens = (vision.image_size // vision.patch_size // self.host.pool) ** 2
            counts = [length // tokens for length in record.lengths]
        else:
            counts = [1 if grid is None else grid.num_tiles for grid in self.host.grids(record)]
        ends = torch.tensor(counts, dtype=torch.long).cumsum(0).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    @property
    def packed(self) -> bool:
        """Whether the tower gets all images as one sequence."""
        return self.host.family.order != "raster"

    def _per_item(self, rows: Tensor, record: Record, tiles: list[tuple[int, int]]) -> list[Tensor]:
        """Rows over patches, [tiles, H, patches] or [1, H, all patches], as [tiles, H, n] per item over its
        visual tokens: the mean of each token's block of patches."""
        order, pool = self.host.family.order, self.host.pool
        if order == "raster":
            if pool > 1:
                side = math.isqrt(rows.shape[-1])
                rows = rows.unflatten(-1, (side // pool, pool, side // pool, pool)).mean((3, 5)).flatten(-2)
            grids = self.host.grids(record)
            return [_resampled(rows[a:b], grid) for (a, b), grid in zip(tiles, grids, strict=True)]
        if order == "images":  # one image after the other, each in raster order
            grids = self.host.grids(record)
            pieces = rows.split([length * pool * pool for length in record.lengths], -1)
            return [
                piece.unflatten(-1, (grid.height, pool, grid.width, pool)).mean((3, 5)).flatten(-2)
                for piece, grid in zip(pieces, grids, strict=True)
            ]
        units = rows.unflatten(-1, (-1, pool * pool)).mean(-1)
        entered = None if record.entered is None else torch.cat(record.entered).to(units.device)
        if entered is not None and units.shape[-1] == len(entered):  # of a layer with all patches
            entered = None
        if order == "window":
            windows = self._window_order(record)
            windows = windows if entered is None else order_of(windows, entered)
            units = units[..., windows.argsort()]
        if entered is not None:  # of tokens whose patches did not enter the tower there is nothing
            whole = units.new_zeros(*units.shape[:-1], len(entered))
            units = whole.index_copy(-1, entered.nonzero().squeeze(1), units)
        return [
            piece.unflatten(-1, (b - a, -1))[0].transpose(0, 1)
            for piece, (a, b) in zip(units.split(record.lengths, -1), tiles, strict=True)
        ]

    def _window_order(self, record: Record) -> Tensor:
        """The original unit at each place of a windowed tower's sequence."""
        from transformers.vision_utils import get_vision_window_index

        tower = self.host.tower
        return get_vision_window_index(
            record.arguments[f"{record.modality}_grid_thw"],
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )[0]


def _resampled(rows: Tensor, grid: Grid | None) -> Tensor:
    """Rows over the patches of frames [T, H, n] as means over the tokens that a video's layout has per frame:
    of the patches of each token's block where blocks are whole, else of those that it overlaps."""
    if grid is None or not grid.video or rows.shape[-1] == grid.tokens_per_tile:
        return rows
    side = math.isqrt(rows.shape[-1])
    maps, block = rows.unflatten(-1, (side, side)), side // grid.height
    if (side // block, side // block) == (grid.height, grid.width):  # what fills no block is left out
        return F.avg_pool2d(maps, block).flatten(-2)
    return F.adaptive_avg_pool2d(maps, (grid.height, grid.width)).flatten(-2)


class _TowerRows:
    """What reducers read of the attention of one layer in one forward, computed once for all of them."""

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        self.query, self.key, self.mask, self.scaling = query, key, mask, scaling
        self._rows: dict[tuple[bool, bool], Tensor] = {}

    def of_kind(self, kind: bool | Literal["joined"]) -> Tensor:
        """The rows [T, H, n] as probabilities (True), logits (False) or "joined" probabilities."""
        joined, softmax = kind == "joined", bool(kind)
        if (joined, softmax) not in self._rows:
            query, key, scaling = self.query, self.key, self.scaling
            if joined:
                query, key, scaling = _joined(query), _joined(key), None
            logits, probabilities = _class_rows(query, key, scaling, self.mask)
            self._rows.update({(joined, False): logits, (joined, True): probabilities})
        return self._rows[joined, softmax]


def _joined(heads: Tensor) -> Tensor:
    """[T, H, n, d] as one head [T, 1, n, H · d]."""
    return heads.transpose(1, 2).flatten(2)[:, None]


def _all(functions: list[Callable[..., None]]) -> Callable[..., None]:
    def probe(*args: Any) -> None:
        for function in functions:
            function(*args)

    return probe


def _class_rows(
    query: Tensor, key: Tensor, scaling: float | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits and probabilities of the class token's attention to each patch [T, H, n]; in towers without one,
    of what each patch receives on average."""
    tokens = key.shape[2]
    if math.isqrt(tokens - 1) ** 2 == tokens - 1 and math.isqrt(tokens) ** 2 != tokens:
        row = mask_of_first(mask)
        logits = attention_rows(query[:, :, :1], key, scaling=scaling, mask=row, softmax=False)[:, :, 0]
        return logits[..., 1:], logits.softmax(-1)[..., 1:]
    received = column_sums(query, key, scaling=scaling, mask=mask) / query.shape[2]
    return received.clamp_min(1e-12).log(), received


def mask_of_first(mask: Tensor | None) -> Tensor | None:
    """The part of a 4-D mask that belongs to the first query."""
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., :1, :]


def check_groups(host: Host, reducer: VisionReducer) -> None:
    """Raise TypeError where what merges in the tower cannot be followed to the language model's tokens, so
    that its prompt would stay as long as it was."""
    family = host.family
    if (family.grids is None and family.segment == "items") or not family.readable:
        raise TypeError(
            f"{type(reducer).__name__} merges patches inside the tower, and for {host.name} "
            f"({host.model.config.model_type}) it is not known which patches stand behind a visual token, so "
            "no budget could be met; use a reducer of features, such as divprune"
        )
    if host.pool > 1:
        case = "all patches of a token go" if reducer.prunes else "the patches of two tokens merge entirely"
        warnings.warn(
            f"{host.name} makes one visual token of {host.pool} × {host.pool} patches: keep is met by the "
            f"patches in the tower, and the prompt gets shorter only where {case}; "
            "attach a reducer of features beside it for a shorter prompt",
            stacklevel=5,
        )


def _check_readable(host: Host) -> None:
    """Raise TypeError for towers outside the table that pack pictures of any size into one sequence: which
    rows of their attention belong to which image is not known."""
    packed = [name for name in _PACKED if takes(host.tower, name)]
    unknown = host.model.config.model_type not in FAMILIES or not host.family.readable
    if unknown and packed:
        raise TypeError(
            f"the tower of {host.name} ({host.model.config.model_type}) packs pictures of any size into one "
            f"sequence ({packed[0]}), and how its attention is divided among the visual tokens is not known; "
            "use a reducer that needs the features alone, such as divprune"
        )
    if not host.family.readable:
        raise TypeError(
            f"how the attention of the tower of {host.name} ({host.model.config.model_type}) is divided "
            "among its visual tokens is not known; use a reducer of features alone, such as divprune"
        )
