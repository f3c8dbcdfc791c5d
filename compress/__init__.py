"""Spending fewer visual tokens: merging algorithms as pure functions on tensors (`vistok.compress.merge`)."""
