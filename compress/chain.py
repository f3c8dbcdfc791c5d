"""Several reducers at one stage, in the order given, as one reducer of that stage."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from .reducer import (
    FeatureReducer,
    Image,
    PixelReducer,
    Reducer,
    Selection,
    Stage,
    TowerLayer,
    budget_of,
    count_of,
    keeps_everything,
)


def by_stage(reducers: Sequence[Reducer]) -> dict[Stage, list[Reducer]]:
    """The reducers of each stage, in the order given; several of features become one `FeatureChain`.

    Raises ValueError for reducers that cannot share a stage.
    """
    stages: dict[Stage, list[Reducer]] = {}
    for reducer in reducers:
        stages.setdefault(reducer.stage, []).append(reducer)
    if len(vision := stages.get(Stage.VISION, ())) > 1:
        raise ValueError(
            f"{' and '.join(type(reducer).__name__ for reducer in vision)} both merge in the blocks of the "
            "tower, whose tokens follow one plan; attach one of them"
        )
    pixels = [reducer for reducer in stages.get(Stage.PIXELS, ()) if isinstance(reducer, PixelReducer)]
    if len(pixels) > 1:
        raise ValueError(
            f"{' and '.join(type(reducer).__name__ for reducer in pixels)} both drop patches before the "
            "tower, each by the whole picture; attach one of them"
        )
    if pixels and vision:
        raise ValueError(
            f"{type(vision[0]).__name__} plans its merges for whole pictures, of which "
            f"{type(pixels[0]).__name__} drops patches; attach one of them"
        )
    if len(features := stages.get(Stage.FEATURES, ())) > 1:
        stages[Stage.FEATURES] = [FeatureChain(reducers=tuple(features))]
    return stages


@dataclass(kw_only=True)
class FeatureChain(FeatureReducer):
    """Feature reducers one after another; each gets the tokens that those before it left.

    The budget is for the last one. Those before it use their own `keep`, or their paper's. The tower's
    attention and states are recorded once for all. They belong to whole pictures: beside the first reducer
    only those read them that do so token by token, after reducers that select. Pixels are for the first.
    """

    reducers: tuple[FeatureReducer, ...]

    default_keep: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for number, reducer in enumerate(self.reducers[1:], 1):
            reads = bool(reducer.tower_layers()) or reducer.wants_states() is not None
            by_token = reducer.by_token and not any(before.merges for before in self.reducers[:number])
            if (reads and not by_token) or reducer.wants_pixels:
                raise ValueError(
                    f"{type(reducer).__name__} reads what the tower made of the whole picture, so it must be "
                    f"the first reducer of features; {type(self.reducers[0]).__name__} is before it"
                )
        self._layers: dict[TowerLayer, bool | Literal["joined"]] = {}
        for layer, kind in (item for reducer in self.reducers for item in reducer.tower_layers().items()):
            if self._layers.setdefault(layer, kind) != kind:
                raise ValueError(
                    f"{self._names} read the attention of tower layer {layer!r} in different forms (such as "
                    "logits and probabilities); attach one of them, or set another layer"
                )
        states = {layer for reducer in self.reducers if (layer := reducer.wants_states()) is not None}
        if len(states) > 1:
            raise ValueError(
                f"{self._names} read the tower's states with the keys of layers "
                f"{' and '.join(sorted(map(repr, states)))}; attach one of them, or set the same layer"
            )
        self._states = next(iter(states), None)
        self.keep = self.reducers[-1].keep
        self.wants_pixels = self.reducers[0].wants_pixels
        self.reads_text = any(reducer.reads_text for reducer in self.reducers)
        positions = {reducer.paper_positions for reducer in self.reducers}
        self.paper_positions = "compact" if "compact" in positions else "keep"

    @property
    def _names(self) -> str:
        return " and ".join(type(reducer).__name__ for reducer in self.reducers)

    def tower_layers(self) -> dict[TowerLayer, bool | Literal["joined"]]:
        """The tower layers whose attention any of the reducers reads."""
        return self._layers

    def wants_states(self) -> TowerLayer | None:
        """The tower layer whose keys any of the reducers reads."""
        return self._states

    def reduce(self, image: Image, budget: float | int | None) -> Selection:
        """How many tokens the last reducer leaves; a fraction is of all of the image's tokens."""
        whole, total = image, Selection(torch.arange(image.num_tokens, device=image.features.device))
        for reducer in self.reducers:
            own = budget_of(reducer.keep, whole, reducer.default_keep)
            if reducer is self.reducers[-1] and budget is not None:
                own = budget
            if keeps_everything(own):
                continue
            if own is not None:
                own = min(count_of(own, whole.num_tokens + whole.dropped), image.num_tokens)
            selection = reducer.reduce(image, own)
            total = _then(total, selection)
            image = _reduced_image(image, selection)
        return total


def _then(first: Selection, second: Selection) -> Selection:
    """Combine two successive selections into one."""
    kept = first.kept[second.kept]
    values, source = second.values, second.source
    if values is None and first.values is not None:
        values = first.values[second.kept]
    if source is not None and first.source is not None:
        source = first.source[source.clamp_min(0)].masked_fill(source < 0, -1)
    elif source is not None:
        source = first.kept[source.clamp_min(0)].masked_fill(source < 0, -1)
    elif first.source is not None:
        source = first.source[second.kept]
    deepstack = second.deepstack
    if deepstack is None and first.deepstack is not None:
        deepstack = [layer[second.kept] for layer in first.deepstack]
    return Selection(kept, values, source, deepstack)


def _reduced_image(image: Image, selection: Selection) -> Image:
    """The image for the next reducer, without what belongs to the whole picture."""
    if selection.values is None:
        return image.remaining(selection.kept)
    grid = image.grid
    if grid is not None:
        places = (selection.kept if selection.source is None else selection.source).cpu()
        is_patch = places >= 0
        places = places.clamp_min(0)
        grid = replace(
            grid,
            tile=grid.tile[places].masked_fill(~is_patch, -1),
            index=grid.index[places].masked_fill(~is_patch, -1),
        )
    return replace(image, features=selection.values, grid=grid, rows={}, states=None, keys=None, encode=None)
