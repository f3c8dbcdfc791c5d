"""KARL: as many tokens as an image needs (arXiv 2507.07995)."""

from .config import KarlConfig
from .model import Karl

__all__ = ["Karl", "KarlConfig"]
