"""Tokens per image of a tokenizer, against the size of the image's JPEG file."""

import io
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...extras import needs
from ...images import to_pil
from ...tokenizer import Tokenizer
from ..metrics.image import psnr
from ..metrics.summary import interval, psnr_text

HEADER = [
    *("target", "tokens (mean, min–max)", "mean error", "PSNR dB"),
    "rank correlation with JPEG size",
]
JPEG_QUALITY = 50


@dataclass(frozen=True)
class Lengths:
    """The results at one target: `asked`, tokens of every image int64 [N], mean absolute error [N], PSNR in
    dB [N] and Spearman's rank correlation of tokens with JPEG sizes (NaN where all lengths are equal)."""

    asked: str
    lengths: Tensor
    error: Tensor
    psnr: Tensor
    correlation: float

    def row(self) -> list[str]:
        """A table row, in the columns of HEADER."""
        counts = self.lengths
        correlation = "all lengths equal" if math.isnan(self.correlation) else f"{self.correlation:.3f}"
        spread = f"{float(counts.double().mean()):.1f}, {int(counts.min())}–{int(counts.max())}"
        decibels = psnr_text(interval(self.psnr))
        return [self.asked, spread, f"{float(self.error.mean()):.4f}", decibels, correlation]

    def record(self) -> dict[str, Any]:
        """The fields for JSON; "psnr" leaves out exact reconstructions, null if all are."""
        mean = interval(self.psnr)
        return {
            "asked": self.asked,
            "images": len(self.lengths),
            "tokens": self.lengths.tolist(),
            "mean_absolute_error": float(self.error.mean()),
            "psnr": mean["value"] if math.isfinite(mean["value"]) else None,
            "exact": mean.get("exact", 0),
            "rank_correlation": None if math.isnan(self.correlation) else self.correlation,
        }


def jpeg_sizes(images: Tensor, quality: int = JPEG_QUALITY) -> list[int]:
    """Bytes of Pillow's JPEG file of every image [N, 3, H, W] in [0, 1]."""
    sizes = []
    for picture in to_pil(images):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        sizes.append(file.tell())
    return sizes


@torch.no_grad()
def measure(
    tokenizer: Tokenizer, images: Tensor, targets: list[float], batch_size: int = 64
) -> list[Lengths]:
    """Encode images [N, 3, S, S] to each target, decode them, and rank the lengths against JPEG sizes.

    A target is a mean absolute error for an adaptive tokenizer and a PSNR in dB for an ordered one. Raises
    ValueError for tokenizers of fixed length and for fewer than two images.
    """
    with needs("scipy", "eval", "rank correlation"):
        from scipy.stats import spearmanr
    tokenizer.require_modality("image", "this measurement takes")
    if not (tokenizer.adaptive or tokenizer.ordered):
        raise ValueError(
            f"{tokenizer.label} gives every image {tokenizer.num_tokens} tokens; lengths differ with "
            "adaptive (KARL) and ordered (FlexTok, vistok-mini) tokenizers"
        )
    if len(images) < 2:
        raise ValueError(f"{len(images)} image(s) cannot be ranked; give two or more")
    sizes, results = jpeg_sizes(images), []
    for target in targets:
        parts = [_reached(tokenizer, part, target) for part in images.split(batch_size)]
        counts, decoded = (torch.cat(part) for part in zip(*parts, strict=True))
        error = (decoded - images).abs().mean((1, 2, 3))
        constant = bool((counts == counts[0]).all()) or len(set(sizes)) == 1
        correlation = math.nan if constant else float(spearmanr(counts.numpy(), sizes).statistic)
        setting = f"error {target:g}" if tokenizer.adaptive else f"{target:g} dB"
        results.append(Lengths(setting, counts, error, psnr(decoded, images), correlation))
    return results


def _reached(tokenizer: Tokenizer, images: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """Lengths int64 [B] and decoded images, on the CPU."""
    if tokenizer.adaptive:
        tokens = tokenizer.encode(images, target=target)
    else:
        tokens = tokenizer.encode(images, target_psnr=target).tokens
    return tokens.lengths.cpu(), tokenizer.decode(tokens).cpu()
