"""The stages, budgets, and what every reducer has."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..algorithms.grid import Grid
from ..algorithms.select import uniform

Budget = float | int | Callable[["Image"], float | int] | None
Positions = Literal["keep", "compact", "paper", "spread"]
TowerLayer = int | Literal["features"]  # from 0, negative from the end, or the one whose output is projected


class Stage(Enum):
    """Where a reducer acts."""

    PIXELS = "pixels"  # before the vision tower, or on the processor
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

    `features` [N, D] are the projected tokens, `text` [T, D] the embeddings of the prompt's other tokens, of
    which `text_before` precede the image, and `text_ids` [T] their numbers in the vocabulary (-1 where the
    caller gave embeddings alone), `grid` records where each token lies (None where that is not known),
    `number` is the image's place in its prompt. `rows` holds the tower's attention that the method needs,
    layer by layer: [tiles, heads, n] for the n tokens of each tile. `states` [tiles, 1 + n, C], which the
    features are the projection of, and `keys` [tiles, 1 + n, heads, d] are the tower's (n without a class
    token), for methods that merge before the projector (`project`). `encode(smaller_grid)` makes the features
    [n, D] of the picture in the layout of a smaller grid (and after them those that the model adds inside its
    first layers), if `wants_pixels`. `renumbered` means that positions will be counted anew, so that only the
    order of tokens matters. `dropped` counts tokens that the image had before a reducer of pixels.
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
    text_before: int = 0
    text_ids: Tensor | None = None
    dropped: int = 0

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

    @property
    def instruction(self) -> slice:
        """Where in `text` the instruction is: what follows the image, or everything where nothing does."""
        return slice(self.text_before if self.text_before < len(self.text) else 0, None)

    def encoded(self) -> Tensor | None:
        """The tower's states before the projector, by token [N, C], with zeros for separators; None where it
        is not known which state a token is made of."""
        return self._by_token(self.states)

    def encoded_keys(self) -> Tensor | None:
        """The keys of the tower's layer, by token [N, heads · d]; as `encoded`."""
        return None if self.keys is None else self._by_token(self.keys.flatten(2))

    def _by_token(self, values: Tensor | None) -> Tensor | None:
        """Values of the tower [tiles, n or 1 + n, C] in the order in which tokens enter the model [N, C]."""
        if values is None:
            return None
        grid = self.grid
        tokens = self.num_tokens // len(values) if grid is None else grid.tokens_per_tile
        flat = values[:, -tokens:].flatten(0, 1)
        if grid is None:
            return flat if len(flat) == self.num_tokens else None
        index = grid.flat.to(flat.device)
        return flat[index.clamp_min(0)].masked_fill((index < 0)[:, None], 0)

    def remaining(self, kept: Tensor) -> "Image":
        """The image with the tokens at places `kept` [n] alone, and what the tower has made of them."""
        features = self.features[kept]
        if self.grid is not None:
            places = kept.to(self.grid.tile.device)
            grid = replace(self.grid, tile=self.grid.tile[places], index=self.grid.index[places])
            return replace(self, features=features, grid=grid, encode=None)
        rows = {layer: x.transpose(0, 1).flatten(1) for layer, x in self.rows.items()}
        rows = {layer: x[:, kept][None] for layer, x in rows.items() if x.shape[1] == self.num_tokens}
        states, keys = (None if x is None else x[kept][None] for x in (self.encoded(), self.encoded_keys()))
        keys = None if keys is None else keys[:, :, None]
        return replace(self, features=features, rows=rows, states=states, keys=keys, encode=None)

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
    comparable: ClassVar[bool] = True
    """Whether `keep` alone sets how many tokens stay, so that methods can be compared at one budget."""

    def __post_init__(self) -> None:
        if self.keep is not None and not callable(self.keep):
            fraction_or_count(self.keep)


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
