"""The arithmetic that the networks behind the metrics run in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions on CUDA in float32; torch by default rounds their inputs to 10 bits (TensorFloat-32).

    A published figure should not depend on the card it was computed on.
    """
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before
