"""MingTok: continuous tokens for understanding and generation (arXiv 2510.06590)."""

from .config import MingTokConfig
from .flow_head import FlowHead, FlowHeadConfig
from .model import MingTok
from .network import FeatureStream

__all__ = ["FeatureStream", "FlowHead", "FlowHeadConfig", "MingTok", "MingTokConfig"]
