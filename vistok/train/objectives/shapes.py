"""Training a tokenizer of solids on procedural shapes, by which points are inside."""

import dataclasses
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ...loading import create
from ...tokenizer import Tokenizer
from ..config import RunConfig, check_ranges
from ..objective import Objective
from ..shapes import shape
from .scenes_vlm import numbered_batches

NEAR = (0.02, 0.1)  # how far from the surface, as standard deviations, half of the queries lie


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesConfig(RunConfig):
    """A run that trains a tokenizer of the modality "shape" on the first `shapes` procedural shapes.

    Each sample has `points` surface points and `queries` places to tell inside from outside, half of them
    near the surface. `validation_shapes` others are judged by intersection over union at every length.
    """

    tokenizer: dict[str, Any]
    shapes: int = 2000
    points: int = 512
    queries: int = 1024
    validation_shapes: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self,
            shapes=(1, math.inf),
            points=(16, math.inf),
            queries=(16, math.inf),
            validation_shapes=(1, math.inf),
        )
        if "name" not in self.tokenizer:
            raise ValueError("tokenizer needs a name: a family of the modality shape, such as vat")


@dataclasses.dataclass
class _Samples(Dataset):
    config: ShapesConfig

    def __post_init__(self) -> None:
        self._surface = lru_cache(maxsize=4000)(self._make_surface)

    def _make_surface(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.config.seed, index, 0))
        return shape("train", self.config.seed, index).surface(4 * self.config.points, rng)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        size = self.config.batch_size
        rows = [self._sample(index) for index in range(number * size, (number + 1) * size)]
        names = ("points", "queries", "inside")
        batch = zip(names, zip(*rows, strict=True), strict=True)
        return {name: torch.from_numpy(np.stack(column)) for name, column in batch}

    def _sample(self, index: int) -> tuple[np.ndarray, ...]:
        config = self.config
        own = index % config.shapes
        rng = np.random.default_rng((config.seed, index, 1))
        places, normals = self._surface(own)
        chosen = rng.permutation(len(places))[: config.points]
        near = places[rng.integers(len(places), size=config.queries // 2)]
        spread = rng.choice(NEAR, size=(len(near), 1))
        queries = np.concatenate(
            [
                near + spread * rng.standard_normal(near.shape),
                rng.uniform(-1, 1, (config.queries - len(near), 3)),
            ]
        )
        inside = shape("train", config.seed, own).inside(queries)
        points = np.concatenate([places[chosen], normals[chosen]], 1)
        return points, queries.astype(np.float32), inside.astype(np.float32)


class ShapesObjective(Objective):
    """A tokenizer of solids."""

    config_class: ClassVar[type] = ShapesConfig
    loaded_by: ClassVar[str] = "vistok.load({})"

    def __init__(self, config: ShapesConfig, device: torch.device, progress: bool) -> None:
        self.config, self.device = config, device
        fields = dict(config.tokenizer)
        self.model = create(fields.pop("name"), **fields)
        self.model.require_modality("shape", "this objective trains")
        self.normals = self.model.config.normals
        self.weights = {"occupancy": 1.0, "kl": 1.0, "commitment": 1.0}
        self.data = _Samples(config)

    def batches(self, start: int, rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        """ "points" [B, P, 6], "queries" [B, M, 3] and "inside" [B, M], 1 inside."""
        return numbered_batches(self.data, self.config, start, rank, world_size)

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Binary cross entropy of inside and outside, and the quantizer's losses."""
        output = self.model(self._points(batch["points"]), batch["queries"])
        logits = output.images.float()
        return {
            "occupancy": F.binary_cross_entropy_with_logits(logits, batch["inside"]),
            **output.losses,
            "right": ((logits > 0) == (batch["inside"] > 0)).float().mean().detach(),
        }

    def _points(self, points: Tensor) -> Tensor:
        return points if self.normals else points[..., :3]

    @torch.no_grad()
    def validate(self, model: Tokenizer, picture: Path) -> dict[str, float]:
        """Mean intersection over union on held-out shapes, of each length that decodes."""
        count, config = self.config.validation_shapes, self.config
        shapes = [shape("validation", 0, index) for index in range(count)]
        rng = np.random.default_rng(0)
        surfaces = [np.concatenate(each.surface(config.points, rng), 1) for each in shapes]
        queries = rng.uniform(-1, 1, (count, 16384, 3)).astype(np.float32)
        inside = torch.from_numpy(
            np.stack([each.inside(own) for each, own in zip(shapes, queries, strict=True)])
        )
        tokens = model.encode(self._points(torch.from_numpy(np.stack(surfaces))))
        figures = {}
        for length in model.prefix_lengths:
            found = model.occupancy(tokens.prefix(length), torch.from_numpy(queries)).cpu() > 0.5
            ratio = (found & inside).sum(1) / (found | inside).sum(1).clamp_min(1)
            figures[f"validation_iou_{length}"] = float(ratio.mean())
        return figures

    def export(self, model: Tokenizer, folder: Path) -> None:
        """Write a folder that `vistok.load` reads."""
        model.to(getattr(torch, self.config.export_dtype)).save_pretrained(folder)
