"""The command groups of `vistok`."""
