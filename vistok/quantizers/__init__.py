"""Quantizers: latents → codes → latents, each usable without any tokenizer.

codes = quantizer.encode(latents)       # [B, K, D] → [B, K], [B, K, Q] or bits [B, K, D']
latents = quantizer.decode(codes)       # and back
result = quantizer(latents)             # training: result.latents, result.codes, result.losses
quantizer.usage(codes)                  # how much of the codebook, or of each bit, is used
"""

from .base import Quantized, Quantizer
from .binary import BinaryQuantizer, bits_to_integers, integers_to_bits
from .continuous import ContinuousLatents
from .cosine import CosineQuantizer
from .finite_scalar import FiniteScalarQuantizer
from .gaussian import DiagonalGaussian, GaussianQuantizer
from .lookup_free import LookupFreeQuantizer
from .multi_scale import MultiScaleBinaryQuantizer, MultiScaleVectorQuantizer
from .perturbation import perturb, perturbation_ratio
from .product import ProductQuantizer
from .residual import ResidualQuantizer
from .shared_residual import SharedResidualQuantizer
from .soft_vector import SoftVectorQuantizer
from .usage import bit_entropy, codebook_usage, perplexity
from .variational_residual import VariationalResidualQuantizer
from .vector import VectorQuantizer

__all__ = [
    "BinaryQuantizer",
    "ContinuousLatents",
    "CosineQuantizer",
    "DiagonalGaussian",
    "FiniteScalarQuantizer",
    "GaussianQuantizer",
    "LookupFreeQuantizer",
    "MultiScaleBinaryQuantizer",
    "MultiScaleVectorQuantizer",
    "ProductQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "SharedResidualQuantizer",
    "SoftVectorQuantizer",
    "VariationalResidualQuantizer",
    "VectorQuantizer",
    "bit_entropy",
    "bits_to_integers",
    "codebook_usage",
    "integers_to_bits",
    "perplexity",
    "perturb",
    "perturbation_ratio",
]
