"""One file a reducer."""
