"""The contract of reducers: the stage they act at, what they get there, and what they return.

A method is a dataclass of its hyper-parameters under the paper's names, in one file of `methods/`, and one
function that scores or selects. Hooks, positions, masks, batches and caches are the session's work.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .algorithms.grid import Grid
from .algorithms.merge import Matching, compose, representatives
from .algorithms.select import uniform

Budget = float | int | Callable[["Image"], float | int] | None
Positions = Literal["keep", "compact", "paper"]
TowerLayer = int | Literal["features"]  # from 0, negative from the end, or the one whose output is projected


class Stage(Enum):
    """Where a reducer acts."""

    VISION = "vision"  # inside the vision tower
    FEATURES = "features"  # between the projector and the language model
    LAYER = "layer"  # before some layers of the language model
    CACHE = "cache"  # on the keys and values, after the prompt


def fraction_or_count(keep: float | int, what: str = "keep") -> float | int:
    """`keep` if it is a float in (0, 1] or an integer of at least 1. Raises TypeError or ValueError."""
    accepted = "a fraction in (0, 1] or a count of tokens (an integer of at least 1)"
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(
            f"{what} is {keep!r}; it takes {accepted}, or a function of the image that returns one"
        )
    if isinstance(keep, int):
        if keep < 1:
            raise ValueError(f"{what} is {keep}; it takes {accepted}")
    elif not 0 < keep <= 1:
        hint = f" (did you mean the count {int(keep)}?)" if keep > 1 and keep == int(keep) else ""
        raise ValueError(f"{what} is {keep}; it takes {accepted}{hint}")
    return keep


def keeps_everything(budget: float | int | None) -> bool:
    """Whether a budget is the fraction 1.0, at which an image is left as it is, separators included."""
    return isinstance(budget, float) and budget == 1.0


def token_count(grid: Grid | int) -> int:
    """N, from a layout or a number."""
    return grid if isinstance(grid, int) else grid.num_tokens


@dataclass
class Image:
    """One image (or video) for a reducer: N visual tokens in the order they enter the language model.

    `features` [N, D] are the projected tokens, `text` [T, D] the embeddings of the prompt's other tokens,
    `grid` records where each token lies (None where that is not known), `number` is the image's place in
    its prompt. `rows` holds the tower's attention that the method needs, layer by layer: [tiles, heads, n]
    for the n tokens of each tile. `states` [tiles, 1 + n, C], which the features are the projection of, and
    `keys` [tiles, 1 + n, heads, d] are the tower's (n without a class token), for methods that merge before
    the projector (`project`). `encode(smaller_grid)` makes the features [n, D] of the picture in the layout
    of a smaller grid (and after them those that the model adds inside its first layers), if `wants_pixels`.
    `renumbered` means that positions will be counted anew, so that only the order of tokens matters.
    """

    features: Tensor
    text: Tensor
    grid: Grid | None = None
    number: int = 0
    rows: dict[TowerLayer, Tensor] = field(default_factory=dict)
    states: Tensor | None = None
    keys: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    newline: Tensor | None = None
    encode: Callable[[Grid], list[Tensor]] | None = None
    renumbered: bool = False

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.features.shape[0]

    def attention(self, layer: TowerLayer) -> Tensor:
        """The recorded attention of a tower layer [tiles, heads, n].

        Raises ValueError where there is nothing, or nothing that fits the image's tokens.
        """
        instead = "use a reducer that needs the features alone, such as divprune"
        rows = self.rows.get(layer)
        if rows is None:
            raise ValueError(
                f"the attention of tower layer {layer!r} was not recorded for this image; have the attached "
                "model make the features itself from pixel_values (features from the caller or from before "
                f"attaching and pooled frames of videos have no attention), or {instead}"
            )
        tiles, tokens = rows.shape[0], rows.shape[-1]
        grid = self.grid
        fits = tiles * tokens == self.num_tokens
        if grid is not None:
            fits = (tiles, tokens) == (grid.num_tiles, grid.tokens_per_tile)
        if not fits:
            raise ValueError(
                f"the tower's attention is for {tiles} tiles of {tokens} tokens, which cannot be matched "
                f"with this image's {self.num_tokens} (tokens merge inside the tower, or the family hides "
                f"their layout); {instead}"
            )
        return rows

    def arranged(self, values: Tensor, source: Tensor, *, in_place: bool = False) -> "Selection":
        """A selection of `values` [n, D], of which `source` [n] is the token each shows, or -1.

        The slots are those tokens' places, and for the others places at even distances. Values fill them in
        the order given or, `in_place`, each its own. Raises ValueError for more values than tokens.
        """
        if len(values) > self.num_tokens:
            raise ValueError(
                f"{len(values)} tokens do not fit into the places of {self.num_tokens}; lower keep"
            )
        taken = torch.zeros(self.num_tokens, dtype=torch.bool, device=source.device)
        taken[source[source >= 0]] = True
        free = (~taken).nonzero().squeeze(1)
        free = free[uniform(len(free), len(values) - int(taken.sum()), free.device)]
        if in_place:
            kept, order = source.masked_scatter(source < 0, free).sort()
            return Selection(kept, values[order], source[order])
        taken[free] = True
        return Selection(taken.nonzero().squeeze(1), values, source)

    def generator(self, seed: int) -> torch.Generator:
        """A generator that depends on the image and the seed alone: equal images in a batch, in beams or
        alone draw the same."""
        digest = self.features[:: max(1, self.num_tokens // 16)].double().abs().sum()
        return torch.Generator().manual_seed(seed * 1_000_003 + int(digest * 1024) % (1 << 31))


def budget_of(keep: Budget, image: Image, default: float | None) -> float | int | None:
    """The budget of one image: what `keep` is or returns for it, else the method's default."""
    if callable(keep):
        return fraction_or_count(keep(image))
    return default if keep is None else fraction_or_count(keep)


