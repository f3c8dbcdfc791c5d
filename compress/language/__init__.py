"""Reducing at the border of the language model, between its layers and in its cache."""
