"""Small parts that the networks of generators share."""

from torch import Tensor, nn

from ..nn.cpu.linear import linear


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer on [B, N, D] through the fastest kernel for it."""
    return linear(x, layer.weight, layer.bias)


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision values in float32, others as they are."""
    return x.float() if x.dtype.itemsize < 4 else x


def initialise(module: nn.Module) -> None:
    """Truncated normal weights of deviation 0.02 and zero biases, as the originals."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
