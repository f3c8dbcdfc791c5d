"""Fast paths for CPUs, equal to the modules of PyTorch that they replace."""
