"""Rectified flow: times and noise for training, guidance, and Euler sampling from noise to data.

x_t = t · noise + (1 - t) · data for t in [0, 1], and a model learns the velocity noise - data (Liu et al.,
"Flow Straight and Fast", 2022, arXiv 2209.03003).
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Guidance = float | Callable[[float], float]
"""Guidance scale, or a function of the time that gives it."""


class Velocity(Protocol):
    """Step number and state [B, …] → conditional velocity [B, …] and, where `guided`, the unconditional
    one."""

    def __call__(self, step: int, x: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        """See the class."""


# Training ---------------------------------------------------------------------------------------------------


def mode_times(uniform: Tensor, scale: float = 0.25) -> Tensor:
    """Uniform draws [B] in [0, 1] → times, gathered at the middle ("Scaling Rectified Flow Transformers",
    2024, arXiv 2403.03206, section 3.1, mode sampling). `scale` 0 gives the draws themselves."""
    if not scale:
        return uniform
    return 1 - uniform - scale * ((math.pi / 2 * uniform).cos().square() - 1 + uniform)


def logit_normal_times(normal: Tensor) -> Tensor:
    """Standard normal draws [B] → times sigmoid(n) (same paper, logit-normal sampling)."""
    return normal.sigmoid()


def stratified_times(uniform: Tensor) -> Tensor:
    """Uniform draws [B] → logit-normal times, one in each of B equally likely strata."""
    quantiles = (torch.arange(len(uniform), device=uniform.device) + uniform) / max(len(uniform), 1)
    return (math.sqrt(2) * (2 * quantiles - 1).erfinv()).sigmoid()


def noised(data: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Data and noise [B, …] at times [B]: t · noise + (1 - t) · data."""
    times = times.view(-1, *[1] * (data.ndim - 1))
    return times * noise + (1 - times) * data


# Guidance ---------------------------------------------------------------------------------------------------


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """v_u + g (v_c - v_u) (Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022, arXiv 2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


def normalized_guidance(
    conditional: Tensor,
    unconditional: Tensor,
    scale: float,
    average: Tensor | None = None,
    *,
    momentum: float = -0.5,
    threshold: float = 2.5,
    eta: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Adaptive projected guidance: the guided velocity [B, …], and the `average` to hand to the next step.

    The running difference d ← (v_c - v_u) + momentum · d is clipped to an L2 norm of `threshold` (0: not
    clipped) and split into parts parallel and orthogonal to v_c, each image by itself; the result is v_c + (g
    - 1) (d⊥ + eta d∥). Sadat et al., "Eliminating Oversaturation and Artifacts of High Guidance Scales",
    2024, arXiv 2410.02416, algorithm 1.
    """
    dims = tuple(range(1, conditional.ndim))
    average = conditional - unconditional + (0 if average is None else momentum * average)
    difference = average
    if threshold > 0:
        norm = difference.norm(p=2, dim=dims, keepdim=True)
        difference = difference * (threshold / norm).clamp(max=1)  # of a zero norm: infinity, clamped
    precise = conditional.dtype if conditional.device.type == "mps" else torch.float64
    direction, wide = conditional.to(precise), difference.to(precise)
    direction = direction / direction.norm(p=2, dim=dims, keepdim=True).clamp_min(1e-12)
    parallel = (wide * direction).sum(dims, keepdim=True) * direction
    update = (wide - parallel + eta * parallel).to(conditional.dtype)
    return conditional + (scale - 1) * update, average


def checked_guidance(guidance: Any) -> Guidance:
    """Return a guidance scale, or a function of the time that checks every scale it gives.

    Raises:
        ValueError: it is neither a finite number nor a function; the function raises it for other values.
    """
    if callable(guidance):

        def scale(time: float) -> float:
            value = guidance(time)
            if not _is_finite(value):
                raise ValueError(
                    f"guidance returned {value!r} for the time {time:g}; it must return a finite number"
                )
            return float(value)

        return scale
    if not _is_finite(guidance):
        raise ValueError(f"guidance is a finite number or a function of the time; got {guidance!r}")
    return float(guidance)


def _is_finite(value: Any) -> bool:
    number = value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
    return isinstance(number, numbers.Real) and not isinstance(number, bool) and math.isfinite(number)


# Sampling ---------------------------------------------------------------------------------------------------


def sample(
    velocity: Velocity, noise: Tensor, steps: int, guidance: Guidance = 1.0, *, normalized: bool = True
) -> Tensor:
    """Integrate from `noise` [B, …] at time 1 to data at time 0 by `steps` equal Euler steps.

    Step i of 0 … steps - 1 is at time 1 - i/steps: x ← x - v/steps, in the dtype of `noise`. A `guidance` of
    1 needs no unconditional velocity; a function of the time always guides. `normalized` takes
    `normalized_guidance`, else `classifier_free_guidance`. ValueError for fewer than one step, and for a
    guidance that `checked_guidance` refuses.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is the number of Euler steps, an integer of 1 or more; {steps!r} was given")
    guidance = checked_guidance(guidance)
    x, average = noise, None
    for step in range(steps):
        scale = guidance((steps - step) / steps) if callable(guidance) else guidance
        guided = callable(guidance) or scale != 1
        conditional, unconditional = velocity(step, x, guided)
        if not guided:
            v = conditional
        elif normalized:
            v, average = normalized_guidance(
                conditional.to(x.dtype), unconditional.to(x.dtype), scale, average
            )
        else:
            v = classifier_free_guidance(conditional.to(x.dtype), unconditional.to(x.dtype), scale)
        x = x - v.to(x.dtype) / steps
    return x
