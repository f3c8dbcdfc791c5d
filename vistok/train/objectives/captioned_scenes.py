"""Training a tokenizer that reads captions, on scenes of known objects with captions made for them."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ...files import atomic_write
from ...images import side_by_side, to_pil
from ...tokenizer import Tokenizer
from ..config import TrainConfig, check_ranges
from ..object_scenes import PICTURE_SIZE, ObjectScene, caption, object_scene, render
from .scenes_vlm import numbered_batches
from .tokenizer import TokenizerObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionedScenesConfig(TrainConfig):
    """A run that trains a text-conditioned tokenizer on `object_scenes`; `data` stays empty.

    The side of pictures divides 120. `validation_scenes` scenes of the validation split are reconstructed
    with their captions and, where the tokenizer reads them, with those of others.
    """

    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    validation_scenes: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, validation_scenes=(2, math.inf))
        if self.data or self.validation or self.teacher:
            raise ValueError(
                "captioned scenes are the data and the validation of this objective; leave out data, "
                "validation and teacher"
            )


@dataclasses.dataclass
class CaptionedScenes(Dataset):
    """Scenes of a split with captions; `size` is the side of pictures in pixels and divides 120."""

    size: int
    seed: int
    split: str = "train"

    def __post_init__(self) -> None:
        if PICTURE_SIZE % self.size:
            raise ValueError(
                f"image_size is {self.size}; scenes are drawn at sides that divide {PICTURE_SIZE}"
            )

    def scene(self, index: int) -> ObjectScene:
        """Scene number `index`, from 0."""
        return object_scene(self.split, self.seed, index)

    def picture(self, index: int) -> Tensor:
        """Its picture: uint8 [3, size, size], means of the pixels of the drawing."""
        drawn = torch.from_numpy(render(self.scene(index))).permute(2, 0, 1).float()
        return F.avg_pool2d(drawn, PICTURE_SIZE // self.size).round().byte()

    def caption(self, index: int) -> str:
        """Its caption."""
        return caption(self.scene(index))


@dataclasses.dataclass
class _Batches(Dataset):
    source: CaptionedScenes
    size: int

    def __getitem__(self, number: int) -> dict[str, Any]:
        indices = range(number * self.size, (number + 1) * self.size)
        return {
            "images": torch.stack([self.source.picture(index) for index in indices]),
            "captions": [self.source.caption(index) for index in indices],
        }


class CaptionedScenesObjective(TokenizerObjective):
    """A tokenizer on drawn scenes and their captions, which its forward takes as `text`."""

    config_class: ClassVar[type] = CaptionedScenesConfig
    source: CaptionedScenes

    def _tokenizer(self) -> Tokenizer:
        tokenizer = super()._tokenizer()
        if "text" not in tokenizer.conditions:
            raise ValueError(
                f"captioned scenes train a tokenizer that reads text; {tokenizer.label} has the conditions "
                f"{tokenizer.conditions or 'none'}; train it with objective: tokenizer"
            )
        return tokenizer

    def _source(self) -> CaptionedScenes:
        return CaptionedScenes(self.tokenizer.image_size, self.config.seed)

    def batches(self, start: int, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        """ "images" uint8 [B, 3, H, W] and "captions", a list of B."""
        data = _Batches(self.source, self.config.batch_size)
        return numbered_batches(data, self.config, start, rank, world_size)

    def _given(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        return batch["images"].float() / 255, self._text(batch["captions"])

    def _text(self, captions: list[str]) -> dict[str, Any]:
        return {"text": captions} if self.tokenizer.config.text_encoder else {}

    @torch.no_grad()
    def validate(self, model: Tokenizer, picture: Path) -> dict[str, float]:
        """Mean PSNR in dB on held-out scenes, with their own captions and with each other's."""
        source = dataclasses.replace(self.source, split="validation", seed=0)
        count, reads = self.config.validation_scenes, bool(model.config.text_encoder)
        images = torch.stack([source.picture(index) for index in range(count)]).to(self.device).float() / 255
        captions = [source.caption(index) for index in range(count)]
        others = [*captions[1:], captions[0]]
        figures, first = {}, []
        for name, texts in (("psnr", captions), ("psnr_wrong_captions", others)):
            if name != "psnr" and not reads:
                continue
            decoded = []
            for start in range(0, count, self.config.batch_size):
                part = slice(start, start + self.config.batch_size)
                condition = texts[part] if reads else None
                decoded.append(model.reconstruct(images[part], condition=condition))
            decoded = torch.cat(decoded)
            mse = (decoded - images).square().mean((1, 2, 3)).double().clamp_min(1e-10)
            figures[f"validation_{name}"] = float(-10 * mse.log10().mean())
            first.append(to_pil(decoded[:8]))
        with atomic_write(picture) as path:
            sheet = side_by_side([list(row) for row in zip(to_pil(images[:8]), *first, strict=True)])
            sheet.save(path, format="PNG")
        return figures
