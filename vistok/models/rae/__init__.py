"""RAE: features of a frozen vision encoder as continuous tokens (arXiv 2510.11690)."""

from .config import RAEConfig
from .model import RAE

__all__ = ["RAE", "RAEConfig"]
