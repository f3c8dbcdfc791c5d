"""Decoding for evaluations: reproducible, independent of the batch, to finite images; and the texts that
protocols state about it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...tokenizer import Tokenizer
from ...tokens import Tokens


def decode_images(
    model: Tokenizer,
    tokens: Tokens,
    size: tuple[int, int],
    numbers: Sequence[int],
    names: Sequence[str],
    *,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
) -> Tensor:
    """Tokens of images with these numbers and names → float32 [B, 3, *size] in [0, 1].

    The noise of a stochastic decoder depends on `seed` and an image's number alone. FloatingPointError for
    images that are not finite.
    """
    options: dict[str, Any] = {"steps": steps, "guidance": guidance}
    if model.sized:
        options["size"] = size
    seeds = [hash((seed, number)) & (2**63 - 1) for number in numbers]
    generators = [torch.Generator().manual_seed(each) for each in seeds]
    decoded = model.decode(tokens, generator=generators, **options).float()
    if bad := (~decoded.isfinite().all(dim=(1, 2, 3))).nonzero()[:, 0].tolist():
        examples = ", ".join(names[row] for row in bad[:3])
        raise FloatingPointError(
            f"{model.label} gives values that are not finite for {len(bad)} of {len(names)} images "
            f"({examples}): check its weights, or look at these images with `vistok reconstruct`"
        )
    return decoded


def to_levels(images: Tensor, *, truncate: bool = False) -> Tensor:
    """Floats in [0, 1] → uint8 of the same shape, rounded, or truncated."""
    levels = images * 255
    return (levels if truncate else levels.round()).to(torch.uint8)


def resizing(size: int, *, crop: bool = True) -> str:
    """The protocol's text on images from `data.decode`."""
    return f"shorter side to {size}, bicubic with antialias, {'centre crop' if crop else 'whole'}"


ICC_PROFILES = {"icc_profiles": "ignored"}
"""The protocol's text on colours: images are compared in the numbers of their files."""


def captions(*models: Tokenizer) -> dict[str, str]:
    """The protocol's text where a decoder takes text: evaluations pass none."""
    takers = [model.label for model in models if "text" in model.conditions]
    return {"captions": f"empty ({', '.join(takers)})"} if takers else {}
