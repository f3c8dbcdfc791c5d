"""The arithmetic that the networks behind the metrics run in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions on CUDA in float32; torch by default rounds their inputs to 10 bits (TensorFloat-32).

    A published figure should not depend on the card it was computed on.
    """
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        holder, name, value = cudnn.conv, "fp32_precision", "ieee"
    else:  # before torch 2.9
        holder, name, value = cudnn, "allow_tf32", False
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
