"""What tokenizers of a grid share: images, or videos, of any size are a row-major grid of tokens."""

import dataclasses
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ..adaptive import AdaptiveTokens, encode_to_quality
from ..tokenizer import Tokenizer
from ..tokens import Tokens


class GridTokenizer(Tokenizer):
    """A tokenizer whose token is a square of `factor` pixels, of a video in some frames.

    A family sets `factor` and gives `latents` and `draw`, or its own `pixels`.
    """

    factor: int

    def draw(self, grid: Tensor) -> Tensor:
        """Latents [B, D, h, w] → images [B, 3, factor·h, factor·w], not clamped."""
        raise NotImplementedError

    def pixels(
        self, latents: Tensor, lengths: Tensor | None = None, *, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Latents of a `grid` of h × w (by default square) [B, hw, D] → images, not clamped."""
        side = isqrt(latents.shape[1])
        return self.draw(latents.transpose(1, 2).unflatten(2, grid or (side, side)))

    @property
    def size_multiple(self) -> int:
        """Sides of images are multiples of this, in pixels."""
        return self.factor

    def check_num_tokens(self, num_tokens: int | None) -> int:
        """Accept any square grid; tokens that carry their `grid` may have another shape."""
        if num_tokens is None:
            return self.num_tokens
        if num_tokens < 1 or isqrt(num_tokens) ** 2 != num_tokens:
            raise ValueError(
                f"{self.label} decodes square grids of tokens; {num_tokens} is not a square. For another "
                "shape give Tokens with their grid"
            )
        return num_tokens

    def grid_of(self, images: Tensor) -> tuple[int, ...]:
        """The sides of the grid that images fill: rows and columns, of a video after its steps in time."""
        return images.shape[-2] // self.factor, images.shape[-1] // self.factor

    @torch.no_grad()
    def encode(
        self, images: Tensor, num_tokens: int | None = None, *, target_psnr: float | None = None
    ) -> Tokens | AdaptiveTokens:
        """Images [B, 3, H, W] in [0, 1], sides divisible by `factor` → a token per square of an image.

        ValueError for images as in `Tokenizer.encode`, for another number of tokens than they have, and for a
        target in dB, which chooses among prefixes.
        """
        if target_psnr is not None:
            return encode_to_quality(self, images, target_psnr, num_tokens=num_tokens)
        codes = self.quantizer.encode(self.check_latents(self.latents(self.check_inputs(images))))
        if num_tokens not in (None, codes.shape[1]):
            raise ValueError(
                f"these images have {codes.shape[1]} tokens per image; {num_tokens} was asked for"
            )
        return dataclasses.replace(self.as_tokens(codes), grid=self.grid_of(images))

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens | Tensor,
        *,
        condition: Any = None,
        steps: int | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tokens (or bare codes [B, K, …] of a square grid) → images [B, 3, H, W] in [0, 1]."""
        self.check_decoding(condition=condition, steps=steps, guidance=guidance)
        latents, _ = self.dequantize(tokens)
        grid = tokens.grid if isinstance(tokens, Tokens) else None
        return self.pixels(latents, grid=grid).clamp(0, 1)
