"""Vector quantization: each latent becomes the index of its nearest codebook row."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantized, Quantizer
from .usage import HitStatistics


class VectorQuantizer(HitStatistics, Quantizer):
    """VQ (van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv 1711.00937).

    With `l2_norm` latents and codebook rows are compared, and returned, as unit vectors (ViT-VQGAN, arXiv
    2110.04627, section 3.1). With `clustering` every training forward pulls rarely used codes towards the
    latents nearest to them (CVQ-VAE, arXiv 2307.15139), which revives dead codes; the running usage is the
    buffer `embed_prob`. Distances are computed in float32 or better, whatever the dtype of the latents.

    Losses of a training forward: `commitment` (times `commitment_cost`), `codebook`, and with
    `entropy_weight` above 0 `entropy` = weight · (mean entropy of each latent's assignment - entropy of the
    mean assignment), nats, soft assignments at `entropy_temperature` (MaskGIT-VQGAN, arXiv 2202.04200;
    MAGVIT-v2, arXiv 2310.05737, eq. 6); `entropy_offset` is added inside the logarithm of the mean.

    With `rotation` the gradient reaches the encoder turned as the latent is turned to its code (Fifty et al.,
    "Restructuring Vector Quantization with the Rotation Trick", 2024, arXiv 2410.06424) and not straight
    through. With `usage_window` training forwards keep the last so many codes in the buffer `codebook_used`,
    with `hit_statistics` a running mean of hits in `ema_vocab_hit_SV`.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        l2_norm: bool = False,
        commitment_cost: float = 0.25,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        entropy_offset: float = 0.0,
        clustering: bool = False,
        decay: float = 0.99,
        rotation: bool = False,
        usage_window: int = 0,
        hit_statistics: bool = False,
    ) -> None:
        super().__init__()
        if rotation and not l2_norm:
            raise ValueError("rotation needs l2_norm: it turns unit vectors; leave it out, or set l2_norm")
        self.codebook_sizes = (codebook_size,)
        self.l2_norm = l2_norm
        if hit_statistics:
            self.start_hits(codebook_size)
        self.commitment_cost = commitment_cost
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.entropy_offset = entropy_offset
        self.decay = decay
        self.rotation = rotation
        if usage_window:
            self.register_buffer("codebook_used", torch.zeros(usage_window))
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        self.clustering = clustering
        if clustering:
            self.register_buffer("embed_prob", torch.zeros(codebook_size))

    def _compare(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and codebook in at least float32, normalised if the model compares directions."""
        dim = self.embedding.embedding_dim
        if latents.shape[-1] != dim:
            raise ValueError(f"latents have {latents.shape[-1]} channels; this codebook has rows of {dim}")
        dtype = torch.promote_types(
            torch.promote_types(latents.dtype, self.embedding.weight.dtype), torch.float32
        )
        latents, codebook = latents.to(dtype), self.embedding.weight.to(dtype)
        if self.l2_norm:
            latents, codebook = F.normalize(latents, dim=-1), F.normalize(codebook, dim=-1)
        return latents, codebook

    def compared(self, latents: Tensor) -> Tensor:
        """Latents [..., D] as they are compared with codes: as unit vectors when `l2_norm`."""
        return self._compare(latents)[0]

    def distances(self, latents: Tensor) -> Tensor:
        """Squared distances [..., N] of latents [..., D] to all N codebook rows."""
        with torch.autocast(latents.device.type, enabled=False):
            return self._distances(*self._compare(latents))

    @staticmethod
    def _distances(latents: Tensor, codebook: Tensor) -> Tensor:
        flat = latents.reshape(-1, latents.shape[-1])
        norms = flat.square().sum(-1, keepdim=True) + codebook.square().sum(-1)
        return torch.addmm(norms, flat, codebook.T, alpha=-2.0).view(*latents.shape[:-1], len(codebook))

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [..., D] → indices int64 [...] of the nearest rows (the first on ties)."""
        return self.distances(latents.detach()).argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Indices int64 [...] → codebook rows [..., D], as unit vectors when `l2_norm`."""
        rows = self.embedding(codes)
        return F.normalize(rows, dim=-1) if self.l2_norm else rows

    def decode_soft(self, weights: Tensor) -> Tensor:
        """Weights over the codebook [..., N] → their mixture of rows [..., D], normalised when `l2_norm`."""
        mixed = weights @ self.embedding.weight
        return F.normalize(mixed, dim=-1) if self.l2_norm else mixed

    def forward(self, latents: Tensor) -> Quantized:
        """Straight-through codes and losses by name; in training mode `clustering` moves the codebook."""
        with torch.autocast(latents.device.type, enabled=False):
            compared, codebook = self._compare(latents)
            distances = self._distances(compared.detach(), codebook.detach())
            codes = distances.argmin(-1)
            rows = self.decode(codes).to(compared.dtype)
            losses = {
                "commitment": self.commitment_cost * F.mse_loss(compared, rows.detach()),
                "codebook": F.mse_loss(rows, compared.detach()),
            }
            if self.entropy_weight:
                losses["entropy"] = self.entropy_weight * self._entropy(compared, codebook)
            if self.clustering and self.training and self.embedding.weight.requires_grad:
                self._update_clusters(latents.detach(), distances, codes)
            if self.training and hasattr(self, "codebook_used"):
                self._remember(codes.flatten())
            if self.training and hasattr(self, "ema_vocab_hit_SV"):
                self.count_hits(codes)
            straight = compared + (rows - compared).detach()
            quantized = _rotated(compared, rows) if self.rotation else straight
        return Quantized(quantized.to(latents.dtype), codes, losses)

    def _entropy(self, latents: Tensor, codebook: Tensor) -> Tensor:
        logits = -self._distances(latents, codebook).flatten(0, -2) / self.entropy_temperature
        log_p = logits.log_softmax(-1)
        mean = log_p.exp().mean(0)
        each = -(log_p.exp() * log_p).sum(-1).mean()
        return each + (mean * (mean + self.entropy_offset).clamp_min(1e-12).log()).sum()

    @property
    def recent_usage(self) -> float:
        """The share of the codebook that occurs in `codebook_used`, 0..1; 0 is there from the start."""
        return len(self.codebook_used.unique()) / self.embedding.num_embeddings

    @torch.no_grad()
    def _remember(self, codes: Tensor) -> None:
        """Move the window of recent codes on."""
        window = len(self.codebook_used)
        recent = torch.cat([self.codebook_used, codes.to(self.codebook_used)])
        self.codebook_used.copy_(recent[-window:])

    @torch.no_grad()
    def _update_clusters(self, latents: Tensor, distances: Tensor, codes: Tensor) -> None:
        """Usage statistics and anchor pull of CVQ-VAE (closest anchors), on the codebook itself."""
        size, dim = self.embedding.weight.shape
        if not codes.numel():
            return
        usage = torch.bincount(codes.flatten(), minlength=size).to(self.embed_prob) / codes.numel()
        # Parity: anchors are the latents before normalisation, also in l2 models.
        anchors = latents.reshape(-1, dim)[distances.flatten(0, -2).argmin(0)].to(self.embedding.weight)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for statistic in (usage, anchors):
                torch.distributed.all_reduce(statistic)
                statistic /= torch.distributed.get_world_size()
        self.embed_prob.mul_(self.decay).add_(usage, alpha=1 - self.decay)
        pull = torch.exp(-self.embed_prob * size * 10 / (1 - self.decay) - 1e-3).unsqueeze(-1)
        # `.data`: a loss of this very step may still hold the weight for its backward pass.
        self.embedding.weight.data.lerp_(anchors, pull)


def _rotated(latents: Tensor, rows: Tensor) -> Tensor:
    """Latents [..., D] turned to the directions of `rows` by a reflection and a rotation that pass gradients
    on."""

    def unit(x: Tensor) -> Tensor:
        return x / (x.norm(dim=-1, keepdim=True) + 1e-6)

    before, after = unit(latents.detach()), unit(rows.detach())
    between = F.normalize(before + after, dim=-1)

    def along(direction: Tensor) -> Tensor:
        return (latents * direction).sum(-1, keepdim=True)

    return latents - 2 * along(between) * between + 2 * along(before) * after