@dataclass
class Selection:
    """The tokens kept of an image: `kept` [n] ascending places among its N tokens.

    `values` [n, D] replaces the kept tokens (merged ones), `source` [n] is which of the N tokens each
    value shows (-1: none of them). `deepstack` [n, D] per layer replaces what Qwen3-VL adds to them inside.
    """

    kept: Tensor
    values: Tensor | None = None
    source: Tensor | None = None
    deepstack: list[Tensor] | None = None


@dataclass(kw_only=True)
class Reducer:
    """A method. `keep` is the budget where `attach` gets none; None means the paper's own."""

    keep: Budget = None

    stage: ClassVar[Stage]
    summary: ClassVar[str] = ""
    """Short description of the method for tables."""
    paper: ClassVar[str] = ""
    """The method's source, such as "arXiv 2503.02175"; empty for baselines."""
    verified: ClassVar[str] = ""
    """Comparisons with recorded outputs of the original, and their accuracy."""
    paper_positions: ClassVar[Literal["keep", "compact"]] = "keep"

    def __post_init__(self) -> None:
        if self.keep is not None and not callable(self.keep):
            fraction_or_count(self.keep)


@dataclass(kw_only=True)
class FeatureReducer(Reducer):
    """Picks or merges tokens between the projector and the language model.

    Subclasses give `select` (which tokens, exactly `count` of them) or, when they merge or choose their own
    number, `reduce`.
    """

    stage: ClassVar[Stage] = Stage.FEATURES
    paper_positions: ClassVar[Literal["keep", "compact"]] = "compact"
    # None: without a budget, `reduce` gets None and uses the method's own number.
    default_keep: ClassVar[float | None] = 0.25
    merges: ClassVar[bool] = False  # whether kept tokens get new values
    wants_pixels: ClassVar[bool] = False  # whether `Image.encode` is needed, so that pixel values are kept

    def tower_layers(self) -> dict[TowerLayer, bool | Literal["joined"]]:
        """Layers of the vision tower whose class-token attention the method needs: as probabilities (True),
        as logits (False), or as probabilities of one head as wide as all ("joined")."""
        return {}

    def wants_states(self) -> TowerLayer | None:
        """The tower layer whose keys the method needs, with the states that are projected, or None."""
        return None

    @staticmethod
    def per_token(rows: Tensor, grid: Grid | None) -> Tensor:
        """Values [tiles, n] in the order in which tokens enter the model [N]; -inf for separators."""
        flat = rows.flatten()
        if grid is None:
            return flat
        index = grid.flat.to(flat.device)
        return flat[index.clamp_min(0)].masked_fill(index < 0, -torch.inf)

    def retained_count(self, grid: Grid | int, budget: float | int) -> int:
        """How many tokens of an image stay, from its layout (or its number of tokens) and the budget
        alone."""
        return count_of(budget, token_count(grid))

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """The tokens to keep as a mask [N] with exactly `count` True; features [N, D], `scores` as the
        method defines them."""
        raise NotImplementedError(f"{type(self).__name__} has no select")

    def scores(self, image: Image) -> Tensor | None:
        """The `scores` for `select`, from what was recorded of the tower."""
        return None

    @staticmethod
    def completed(mask: Tensor, count: int) -> Tensor:
        """The mask [N] with first False entries (separators, once all patches are in) set, up to `count`."""
        missing = count - int(mask.sum())
        return mask.index_fill(0, (~mask).nonzero().squeeze(1)[:missing], True)

    def need(self, scores: Tensor | None) -> Tensor:
        """The scores. Raises ValueError if there are none."""
        if scores is None:
            raise ValueError(
                f"{type(self).__name__} selects by the vision tower's attention; give select what "
                "scores(image) returns"
            )
        return scores

    def reduce(self, image: Image, budget: float | int) -> Selection:
        """The tokens kept of the image, and their new values if any."""
        count = self.retained_count(image.grid or image.num_tokens, budget)
        mask = self.select(image.features, image.grid, count, self.scores(image))
        return Selection(mask.nonzero().squeeze(1))


