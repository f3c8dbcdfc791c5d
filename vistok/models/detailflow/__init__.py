"""DetailFlow: coarse-to-fine 1D tokens in groups (arXiv 2505.21473)."""

from .config import DetailFlowConfig, ResolutionMap
from .model import DetailFlow

__all__ = ["DetailFlow", "DetailFlowConfig", "ResolutionMap"]
