"""Fewer visual tokens by a processor's own settings, the baseline that needs no reducer.

Some families take a limit of pixels, tiles or tokens per picture. `native_budget` finds the setting with the
most tokens within a budget, and `applied` uses it for a while. `BudgetedProcessor` does both in every call of
a processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

from torch import nn

from .reducer import keeps_everything
from .undo import Undo

Size = tuple[int, int]


@dataclass(frozen=True)
class ProcessorSetting:
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

    def apply(self, model: nn.Module, processor: Any) -> Callable[[], None]:
        """Use the setting until the function that is returned restores what was there."""
        configs = {id(config): config for config in (model.config, model.base_model.config)}.values()
        changes = [(processor.image_processor, self.processor), *((config, self.model) for config in configs)]
        before = [(owner, {name: getattr(owner, name) for name in values}) for owner, values in changes]

        def restore() -> None:
            for owner, values in before:
                _set(owner, values)

        try:
            for owner, values in changes:
                _set(owner, values)
        except BaseException:
            restore()
            raise
        return restore

    @contextmanager
    def applied(self, model: nn.Module, processor: Any) -> Iterator[None]:
        """Use the setting inside the block, and restore what was there."""
        restore = self.apply(model, processor)
        try:
            yield
        finally:
            restore()


def _set(owner: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(owner, name, value)


def has_native_budget(model: nn.Module) -> bool:
    """Whether the processor of this model's family has a setting for fewer visual tokens."""
    return model.config.model_type in FAMILIES


def check_native_budget(model: nn.Module) -> None:
    """Raise ValueError, naming the family, where its processor has no setting for fewer visual tokens."""
    if not has_native_budget(model):
        raise ValueError(
            f"the processor of {model.config.model_type} has no setting for fewer visual tokens; there "
            f"is one for {', '.join(FAMILIES)}"
        )


def native_budget(
    model: nn.Module, processor: Any, sizes: Sequence[Size], full: int, keep: float
) -> ProcessorSetting:
    """The setting with the most visual tokens of at most `keep` × `full`, or the one with the fewest.

    `sizes` (height, width) in pixels are those of one prompt's pictures, and `full` their visual tokens as
    the processor is. Raises ValueError for a family without such a setting and a keep outside (0, 1].
    """
    check_native_budget(model)
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; it takes a share of the visual tokens in (0, 1]")

    def tokens(setting: ProcessorSetting) -> int:
        with setting.applied(model, processor):
            return visual_tokens(model, processor, sizes)

    budget = keep * full
    settings = FAMILIES[model.config.model_type](
        model, processor.image_processor, lambda setting: tokens(setting) <= budget
    )
    counted = [(tokens(setting), -number, setting) for number, setting in enumerate(settings)]
    fitting = [each for each in counted if each[0] <= budget]
    count, _, setting = max(fitting or [min(counted, key=lambda each: each[:2])], key=lambda each: each[:2])
    return replace(setting, tokens=count, fits=bool(fitting))


def visual_tokens(model: nn.Module, processor: Any, sizes: Sequence[Size]) -> int:
    """How many visual tokens pictures of these sizes (height, width) have with the processor as it is, marks
    around them not counted."""
    per_tile = _TOKENS_PER_TILE.get(model.config.model_type)
    if per_tile is None:
        images = [list(size) for size in sizes]
        return sum(processor._get_num_multimodal_tokens(image_sizes=images)["num_image_tokens"])
    counts = [processor.image_processor.get_number_of_image_patches(*size, {}) for size in sizes]
    tiles = [count[0] if isinstance(count, tuple) else count for count in counts]
    return getattr(processor, per_tile) * sum(max(1, count) for count in tiles)


_TOKENS_PER_TILE = {"internvl": "image_seq_length", "idefics3": "image_seq_len"}
"""Model type → the processor's attribute, where predicted numbers of tokens include marks."""


