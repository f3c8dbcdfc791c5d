"""One adapter per family, which runs a parity case through vistok's implementation."""
