"""Diagonal-Gaussian bottleneck of KL autoencoders: continuous codes with a KL penalty."""

import torch
from torch import Tensor

from .base import Quantized, Quantizer


class DiagonalGaussian:
    """A batch of diagonal normal distributions from moments [..., 2D]: the mean, then the log-variance.

    The log-variance is clamped to [-30, 20] (Kingma & Welling, "Auto-Encoding Variational Bayes", 2013,
    arXiv 1312.6114; clamp as in latent diffusion, arXiv 2112.10752).
    """

    def __init__(self, moments: Tensor) -> None:
        if moments.shape[-1] % 2:
            raise ValueError(
                f"moments have {moments.shape[-1]} channels; mean and log-variance need an even number"
            )
        self.mean, log_variance = moments.chunk(2, dim=-1)
        self.logvar = log_variance.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """Standard deviation [..., D]."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The mean [..., D]: the deterministic choice."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """mean + std · n, with n given as `noise` [..., D] or drawn from `generator`."""
        if noise is None:
            device = generator.device if generator is not None else self.mean.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL divergence to the standard normal, summed over channels: [...], in nats."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(-1)


class GaussianQuantizer(Quantizer):
    """KL bottleneck: latents are moments [B, K, 2D], codes are continuous vectors [B, K, D], D = `dim`.

    `encode` takes the mean, so it is deterministic; pass a generator to sample the posterior as the published
    KL tokenizers' own `encode` does. No parameters.
    """

    kind = "latents"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def encode(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Moments [B, K, 2D] → mean [B, K, D], or a sample of the posterior when a generator is given."""
        posterior = DiagonalGaussian(latents)
        return posterior.mode() if generator is None else posterior.sample(generator)

    def decode(self, codes: Tensor) -> Tensor:
        """Identity: continuous codes are the latents."""
        if codes.shape[-1] != self.dim:
            raise ValueError(f"latents have {codes.shape[-1]} channels; this bottleneck has {self.dim}")
        return codes

    def forward(self, latents: Tensor) -> Quantized:
        """Sampled latents; `losses["kl"]` is sum(KL)/B in nats."""
        posterior = DiagonalGaussian(latents.float())
        sample = posterior.sample().to(latents.dtype)
        return Quantized(sample, sample, {"kl": posterior.kl().sum() / max(latents.shape[0], 1)})
