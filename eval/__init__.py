"""Measure tokenizers and token reducers: reconstruction, FID, VLM accuracy and speed."""
