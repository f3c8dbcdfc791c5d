"""FlexTok's VAE: diffusers' AutoencoderKL with faster kernels on a CPU, and its loading."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import checkpoint, hub
from ...bounded_build import bounded_build, count
from ...configuration import convert, run_config_reader
from ...extras import needs
from ...files import looks_like_path
from ...nn.cpu.batching import in_chunks
from ...nn.cpu.upsample import upsample_conv
from ...nn.cpu.winograd import ExactGroupNorm, norm_silu_conv
from ...tokenizer import TrainingOutput
from .config import LICENSE, FlexTokConfig

VAES = {f"flextok-vae-c{channels}": f"EPFL-VILAB/flextok_vae_c{channels}" for channels in (4, 8, 16)}
VAE_FILE = "diffusion_pytorch_model.safetensors"


class FoldedUpsample(nn.Module):
    """A VAE decoder's upsampling, with its convolution at the low resolution; key `conv`."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """[B, C, h, w] → [B, C, 2h, 2w]."""
        return upsample_conv(x, self.conv)


class ResidualBlock(nn.Module):
    """diffusers' residual block of a VAE under its keys, with less arithmetic and memory for inference on a
    CPU."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2
        self.conv_shortcut = block.conv_shortcut

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        """[B, C, H, W] → [B, C', H, W]; on a CPU without gradients, `x` is overwritten."""
        h = norm_silu_conv(x, self.norm1, self.conv1)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return norm_silu_conv(h, self.norm2, self.conv2, x)


class FlexTokVAE(nn.Module):
    """diffusers' AutoencoderKL under the key `vae`, frozen; latents are times a scaling factor."""

    def __init__(
        self, autoencoder: nn.Module, scaling_factor: float | None, source: str | None = None
    ) -> None:
        super().__init__()
        self.vae, self._scaling_factor, self.source = autoencoder, scaling_factor, source
        for half in (autoencoder.encoder, autoencoder.decoder):
            half.conv_act.inplace = True  # of normalised features, which are used nowhere else
            half.conv_norm_out = _exact_norm(half.conv_norm_out)
            blocks = half.down_blocks if half is autoencoder.encoder else half.up_blocks
            for level in (*blocks, half.mid_block):
                level.resnets = nn.ModuleList(ResidualBlock(block) for block in level.resnets)
        for level in autoencoder.decoder.up_blocks:
            if level.upsamplers is not None:
                level.upsamplers[0] = FoldedUpsample(level.upsamplers[0].conv)

    @property
    def scaling_factor(self) -> float:
        """Factor on the latents; read from the VAE's repository where the checkpoint does not state it."""
        if self._scaling_factor is None:
            config = _hub_config(self.source) if self.source else {"scaling_factor": 1.0}  # fresh weights
            factor = config.get("scaling_factor")
            if factor is None:
                raise ValueError(
                    f"neither the tokenizer's configuration nor {self.source}'s has the VAE's "
                    "scaling_factor: give config={…, 'vae': {…, 'scaling_factor': …}}"
                )
            factor = convert(float, factor, f"the scaling_factor of {self.source}")
            if not factor > 0:
                raise ValueError(f"the scaling_factor of {self.source} is {factor}; it is a positive number")
            self._scaling_factor = factor
        return self._scaling_factor

    def posterior(self, images: Tensor) -> Any:
        """Images [B, 3, H, W] in [-1, 1] → the distribution of unscaled latents [B, C, h, w]."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        moments = self._in_chunks(lambda x: self.vae.encode(x).latent_dist.parameters, images, 1)
        return DiagonalGaussianDistribution(moments)

    def encode(self, images: Tensor, sample: bool = False) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] → scaled latents [B, C, h, w]: the posterior's mean, or a sample."""
        posterior = self.posterior(images)
        return (posterior.sample() if sample else posterior.mode()) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] → images [B, 3, H, W] in about [-1, 1]."""
        cell = 4 ** (len(self.vae.config.block_out_channels) - 1)
        return self._in_chunks(lambda x: self.vae.decode(x).sample, latents / self.scaling_factor, cell)

    def autoencode(self, images: Tensor) -> TrainingOutput:
        """Images [B, 3, H, W] in [0, 1] through samples of the posterior and back, for training it alone;
        `kl` is sum(KL)/B."""
        posterior = self.vae.encode(2 * images - 1).latent_dist
        latents = posterior.sample()
        decoded = (self.vae.decode(latents).sample + 1) / 2
        return TrainingOutput(decoded, latents, {"kl": posterior.kl().mean()})

    def _in_chunks(self, run: Any, x: Tensor, pixels_per_cell: int) -> Tensor:
        """Run in the VAE's own precision also under autocast; a CPU takes as many images at a time as fit its
        cache."""
        weight = next(parameter for parameter in self.vae.parameters() if parameter.ndim == 4)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(weight.dtype)
            if x.device.type != "cpu":
                return run(x)
            if not weight.is_contiguous(memory_format=torch.channels_last):
                self.vae.to(memory_format=torch.channels_last)
            x = x.contiguous(memory_format=torch.channels_last)
            return in_chunks(run, x, x.shape[2] * x.shape[3] * pixels_per_cell).contiguous()


def _exact_norm(norm: nn.GroupNorm) -> ExactGroupNorm:
    exact = ExactGroupNorm(norm.num_groups, norm.num_channels, norm.eps, device="meta")
    exact.weight, exact.bias = norm.weight, norm.bias
    return exact


def _hub_config(repo: str) -> dict[str, Any]:
    """config.json of a VAE's repository, downloaded if it is one of VAES, else only read from the cache."""
    try:
        unasked = repo not in VAES.values()  # a configuration file may name any repository
        return checkpoint.read_config(hub.get_file(repo, checkpoint.CONFIG_NAME, local_files_only=unasked))
    except Exception as error:  # the client raises many kinds for "no network" and "no such repository"
        raise FileNotFoundError(
            f"the VAE's scaling_factor is in {checkpoint.CONFIG_NAME} of the hub repository {repo!r}, "
            f"which is not in the cache and was not downloaded ({type(error).__name__}). Give it in the "
            "tokenizer's configuration"
        ) from error


