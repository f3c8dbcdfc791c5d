"""A small vision-language model that answers the same questions from several numbers of visual tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from ..nn.flexible_projector import FlexibleProjector
from ..nn.nested_pooling import nested_pool
from .scene_learner import SceneReader

TILES = 2  # per side of a picture of the scenes, beside the tile that shows it whole


class ScaledReader(SceneReader):
    """Answers from `scale` tokens per tile of a picture, at consecutive positions.

    The tokens are nested means of the model's own projected ones (M3), or come from `projector` where there
    is one (TokenFLEX). The vision tower has no gradients unless `trains_tower`.

    Args:
        model: of `scenes_vlm`.
        processor: its processor.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        projector: FlexibleProjector | None = None,
        *,
        trains_tower: bool = False,
    ) -> None:
        super().__init__(model, processor)
        self.projector, self.trains_tower = projector, trains_tower
        model.requires_grad_(True)
        model.model.vision_tower.requires_grad_(trains_tower)
        if projector is not None:
            model.model.multi_modal_projector.requires_grad_(False)

    @property
    def tile_side(self) -> int:
        """The side of the map of tokens of a tile at full size."""
        vision = self.model.config.vision_config
        return vision.image_size // vision.patch_size

    def forward(self, batch: dict[str, Tensor], scales: Sequence[int]) -> dict[str, Tensor]:
        """The scalar "answer", the mean over `scales` of the cross entropies "answer_<scale>", which are
        logged. The picture is encoded once."""
        states = self._tile_states(batch)
        losses = {
            f"answer_{scale}": self._answer_loss(self._states(self._tokens(states, scale), batch), batch)
            for scale in scales
        }
        answer = torch.stack(list(losses.values())).mean()
        return {"answer": answer, **{name: loss.detach() for name, loss in losses.items()}}

    @torch.no_grad()
    def is_right(self, batch: dict[str, Tensor], scale: int) -> list[bool]:
        """Whether the answer to each question of a batch of `question_batches` is right at a scale, as greedy
        decoding would give it."""
        return self._right(self._tokens(self._tile_states(batch), scale), batch)

    def compile(self) -> None:  # type: ignore[override]
        """Compile the vision tower and the language model, for sequences of any length."""
        self.model.model.vision_tower.compile()
        self.model.model.language_model.compile(dynamic=True)

    def _tile_states(self, batch: dict[str, Tensor]) -> Tensor:
        """What the tower makes of each tile, without class tokens: [B, tiles, N, C]."""
        core, pixels = self.model.model, batch["pixel_values"]
        with torch.set_grad_enabled(self.trains_tower and torch.is_grad_enabled()):
            output = core.vision_tower(
                pixels.flatten(0, 1).to(self.model.lm_head.weight.dtype), output_hidden_states=True
            )
            states = output.hidden_states[self.model.config.vision_feature_layer][:, 1:]
        return states.unflatten(0, pixels.shape[:2])

    def _tokens(self, states: Tensor, scale: int) -> Tensor:
        """The visual tokens [B, n, D] as they enter the language model: the whole picture, then its tiles
        stitched to one map whose rows end in the newline vector."""
        rows = states.shape[0]
        if self.projector is None:
            tokens = nested_pool(self.model.model.multi_modal_projector(states), scale)
        else:
            side = round(scale**0.5)
            tokens = self.projector(states.flatten(0, 1), (side, side)).unflatten(0, (rows, -1))
        side = round(tokens.shape[2] ** 0.5)
        maps = tokens[:, 1:].unflatten(2, (side, side)).unflatten(1, (TILES, TILES))
        maps = maps.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, 2 · side, 2 · side, D]
        newline = self.model.model.image_newline.to(maps).expand(*maps.shape[:2], 1, -1)
        return torch.cat([tokens[:, 0], torch.cat([maps, newline], 2).flatten(1, 2)], 1)

    def _prefix(self, visual_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """The prompt before the question with `visual_tokens` places for the picture."""
        places = self.is_visual.nonzero().squeeze(1)
        stay = torch.ones_like(self.is_visual)
        stay[places[visual_tokens:]] = False
        return self.prefix[stay], self.is_visual[stay], self.positions[: int(stay.sum())]
