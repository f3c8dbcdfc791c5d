"""Group norm, SiLU and a 3×3 convolution in one go on a CPU, with fewer multiplications.

Winograd's F(2, 3): two outputs of a filter of three taps from four products instead of six, down the columns
and, where it pays, along the rows as well (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks",
2015, arXiv 1509.09308). An image goes through in strips, so that neither what is normalised nor what is
transformed is ever a whole image in memory.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIP = 2**20  # values of a strip: few enough for the cache, enough to share among threads
CHUNK = 2**18  # values whose statistics are taken at a time
FEWEST_PIXELS = 2048  # of an image: for fewer, transforming the kernel costs what it saves
BOTH_AXES = 256  # channels from which products cost more than the sums that save them


def norm_silu_conv(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, residual: Tensor | None = None) -> Tensor:
    """conv(silu(norm(x))) + residual for a 3×3 convolution with padding 1: [B, C, H, W] → [B, C', H, W].

    Float32 inference on a CPU takes the fast way, equal up to rounding, and adds into `residual` itself,
    which the caller must not need any more.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_fast(x, conv):
        out = conv(F.silu(norm(x)))
        return out if residual is None else out + residual
    pixels = x.permute(0, 2, 3, 1).contiguous()  # [B, H, W, C]: channels-last memory as it is
    affines = [group_affine(image, norm) for image in pixels]
    if pixels[0, ..., 0].numel() < FEWEST_PIXELS:
        out = conv(F.silu(_normed(pixels, affines), inplace=True))
        return out if residual is None else out.add_(residual)
    if residual is None:
        into, store = x.new_empty(*pixels.shape[:3], conv.out_channels), Tensor.copy_
    else:
        into, store = residual.permute(0, 2, 3, 1).contiguous(), Tensor.add_
    kernel = _transformed(conv.weight)
    for image, affine, out in zip(pixels, affines, into, strict=True):
        _convolve(image, affine, kernel, conv.bias, out, store)
    return into.permute(0, 3, 1, 2)


class ExactGroupNorm(nn.GroupNorm):
    """A group norm that stays accurate in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
            return super().forward(x)
        pixels = x.permute(0, 2, 3, 1)
        return _normed(pixels, [group_affine(image, self) for image in pixels])


def _normed(pixels: Tensor, affines: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """[B, H, W, C] → [B, C, H, W] in channels-last memory."""
    pairs = zip(pixels, affines, strict=True)
    images = [torch.addcmul(addend, image, factor) for image, (factor, addend) in pairs]
    return torch.stack(images).permute(0, 3, 1, 2)


def group_affine(pixels: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """A group norm of one image [H, W, C] as factor and addend per channel, [C] each.

    Means and variances of chunks are joined in float64, so that a flat picture, whose variance is tiny beside
    its mean, keeps its digits; the sums of squares behind PyTorch's channels-last kernel lose them.
    """
    flat = pixels.flatten(0, 1)
    means, squares, counts = [], [], []
    for chunk in flat.split(max(1, CHUNK // flat.shape[1])):
        means.append(chunk.mean(0))
        squares.append((chunk - means[-1]).square_().sum(0))
        counts.append(len(chunk))
    grouped = [torch.stack(each).double().unflatten(1, (norm.num_groups, -1)) for each in (means, squares)]
    count = torch.tensor(counts, dtype=torch.float64)[:, None, None]
    total = len(flat) * grouped[0].shape[2]
    mean = (count * grouped[0]).sum((0, 2)) / total  # [G]
    spread = grouped[1] + count * (grouped[0] - mean[:, None]).square()
    deviation = (spread.sum((0, 2)) / total + norm.eps).sqrt()
    factor = norm.weight.double().unflatten(0, (norm.num_groups, -1)) / deviation[:, None]
    addend = norm.bias.double() - (factor * mean[:, None]).flatten()
    return factor.flatten().to(pixels), addend.to(pixels)


def _is_fast(x: Tensor, conv: nn.Conv2d) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == conv.weight.dtype == torch.float32
        and (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        and x.shape[2] % 2 == x.shape[3] % 2 == 0
    )


def _convolve(
    image: Tensor,
    affine: tuple[Tensor, Tensor],
    kernel: Sequence[Tensor],
    bias: Tensor | None,
    out: Tensor,
    store: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """One image [H, W, C], normalised by `affine` and activated, into out [H, W, C'] strip by strip."""
    height, width, channels = image.shape
    rows = min(height, 2 * max(1, STRIP // (2 * width * channels)))
    padded = image.new_zeros(rows + 2, width + 2, channels)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = max(top - 1, 0), min(bottom + 1, height)
        inside = padded[first - top + 1 : last - top + 1, 1:-1]
        torch.addcmul(affine[1], image[first:last], affine[0], out=inside)
        F.silu(inside, inplace=True)
        if last == height:
            padded[last - top + 1 :].zero_()
        above, below = padded[: bottom - top + 2].unflatten(0, (-1, 2)).unbind(1)  # [h + 1, W + 2, C]
        outs = out[top:bottom].unflatten(0, (-1, 2)).unbind(1)
        _two_of_four(
            (above[:-1], below[:-1], above[1:], below[1:]),
            lambda tap, cells: _along_rows(cells, kernel[tap], bias if tap == 1 else None),
            outs,
            store,
        )


def _along_rows(cells: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Rows with a border [h, W + 2, C] → [h, W, C'], by a kernel [C', C, 1, 3] or its transform."""
    if kernel.ndim == 4:
        return _multiply(cells, kernel, bias)
    even, odd = cells.unflatten(1, (-1, 2)).unbind(2)  # [h, w + 1, C]
    out = cells.new_empty(len(cells), even.shape[1] - 1, 2, kernel.shape[1])
    _two_of_four(
        (even[:, :-1], odd[:, :-1], even[:, 1:], odd[:, 1:]),
        lambda tap, values: _multiply(values, kernel[tap], bias if tap == 1 else None),
        out.unbind(2),
        Tensor.copy_,
    )
    return out.flatten(1, 2)


def _two_of_four(
    cells: Sequence[Tensor],
    product: Callable[[int, Tensor], Tensor],
    outs: Sequence[Tensor],
    store: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """F(2, 3): from each four neighbours, a step of two apart, two neighbouring outputs of three taps."""
    zero, one, two, three = cells
    first, second = outs
    total, other = product(1, one + two), product(2, two - one)
    store(first, total)
    first.add_(other)
    store(second, total.sub_(other))
    del total, other
    first.add_(product(0, zero - two))
    second.sub_(product(3, one - three))


def _multiply(cells: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """[h, w, C] convolved with [C', C, 1, n], without a border."""
    return F.conv2d(cells[None].permute(0, 3, 1, 2), kernel, bias)[0].permute(1, 2, 0)


def _transformed(weight: Tensor) -> list[Tensor]:
    """A kernel [C', C, 3, 3] → four of [C', C, 1, 3], or, transformed along the rows as well, of [4, C', C,
    1, 1]."""
    kernels = [row[:, :, None] for row in _four_taps(weight.unbind(2))]
    if min(weight.shape[:2]) < BOTH_AXES:
        return [row.contiguous(memory_format=torch.channels_last) for row in kernels]
    return [torch.stack(_four_taps(row.split(1, 3))) for row in kernels]


def _four_taps(taps: Sequence[Tensor]) -> list[Tensor]:
    first, second, third = taps
    even, odd = (first + third) / 2, second / 2
    return [first, even + odd, even - odd, third]
