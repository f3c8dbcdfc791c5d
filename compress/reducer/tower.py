"""Reducers before, inside and behind the vision tower: pixels, the tower's tokens, and its features."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..algorithms.anyres import split_budget
from ..algorithms.grid import Grid
from ..algorithms.merge import Matching, compose, representatives
from ..algorithms.select import top_k
from ..undo import Undo
from .base import (
    Budget,
    Image,
    Reducer,
    Selection,
    Stage,
    TowerLayer,
    count_of,
    keeps_everything,
    token_count,
)


@dataclass(frozen=True)
class Patches:
    """The pixels of one picture before the tower, for a reducer.

    `pixels` [N, n, C, p, p] are as the processor normalised them: the n patches of p × p pixels behind each
    of N = `height` · `width` visual tokens, row by row.
    """

    pixels: Tensor
    height: int
    width: int


@dataclass(kw_only=True)
class PixelReducer(Reducer):
    """Drops patches of pictures before the vision tower, which then runs on fewer. Videos stay whole.

    How many stay depends on the pixels, so there is no budget: `keep` takes 1.0 (every patch stays) or None.
    With `after_blocks` they leave after that many blocks of the tower, with -1 after all of them.
    Where tokens are dropped, text after a picture keeps the positions that it has in the full prompt
    (`positions="keep"`) or starts behind the largest position among the picture's tokens that enter the
    language model ("engine", as serving engines number them). Raises ValueError for other values.
    """

    positions: Literal["keep", "engine"] = "keep"
    after_blocks: int = 0

    stage: ClassVar[Stage] = Stage.PIXELS
    comparable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and not keeps_everything(self.keep):
            raise ValueError(
                f"keep is {self.keep!r}, and how many patches {type(self).__name__} keeps depends on the "
                "pixels; leave keep out, give 1.0 (everything stays), or attach a reducer with a budget "
                "beside it: [PixelPrune(), DivPrune(keep=0.25)]"
            )
        if self.positions not in ("keep", "engine"):
            raise ValueError(f'positions is {self.positions!r}; it takes "keep" or "engine"')

    def check(self, vision: Any) -> None:
        """Compare the reducer's settings with a model's vision configuration. Raises ValueError where they
        differ."""

    def select(self, patches: Patches) -> Tensor:
        """The visual tokens whose patches enter the tower, as a mask [N]."""
        raise NotImplementedError


@dataclass(kw_only=True)
class ProcessorReducer(Reducer):
    """Changes how a processor prepares pictures, so that they have fewer visual tokens from the start."""

    stage: ClassVar[Stage] = Stage.PIXELS
    comparable: ClassVar[bool] = False

    def install(self, model: nn.Module, keep: Callable[[], Budget], undo: Undo) -> None:
        """Change the processor until `undo` runs; `keep` returns the budget as of the call."""
        raise NotImplementedError


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
    reads_text: ClassVar[bool] = False  # whether the prompt's text decides, so that its end must be known
    reads_frames: ClassVar[bool] = False  # whether frames of a video are compared, and pictures stay whole
    # Whether the tower is read token by token, so that the method can follow another one that selects.
    by_token: ClassVar[bool] = False

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

    @staticmethod
    def even_shares(grid: Grid | None, tokens: int, count: int) -> list[tuple[Tensor, int]]:
        """For each tile the places of its tokens, ascending, and as even a share of `count` as the tiles can
        give; separators are left out. All of the `tokens` are one tile where the layout is not known."""
        if grid is None:
            return [(torch.arange(tokens), min(count, tokens))]
        places = [(grid.tile == tile).nonzero().squeeze(1) for tile in grid.tile[grid.tile >= 0].unique()]
        capacity = torch.tensor([len(own) for own in places])
        counts = split_budget(torch.ones(len(places)), min(count, int(capacity.sum())), capacity)
        return list(zip(places, counts.tolist(), strict=True))

    def highest_of_each_tile(self, scores: Tensor, grid: Grid | None, count: int) -> Tensor:
        """Mask [N] of exactly `count` tokens, the highest `scores` [N] of each tile in even shares."""
        mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        for places, share in self.even_shares(grid, len(scores), count):
            own = places.to(scores.device)
            mask[own[top_k(scores[own], share)]] = True
        return self.completed(mask, count)

    def retained_count(self, grid: Grid | int, budget: float | int) -> int:
        """How many tokens of an image stay, from its layout (or its number of tokens) and the budget
        alone."""
        return count_of(budget, token_count(grid))

    def compared(self, image: Image) -> Tensor:
        """The `features` [N, D] that `select` gets."""
        return image.features

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
                f"{type(self).__name__} selects by scores of the image; give select what scores(image) "
                "returns"
            )
        return scores

    def reduce(self, image: Image, budget: float | int) -> Selection:
        """The tokens kept of the image, and their new values if any."""
        count = self.retained_count(image.grid or image.num_tokens, budget)
        mask = self.select(self.compared(image), image.grid, count, self.scores(image))
        return Selection(mask.nonzero().squeeze(1))


@dataclass(frozen=True)
class TowerAttention:
    """Attention among the tokens of one block of a vision tower, for reducers with `reads_attention`.

    `weights` [B, H, N, N] are probabilities in float32 (rows are queries and sum to 1); `class_token`: token
    0 is the class token.
    """

    weights: Tensor
    class_token: bool


@dataclass(kw_only=True)
class VisionReducer(Reducer):
    """Merges or drops tokens inside the vision tower.

    `metric` is what tokens are compared by (mean "keys" of the block, or "hidden" states), `where` it happens
    (after the "attention" of a block, or after the whole "layer"), `weighted` whether means count original
    tokens, `prop_attn` whether attention does. With `prunes` tokens that go leave nothing in those that stay,
    and with `reads_attention` `match` also gets the block's attention, as `attention`.
    """

    stage: ClassVar[Stage] = Stage.VISION
    metric = "keys"
    where = "attention"
    weighted = True
    prop_attn = False
    prunes: ClassVar[bool] = False
    reads_attention: ClassVar[bool] = False

    def plan(self, num_blocks: int, num_tokens: int, prefix: int, keep: int | None) -> list[int]:
        """Tokens that go in each of `num_blocks` blocks, from `num_tokens` patches (without the `prefix` of
        class and register tokens) down to `keep` of them, or by the paper's schedule."""
        raise NotImplementedError

    def match(self, block: int, num_blocks: int, metric: Tensor, r: int, prefix: int) -> Matching:
        """Which r tokens of `metric` [B, N, C] go in a block, and into which of those that stay."""
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