@dataclass(kw_only=True)
class VisionReducer(Reducer):
    """Merges tokens inside the vision tower.

    `metric` is what tokens are compared by (mean "keys" of the block, or "hidden" states), `where` merging
    happens (after the "attention" of a block, or after the whole "layer"), `weighted` whether means count
    original tokens, `prop_attn` whether attention does.
    """

    stage: ClassVar[Stage] = Stage.VISION
    metric = "keys"
    where = "attention"
    weighted = True
    prop_attn = False

    def plan(self, num_blocks: int, num_tokens: int, prefix: int, keep: int | None) -> list[int]:
        """Tokens merged in each of `num_blocks` blocks, from `num_tokens` patches (without the `prefix` of
        class and register tokens) down to `keep` of them, or by the paper's schedule."""
        raise NotImplementedError

    def match(self, block: int, num_blocks: int, metric: Tensor, r: int, prefix: int) -> Matching:
        """Which r tokens of `metric` [B, N, C] merge in a block."""
        raise NotImplementedError

    def retained_count(self, grid: Grid | int, budget: float | int) -> int:
        """How many tokens of an image stay, from its layout (or its number of tokens) and the budget
        alone."""
        return count_of(budget, token_count(grid))

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Without a tower: the tokens to keep as a mask [N] with exactly `count` True, one of each group that
        merging the features [N, D] themselves leaves. Grid and scores are not used."""
        merged, matchings = features[None], []
        while merged.shape[1] > count:
            r = min(merged.shape[1] - count, merged.shape[1] // 2)
            matchings.append(self.match(len(matchings), len(matchings) + 1, merged, r, 0))
            merged = matchings[-1].merge(merged)
        mask = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        groups = compose(matchings)
        mask[slice(None) if groups is None else representatives(groups, count)[0]] = True
        return mask


@dataclass
class LayerTokens:
    """One prompt at a cut inside the language model, for a reducer.

    N visual tokens are left. `attention` [N] is the head-mean attention they get in the layer and from the
    rows that the method needs, `measured` [N] the sum of what `measure` returned in the layers since the
    start, `hidden` [N, D] their hidden states.
    """

    layer: int
    hidden: Tensor
    attention: Tensor | None = None
    measured: Tensor | None = None
    record: Callable[[str, Tensor], None] = lambda name, value: None


PUBLISHED_LAYERS = 32
"""Layers of the language models that published schedules are for."""


@dataclass(kw_only=True)
class LayerReducer(Reducer):
    """Drops tokens before some layers of the language model, by their score there."""

    stage: ClassVar[Stage] = Stage.LAYER
    rows: ClassVar[Literal["last", "instruction"] | None] = None
    rows_of: ClassVar[Literal["previous", "next"]] = "previous"

    def cuts(self, num_layers: int) -> dict[int, float]:
        """0-based layers before which tokens are dropped → the share of the image's tokens kept from there
        on, by the paper's schedule."""
        raise NotImplementedError

    def fitted(self, num_layers: int) -> "LayerReducer":
        """This reducer, or for a model with too few layers for its schedule a copy with a shorter one.

        Published schedules are for 32 layers. Raises ValueError where there are more cuts than layers.
        """
        return self

    def measured_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers whose modules `measure` is called with."""
        return ()

    def measure(self, module: str, inputs: Tensor, outputs: Tensor, valid: Tensor, visual: Tensor) -> Tensor:
        """A score per token [B, L] from the "attention" or "mlp" module's input and output [B, L, D]."""
        raise NotImplementedError

    def score(self, tokens: LayerTokens) -> Tensor:
        """A score per token [N]; the highest stay."""
        raise NotImplementedError

    def count(self, share: float, tokens: int) -> int:
        """How many of an image's `tokens` are a `share`."""
        return int(tokens * share)

    def schedule(self, num_layers: int, budget: float | None) -> dict[int, float]:
        """The cuts with `budget` as the share that the last one leaves.

        Earlier cuts follow on the paper's curve: each share is raised to the power that takes the last one to
        the budget, so a budget of 1 drops nothing.
        """
        cuts = dict(sorted(self.cuts(num_layers).items()))
        if budget is None or not cuts:
            return cuts
        last = cuts[max(cuts)]
        if last == 1:
            return cuts if budget == 1 else {layer: budget for layer in cuts}
        power = math.log(budget) / math.log(last)
        shares = {layer: share**power for layer, share in cuts.items()}
        shares[max(cuts)] = budget
        return shares