def load_vae(source: str | Path) -> nn.Module:
    """Load an AutoencoderKL: flextok-vae-c4, -c8, -c16, a hub repository (`hf://owner/name`), folder or file.

    Raises:
        FileNotFoundError: there is no such file, or it cannot be downloaded.
        ValueError: what is there is not an AutoencoderKL.
    """
    with needs("diffusers", "diffusers", "FlexTok's VAE"):
        from diffusers import AutoencoderKL

    located = _locate_vae(source)
    beside = located.weights.parent / checkpoint.CONFIG_NAME
    config = located.config or (checkpoint.read_config(beside) if beside.is_file() else None)
    choice = checkpoint.read_choices(located.weights)[0]
    state = {_current_name(key): value for key, value in choice.tensors.items()}
    kind = (config or {}).get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL" or "decoder.conv_in.weight" not in state:
        raise ValueError(
            f"{source} ({kind}, keys such as {next(iter(state), None)}) is not an AutoencoderKL of "
            f"diffusers, which FlexTok takes: {', '.join(VAES)}"
        )
    if config is None:
        config = vae_config(FlexTokConfig(latent_channels=state["decoder.conv_in.weight"].shape[1]))
    with bounded_build(*count(state), located.weights):
        model = run_config_reader(lambda: AutoencoderKL.from_config(config), located.weights)
    checkpoint.load_strictly(model, state, source=located.weights)
    return model


def _locate_vae(source: str | Path) -> checkpoint.Located:
    """The weights of a VAE on this machine; only one of VAES or `hf://owner/name` is ever downloaded."""
    name = VAES.get(str(source), str(source))
    repo = name.removeprefix(hub.PREFIX)
    if repo in VAES.values():
        warnings.warn(f"{repo}: {LICENSE}", stacklevel=3)
    if isinstance(source, Path) or looks_like_path(name):
        return checkpoint.locate(source)
    if name.startswith(hub.PREFIX) or repo in VAES.values():
        if repo.count("/") != 1 or not all(repo.split("/")):
            raise ValueError(f"{source} is not a hub repository; give {hub.PREFIX}owner/name")
        return checkpoint.fetch(repo, VAE_FILE)
    raise FileNotFoundError(
        f"{source} is neither a file or folder here nor one of {', '.join(VAES)}; a repository of the "
        f"Hugging Face hub is given as {hub.PREFIX}owner/name"
    )


def _current_name(key: str) -> str:
    """The key of an attention layer in current diffusers; files from before 0.18 have other names."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        if ".attentions." in key:
            key = key.replace(f".{old}.", f".{new}.")
    return key


def vae_config(config: FlexTokConfig) -> dict[str, Any]:
    """The arguments of AutoencoderKL."""
    levels = len(config.vae_block_out_channels)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.vae_block_out_channels,
        "layers_per_block": config.vae_layers_per_block,
        "norm_num_groups": config.vae_norm_num_groups,
        "latent_channels": config.latent_channels,
        "sample_size": config.image_size,
        "scaling_factor": config.vae_scaling_factor or 1.0,
    }
