"""Schedules of classifier-free guidance that more than one generator follows."""

import math


def power_cosine(scale: float, power: float, share: float) -> float:
    """Guidance that rises from 1 to `scale` with the `share` (0..1) of steps done; constant for power 0.

    "Masked Diffusion Transformer is a Strong Image Synthesizer" (Gao et al., 2023, arXiv 2303.14389).
    """
    return (scale - 1) * (1 - math.cos(math.pi * share**power)) / 2 + 1
