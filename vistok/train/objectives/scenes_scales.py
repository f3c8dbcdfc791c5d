"""Fine-tuning the test-bed model to answer from several numbers of visual tokens with one set of weights."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...extras import needs
from ...nn.flexible_projector import FlexibleProjector, FlexibleProjectorConfig
from ...nn.nested_pooling import nested_scales
from ..config import RunConfig, check_ranges
from ..object_scenes import PICTURE_SIZE
from ..objective import Objective
from .scenes_vlm import numbered_batches, write_vlm

PROJECTOR = "projector"
"""The folder in the exported model that holds TokenFLEX's projector."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScenesScalesConfig(RunConfig):
    """A run that fine-tunes `initial`, "scenes-vlm" or the folder of a model that was trained from it.

    With `method` "m3" every step averages the losses at all `scales` (tokens per tile); with "tokenflex" it
    draws one of them, for all processes alike, and a new projector replaces the model's own. `trains_tower`
    lets the vision tower learn, too. Accuracy is measured at every scale on the first `validation_questions`
    questions of the validation set.
    """

    method: Literal["m3", "tokenflex"]
    initial: str
    scales: tuple[int, ...]
    trains_tower: bool = False
    validation_questions: int = 350

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, validation_questions=(1, math.inf), scales=(1, math.inf))
        if not self.scales or len(set(self.scales)) < len(self.scales):
            raise ValueError(
                f"scales is {list(self.scales)}; give different numbers of tokens per tile, at least one"
            )


class ScenesScalesObjective(Objective):
    """A vision-language model that reads any of several numbers of tokens per tile."""

    config_class: ClassVar[type] = ScenesScalesConfig
    loaded_by: ClassVar[str] = "transformers.AutoModelForImageTextToText.from_pretrained({})"

    def __init__(self, config: ScenesScalesConfig, device: torch.device, progress: bool) -> None:
        with needs("transformers", None, "training a vision-language model"):
            import transformers

            from .. import scene_batches, scene_scales

        folder = _folder(config.initial)
        settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(settings, "image_grid_pinpoints", None) != [[PICTURE_SIZE, PICTURE_SIZE]]:
            raise ValueError(
                f"initial is {config.initial!r}, a {settings.model_type} model that does not read pictures "
                "in the tiles of scenes-vlm; give scenes-vlm or a model that was trained from it"
            )
        model = transformers.LlavaNextForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
        self.processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        model.set_attn_implementation("eager")  # on CPUs faster than fused attention with a mask
        projector = None
        if config.method == "tokenflex":
            widths = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
            projector = FlexibleProjector(FlexibleProjectorConfig(*widths))
        self.model = scene_scales.ScaledReader(
            model, self.processor, projector, trains_tower=config.trains_tower
        )
        self.config, self.device, self.weights = config, device, {"answer": 1.0}
        self._check_scales(self.model.tile_side)
        self.data = scene_batches.SceneBatches(self.processor, config.batch_size, seed=config.seed)
        self._validation = scene_batches.question_batches(
            self.processor, "validation", config.validation_questions
        )

    def _check_scales(self, side: int) -> None:
        scales = nested_scales(side, side)
        if self.config.method == "tokenflex":
            scales = tuple(number**2 for number in range(side, 0, -1))
        if unknown := [scale for scale in self.config.scales if scale not in scales]:
            raise ValueError(
                f"scales has {unknown[0]}; tiles of {side} × {side} tokens take "
                f"{', '.join(map(str, scales))} with method: {self.config.method}"
            )

    def batches(self, start: int, rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        """Batches of `SceneBatches`."""
        return numbered_batches(self.data, self.config, start, rank, world_size)

    def scales_of_step(self, step: int) -> tuple[int, ...]:
        """The scales at which a step learns, the same in every process."""
        if self.config.method == "m3":
            return self.config.scales
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        return (self.config.scales[int(torch.randint(len(self.config.scales), (), generator=generator))],)

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The mean cross entropy of answers over the step's scales."""
        return self.model(batch, self.scales_of_step(step))

    def validate(self, model: nn.Module, picture: Path) -> dict[str, float]:
        """The share of right answers per scale on the validation set."""
        right = defaultdict(list)
        for _, batch in self._validation:
            batch = {name: value.to(self.device) for name, value in batch.items()}
            for scale in self.config.scales:
                right[scale] += model.is_right(batch, scale)
        return {f"accuracy_at_{scale}": sum(values) / len(values) for scale, values in right.items()}

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write a folder that `AutoModelForImageTextToText` and `AutoProcessor` load; with a projector of
        its own that is in the folder "projector", which `FlexibleProjector.load` reads."""
        write_vlm(model.model, self.processor, folder, self.config.export_dtype)
        if model.projector is not None:
            model.projector.save(folder / PROJECTOR)


def _folder(initial: str) -> Path:
    """The folder of a shipped model or of another one. Raises FileNotFoundError."""
    folder = Path(str(files("vistok.assets") / "scenes-vlm")) if initial == "scenes-vlm" else Path(initial)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"initial is {initial!r}, and {folder} is not the folder of a model (it has no config.json); "
            "give scenes-vlm or such a folder"
        )
    return folder
