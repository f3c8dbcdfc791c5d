"""DualToken: one tower, codes for pixels and codes for meaning (arXiv 2503.14324)."""

from .config import DualTokenConfig
from .model import DualToken

__all__ = ["DualToken", "DualTokenConfig"]
