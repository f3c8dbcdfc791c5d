"""PixelPrune: patches whose pixels the patches before them already give never enter the tower."""

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..algorithms.predictive import (
    METRICS,
    Metric,
    Similarity,
    predicted_2d,
    sample_of_components,
    starts_of_runs,
    with_count,
)
from ..reducer import Patches, PixelReducer

METHODS = ("pred_2d", "raster", "serpentine", "random", "conncomp")
_ROUNDING = 0.01  # of pixels in half precision, in units of [0, 1]


@dataclass(kw_only=True)
class PixelPrune(PixelReducer):
    """PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding (2026, arXiv 2604.00886).

    Drops a visual token when the pixels behind it are similar to those that its neighbours predict: their
    distance by `metric` is at most `threshold`, in pixel units of [0, 1]. At threshold 0 (the default) the
    kept pixels and the mask determine every pixel of the picture. Documents and screens lose much, noisy
    photographs nothing.

    `method`: "pred_2d" predicts from the left, above or above-left neighbour (`anchored`: as they are
    reconstructed from kept tokens, so that errors do not add up; else as they are), "raster" and "serpentine"
    from the last kept token along the rows. Baselines: "random" keeps as many as "pred_2d", "conncomp" a
    share of each connected component of similar tokens: with `align_compression` as many in all as "pred_2d",
    else 1 - `skip_ratio` of each, at random or (`rand=False`) at even distances. `seed` is for both.

    A threshold above 0 needs to know how the pixels were normalised: give the `processor`, or `image_mean`
    and `image_std` (one number per channel). Raises ValueError for settings that do not go together, a
    processor that cuts other patches than the model, and pixels that were not made with these numbers.
    """

    summary: ClassVar = "patches that their neighbours predict, before the tower"
    paper: ClassVar = "arXiv 2604.00886"
    verified: ClassVar = "masks of 11 settings equal, logits 2.4e-6"

    method: Literal["pred_2d", "raster", "serpentine", "random", "conncomp"] = "pred_2d"
    metric: Metric = "max"
    threshold: float = 0.0
    anchored: bool = True
    skip_ratio: float | None = None
    rand: bool = True
    align_compression: bool = True
    seed: int = 42
    processor: Any = None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = field(
        init=False, default=None, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("method", METHODS), ("metric", METRICS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it takes {', '.join(known)}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it takes pixel units from 0 to 1")
        if self.metric == "exact" and self.threshold:
            raise ValueError(f'metric="exact" is for threshold 0, not {self.threshold}; use metric="max"')
        if self.method == "conncomp" and self.align_compression != (self.skip_ratio is None):
            raise ValueError(
                f"skip_ratio is {self.skip_ratio} with align_compression={self.align_compression}; give a "
                'skip_ratio and align_compression=False, or neither, to keep as many tokens as "pred_2d"'
            )
        if self.skip_ratio is not None and not 0 <= self.skip_ratio <= 1:
            raise ValueError(f"skip_ratio is {self.skip_ratio}; it takes a share from 0 to 1")
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("image_mean and image_std belong together; give both or neither")
        if self.processor is not None:
            images = _image_processor(self.processor)
            if self.image_mean is not None:
                raise ValueError("image_mean and image_std are the processor's; give one or the other")
            self.normalisation = tuple(images.image_mean), tuple(images.image_std)
            if not images.do_normalize:
                self.normalisation = (0.0,) * len(images.image_mean), (1.0,) * len(images.image_std)
        elif self.image_mean is not None:
            self.normalisation = tuple(self.image_mean), tuple(self.image_std)
        if self.threshold and self.normalisation is None:
            raise ValueError(
                f"threshold is {self.threshold} in pixel units of [0, 1], and how the pixels were normalised "
                "is not known; give the processor, or image_mean and image_std"
            )

    def check(self, vision: Any) -> None:
        """Compare the processor's patches with those of a model's vision configuration."""
        if self.processor is None:
            return
        images = _image_processor(self.processor)
        for name, expected in (
            ("patch_size", vision.patch_size),
            ("merge_size", vision.spatial_merge_size),
            ("temporal_patch_size", vision.temporal_patch_size),
        ):
            value = getattr(images, name, None)
            if value != expected:
                raise ValueError(
                    f"the processor's {name} is {value}, and the model's is {expected}; give the processor "
                    "of this model"
                )

    def select(self, patches: Patches) -> Tensor:
        """The tokens to keep, as a mask [N]."""
        return self.mask(self._pixels(patches.pixels).flatten(1), patches.height, patches.width)

    def mask(self, vectors: Tensor, height: int, width: int) -> Tensor:
        """The tokens to keep, as a mask [N], from the pixels of each in [0, 1] as one vector [N, D]."""
        similar = Similarity(vectors, height, width, self.metric, self.threshold)
        if self.method in ("raster", "serpentine"):
            return starts_of_runs(similar, serpentine=self.method == "serpentine")
        if self.method == "conncomp" and not self.align_compression:
            random = torch.Generator().manual_seed(self.seed) if self.rand else None
            return sample_of_components(similar, self.skip_ratio, generator=random)
        kept = predicted_2d(similar, anchored=self.anchored)
        if self.method == "pred_2d":
            return kept
        random, count = torch.Generator().manual_seed(self.seed), int(kept.sum())
        if self.method == "random":
            return with_count(torch.zeros_like(kept), count, random)
        skip = 1 - count / len(kept)
        sample = sample_of_components(similar, skip, generator=random if self.rand else None)
        return with_count(sample, count, random)

    def _pixels(self, pixels: Tensor) -> Tensor:
        """The pixels [N, n, C, p, p] in [0, 1]; as they are at threshold 0, where only equality counts."""
        if not self.threshold:
            return pixels
        if any(len(numbers) != pixels.shape[2] for numbers in self.normalisation):
            counts = " and ".join(str(len(numbers)) for numbers in self.normalisation)
            raise ValueError(
                f"image_mean and image_std have {counts} numbers, and the pixels {pixels.shape[2]} channels"
            )
        mean, std = (pixels.new_tensor(x, dtype=torch.float32)[:, None, None] for x in self.normalisation)
        values = pixels.float() * std + mean
        low, high = float(values.amin()), float(values.amax())
        if low < -_ROUNDING or high > 1 + _ROUNDING:
            raise ValueError(
                f"pixels lie in [{low:.3g}, {high:.3g}] once image_mean and image_std {self.normalisation} "
                "are undone, not in [0, 1]; they were normalised with other numbers"
            )
        levels = 255 * values
        if pixels.dtype == torch.float32 and float((levels - levels.round()).abs().amax()) > _ROUNDING:
            warnings.warn(
                "the pixels do not have 256 levels once image_mean and image_std are undone; unless the "
                "pictures themselves have more, they were normalised with other numbers, and the threshold "
                "is in other units",
                stacklevel=2,
            )
        return values


def _image_processor(processor: Any) -> Any:
    """The image processor inside a processor. Raises TypeError for what is neither."""
    images = getattr(processor, "image_processor", processor)
    missing = [name for name in ("image_mean", "image_std", "do_normalize") if not hasattr(images, name)]
    if missing:
        raise TypeError(
            f"processor is a {type(processor).__name__} without {', '.join(missing)}; give the model's "
            "processor"
        )
    return images
