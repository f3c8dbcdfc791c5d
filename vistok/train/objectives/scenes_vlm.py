"""Training a small vision-language model from scratch on questions about procedural pictures."""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...extras import needs
from ..config import RunConfig, check_ranges
from ..objective import Objective
from ..workers import start as start_workers
from ..workers import worker_started

LOSSES = ("answer", "phrases", "facts", "patches", "class_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScenesVlmConfig(RunConfig):
    """A run that trains `scenes_vlm` (LLaVA-NeXT type) or `scenes_qwen` (Qwen2.5-VL type).

    `visual_steps` first steps train the vision tower and the projector alone, with the losses "patches" and
    "class_token". `loss_weights` are those of `vistok.train.scene_learner.SceneLearner`. Accuracy is measured
    on the first `validation_questions` questions of the validation set.
    """

    vlm: Literal["scenes_vlm", "scenes_qwen"]
    visual_steps: int = 0
    loss_weights: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(LOSSES, 1.0))
    validation_questions: int = 350

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self, visual_steps=(0, math.inf), validation_questions=(1, math.inf), loss_weights=(0, math.inf)
        )
        if set(self.loss_weights) != set(LOSSES):
            raise ValueError(
                f"loss_weights names {', '.join(self.loss_weights) or 'nothing'}; give a weight to each of "
                f"{', '.join(LOSSES)}"
            )


def numbered_batches(
    data: Any, config: RunConfig, start: int, rank: int, world_size: int
) -> Iterator[dict[str, Tensor]]:
    """Endless batches `data[n]` of one process, made by the run's workers."""
    batches = DataLoader(
        data,
        batch_size=None,
        sampler=itertools.count(start * world_size + rank, world_size),
        num_workers=config.workers,
        worker_init_fn=worker_started if config.workers else None,
    )
    yield from start_workers(batches)


def write_vlm(model: Any, processor: Any, folder: Path, dtype: str) -> None:
    """Write a folder that `AutoModelForImageTextToText` and `AutoProcessor` load."""
    vlm = model.to(getattr(torch, dtype))
    vlm.set_attn_implementation("sdpa")
    vlm.save_pretrained(folder)
    processor.save_pretrained(folder)


class ScenesVlmObjective(Objective):
    """A vision-language model on scenes of known objects."""

    config_class: ClassVar[type] = ScenesVlmConfig
    loaded_by: ClassVar[str] = "transformers.AutoModelForImageTextToText.from_pretrained({})"

    def __init__(self, config: ScenesVlmConfig, device: torch.device, progress: bool) -> None:
        with needs("transformers", None, "training a vision-language model"):
            from .. import scene_batches, scene_learner, scenes_vlm

        self.config, self.device = config, device
        model, self.processor = getattr(scenes_vlm, config.vlm)()
        model.set_attn_implementation("eager")  # on CPUs faster than fused attention with a mask
        self.model = scene_learner.SceneLearner(model, self.processor)
        self.weights = config.loss_weights
        self.data = scene_batches.SceneBatches(self.processor, config.batch_size, seed=config.seed)
        self._validation = scene_batches.question_batches(
            self.processor, "validation", config.validation_questions
        )

    def batches(self, start: int, rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        """Batches of `SceneBatches`."""
        if world_size > 1 and self.config.visual_steps:
            raise ValueError(
                f"visual_steps is {self.config.visual_steps}, which leaves the language model without "
                f"gradients, and {world_size} processes would wait for them; set visual_steps: 0"
            )
        yield from numbered_batches(self.data, self.config, start, rank, world_size)

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The losses of a step, of the tower alone in the first `visual_steps`."""
        return self.model(batch, only_visual=step < self.config.visual_steps)

    def validate(self, model: nn.Module, picture: Path) -> dict[str, float]:
        """The share of right answers per category on the validation set."""
        right = defaultdict(list)
        for categories, batch in self._validation:
            batch = {name: value.to(self.device) for name, value in batch.items()}
            for category, value in zip(categories, model.is_right(batch), strict=True):
                right[category].append(value)
        return {f"accuracy_{name}": sum(values) / len(values) for name, values in right.items()}

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write a folder that `AutoModelForImageTextToText` and `AutoProcessor` load."""
        write_vlm(model.model, self.processor, folder, self.config.export_dtype)
