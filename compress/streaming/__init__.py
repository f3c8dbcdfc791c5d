"""Streams of video: frames come one after the other, tokens of all of them stay in bounded memory."""

from .pvc import PVCConfig, PVCEncoder, PVCState
from .stc import STC
from .stream import Stream

__all__ = ["STC", "PVCConfig", "PVCEncoder", "PVCState", "Stream"]
