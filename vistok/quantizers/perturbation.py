"""Latent perturbation: codes are exchanged for near ones, as a generator's mistakes do."""

import torch
from torch import Tensor

from .vector import VectorQuantizer


def perturb(
    quantizer: VectorQuantizer,
    latents: Tensor,
    quantized: Tensor,
    *,
    alpha: float,
    beta: float,
    delta: int,
    chances: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """Exchange codes of the first `beta` share of a batch, straight through: [B, K, C] → [B, K, C].

    With probability `alpha` a latent gets one of the `delta` codes nearest to it, itself included, else its
    own; the images after those keep `quantized` [B, K, C], the quantizer's output. `chances` in [0, 1) and
    `ranks` in 0..delta - 1, both [B, K], are drawn unless given. Raises ValueError for numbers out of range.

    RobustTok: "Robust Latent Matters: Boosting Image Generation with Sampling Error Synthesis" (2025, arXiv
    2503.08354), section 3.
    """
    size = quantizer.codebook_sizes[0]
    if not (0 <= alpha <= 1 and 0 <= beta <= 1 and 1 <= delta <= size):
        raise ValueError(
            f"alpha is {alpha}, beta {beta} and delta {delta}; they are shares in 0..1 and 1 to {size} codes"
        )
    shape, device = latents.shape[:2], latents.device
    chances = torch.rand(shape, device=device) if chances is None else chances
    ranks = torch.randint(delta, shape, device=device) if ranks is None else ranks
    nearest = quantizer.distances(latents.detach()).topk(delta, largest=False).indices  # [B, K, delta]
    codes = nearest.gather(-1, torch.where(chances > alpha, 0, ranks).unsqueeze(-1)).squeeze(-1)
    compared = quantizer.compared(latents)
    exchanged = compared + (quantizer.decode(codes) - compared).detach()
    chosen = torch.arange(len(latents), device=device) < int(len(latents) * beta)
    return torch.where(chosen.view(-1, 1, 1), exchanged.to(quantized.dtype), quantized)


def perturbation_ratio(epoch: float, *, start: float = 40, end: float = 120, end_ratio: float = 0.5) -> float:
    """The factor on alpha and delta at an epoch of the published schedule (section 3.3): 1 before `start`,
    `end_ratio` after `end`."""
    if epoch < start:
        return 1.0
    if epoch > end:
        return end_ratio
    # Parity: unless end_ratio is 0.5 the factor jumps at the end.
    return 1 - (epoch - start) / (end - start) * end_ratio
