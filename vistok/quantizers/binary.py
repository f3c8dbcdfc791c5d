"""Binary quantization: each token is a set of bits, and its latent the sum of the embeddings of those set."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantized, Quantizer


class BinaryQuantizer(Quantizer):
    """Instella-T2I's binary latents (Wang et al., "Instella-T2I: Pushing the Limits of 1D Discrete Latent
    Space Image Generation", 2025, arXiv 2506.21022; sampling as in Wang et al., "Binary Latent Diffusion",
    2023, arXiv 2304.04820).

    A linear layer gives `num_bits` logits z per token; codes are bool [B, K, num_bits]. `encode`, and
    `forward` in eval mode, set the bits with z > 0. In training mode `forward` draws them with probability
    sigmoid(z / temperature); at temperature 0, the end of an annealing, it takes the threshold as well. The
    gradient is that of p = sigmoid(z), without temperature.

    Losses: `code` = code_weight · mean p(1 - p), which favours decided bits, and with `entropy_weight` above
    0 `entropy` = weight · (mean entropy of each bit given its image - entropy of each bit over the batch), in
    nats per bit, which also favours bits that differ between images (MAGVIT-v2, arXiv 2310.05737, eq. 6, for
    independent bits).
    """

    kind = "bits"

    def __init__(
        self,
        num_bits: int,
        dim: int,
        *,
        temperature: float = 0.1,
        code_weight: float = 1.0,
        entropy_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if num_bits < 1 or not temperature >= 0:
            raise ValueError(
                f"num_bits={num_bits}, temperature={temperature}: give at least one bit, and 0 or more"
            )
        self.temperature = temperature
        self.code_weight = code_weight
        self.entropy_weight = entropy_weight
        self.proj = nn.Sequential(nn.Linear(dim, num_bits))
        self.embed = nn.Parameter(0.02 * torch.randn(num_bits, dim))

    @property
    def rows(self) -> Tensor:
        """The embeddings of the bits [num_bits, dim]."""
        return self.embed

    def logits(self, latents: Tensor) -> Tensor:
        """Latents [..., dim] → logits [..., num_bits] in float32 or better; a bit is set where above 0."""
        num_bits, dim = self.rows.shape
        if latents.shape[-1] != dim:
            raise ValueError(f"latents have {latents.shape[-1]} channels; these {num_bits} bits read {dim}")
        weight, bias = self.proj[0].weight.flatten(1), self.proj[0].bias
        dtype = torch.promote_types(torch.promote_types(latents.dtype, weight.dtype), torch.float32)
        with torch.autocast(latents.device.type, enabled=False):
            return F.linear(latents.to(dtype), weight.to(dtype), bias.to(dtype))

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [..., dim] → bits bool [..., num_bits]."""
        return self.logits(latents.detach()) > 0

    def decode(self, codes: Tensor) -> Tensor:
        """Bits bool [..., num_bits] → the sum of their embeddings [..., dim]."""
        rows = self.rows
        if codes.dtype != torch.bool or codes.shape[-1] != len(rows):
            raise ValueError(
                f"codes are {codes.dtype} [..., {codes.shape[-1]}]; give bool [..., {len(rows)}]"
            )
        return codes.to(rows.dtype) @ rows

    def forward(self, latents: Tensor) -> Quantized:
        """Straight-through bits: drawn in training mode, thresholded in eval mode."""
        logits = self.logits(latents)
        probability = logits.sigmoid()
        if self.training and self.temperature > 0:
            bits = torch.bernoulli((logits.detach() / self.temperature).sigmoid()) > 0
        else:
            bits = logits.detach() > 0
        passed = bits.to(logits.dtype) + (probability - probability.detach())
        losses = {"code": self.code_weight * self.code_loss(probability)}
        if self.entropy_weight:
            losses["entropy"] = self.entropy_weight * _entropy_loss(logits, probability)
        with torch.autocast(latents.device.type, enabled=False):
            summed = passed @ self.rows.to(passed.dtype)
        return Quantized(summed.to(latents.dtype), bits, losses)

    @staticmethod
    def code_loss(probability: Tensor) -> Tensor:
        """How undecided the bits are, a scalar in 0..1/4: the mean of p(1 - p)."""
        return (probability * (1 - probability)).mean()


def _entropy_loss(logits: Tensor, probability: Tensor) -> Tensor:
    """Mean entropy of the bits given their image, less their entropy over the batch (axis 0), in nats."""
    decided = F.softplus(logits) - probability * logits
    share = probability.mean(0).clamp(1e-6, 1 - 1e-6)
    entropy = torch.special.entr(share) + torch.special.entr(1 - share)
    return decided.mean() - entropy.mean()


def bits_to_integers(bits: Tensor) -> Tensor:
    """Bits bool [..., D], D up to 64 → int64 [...], bit j worth 2^j; with D = 64 the last is the sign.

    `integers.numpy().astype("<u8").tobytes()` is the byte form: 8 little-endian bytes per token.
    """
    return (bits.long() << _places(bits.shape[-1], bits.device)).sum(-1)


def integers_to_bits(integers: Tensor, num_bits: int = 64) -> Tensor:
    """Undo `bits_to_integers`: int64 [...] → bool [..., num_bits]."""
    return (integers.unsqueeze(-1) >> _places(num_bits, integers.device)) & 1 > 0


def _places(num_bits: int, device: torch.device) -> Tensor:
    if not 1 <= num_bits <= 64:
        raise ValueError(f"{num_bits} bits do not fit an int64; give 1 to 64, or pack them with Tokens.save")
    return torch.arange(num_bits, device=device)
