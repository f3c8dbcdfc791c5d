"""Learning rates, the EMA decay and the weight-decay rule of the TiTok training recipes."""

import math
from collections.abc import Sequence

from torch import Tensor

NO_DECAY_NAMES = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")


def constant_schedule(step: int, base: float, warmup: int) -> float:
    """Learning rate at `step` (from 0): linear from 0 to `base` over `warmup` steps, then `base`."""
    return base * min(1.0, step / max(1, warmup))


def wsd_schedule(step: int, base: float, end: float, warmup: int, decay: int, total: int) -> float:
    """Learning rate at `step` (from 0): warm-up, stable at `base`, then linear to `end` at step `total`.

    The last `decay` steps decay, so a run can be made longer until its decay begins (warmup-stable-decay; Hu
    et al., MiniCPM, 2024, arXiv 2404.06395, section 4).
    """
    rate = constant_schedule(step, base, warmup)
    left = max(0, total - step) / max(1, decay)
    return rate if left >= 1 else end + (rate - end) * left


def cosine_schedule(step: int, base: float, end: float, warmup: int, total: int) -> float:
    """Learning rate at `step` (from 0): linear from 0 to `base`, then half a cosine to `end` at step `total`.

    Raises ValueError when `total` leaves no step after the warm-up.
    """
    if total <= warmup:
        raise ValueError(f"total is {total} steps, but the warm-up alone takes {warmup}: give a larger total")
    if step < warmup:
        return constant_schedule(step, base, warmup)
    # Parity: beyond `total` the cosine turns and the rate rises again; training stops at `total`.
    progress = (step - warmup) / (total - warmup)
    return end + (base - end) * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay(step: int, max_decay: float = 0.999) -> float:
    """Decay of the weight average at optimisation step `step` (from 1): 0 at first, then up to `max_decay`.

    The first step copies the weights; step t > 1 uses min(max_decay, t / (9 + t)).
    """
    if step <= 1:
        return 0.0
    return min(max_decay, step / (9 + step))


def no_weight_decay(name: str, parameter: Tensor, names: Sequence[str] = NO_DECAY_NAMES) -> bool:
    """Whether AdamW leaves a parameter undecayed: vectors, and parameters with one of `names` in theirs (by
    default norms, biases, tokens, positions and codebooks).

    Parity: the rule matches substrings of the name, so `patch_embed.weight` is exempt as well.
    """
    return parameter.ndim < 2 or any(part in name for part in names)
