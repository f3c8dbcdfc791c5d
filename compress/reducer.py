"""The contract of reducers: the stage they act at, what they get there, and what they return.

A method is a dataclass of its hyper-parameters under the paper's names, in one file of `methods/`, and one
function that scores or selects. Hooks, positions, masks, batches and caches are the session's work.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .algorithms.anyres import split_budget
from .algorithms.grid import Grid
from .algorithms.merge import Matching, compose, representatives
from .algorithms.select import top_k, uniform
from .undo import Undo

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


@dataclass
class LayerContext:
    """The surroundings of one image at a cut inside the language model, for methods with `wants_context`.

    `text` [T, D] are the hidden states of the prompt's text after the image. `keys` [N, K] are the rotated
    keys of the image's tokens in the layer before the cut, all heads side by side, and `text_keys` [T, K]
    those of the text. `places` [N] and `text_places` [T] count the tokens of the prompt from 0, without
    padding. `norm` is the final norm of the language model.
    """

    text: Tensor
    keys: Tensor
    text_keys: Tensor
    places: Tensor
    text_places: Tensor
    norm: Callable[[Tensor], Tensor]


@dataclass
class LayerTokens:
    """One prompt at a cut inside the language model, for a reducer.

    N visual tokens are left. `attention` [N] is the head-mean attention they get in the layer and from the
    rows that the method needs, `measured` [N] the sum of what `measure` returned in the layers since the
    start, `hidden` [N, D] their hidden states. For methods with `rows = "raters"`, `rows` [H, R, N] holds the
    attention of each rater and, if they have `wants_decay`, `decay` [R, N] the product of a query and a key
    of ones after rotation to the positions of rater and token. `context` is what surrounds the image, for
    methods with `wants_context`. `exact`: the user has set a budget, so that exactly as many tokens go on.
    `last_stays`: the image's last token is the last one of the prompt, whose output predicts the answer, so
    it must be kept.
    """

    layer: int
    hidden: Tensor
    attention: Tensor | None = None
    measured: Tensor | None = None
    record: Callable[[str, Tensor], None] = lambda name, value: None
    rows: Tensor | None = None
    decay: Tensor | None = None
    context: LayerContext | None = None
    exact: bool = False
    last_stays: bool = False

    def ranked(self, score: Tensor) -> Tensor:
        """The places of the tokens [N] from the highest to the lowest score [N], of equal scores the lower
        place first, and before all a last token that must stay."""
        order = score.sort(descending=True, stable=True).indices
        if self.last_stays:
            last = len(order) - 1
            order = torch.cat([order[order == last], order[order != last]])
        return order


@dataclass
class LayerSelection:
    """The tokens of an image that go on from a cut: `kept` [n] ascending places among its N tokens.

    `members` [m] are dropped tokens that go on in means, `groups` [m] the number, from 0, of the mean that
    each is part of. Means follow the kept tokens.
    """

    kept: Tensor
    members: Tensor | None = None
    groups: Tensor | None = None


@dataclass(frozen=True)
class Skip:
    """What a layer leaves out for some tokens, which stay in the sequence and in the cache.

    `what`: "ffn" leaves out the MLP, "attn" the attention (other tokens still attend to the keys and values
    of those that skip it), "block" both. With `tokens` "visual" these are an image's tokens, and with "all"
    every token of a forward of `least` to `most` tokens. For all tokens, "block" copies the cache of the
    layer before, "attn" writes the normed states into the cache and gives them to the MLP, "parallel_attn"
    gives the MLP what attention gets, and "parallel_block" runs this layer and the next on the same input and
    goes on with the mean. `leading`: instead of an image's tokens, the first as many of every forward skip
    the MLP and get its input added.
    """

    what: Literal["ffn", "attn", "block", "parallel_attn", "parallel_block"]
    tokens: Literal["visual", "all"] = "visual"
    least: int = 1
    most: float = math.inf
    leading: int | None = None


PUBLISHED_LAYERS = 32
"""Layers of the language models that published schedules are for."""


@dataclass(kw_only=True)
class LayerReducer(Reducer):
    """Drops tokens before some layers of the language model, by their score there.

    Subclasses give `cuts`, and `score` or, where the highest scores alone do not decide, `select`.
    """

    stage: ClassVar[Stage] = Stage.LAYER
    rows: ClassVar[Literal["last", "instruction", "raters"] | None] = None
    rows_of: ClassVar[Literal["previous", "next"]] = "previous"
    softmax: ClassVar[bool] = True  # whether rows hold probabilities, or scaled logits
    wants_context: ClassVar[bool] = False  # whether `LayerTokens.context` is needed
    wants_decay: ClassVar[bool] = False  # whether `LayerTokens.decay` is needed, with rows = "raters"
    merges: ClassVar[bool] = False  # whether tokens go on in means

    @property
    def reads_attention(self) -> bool:
        """Whether queries or keys of the prompt are needed."""
        return self.rows is not None or self.wants_context

    def cuts(self, num_layers: int) -> dict[int, float | int]:
        """0-based layers before which tokens are dropped → the share of the image's tokens kept from there
        on, or their count, by the paper's schedule."""
        raise NotImplementedError

    def truncated(self, num_layers: int) -> tuple[int, ...]:
        """The cuts that also shorten the caches of the layers before them, once the prompt has been read."""
        return ()

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

    def raters(self, image: Tensor, text: Tensor) -> Tensor:
        """Which tokens of the text after an image rate its tokens, bool [T], from their input embeddings
        [N, D] and [T, D]. Without any, all of the text does."""
        raise NotImplementedError

    def score(self, tokens: LayerTokens) -> Tensor:
        """A score per token [N]; the highest stay."""
        raise NotImplementedError

    def select(self, tokens: LayerTokens, count: int) -> LayerSelection:
        """The tokens that stay, `count` of them unless the method adds means to the paper's number."""
        score = self.score(tokens)
        tokens.record("score", score)
        return LayerSelection(tokens.ranked(score)[:count].sort().values)

    def own_count(self, tokens: LayerTokens) -> int | None:
        """Without a budget, how many tokens stay, for methods that decide it from the tokens; None: the share
        of `cuts`."""
        return None

    def count(self, share: float, tokens: int) -> int:
        """How many of an image's `tokens` are a `share`."""
        return int(tokens * share)

    def schedule(self, num_layers: int, budget: float | None, tokens: int) -> dict[int, float]:
        """The cuts with `budget` as the share that the last one leaves, of an image with `tokens`.

        Earlier cuts follow on the paper's curve: each share is raised to the power that takes the last one to
        the budget, so a budget of 1 drops nothing.
        """
        cuts = {
            layer: min(1.0, share / tokens) if isinstance(share, int) else share
            for layer, share in sorted(self.cuts(num_layers).items())
        }
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
class SkipReducer(LayerReducer):
    """Leaves out parts of some layers for tokens that stay in the sequence and in the cache.

    `keep` is the share of the layers that compute an image's tokens, or as a count their average over the
    layers.
    """

    def cuts(self, num_layers: int) -> dict[int, float | int]:
        """No layer drops tokens."""
        return {}

    def skips(self, num_layers: int, budget: float | None) -> dict[int, Skip]:
        """0-based layers that leave something out → what; `budget` is the share of the layers that compute
        an image's tokens (None: as the paper)."""
        raise NotImplementedError


