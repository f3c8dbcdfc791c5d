"""One adapter a family: how to run a parity case through our implementation."""
