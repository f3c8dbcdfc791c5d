"""Tiny random models of the real Hugging Face classes, to try reducers on every family without any file."""
