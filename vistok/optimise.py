"""Tokens that fit any differentiable loss of their picture, found at test time by gradient descent.

The decoder of a few tokens draws nothing but pictures, so tokens alone can be moved until the picture fits a
loss: nearer to an original, continued where a hole was, or as another network prefers it ("Highly Compressed
Tokenizer Can Generate Without Training", Lao Beyer et al., 2025, arXiv 2506.08257).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .pretrained_model import evaluating
from .tokenizer import Tokenizer
from .tokens import Tokens

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OptimisedTokens:
    """The best tokens that were seen, what they decode to, and the losses on the way.

    `images` [B, 3, H, W] in [0, 1]; `loss` [B] is theirs, `start` [B] that of the first tokens, and `history`
    [steps + 1, B] that of every step; all float32.
    """

    tokens: Tokens
    images: Tensor
    loss: Tensor
    start: Tensor
    history: Tensor


def optimise_tokens(
    tokenizer: Tokenizer,
    loss: Loss,
    start: Tensor | Tokens,
    *,
    num_tokens: int | None = None,
    steps: int = 100,
    learning_rate: float = 0.05,
    **options: Any,
) -> OptimisedTokens:
    """Move tokens downhill on `loss`, from `start`, and return the best that were seen.

    `start` are images [B, 3, H, W] in [0, 1], of which ordered tokenizers keep `num_tokens`, or tokens.
    `loss` maps decoded images [B, 3, H, W] in [0, 1] to one value per image [B], or to one for all; it may be
    any differentiable function. Latents before the quantizer follow Adam through a straight-through
    quantizer; `learning_rate` is in standard deviations of the starting latents. Each step decodes once, and
    every reported loss is that of decoded tokens, not of latents. `options` go to the family's `pixels`
    (text=… for TA-TiTok). Weights of the tokenizer stay as they are.

        target = vistok.to_tensor("photo.jpg", tokenizer.image_size)
        better = vistok.optimise_tokens(tokenizer, lambda x: (x - target).square().mean((1, 2, 3)), target)

    Raises:
        ValueError: a tokenizer whose pictures are drawn from noise, choose their own length or carry no
            gradient, or that tokenizes no images; tokens to which no latents are known; a loss of another
            shape; settings out of range; whatever `encode` refuses.
        FloatingPointError: a loss that is not finite.
    """
    _check(tokenizer, steps, learning_rate)
    latents = _starting_latents(tokenizer, start, num_tokens).detach().float()
    scale = learning_rate * float(latents.std()) if latents.numel() else learning_rate
    latents.requires_grad_(True)
    optimizer = torch.optim.Adam([latents], lr=scale or learning_rate)
    history: list[Tensor] = []
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for step in range(steps + 1):
        with torch.enable_grad():
            quantized, codes = _quantized(tokenizer, latents)
            drawn = tokenizer.pixels(quantized.to(tokenizer.dtype), **options).float()
            if not drawn.requires_grad and drawn.numel():
                raise ValueError(f"pictures of {tokenizer.label} carry no gradient to their tokens")
            images = drawn + (drawn.clamp(0, 1) - drawn).detach()
            values = _values(loss, images, step)
        history.append(values.detach().expand(len(images)).float())
        best = _better(best, history[-1], codes.detach(), images.detach())
        if step < steps and len(images):
            (latents.grad,) = torch.autograd.grad(values.sum(), latents)
            optimizer.step()
    found, codes, images = best
    return OptimisedTokens(tokenizer.as_tokens(codes), images, found, history[0], torch.stack(history))


def _check(tokenizer: Tokenizer, steps: int, learning_rate: float) -> None:
    tokenizer.require_modality("image", "the optimisation of tokens takes")
    if tokenizer.stochastic or tokenizer.adaptive:
        why = "are drawn from noise in steps" if tokenizer.stochastic else "choose how many tokens they take"
        raise ValueError(
            f"pictures of {tokenizer.label} {why}, so a loss has no gradient to follow; use a tokenizer with "
            "one deterministic pass, such as vistok-mini"
        )
    if steps < 1 or not 0 < learning_rate < float("inf"):
        raise ValueError(
            f"steps is {steps} and learning_rate {learning_rate}; they are 1 or more, and a positive number"
        )


def _starting_latents(tokenizer: Tokenizer, start: Tensor | Tokens, num_tokens: int | None) -> Tensor:
    """Latents [B, K, D] that the quantizer takes, and that encode to the start."""
    if isinstance(start, Tensor):
        count = tokenizer.check_num_tokens(num_tokens)
        with torch.no_grad():
            latents = tokenizer.check_latents(tokenizer.latents(tokenizer.check_images(start)))
        return latents[:, :count] if tokenizer.ordered else latents
    if num_tokens is not None:
        raise ValueError("tokens have a number already; leave num_tokens out, or start from start.prefix(k)")
    decoded, lengths = tokenizer.dequantize(start)
    if lengths is not None:
        raise ValueError("tokens of images that differ in length move apart; start from those of one length")
    codes, quantizer = getattr(start, tokenizer.quantizer.kind).to(tokenizer.device), tokenizer.quantizer
    candidates = [decoded, quantizer.expand(decoded)] if hasattr(quantizer, "expand") else [decoded]
    for latents in candidates:
        if torch.equal(quantizer.encode(latents), codes):
            return latents
    raise ValueError(
        f"no latents are known that {tokenizer.label} quantizes to these tokens; start from images instead"
    )


def _quantized(tokenizer: Tokenizer, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized latents with a gradient, and their codes."""
    quantizer = tokenizer.quantizer
    if quantizer.kind == "latents":
        codes = quantizer.encode(latents)
        return quantizer.decode(codes), codes
    with evaluating(quantizer):  # in training mode some draw codes or move their codebook
        result = quantizer(latents)
    return result.latents, result.codes


def _values(loss: Loss, images: Tensor, step: int) -> Tensor:
    values = loss(images)
    if not isinstance(values, Tensor) or values.shape not in ((), (len(images),)):
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"the loss returned {shape}; it returns one value per image [{len(images)}], or one")
    if not bool(values.isfinite().all()):
        raise FloatingPointError(f"the loss is {values.tolist()} at step {step}; it must be finite")
    return values


def _better(
    best: tuple[Tensor, Tensor, Tensor] | None, values: Tensor, codes: Tensor, images: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Per image the values, codes and images of the lower loss."""
    if best is None:
        return values, codes, images
    lower = values < best[0]

    def rows(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(lower.view(-1, *[1] * (new.ndim - 1)), new, old)

    return rows(values, best[0]), rows(codes, best[1]), rows(images, best[2])
