"""Lookup-free quantization: each channel is its sign, and the code the binary number of the signs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Quantized, Quantizer


class LookupFreeQuantizer(Quantizer):
    """LFQ (Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", 2023, arXiv
    2310.05737, section 3.1).

    Latents have `num_bits` channels, 1 to 63; codes are indices below 2^num_bits, the first channel the most
    significant bit as published implementations number them; decoded latents are ±1. No parameters.

    Losses of a forward: `commitment` = commitment_weight · mean squared error to the signs, and `entropy` =
    entropy_weight · (mean entropy of each latent's assignment - diversity · entropy of the mean assignment),
    nats, eq. 6, with soft assignments softmax(2 x·c / temperature). The second entropy runs over all codes of
    each `group_bits` channels, which is exact up to that many bits and an upper bound (the sum over groups)
    beyond, since 2^num_bits codes cannot be listed.
    """

    def __init__(
        self,
        num_bits: int,
        *,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        commitment_weight: float = 0.25,
        temperature: float = 0.01,
        group_bits: int = 9,
    ) -> None:
        super().__init__()
        if not 1 <= num_bits <= 63:
            raise ValueError(
                f"num_bits={num_bits}: indices have 1 to 63 bits; for more use BinaryQuantizer, whose codes "
                "stay bits"
            )
        if not 1 <= group_bits <= 20 or not temperature > 0:
            raise ValueError(
                f"group_bits={group_bits}, temperature={temperature}: give 1 to 20, and a number above 0"
            )
        self.num_bits = num_bits
        self.codebook_sizes = (2**num_bits,)
        self.entropy_weight, self.diversity = entropy_weight, diversity
        self.commitment_weight = commitment_weight
        self.temperature, self.group_bits = temperature, group_bits
        self.register_buffer("_places", torch.arange(num_bits - 1, -1, -1), persistent=False)

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [..., num_bits] → indices int64 [...]; zero counts as negative."""
        if latents.shape[-1] != self.num_bits:
            raise ValueError(
                f"latents have {latents.shape[-1]} channels; this quantizer takes {self.num_bits}"
            )
        return ((latents > 0).long() << self._places).sum(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Indices int64 [...] → ±1 float32 [..., num_bits]."""
        return ((codes.unsqueeze(-1) >> self._places) & 1).float() * 2 - 1

    def forward(self, latents: Tensor) -> Quantized:
        """Straight-through signs, and the losses."""
        codes = self.encode(latents.detach())
        wide = latents.float() if latents.dtype.itemsize < 4 else latents
        signs = self.decode(codes).to(wide.dtype)
        losses = {}
        with torch.autocast(latents.device.type, enabled=False):
            if self.commitment_weight:
                losses["commitment"] = self.commitment_weight * F.mse_loss(wide, signs)
            if self.entropy_weight:
                losses["entropy"] = self.entropy_weight * self._entropy(wide.flatten(0, -2))
        # Not x + (sign - x): in half precision that is not the sign.
        return Quantized((signs + (wide - wide.detach())).to(latents.dtype), codes, losses)

    def _entropy(self, latents: Tensor) -> Tensor:
        """Latents [N, D] → mean entropy of their assignments, less `diversity` times that of the mean one."""
        logits = 4 * latents / self.temperature  # of +1 against -1, channel by channel
        each = (F.softplus(logits) - logits.sigmoid() * logits).sum(-1).mean()
        together = each.new_zeros(())
        for group in logits.split(self.group_bits, dim=-1):  # [N, g]
            width = group.shape[-1]
            words = torch.arange(2**width, device=group.device).unsqueeze(-1)
            words = (words >> torch.arange(width, device=group.device) & 1).to(group.dtype)  # [2^g, g]
            log_p = F.logsigmoid(group) @ words.T + F.logsigmoid(-group) @ (1 - words).T  # [N, 2^g]
            mean = log_p.exp().mean(0)
            together = together - (mean * mean.clamp_min(1e-12).log()).sum()
        return each - self.diversity * together
