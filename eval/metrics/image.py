"""Per-image distances between a picture and its reconstruction: PSNR and SSIM."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .metric import Metric

WINDOW = 11
SIGMA = 1.5
LUMINANCE_CONSTANT = 0.01**2
CONTRAST_CONSTANT = 0.03**2
_HEIGHTS = [math.exp(-0.5 * ((offset - WINDOW // 2) / SIGMA) ** 2) for offset in range(WINDOW)]
GAUSSIAN = [height / sum(_HEIGHTS) for height in _HEIGHTS]


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of every image against its reference.

    Both [B, C, H, W], float in [0, 1] -> [B], float64 (float32 on MPS), inf where an image equals its
    reference. Average these values over a set; the mean of the squared errors is another number.
    Raises ValueError for other shapes or ranges, TypeError for integer images.
    """
    images, references = _in_double(images, references)
    return -10 * torch.log10((images - references).square().mean(dim=(1, 2, 3)))  # [B]


def ssim(images: Tensor, references: Tensor, border: Literal["crop", "reflect"] = "crop") -> Tensor:
    """Structural similarity of every image to its reference, in [-1, 1] and 1 where they are equal.

    Both [B, C, H, W], float in [0, 1], H and W at least 11 -> [B], float64 (float32 on MPS).
    Gaussian window of 11 with sigma 1.5, population covariance, data range 1; the map is averaged over
    channels and pixels. The field's tools treat the border differently, which matters for small images:
    "crop" averages only the windows wholly inside the image, as scikit-image does in `structural_similarity(
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)`; "reflect" mirrors the image
    by 5 pixels and averages every pixel, as torchmetrics does. Raises ValueError for other shapes, ranges or
    borders, TypeError for integer images.

    "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004), equation 13.
    """
    images, references = _in_double(images, references)
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(
            f"images are {images.shape[-2]}x{images.shape[-1]}; SSIM needs at least {WINDOW}x{WINDOW}"
        )
    if border not in ("crop", "reflect"):
        raise ValueError(f"border is {border!r}; give 'crop' (scikit-image) or 'reflect' (torchmetrics)")
    if border == "reflect":
        images, references = (
            F.pad(batch, (WINDOW // 2,) * 4, mode="reflect") for batch in (images, references)
        )
    # One image at a time: its maps stay in the cache, and memory does not grow with the batch.
    return torch.stack([_ssim_map(*pair).mean() for pair in zip(images, references, strict=True)])


def _ssim_map(image: Tensor, reference: Tensor) -> Tensor:
    """[C, H, W] twice -> the similarity of every window inside, [C, H-10, W-10]."""
    moments = torch.stack([image, reference, image.square() + reference.square(), image * reference])
    mean_x, mean_y, squares, product = _blur(_blur(moments, -1), -2)  # 4 x [C, H-10, W-10]
    mean_squares, mean_product = mean_x.square() + mean_y.square(), mean_x * mean_y
    luminance = (2 * mean_product + LUMINANCE_CONSTANT) / (mean_squares + LUMINANCE_CONSTANT)
    covariance, variances = product - mean_product, squares - mean_squares
    return luminance * (2 * covariance + CONTRAST_CONSTANT) / (variances + CONTRAST_CONSTANT)


def _blur(maps: Tensor, axis: int) -> Tensor:
    """Gaussian average along one axis without padding, which shortens it by 10."""
    length = maps.shape[axis] - WINDOW + 1
    return sum(tap * maps.narrow(axis, offset, length) for offset, tap in enumerate(GAUSSIAN))


def _in_double(images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    check_pair(images, references)
    # Variances of flat, bright regions cancel in float32 (errors near 1e-4); MPS has no float64.
    dtype = torch.float32 if images.device.type == "mps" else torch.float64
    return images.to(dtype), references.to(dtype)


def check_pair(images: Tensor, references: Tensor) -> None:
    """Refuse what no metric can score.

    ValueError unless both are the same non-empty [B, C, H, W] on one device with values in [0, 1], TypeError
    for integers.
    """
    if images.ndim != 4 or images.shape != references.shape or images.numel() == 0:
        raise ValueError(
            f"images are {list(images.shape)} and references {list(references.shape)}; both must be the same "
            "non-empty [B, C, H, W]: add a batch axis with [None] or resize one to the other"
        )
    if images.device != references.device:
        raise ValueError(
            f"images are on {images.device} and references on {references.device}: move one with .to()"
        )
    for name, batch in (("images", images), ("references", references)):
        if not batch.is_floating_point():
            raise TypeError(f"{name} are {batch.dtype}; give floats in [0, 1] (8-bit images: divide by 255)")
        low, high = batch.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{name} span [{low:.4g}, {high:.4g}]; the metrics take [0, 1]: clamp reconstructions, "
                "map [-1, 1] by (x + 1) / 2, divide 8-bit values by 255"
            )


METRICS = (
    Metric(
        "psnr",
        "PSNR",
        "dB",
        ".2f",
        "higher",
        make=lambda files, device: psnr,
        aligned=True,
        card=True,
        rank=1,
    ),
    Metric(
        "ssim",
        "SSIM",
        better="higher",
        make=lambda files, device: ssim,
        aligned=True,
        card=True,
        rank=2,
    ),
)
