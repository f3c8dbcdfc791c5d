"""Tiny models with inputs made by hand, which `vistok.compress.tiny` builds."""

from vistok.compress.tiny.bare import BARE, VARIANTS, bare_vlm

__all__ = ["BARE", "VARIANTS", "bare_vlm"]