@dataclass(kw_only=True)
class CacheReducer(Reducer):
    """Evicts visual tokens from the cache once the prompt has been read, layer by layer."""

    stage: ClassVar[Stage] = Stage.CACHE

    def score(self, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        """A score per token [N] from the visual tokens' keys and values [H_k, N, D] of one prompt; the
        highest stay."""
        raise NotImplementedError


def share_by_layer(**lists: Sequence[float]) -> dict[int, float]:
    """A list of layers and the list of their shares, by the names a method gives them → layer → share.

    Raises ValueError unless there is one share per layer.
    """
    (layers, shares), (first, second) = lists.values(), lists
    if len(layers) != len(shares):
        raise ValueError(
            f"{first} has {len(layers)} layers and {second} {len(shares)} shares; give one share per layer"
        )
    return dict(zip(layers, shares, strict=True))


def scaled_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Layers of a 32-layer model, in rising order → those at the same relative depth, each another one.

    Raises ValueError where `num_layers` has no room for them.
    """
    scaled: list[int] = []
    for layer in layers:
        nearest = round(layer * num_layers / PUBLISHED_LAYERS)
        scaled.append(max(nearest, scaled[-1] + 1 if scaled else 1))
    if scaled and scaled[-1] >= num_layers:
        raise ValueError(
            f"{len(layers)} cuts do not fit a model of {num_layers} layers; give a schedule of its own"
        )
    return tuple(scaled)


def count_of(budget: float | int, tokens: int) -> int:
    """A budget as a count of an image's `tokens`: fractions rounded (halves to even), at least 1.

    Raises ValueError for a count above `tokens`.
    """
    if isinstance(fraction_or_count(budget), float):
        return max(1, round(budget * tokens))
    if budget > tokens:
        raise ValueError(
            f"keep is {budget} tokens, but this image has {tokens}; give at most that, a fraction in (0, "
            f"1], or keep=lambda image: min({budget}, image.num_tokens)"
        )
    return budget
