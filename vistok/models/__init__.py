"""Tokenizer families, one file each."""
