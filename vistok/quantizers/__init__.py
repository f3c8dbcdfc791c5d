"""Quantizers: latents → codes → latents, each usable without any tokenizer.

codes = quantizer.encode(latents)       # [B, K, D] → [B, K]
latents = quantizer.decode(codes)       # and back
result = quantizer(latents)             # training: result.latents, result.codes, result.losses
"""

from .base import Quantized, Quantizer
from .finite_scalar import FiniteScalarQuantizer
from .gaussian import DiagonalGaussian, GaussianQuantizer
from .vector import VectorQuantizer

__all__ = [
    "DiagonalGaussian",
    "FiniteScalarQuantizer",
    "GaussianQuantizer",
    "Quantized",
    "Quantizer",
    "VectorQuantizer",
]
