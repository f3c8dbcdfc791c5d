"""The one resumable pass over a data set: its stages, state and record."""
