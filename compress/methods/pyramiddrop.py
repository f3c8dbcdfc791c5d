"""PyramidDrop: half of the tokens at a time, at three depths."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..reducer import LayerReducer, LayerTokens, scaled_layers, share_by_layer


@dataclass(kw_only=True)
class PyramidDrop(LayerReducer):
    """PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction
    (Xing et al., CVPR 2025, arXiv 2410.17247).

    After as many layers as `layer_list` states, the share of `image_token_ratio_list` stays: the tokens with
    the most attention from the last prompt token in the next layer, mean over heads. `keep` sets the last
    share and scales the others. The paper renumbers positions (`positions="paper"`).
    """

    summary: ClassVar = "last row's attention at three depths"
    paper: ClassVar = "arXiv 2410.17247"
    verified: ClassVar = "kept sets equal, logits bit-equal, three decode steps"

    layer_list: Sequence[int] = (8, 16, 24)
    image_token_ratio_list: Sequence[float] = (0.5, 0.25, 0.125)

    rows: ClassVar = "last"
    rows_of: ClassVar = "next"
    paper_positions: ClassVar = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cuts(0)  # refuses lists of different length

    def cuts(self, num_layers: int) -> dict[int, float]:
        """A cut after as many layers as each entry of the list states."""
        return share_by_layer(layer_list=self.layer_list, image_token_ratio_list=self.image_token_ratio_list)

    def fitted(self, num_layers: int) -> "PyramidDrop":
        """A copy that cuts at the same relative depths, for a model with too few layers."""
        if max(self.layer_list, default=0) < num_layers:
            return self
        return replace(self, layer_list=scaled_layers(self.layer_list, num_layers))

    def score(self, tokens: LayerTokens) -> Tensor:
        """Attention of the last prompt token [N]."""
        return tokens.attention
