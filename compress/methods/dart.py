"""DART: drop the tokens that duplicate a few pivots most."""

from dataclasses import dataclass
from typing import ClassVar

from ..algorithms.pivots import least_duplicates
from ..reducer import LayerReducer, LayerSelection, LayerTokens


@dataclass(kw_only=True)
class DART(LayerReducer):
    """Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More (Wen et al.,
    EMNLP 2025, arXiv 2502.11494).

    Before layer `pruned_layer` (0-based) the image's `pivot_image` tokens and the `pivot_text` tokens of the
    text after it with the largest L1 norm of their keys in the layer before become pivots. Image pivots stay,
    and each pivot keeps as many other tokens, those whose normed hidden state is least similar to its own;
    together they are a share 1 - `reduction_ratio` of the image, rounded down per pivot. `keep` sets that
    share.
    """

    summary: ClassVar = "least duplicates of pivot tokens"
    paper: ClassVar = "arXiv 2502.11494"
    verified: ClassVar = "kept set equal"

    pruned_layer: int = 2
    pivot_image: int = 4
    pivot_text: int = 4
    reduction_ratio: float = 0.778

    wants_context: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pivot_image", "pivot_text"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < (name == "pivot_image"):
                raise ValueError(
                    f"{name} is {value!r}; it takes a number of tokens, from {int(name == 'pivot_image')}"
                )

    def cuts(self, num_layers: int) -> dict[int, float]:
        """One cut, before the pruned layer."""
        return {self.pruned_layer: 1 - self.reduction_ratio}

    def count(self, share: float, tokens: int) -> int:
        """The image pivots, and an equal number of tokens, rounded down, for every pivot."""
        pivots = self.pivot_image + self.pivot_text
        return min(tokens, self.pivot_image + pivots * int(tokens * share / pivots))

    def select(self, tokens: LayerTokens, count: int) -> LayerSelection:
        """Image pivots, and the tokens that duplicate the pivots least."""
        context = tokens.context
        return LayerSelection(
            least_duplicates(
                context.norm(tokens.hidden),
                context.norm(context.text),
                context.keys,
                context.text_keys,
                count,
                pivot_image=self.pivot_image,
                pivot_text=self.pivot_text,
                places=context.places,
                text_places=context.text_places,
            )
        )
