"""One file per reducer."""
