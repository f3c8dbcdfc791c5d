"""Linear layers through the fastest kernel PyTorch has for them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` for x [B, N, D]; float32 inference on a CPU runs as a 1×1 convolution.

    The convolution goes to oneDNN, which fills AVX-512 better than the BLAS behind `F.linear`: 1.1 to 1.4
    times as fast at ViT sizes on a Zen 4 core. Equal up to rounding.
    """
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.numel()
    if plain or x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return F.linear(x, weight, bias)
    batch, length, dim = x.shape
    pixels = x.reshape(1, batch * length, 1, dim).permute(0, 3, 1, 2)  # a channels-last image of 1 column
    out = F.conv2d(pixels, weight[..., None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(batch, length, -1)
