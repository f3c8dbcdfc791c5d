"""Models whose images do not enter at the border of a decoder: through a Q-Former or by
cross-attention.

BLIP-2 and InstructBLIP: what enters the Q-Former is reduced, its queries stay. Mllama: the states that the
text attends to are reduced; its self-attention never gets them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms.grid import Grid
from ..hosts import cache_in
from ..layout import compact, gather
from ..reducer import Budget, FeatureReducer, Image, Reducer, Stage
from ..report.counts import ImageReport, Report
from ..undo import Undo
from .boundary import decide

KINDS = {"mllama": "mllama", "blip-2": "qformer", "instructblip": "qformer"}


@dataclass
class CutPoint:
    """A reducer at a model's own cut point."""

    model: nn.Module
    reducer: FeatureReducer
    keep: Callable[[], Budget]
    undo: Undo
    images: list[ImageReport] = field(default_factory=list)
    _local: threading.local = field(default_factory=threading.local)

    def report(self, reducers: list[str]) -> Report:
        """Tokens kept; operations are not counted for these models. Raises RuntimeError before an image."""
        if not self.images:
            raise RuntimeError("no prompt with images has run in this session yet")
        return Report(reducers, self.images)

    def _chosen(self, features: Tensor, grid: Grid | None, number: int, row: int) -> Tensor:
        """Numbers of the tokens of one image that stay."""
        image = Image(features, features[:0], grid, number)
        selection, numbers = decide(image, self.reducer, self.keep(), None)
        if selection.values is not None:
            raise TypeError(
                f"{type(self.reducer).__name__} merges tokens, which {type(self.model).__name__}'s cut "
                "point does not take; attach a reducer that selects"
            )
        self.images.append(ImageReport(row, number, len(features), [len(numbers)]))
        return numbers

    # Q-Former -----------------------------------------------------------------------------------------------

    def attach_qformer(self) -> None:
        """Reduce the patches that the Q-Former reads; the class token in front stays."""

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            states = kwargs.get("encoder_hidden_states")
            if states is None:
                return None
            self.images = []
            side = round((states.shape[1] - 1) ** 0.5)
            grid = Grid.single(side, side) if side * side == states.shape[1] - 1 else None
            stay = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
            stay[:, 0] = True
            for row in range(len(states)):
                stay[row, 1 + self._chosen(states[row, 1:], grid, 0, row)] = True
            if stay.all():
                return None
            index, valid, _ = compact(stay)
            mask = kwargs.get("encoder_attention_mask")
            mask = valid.long() if mask is None else gather(mask, index) * valid.to(mask)
            return args, {
                **kwargs,
                "encoder_hidden_states": gather(states, index),
                "encoder_attention_mask": mask,
            }

        self.undo.pre_hook(self.model.qformer, before)

    # Cross-attention ----------------------------------------------------------------------------------------

    def attach_mllama(self) -> None:
        """Reduce the states that the text attends to; which ones stayed is recorded on the cache."""

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            states, mask = kwargs.get("cross_attention_states"), kwargs.get("cross_attention_mask")
            if states is None:
                index = getattr(cache_in(kwargs), "vistok_cross_index", None)
                if index is None or mask is None:
                    return None
                return args, {**kwargs, "cross_attention_mask": _columns(mask, *index)}
            embeds = kwargs.get("inputs_embeds")
            batch = len(kwargs["input_ids"] if embeds is None else embeds)
            flat = states.reshape(batch, -1, states.shape[-1])
            stay = self._stay(flat, states.shape[1], mask)
            if stay.all():
                return None
            index, valid, _ = compact(stay)
            self._local.index = (index, valid)
            changed = {**kwargs, "cross_attention_states": gather(flat, index)}
            if mask is not None:
                changed["cross_attention_mask"] = _columns(mask, index, valid)
            return args, changed

        def after(module: nn.Module, args: Any, output: Any) -> None:
            index, self._local.index = getattr(self._local, "index", None), None
            cache = cache_in(output)
            if index is not None and cache is not None:
                cache.vistok_cross_index = index

        language_model = self.model.base_model.language_model
        self.undo.pre_hook(language_model, before)
        self.undo.hook(language_model, after, with_kwargs=False)

    def _stay(self, states: Tensor, patches: int, mask: Tensor | None) -> Tensor:
        """Which of each row's states [B, images · tiles · n, D] stay; tiles that no text may attend to go."""
        tiles = self.model.config.vision_config.max_num_tiles
        visible = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        if mask is not None:
            visible = (mask == 0).any(2)[:, 0]
            hidden_rows = ~visible.any(1)
            visible[hidden_rows] = True
        stay, self.images = torch.zeros_like(visible), []
        per_image = tiles * patches
        for row in range(len(states)):
            for number in range(states.shape[1] // per_image):
                places = torch.arange(per_image, device=states.device) + number * per_image
                places = places[visible[row, places]]
                if len(places):
                    chosen = self._chosen(states[row, places], None, number, row)
                    if len(chosen) == len(places) == int(visible[row].sum()):
                        stay[row] = True  # nothing to drop: leave the row as it is
                    else:
                        stay[row, places[chosen]] = True
        return stay


def _columns(mask: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """The columns of a cross-attention mask [B, 1, L, N] that stay."""
    columns = index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    return mask.gather(3, columns).masked_fill(~valid[:, None, None], torch.finfo(mask.dtype).min)


def attach(
    model: nn.Module, stages: dict[Stage, Reducer], keep: Callable[[], Budget], undo: Undo
) -> CutPoint | None:
    """Reduce at the model's own cut point; None for models without one.

    Raises TypeError for reducers of other stages than FEATURES, and for those that read the tower's
    attention.
    """
    kind = KINDS.get(getattr(getattr(model, "config", None), "model_type", ""))
    if kind is None:
        return None
    name = type(model).__name__
    reducer = stages.get(Stage.FEATURES)
    if reducer is None or len(stages) > 1:
        others = [type(r).__name__ for stage, r in stages.items() if stage is not Stage.FEATURES]
        raise TypeError(
            f"{name} takes its images in through a "
            f"{'Q-Former' if kind == 'qformer' else 'cross-attention'}, where only reducers of features "
            f"act; {' and '.join(others)} acts elsewhere"
        )
    if reducer.wants_pixels:
        raise TypeError(
            f"{name} ({model.config.model_type}) cannot encode a smaller picture: what its tower gives does "
            "not enter the language model as tokens"
        )
    if reducer.tower_layers() or reducer.wants_states():
        raise TypeError(
            f"{type(reducer).__name__} reads the attention of the vision tower, which is not recorded for "
            f"{name}; use a method that reads features alone, as DivPrune"
        )
    if reducer.reads_text:
        raise TypeError(
            f"{type(reducer).__name__} ranks by the prompt's text, which does not enter the "
            f"{'Q-Former' if kind == 'qformer' else 'cross-attention'} of {name}; use a method that reads "
            "features alone, as DivPrune"
        )
    point = CutPoint(model, reducer, keep, undo)
    point.attach_qformer() if kind == "qformer" else point.attach_mllama()
    return point
