"""The two-dimensional tokenizers that KARL distils: MAGE's VQGAN and MAR's KL autoencoder."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.convolution import GridAttention, group_norm
from ...nn.convolution import ResidualBlock as LatentDiffusionBlock
from ...nn.cpu.batching import in_chunks
from ...nn.cpu.linear import linear
from ...nn.cpu.upsample import upsample_conv
from ...quantizers import DiagonalGaussian, VectorQuantizer
from ...tokenizer import TrainingOutput
from ..maskgit_vqgan import ResidualBlock
from .config import VAE_SCALE, KarlConfig

# Memory stays channels-first: channels-last is a tenth faster on a CPU, but its group norm loses up to three
# digits on flat pictures, which changes codes, and makes batches differ from single images.


class Resample(nn.Module):
    """The convolution of a change of resolution; its key is `conv`."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=0 if stride == 2 else 1)


class Level(nn.Module):
    """The blocks of one resolution (`block.N`), each followed by attention (`attn.N`) in the deepest level of
    the VAE's encoder."""

    def __init__(self, block: type[nn.Module], widths: Sequence[int], attention: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(block(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(GridAttention(b) for b in widths[1:] if attention)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H, W]."""
        for number, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[number](x)
        return x


class Middle(nn.Module):
    """Two blocks at the lowest resolution, around attention in the VAE."""

    def __init__(self, block: type[nn.Module], channels: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = block(channels, channels)
        if attention:
            self.attn_1 = GridAttention(channels)
        self.block_2 = block(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        x = self.block_1(x)
        return self.block_2(self.attn_1(x) if hasattr(self, "attn_1") else x)


class GridEncoder(nn.Module):
    """Images [B, 3, H, W] → a grid [B, E, h, w]; the VAE's E is twice its channels: means, log-variances."""

    def __init__(self, config: KarlConfig) -> None:
        super().__init__()
        vae, widths = config.base == "vae", config.base_widths
        block = LatentDiffusionBlock if vae else ResidualBlock
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1, bias=vae)
        self.down = nn.ModuleList()
        for depth, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            last = depth == len(widths) - 1
            level = Level(block, [before] + [width] * config.base_res_blocks, attention=vae and last)
            if vae and not last:
                level.downsample = Resample(width, stride=2)
            self.down.append(level)
        self.mid = Middle(block, widths[-1], attention=vae)
        self.norm_out = group_norm(widths[-1])
        out = 2 * config.base_channels if vae else config.base_channels
        self.conv_out = nn.Conv2d(widths[-1], out, 3 if vae else 1, padding=1 if vae else 0)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, E, h, w]."""
        x = self.conv_in(images.contiguous())
        for depth, level in enumerate(self.down):
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
            elif depth < len(self.down) - 1:
                x = F.avg_pool2d(x, 2)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class GridDecoder(nn.Module):
    """A grid [B, E, h, w] → images [B, 3, H, W], not clamped."""

    def __init__(self, config: KarlConfig) -> None:
        super().__init__()
        vae, widths = config.base == "vae", config.base_widths
        block = LatentDiffusionBlock if vae else ResidualBlock
        self.conv_in = nn.Conv2d(config.base_channels, widths[-1], 3, padding=1)
        self.mid = Middle(block, widths[-1], attention=vae)
        blocks = config.base_res_blocks + vae  # only the VAE's decoder has one more per level
        self.up = nn.ModuleList()
        for depth, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            level = Level(block, [before] + [width] * blocks)
            if depth:
                level.upsample = Resample(width, stride=1)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, grid: Tensor) -> Tensor:
        """[B, E, h, w] → [B, 3, H, W]."""
        cells = grid.shape[2] * grid.shape[3]
        return in_chunks(self._decode, grid, cells * 4 ** (len(self.up) - 1))

    def _decode(self, grid: Tensor) -> Tensor:
        x = self.mid(self.conv_in(grid.contiguous()))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = upsample_conv(x, level.upsample.conv).contiguous()
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """The VQGAN of MAGE (arXiv 2211.09117): MaskGIT's network with a codebook of 1024."""

    name = "VQGAN"

    def __init__(self, config: KarlConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = GridEncoder(config), GridDecoder(config)
        self.quantize = VectorQuantizer(config.base_codebook_size, config.base_channels)
        self.outputs = config.base_codebook_size

    def features(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images → what the encoder gives before quantization, [B, E, h, w]."""
        return self.encoder(images)

    def grid(self, output: Tensor) -> Tensor:
        """Logits over the codebook [B, N, 1024] → the grid as the decoder takes it, [B, N, E]."""
        # Parity: the soft mixture of code vectors, never the likeliest code.
        return self.quantize.decode_soft(output.softmax(-1))

    def autoencode(self, images: Tensor) -> TrainingOutput:
        """Images [B, 3, H, W] through code vectors and back, for training it alone."""
        features = self.features(images)
        quantized = self.quantize(features.flatten(2).transpose(1, 2))
        grid = quantized.latents.transpose(1, 2).unflatten(2, features.shape[2:])
        return TrainingOutput(self.decoder(grid), quantized.codes, quantized.losses)

    def distillation(self, output: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Losses of logits [B, N, 1024] against the codes of the features: `nll` (nats) and `code`."""
        codes = self.quantize.encode(features.flatten(2).transpose(1, 2))
        return {
            "nll": F.cross_entropy(output.flatten(0, 1).float(), codes.flatten()),
            "code": F.mse_loss(self.grid(output), self.quantize.decode(codes)),
        }


class VAE(nn.Module):
    """The KL autoencoder of MAR (arXiv 2406.11838): latent diffusion's f16 network with 16 channels."""

    name = "VAE"

    def __init__(self, config: KarlConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = GridEncoder(config), GridDecoder(config)
        self.quant_conv = nn.Conv2d(2 * config.base_channels, 2 * config.base_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.base_channels, config.base_channels, 1)
        self.outputs = config.base_channels

    def moments(self, images: Tensor) -> Tensor:
        """Images → means, then log-variances, [B, 2E, h, w]."""
        return self.quant_conv(self.encoder(images))

    def features(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images → the scaled mean [B, E, h, w], or with `noise` of that shape a sample of the posterior."""
        posterior = DiagonalGaussian(self.moments(images).movedim(1, -1))
        sampled = (
            posterior.mode() if noise is None else posterior.sample(noise=noise.movedim(1, -1))
        )  # [B, h, w, E]
        return VAE_SCALE * sampled.movedim(-1, 1)

    def grid(self, output: Tensor) -> Tensor:
        """[B, N, E] → [B, N, E]."""
        # Parity: the scale of `features` is not taken back; the decoder was trained with it.
        return linear(output, self.post_quant_conv.weight.flatten(1), self.post_quant_conv.bias)

    def autoencode(self, images: Tensor) -> TrainingOutput:
        """Images [B, 3, H, W] through samples of the posterior and back, for training it alone; `kl` is
        sum(KL)/B."""
        posterior = DiagonalGaussian(self.moments(images).movedim(1, -1).float())
        sampled = VAE_SCALE * posterior.sample()  # [B, h, w, E]
        grid = self.grid(sampled.flatten(1, 2)).transpose(1, 2).unflatten(2, sampled.shape[1:3])
        kl = posterior.kl().sum() / max(len(images), 1)
        return TrainingOutput(self.decoder(grid), sampled, {"kl": kl})

    def distillation(self, output: Tensor, features: Tensor) -> dict[str, Tensor]:
        """The loss of outputs [B, N, E] against the scaled features: `code`, their mean squared error."""
        return {"code": F.mse_loss(output.float(), features.flatten(2).transpose(1, 2).float())}


BASES = {"vqgan": VQGAN, "vae": VAE}
