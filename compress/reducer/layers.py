"""Reducers inside the language model: they drop tokens before layers, or leave out parts of layers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import Reducer, Stage


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
    # whether every later token selects anew, by the attention in the layer before, from all of the prompt
    revives: ClassVar[bool] = False

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
    if len(layers) >= num_layers:
        raise ValueError(
            f"{len(layers)} cuts do not fit a model of {num_layers} layers; give a schedule of its own"
        )
    scaled: list[int] = []
    for place, layer in enumerate(layers):
        nearest = round(layer * num_layers / PUBLISHED_LAYERS)
        last = num_layers - len(layers) + place  # what later cuts leave room for
        scaled.append(min(max(nearest, scaled[-1] + 1 if scaled else 1), last))
    return tuple(scaled)