@dataclass
class CachedPrompt:
    """One whole prompt in one layer, without padding and answers: T tokens, in order.

    `module` is the attention module of the layer, `lm` its language model, `hidden` [1, T, C] are the states
    that enter the module, `keys` and `values` [1, H_k, T, D] those in the cache (rotated keys),
    `position_embeddings` what the module rotates by, cut to these tokens. `places` [N] are those of the
    visual tokens that are ranked.
    """

    module: nn.Module
    lm: nn.Module
    hidden: Tensor
    keys: Tensor
    values: Tensor
    position_embeddings: Any
    places: Tensor


@dataclass
class CacheTokens:
    """The N visual tokens of one prompt that are ranked in one layer's cache, and how many of them stay.

    `keys` and `values` [H_k, N, D] are in the order of the prompt. `received` [H_k, N] is what the queries of
    the prompt give each token, as `CacheReducer.attention_scores` counts it, summed over queries and over
    the query heads of each key head (None for methods that do not ask for it), `prompt` what surrounds the
    tokens (None unless the method has `wants_prompt`).
    """

    layer: int
    keys: Tensor
    values: Tensor
    count: int
    received: Tensor | None = None
    prompt: CachedPrompt | None = None


@dataclass(kw_only=True)
class CacheReducer(Reducer):
    """Evicts visual tokens from the cache once the prompt has been read, layer by layer."""

    stage: ClassVar[Stage] = Stage.CACHE
    per_image: ClassVar[bool] = True  # whether every image keeps its budget; else the images share the sum
    per_head: ClassVar[bool] = False  # whether each key head keeps tokens of its own
    wants_prompt: ClassVar[bool] = False  # whether `CacheTokens.prompt` is needed

    def prepare(self, model: nn.Module) -> None:
        """Read what the method needs of the model that it is attached to."""

    def default_count(self, tokens: int) -> int:
        """How many of `tokens` visual tokens stay without a budget: all of them, unless the paper has a
        number."""
        return tokens

    def attention_scores(self, layer: int) -> Callable[[Tensor], Tensor] | None:
        """For methods that rank by the prompt's attention: a function from the masked, scaled logits of some
        queries [H, R, T] to the score that each query gives each token [H, R, T]. It gets the queries of one
        prompt in order, and T tokens of the prompt without padding. None: no attention is read."""
        return None

    def score(self, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        """A score per token [N] from the visual tokens' keys and values [H_k, N, D] of one prompt; the
        highest stay."""
        raise NotImplementedError(f"{type(self).__name__} has neither score nor rank")

    def rank(self, tokens: CacheTokens) -> Tensor:
        """A score per token [N], or with `per_head` per key head and token [H_k, N]; the highest stay.

        Methods that need more than keys and values give this in place of `score`.
        """
        return self.score(tokens.layer, tokens.keys, tokens.values)


@dataclass
class CacheStep:
    """Tokens that follow the prompt, in one layer, for a reducer that chooses what they attend to.

    `query` [B, H, R, D] are R tokens per row in order, of which `real` [B, R] exist; `keys` [B, H_k, S, D]
    are all entries of the layer, the new ones included. `allowed` [B, 1, R, S] marks the entries that each
    token may attend to, `visual` [B, 1, R, S] the visual ones among them. `start`: the tokens are the last
    ones of the prompts (R = 1), which attend to everything. `memory` holds what the method keeps from step to
    step, tensors whose first dimension is B; entries only come in at the end, and `first` is how many a
    window has dropped in front. `best(scores)` marks the visual entries with the highest scores
    [B, 1 or H_k, R, S] within the budget.
    """

    layer: int
    query: Tensor
    keys: Tensor
    scaling: float | None
    allowed: Tensor
    visual: Tensor
    real: Tensor
    start: bool
    first: int
    memory: dict[str, Tensor]
    best: Callable[[Tensor], Tensor]


@dataclass(kw_only=True)
class StepReducer(Reducer):
    """Chooses which visual tokens each token after the prompt attends to; the cache keeps all of them.

    `keep` is the share or count of an image's tokens that one step attends to. The prompt itself is read
    with full attention.
    """

    stage: ClassVar[Stage] = Stage.CACHE
    per_image: ClassVar[bool] = True  # whether every image keeps its budget; else the images share the sum
    starts: ClassVar[bool] = False  # whether `attend` also gets the last token of the prompt

    def default_count(self, tokens: int) -> int:
        """How many of `tokens` visual tokens a step attends to without a budget."""
        raise NotImplementedError

    def attend(self, step: CacheStep) -> Tensor:
        """Which visual entries each token attends to, bool [B, 1 or H_k, R, S]."""
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
