"""No quantization: the latents themselves are the codes."""

from torch import Tensor

from .base import Quantized, Quantizer


class ContinuousLatents(Quantizer):
    """The bottleneck of tokenizers that keep latents [B, K, D] as they are, D = `dim`.

    Its training forward has no losses, and gradients go through. No parameters.
    """

    kind = "latents"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, K, D] as they are; ValueError for another number of channels."""
        if latents.shape[-1] != self.dim:
            raise ValueError(f"latents have {latents.shape[-1]} channels; this tokenizer has {self.dim}")
        return latents

    def decode(self, codes: Tensor) -> Tensor:
        """Latents [B, K, D] as they are; ValueError for another number of channels."""
        return self.encode(codes)

    def forward(self, latents: Tensor) -> Quantized:
        """Latents [B, K, D] as latents and codes."""
        return Quantized(self.encode(latents), latents)
