"""Compressors with trained weights: pooled and flexible projectors, and the layer that reads slow tokens."""
