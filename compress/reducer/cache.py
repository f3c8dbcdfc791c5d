"""Reducers of the cache: what is evicted after the prompt, and what later tokens attend to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .base import Reducer, Stage


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
