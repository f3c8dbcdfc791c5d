"""Fewer visual tokens by a processor's own settings, the baseline that needs no reducer.

Some families take a limit of pixels, tiles or tokens per picture. `native_budget` finds the setting with the
most tokens within a budget, and `applied` uses it for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

Size = tuple[int, int]


@dataclass(frozen=True)
class NativeBudget:
    """A setting of a processor: `text` for tables, `tokens` that it gives the pictures it was chosen for,
    `fits` whether these are within the budget.

    `processor` are attributes of the image processor, `model` fields of the model's configuration that must
    agree with them.
    """

    text: str
    processor: dict[str, Any] = field(hash=False)
    model: dict[str, Any] = field(default_factory=dict, hash=False)
    tokens: int = 0
    fits: bool = True

    @contextmanager
    def applied(self, model: nn.Module, processor: Any) -> Iterator[None]:
        """Use the setting inside the block, and restore what was there."""
        configs = {id(config): config for config in (model.config, model.base_model.config)}.values()
        changes = [(processor.image_processor, self.processor), *((config, self.model) for config in configs)]
        before = [(owner, {name: getattr(owner, name) for name in values}) for owner, values in changes]
        try:
            for owner, values in changes:
                _set(owner, values)
            yield
        finally:
            for owner, values in before:
                _set(owner, values)


def _set(owner: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(owner, name, value)


def has_native_budget(model: nn.Module) -> bool:
    """Whether the processor of this model's family has a setting for fewer visual tokens."""
    return model.config.model_type in FAMILIES


def native_budget(
    model: nn.Module, processor: Any, sizes: Sequence[Size], full: int, keep: float
) -> NativeBudget:
    """The setting with the most visual tokens of at most `keep` × `full`, or the one with the fewest.

    `sizes` (height, width) in pixels are those of one prompt's pictures, and `full` their visual tokens as
    the processor is. Raises ValueError for a family without such a setting and a keep outside (0, 1].
    """
    if not has_native_budget(model):
        raise ValueError(
            f"the processor of {model.config.model_type} has no setting for fewer visual tokens; there "
            f"is one for {', '.join(FAMILIES)}"
        )
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; it takes a share of the visual tokens in (0, 1]")
    # What a processor predicts includes marks around the picture in some families.
    marks = _predicted(processor, sizes) - full

    def tokens(setting: NativeBudget) -> int:
        with setting.applied(model, processor):
            return _predicted(processor, sizes) - marks

    budget = keep * full
    settings = FAMILIES[model.config.model_type](
        model, processor.image_processor, lambda setting: tokens(setting) <= budget
    )
    counted = [(tokens(setting), -number, setting) for number, setting in enumerate(settings)]
    fitting = [each for each in counted if each[0] <= budget]
    count, _, setting = max(fitting or [min(counted, key=lambda each: each[:2])], key=lambda each: each[:2])
    return replace(setting, tokens=count, fits=bool(fitting))


def _predicted(processor: Any, sizes: Sequence[Size]) -> int:
    return sum(processor._get_num_multimodal_tokens(image_sizes=[list(s) for s in sizes])["num_image_tokens"])


# The settings of each family, from the most tokens to the fewest --------------------------------------------

Fits = Callable[[NativeBudget], bool]


def _pixels(model: nn.Module, images: Any, fits: Fits) -> list[NativeBudget]:
    """Qwen2-VL and later: the most pixels of a resized picture, found by bisection."""
    size = images.size
    least, most = (int(size[name]) for name in ("shortest_edge", "longest_edge"))

    def setting(pixels: int) -> NativeBudget:
        limits = {"shortest_edge": min(least, pixels), "longest_edge": pixels}
        return NativeBudget(f"longest_edge={pixels}", {"size": type(size)(**limits)})

    low, high = (images.patch_size * images.merge_size) ** 2, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(setting(middle)) else (low, middle - 1)
    return [setting(low)]


def _tiles(model: nn.Module, images: Any, fits: Fits) -> list[NativeBudget]:
    """LLaVA-NeXT and its successors: the tiles that a picture is cut into, beside the whole picture."""
    side = model.config.vision_config.image_size
    grids = [list(each) for each in model.config.image_grid_pinpoints]
    rows, cols = max(h for h, _ in grids) // side, max(w for _, w in grids) // side
    most = max(h * w for h, w in grids) // side**2
    settings = [_grid_setting("all tiles", grids)]
    for count in range(most - 1, 0, -1):
        fewer = [
            [side * row, side * col]
            for row in range(1, rows + 1)
            for col in range(1, cols + 1)
            if row * col <= count
        ]
        settings.append(_grid_setting(f"up to {count} tile{'s' * (count > 1)}", fewer))
    return settings


def _grid_setting(text: str, grids: list[list[int]]) -> NativeBudget:
    pinpoints = {"image_grid_pinpoints": grids}
    return NativeBudget(text, pinpoints, pinpoints)


def _patches(model: nn.Module, images: Any, fits: Fits) -> list[NativeBudget]:
    """InternVL: the most tiles that a picture is cut into; with one the whole picture is all there is."""
    return [
        NativeBudget(
            f"max_patches={count}", {"max_patches": count, "min_patches": min(count, images.min_patches)}
        )
        for count in range(images.max_patches, 0, -1)
    ]


_SOFT_TOKENS = (1120, 560, 280, 140, 70)  # what the processor accepts


def _soft_tokens(model: nn.Module, images: Any, fits: Fits) -> list[NativeBudget]:
    """Gemma 4: the most tokens per picture, one of five numbers."""
    return [
        NativeBudget(f"max_soft_tokens={count}", {"max_soft_tokens": count})
        for count in _SOFT_TOKENS
        if count <= images.max_soft_tokens
    ]


FAMILIES: dict[str, Callable[[nn.Module, Any, Fits], list[NativeBudget]]] = {
    "qwen2_vl": _pixels,
    "qwen2_5_vl": _pixels,
    "qwen3_vl": _pixels,
    "qwen3_vl_moe": _pixels,
    "llava_next": _tiles,
    "llava_next_video": _tiles,
    "llava_onevision": _tiles,
    "internvl": _patches,
    "gemma4": _soft_tokens,
}
"""Model type → its settings."""
