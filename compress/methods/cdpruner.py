"""CDPruner: a subset of tokens that differ from each other and are relevant to the instruction."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..algorithms.dpp import dpp_order, text_relevance
from ..algorithms.grid import Grid
from ..reducer import FeatureReducer, Image, TowerLayer
from ..vision.text_tower import TextTower


@dataclass(kw_only=True)
class CDPruner(FeatureReducer):
    """Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs (Zhang et
    al., NeurIPS 2025, arXiv 2506.10967).

    Of every tile equally many tokens stay, which span the largest volume: a token's length is its relevance
    to the instruction, and angles are those of the projected features. The instruction is the text after the
    image. With a `text_tower` relevance is the cosine of CLIP's embeddings of image and text, negated as in
    the original, because patches that lie far from a text in CLIP's space are those it is about. Models whose
    tower has no text half, such as Qwen-VL and InternVL, need none: relevance is then the cosine of projected
    features and the language model's embeddings of the instruction, mean over its tokens. Newline vectors go
    first.
    """

    summary: ClassVar = "diverse tokens, weighted by the instruction"
    paper: ClassVar = "arXiv 2506.10967"
    verified: ClassVar = "picks equal in 3 sets, with text embeddings"

    text_tower: TextTower | None = None

    reads_text: ClassVar[bool] = True
    by_token: ClassVar[bool] = True

    def wants_states(self) -> TowerLayer | None:
        """The states that a text tower embeds."""
        return None if self.text_tower is None else "features"

    def scores(self, image: Image) -> Tensor:
        """The relevance of each token [N]; 0 for newlines. Raises ValueError without text, and with a text
        tower where states or numbers of the text are not known."""
        patches = slice(None) if image.grid is None else (~image.grid.separators).to(image.features.device)
        embeds, sign = (image.features, 1.0) if self.text_tower is None else (self._embeds(image), -1.0)
        relevance = torch.zeros(image.num_tokens, device=image.features.device)
        relevance[patches] = text_relevance(embeds[patches], self._text(image), sign=sign)
        return relevance

    def _embeds(self, image: Image) -> Tensor:
        """CLIP's embeddings of the image's tokens [N, E]."""
        states = image.encoded()
        if states is None:
            raise ValueError(
                "CDPruner's text_tower embeds the tower's states, and which of them a token is made of is "
                "not known for this model; use CDPruner() without a text tower"
            )
        return self.text_tower.image_embeds(states).to(image.features.device)

    def _text(self, image: Image) -> Tensor:
        """Embeddings of the instruction: one per token [T, D], or by the text tower [M, E]."""
        text = image.text[image.instruction]
        if not len(text):
            raise ValueError(
                "CDPruner ranks tokens by the prompt's text, and this prompt has none; add an instruction, "
                "or use a method that reads features alone, such as divprune"
            )
        if self.text_tower is None:
            return text
        return self.text_tower.text_embeds(image.text_ids[image.instruction]).to(text.device)

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of exactly `count` tokens by `features` [N, D] and their relevance `scores` [N]."""
        scores = self.need(scores)
        mask = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        for places, share in self.even_shares(grid, len(features), count):
            own = places.to(features.device)
            mask[own[dpp_order(features[own], scores[own], share)]] = True
        return self.completed(mask, count)
