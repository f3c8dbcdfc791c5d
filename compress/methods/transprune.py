"""TransPrune: drop tokens that layers change little and that the instruction does not attend to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..reducer import LayerReducer, LayerTokens, scaled_layers, share_by_layer


@dataclass(kw_only=True)
class TransPrune(LayerReducer):
    """TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model (Li et al., 2025, arXiv
    2507.20630).

    In the layers of `accumulating_layer_list` each token's transition is measured: how much attention and MLP
    change its norm and direction. After as many layers as `pruning_layer_list` states (1-based, as in the
    original) the share of `image_token_ratio_list` stays, by summed transitions plus the attention that the
    instruction pays in the next layer. `keep` sets the last share and scales the others. The paper's text
    takes 1 - |cos| and a soft-max over image tokens (`variant="paper"`), the released code 1 - cos and all
    tokens ("code").
    """

    summary: ClassVar = "token transitions and instruction attention"
    paper: ClassVar = "arXiv 2507.20630"
    verified: ClassVar = "scores 1.5e-8, kept sets equal, logits bit-equal"

    accumulating_layer_list: Sequence[int] = (7, 8, 9, 10, 11, 12)
    pruning_layer_list: Sequence[int] = (7, 9, 12)
    image_token_ratio_list: Sequence[float] = (0.875, 0.625, 0.125)
    alpha: float = 0.5
    variant: Literal["code", "paper"] = "code"

    rows: ClassVar = "instruction"
    rows_of: ClassVar = "next"
    paper_positions: ClassVar = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cuts(0)  # refuses lists of different length

    def cuts(self, num_layers: int) -> dict[int, float]:
        """A cut after as many layers as each entry of the list states."""
        return share_by_layer(
            pruning_layer_list=self.pruning_layer_list, image_token_ratio_list=self.image_token_ratio_list
        )

    def fitted(self, num_layers: int) -> "TransPrune":
        """A copy that cuts at the same relative depths, for a model with too few layers; it measures every
        layer from the first cut to the last, as the published schedule does."""
        if max(self.pruning_layer_list, default=0) < num_layers:
            return self
        cuts = scaled_layers(self.pruning_layer_list, num_layers)
        measured = tuple(range(cuts[0], cuts[-1] + 1))
        return replace(self, pruning_layer_list=cuts, accumulating_layer_list=measured)

    def measured_layers(self, num_layers: int) -> tuple[int, ...]:
        """The accumulating layers, 0-based."""
        return tuple(layer - 1 for layer in self.accumulating_layer_list if layer <= num_layers)

    def measure(self, module: str, inputs: Tensor, outputs: Tensor, valid: Tensor, visual: Tensor) -> Tensor:
        """Transition [B, L] of each token through a module: relative length times soft-max of the turn (Eqs.
        2-4)."""
        inputs, outputs = inputs.float(), outputs.float()
        cosine = cosine_similarity(inputs, outputs, dim=-1, eps=1e-8)
        paper = self.variant == "paper"
        turn = 1 - (cosine.abs() if paper else cosine)
        turn = turn.masked_fill(~(visual if paper else valid), -torch.inf).softmax(-1)
        return (outputs.norm(dim=-1) / inputs.norm(dim=-1) * turn).nan_to_num()

    def score(self, tokens: LayerTokens) -> Tensor:
        """Both parts, each as a share of its sum over the image (Eq. 6) [N]."""
        parts = []
        for name, raw in (("acc", tokens.measured), ("iga", tokens.attention)):
            if raw is None:  # nothing was measured before the first cut
                raw = torch.zeros_like(tokens.attention)
            tokens.record(f"{name}_raw", raw)
            parts.append(raw / (raw.sum() + 1e-8))
            tokens.record(name, parts[-1])
        return 2 * (self.alpha * parts[0] + (1 - self.alpha) * parts[1])
