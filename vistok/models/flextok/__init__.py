"""FlexTok: flexible-length 1D tokens with a rectified-flow decoder (arXiv 2502.13967)."""

from .config import FlexTokConfig
from .model import FlexTok

__all__ = ["FlexTok", "FlexTokConfig"]
