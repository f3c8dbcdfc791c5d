"""KARL: as many tokens as an image needs (arXiv 2507.07995)."""

from .model import Karl, KarlConfig

__all__ = ["Karl", "KarlConfig"]
