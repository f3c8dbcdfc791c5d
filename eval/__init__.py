"""Measure tokenizers and token reducers: reconstruction, FID, VLM accuracy and speed."""

from ..checkout import check_checkout

check_checkout(__file__, "eval")