class BudgetedProcessor:
    """A processor that chooses, in every call, its setting with the most visual tokens within a budget.

    The share `keep` is of the tokens that the pictures of the call have otherwise, a count is per picture.
    The setting stays in force until the next call or `undo`, also in the configuration of the model. `chosen`
    gets each setting. Raises ValueError for a call that sets what the budget sets.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        keep: Callable[[], float | int],
        chosen: Callable[[ProcessorSetting], None],
    ) -> None:
        self.model, self.processor, self.keep, self.chosen = model, processor, keep, chosen
        self._restore: Callable[[], None] | None = None

    def attach(self, undo: Undo) -> None:
        """Choose settings from now on, until `undo`."""
        images = self.processor.image_processor
        if "preprocess" in vars(images):
            raise ValueError(
                f"this {type(images).__name__} has a budget already; detach the session that gave it one"
            )
        undo.step(self.restore)
        # Attributes of the image processor are its configuration, which can be printed and saved.
        undo.attribute(images, "to_dict", self._configuration(images.to_dict))
        undo.attribute(images, "preprocess", self._preprocess(images.preprocess))

    def restore(self) -> None:
        """Restore the settings as they were before the last call."""
        if self._restore is not None:
            self._restore()
        self._restore = None

    @staticmethod
    def _configuration(stock: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        @wraps(stock)
        def to_dict() -> dict[str, Any]:
            return {name: value for name, value in stock().items() if name not in ("preprocess", "to_dict")}

        return to_dict

    def _preprocess(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def preprocess(images: Any, *args: Any, **kwargs: Any) -> Any:
            self.restore()
            keep = self.keep()
            if not keeps_everything(keep):
                self._choose(_sizes(images), keep, kwargs)
            return stock(images, *args, **kwargs)

        return preprocess

    def _choose(self, sizes: list[Size], keep: float | int, kwargs: dict[str, Any]) -> None:
        full = visual_tokens(self.model, self.processor, sizes)
        # Half a token more than the count, so that rounding cannot make it one less.
        share = keep if isinstance(keep, float) else min(1.0, (keep * len(sizes) + 0.5) / full)
        setting = native_budget(self.model, self.processor, sizes, full, share)
        names = [*setting.processor, *(("min_pixels", "max_pixels") if "size" in setting.processor else ())]
        own = [name for name in names if kwargs.get(name) is not None]
        if own:
            raise ValueError(
                f"the processor was called with {', '.join(own)}, which NativeBudget sets by keep; leave "
                "it out, or detach the reducer"
            )
        self._restore = setting.apply(self.model, self.processor)
        self.chosen(setting)


def _sizes(images: Any) -> list[Size]:
    """Height and width of every picture that an image processor takes, nested or not."""
    from transformers.image_utils import get_image_size, make_flat_list_of_images

    sizes = []
    for image in make_flat_list_of_images(images):
        if hasattr(image, "size") and not callable(image.size) and isinstance(image.size, tuple):
            sizes.append((image.height, image.width))  # PIL
        else:
            sizes.append(tuple(get_image_size(image)))
    return sizes


# The settings of each family, from the most tokens to the fewest --------------------------------------------

Fits = Callable[[ProcessorSetting], bool]


def _pixels(model: nn.Module, images: Any, fits: Fits) -> list[ProcessorSetting]:
    """Qwen2-VL and later: the most pixels of a resized picture, found by bisection."""
    size = images.size
    least, most = (int(size[name]) for name in ("shortest_edge", "longest_edge"))

    def setting(pixels: int) -> ProcessorSetting:
        limits = {"shortest_edge": min(least, pixels), "longest_edge": pixels}
        return ProcessorSetting(f"longest_edge={pixels}", {"size": type(size)(**limits)})

    low, high = (images.patch_size * images.merge_size) ** 2, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(setting(middle)) else (low, middle - 1)
    return [setting(low)]


def _tiles(model: nn.Module, images: Any, fits: Fits) -> list[ProcessorSetting]:
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


def _grid_setting(text: str, grids: list[list[int]]) -> ProcessorSetting:
    pinpoints = {"image_grid_pinpoints": grids}
    return ProcessorSetting(text, pinpoints, pinpoints)


def _patches(model: nn.Module, images: Any, fits: Fits) -> list[ProcessorSetting]:
    """InternVL: the most tiles that a picture is cut into; with one the whole picture is all there is."""
    return [
        ProcessorSetting(
            f"max_patches={count}", {"max_patches": count, "min_patches": min(count, images.min_patches)}
        )
        for count in range(images.max_patches, 0, -1)
    ]


def _longest_edge(model: nn.Module, images: Any, fits: Fits) -> list[ProcessorSetting]:
    """Idefics3: the longest edge of a resized picture, in tiles."""
    tile, most = images.max_image_size["longest_edge"], images.size["longest_edge"]
    edges = [most, *range((most - 1) // tile * tile, 0, -tile)]
    return [
        ProcessorSetting(f"longest_edge={edge}", {"size": type(images.size)(longest_edge=edge)})
        for edge in edges
    ]


_SOFT_TOKENS = (1120, 560, 280, 140, 70)  # what the processor accepts


def _soft_tokens(model: nn.Module, images: Any, fits: Fits) -> list[ProcessorSetting]:
    """Gemma 4: the most tokens per picture, one of five numbers."""
    return [
        ProcessorSetting(f"max_soft_tokens={count}", {"max_soft_tokens": count})
        for count in _SOFT_TOKENS
        if count <= images.max_soft_tokens
    ]


FAMILIES: dict[str, Callable[[nn.Module, Any, Fits], list[ProcessorSetting]]] = {
    "qwen2_vl": _pixels,
    "qwen2_5_vl": _pixels,
    "qwen3_vl": _pixels,
    "qwen3_vl_moe": _pixels,
    "llava_next": _tiles,
    "llava_next_video": _tiles,
    "llava_onevision": _tiles,
    "internvl": _patches,
    "idefics3": _longest_edge,
    "gemma4": _soft_tokens,
}
"""Model type → its settings."""
