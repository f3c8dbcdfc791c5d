"""Losses for training tokenizers and the models that write tokens.

`ReconstructionLoss` trains image decoders (TiTok stage 2, TA-TiTok, small models of your own);
`proxy_code_loss` trains TiTok stage 1; the token losses train MaskGIT- and GPT-like generators.
"""

import math
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import ConvNeXt_Small_Weights, VGG16_Weights, convnext_small
from torchvision.transforms.v2.functional import InterpolationMode, resize

from ..configuration import shorten
from ..nn.lpips import build_lpips
from ..nn.stlpips import build_stlpips, random_stlpips
from .discriminator import NLayerDiscriminator

LECAM_DECAY = 0.999
LARGEST_LOGVAR = 30  # its exponential is far below the largest float
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CONVNEXT_SIZE = 224
VGG_MINIMUM_SIZE = 16
PERCEPTUAL_NETWORKS = ("lpips", "convnext_s")
ST_LPIPS = {"stlpips-alex": "alex", "stlpips-vgg": "vgg"}


# ---- adversarial -------------------------------------------------------------------------------------------


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """The adversarial loss of reconstructions: their negative mean logit, a scalar."""
    return -fake_logits.mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss 0.5 * (mean relu(1 - real) + mean relu(1 + fake)) over logits of any shape, a scalar.

    "Geometric GAN" (2017, arXiv 1705.02894).
    """
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def lecam_loss(
    real_logits: Tensor, fake_logits: Tensor, ema_real_mean: Tensor, ema_fake_mean: Tensor
) -> Tensor:
    """Keep the discriminator's mean logits near the other side's running mean, a scalar.

    "Regularizing Generative Adversarial Networks under Limited Data" (2021, arXiv 2104.03310),
    with the one-sided penalties of TiTok's code.
    """
    real_excess = F.relu(real_logits.mean() - ema_fake_mean).square()
    fake_excess = F.relu(ema_real_mean - fake_logits.mean()).square()
    return (real_excess + fake_excess).mean()


# ---- perceptual --------------------------------------------------------------------------------------------


def parse_perceptual_name(name: str) -> dict[str, float]:
    """Read "lpips", "convnext_s", "stlpips-alex", "stlpips-vgg" or "lpips-convnext_s-1.0-0.1" as {network:
    weight}.

    Raises ValueError for any other name, and for weights that are not above 0.
    """
    if name in (*PERCEPTUAL_NETWORKS, *ST_LPIPS):
        return {name: 1.0}
    match = re.fullmatch(r"lpips-convnext_s-(\d*\.?\d+)-(\d*\.?\d+)", name)
    if match is None or min(map(float, match.groups())) == 0:
        raise ValueError(
            f"perceptual loss {shorten(name)} is not understood; give 'lpips', 'convnext_s', or both with a "
            "weight above 0 for each, as in 'lpips-convnext_s-1.0-0.1'; or 'stlpips-alex' or 'stlpips-vgg'"
        )
    return dict(zip(PERCEPTUAL_NETWORKS, map(float, match.groups()), strict=True))


class PerceptualLoss(nn.Module):
    """Distance between images in VGG16 features (LPIPS), ConvNeXt-S logits or shift-tolerant features
    (ST-LPIPS).

    `name` gives the networks and their weights (see `parse_perceptual_name`); the terms are averaged with
    those weights. The networks are frozen and stay in evaluation mode.

    `weights` is the place of torchvision's ImageNet files: "hub" (torch hub's checkpoint folder; nothing is
    downloaded), "download" (the same folder, fetching what is missing), a folder, or None for random networks
    whose values mean nothing, for tests. Raises FileNotFoundError for a missing file, ConnectionError when
    the download fails, ImportError without the `lpips` package. ST-LPIPS has its weights in the
    `stlpips-pytorch` package, or a folder, and needs neither torch hub nor a download.

    "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018, arXiv 1801.03924),
    computed by the `lpips` package; the ConvNeXt term is that of "Democratizing Text-to-Image Masked
    Generative Models with Compact Text-Aware One-Dimensional Tokens" (2025, arXiv 2501.07730). ST-LPIPS:
    "Shift-tolerant Perceptual Similarity Metric" (2022, arXiv 2207.13686).
    """

    def __init__(self, name: str = "lpips", weights: str | PathLike[str] | None = "hub") -> None:
        """Build the networks that `name` lists and freeze them."""
        super().__init__()
        self.networks = parse_perceptual_name(name)
        if "lpips" in self.networks:
            self.lpips = build_lpips("vgg", _read_torchvision(VGG16_Weights.IMAGENET1K_V1, weights))
        if "convnext_s" in self.networks:
            state_dict = _read_torchvision(ConvNeXt_Small_Weights.IMAGENET1K_V1, weights)
            self.convnext = convnext_small(weights=None)
            if state_dict is not None:
                self.convnext.load_state_dict(state_dict)
            self.register_buffer("imagenet_mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
            self.register_buffer("imagenet_std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        for network in ST_LPIPS.keys() & self.networks:
            self.stlpips = _stlpips(ST_LPIPS[network], weights)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stay in evaluation mode: dropout and stochastic depth would make the distance random."""
        return super().train(False)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Two batches [B, 3, H, W] in [0, 1] -> scalar, the mean over the batch.

        Raises ValueError when the shapes differ or the images are smaller than LPIPS (16 pixels) or ST-LPIPS
        (21 pixels with AlexNet, 18 with VGG16) takes.
        """
        _check_pair(images, references)
        if self.networks.keys() & ST_LPIPS.keys():
            return self.stlpips(images, references).mean()
        total = images.new_zeros(())
        if "lpips" in self.networks:
            if min(images.shape[-2:]) < VGG_MINIMUM_SIZE:
                raise ValueError(
                    f"images are {images.shape[-2]}x{images.shape[-1]}; LPIPS needs {VGG_MINIMUM_SIZE} "
                    "pixels per side: enlarge them or leave lpips out of the perceptual loss"
                )
            distance = self.lpips(images, references, normalize=True)  # [B, 1, 1, 1]
            total = total + self.networks["lpips"] * distance.mean()
        if "convnext_s" in self.networks:
            distance = F.mse_loss(self._convnext_logits(images), self._convnext_logits(references))
            total = total + self.networks["convnext_s"] * distance
        return total / sum(self.networks.values())

    def _convnext_logits(self, images: Tensor) -> Tensor:
        size = [CONVNEXT_SIZE, CONVNEXT_SIZE]
        resized = resize(images, size, interpolation=InterpolationMode.BILINEAR, antialias=True)
        return self.convnext((resized - self.imagenet_mean) / self.imagenet_std)  # [B, 1000]


def _stlpips(net: str, weights: str | PathLike[str] | None) -> nn.Module:
    """ST-LPIPS from the place that `weights` names; its package stands for torch hub's folder."""
    if weights is None:
        return random_stlpips(net)
    return build_stlpips(net, None if weights in ("hub", "download") else Path(weights))


def _read_torchvision(
    pretrained: VGG16_Weights | ConvNeXt_Small_Weights, weights: str | PathLike[str] | None
) -> dict[str, Tensor] | None:
    """State dict of one of torchvision's published networks, from the place that `weights` names."""
    if weights is None:
        return None
    hub = Path(torch.hub.get_dir(), "checkpoints")
    if weights == "download":
        try:
            return pretrained.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except URLError as error:
            raise ConnectionError(
                f"cannot download {pretrained.url} ({error.reason}); put that file into {hub} by hand"
            ) from error
    folder = hub if weights == "hub" else Path(weights)
    path = folder / pretrained.url.rsplit("/", 1)[1]
    if not path.is_file():
        raise FileNotFoundError(
            f"the perceptual loss needs {path.name}, which is not in {folder}: put {pretrained.url} there; "
            "or name the folder that holds it, or give 'download' when online, with the option weights= "
            "(perceptual_weights= of ReconstructionLoss); or set perceptual_weight to 0 to train without"
        )
    return torch.load(path, map_location="cpu", weights_only=True)


# ---- image reconstruction ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReconstructionLossConfig:
    """Weights and schedule of a `ReconstructionLoss`; a weight of 0 leaves the part, and its network, out.

    TiTok stage 2: `perceptual="convnext_s"`, 0.1; discriminator 0.01 from step 20,000, LeCam 1e-3.
    TA-TiTok: `perceptual="lpips-convnext_s-1.0-0.1"`, 1.1; discriminator 0.1 from step 200,000, LeCam 1e-3;
    quantizer 1.0 or KL 1e-6. `perceptual_precision` "bfloat16" runs the perceptual network under autocast,
    2 to 3 times as fast where bfloat16 is. With `crop` the perceptual network and the discriminator read a
    random square of that side, in pixels, at each step, and not whole images. Raises ValueError for unknown
    names, values out of range, and a crop that no part reads.
    """

    reconstruction: str = "l2"
    reconstruction_weight: float = 1.0
    logvar: float = 0.0
    perceptual: str = "lpips"
    perceptual_weight: float = 0.0
    perceptual_precision: str = "float32"
    discriminator_weight: float = 0.0
    discriminator_start: int = 0
    discriminator_channels: int = 128
    lecam_weight: float = 1e-3
    crop: int | None = None
    quantizer_weight: float = 1.0
    kl_weight: float = 1e-6

    def __post_init__(self) -> None:
        """Raise ValueError for unknown names and values out of range."""
        if self.reconstruction not in ("l1", "l2"):
            raise ValueError(f"reconstruction is {shorten(self.reconstruction)}; give 'l1' or 'l2'")
        parse_perceptual_name(self.perceptual)
        if self.perceptual_precision not in ("float32", "bfloat16"):
            raise ValueError(
                f"perceptual_precision is {shorten(self.perceptual_precision)}; give 'float32' or 'bfloat16'"
            )
        for field in ("reconstruction", "perceptual", "discriminator", "lecam", "quantizer", "kl"):
            weight = getattr(self, f"{field}_weight")
            if not 0 <= weight < math.inf:
                raise ValueError(f"{field}_weight is {weight}; weights are 0 (off) or positive")
        judged = self.perceptual_weight + self.discriminator_weight > 0
        if self.crop is not None and (self.crop < 1 or not judged):
            raise ValueError(
                f"crop is {self.crop} with perceptual_weight {self.perceptual_weight} and "
                f"discriminator_weight {self.discriminator_weight}; it is 1 pixel or more, with one of these "
                "weights above 0"
            )
        if self.discriminator_start < 0 or self.discriminator_channels < 1:
            raise ValueError(
                f"discriminator_start is {self.discriminator_start} and discriminator_channels "
                f"{self.discriminator_channels}; they begin at 0 and 1"
            )
        if not abs(self.logvar) <= LARGEST_LOGVAR:
            raise ValueError(f"logvar is {self.logvar}; it is between -{LARGEST_LOGVAR} and {LARGEST_LOGVAR}")


class ReconstructionLoss(nn.Module):
    """The loss of a tokenizer that writes pixels: pixels, perception, a discriminator, its bottleneck.

    `generator_step` is the tokenizer's loss, `discriminator_step` the discriminator's; neither leaves
    gradients on the other's parameters, and both compute in float32 under autocast, the perceptual network in
    `perceptual_precision`. `self.discriminator` needs an optimiser of its own and, on several processes, a
    DistributedDataParallel of its own; LeCam's running means are each process's own.

    `perceptual_weights` is `PerceptualLoss`' `weights` and raises its FileNotFoundError.
    "An Image is Worth 32 Tokens for Reconstruction and Generation" (2024, arXiv 2406.07550), section 3.3, and
    "Democratizing Text-to-Image Masked Generative Models with Compact Text-Aware One-Dimensional Tokens"
    (2025, arXiv 2501.07730).
    """

    def __init__(
        self, config: ReconstructionLossConfig, perceptual_weights: str | PathLike[str] | None = "hub"
    ) -> None:
        """Build the networks whose weights in `config` are above 0."""
        super().__init__()
        self.config = config
        if config.perceptual_weight > 0:
            self.perceptual_loss = PerceptualLoss(config.perceptual, perceptual_weights)
        if config.discriminator_weight > 0:
            self.discriminator = NLayerDiscriminator(config.discriminator_channels)
            self.register_buffer("ema_real_logits_mean", torch.zeros(1))
            self.register_buffer("ema_fake_logits_mean", torch.zeros(1))

    def uses_discriminator(self, step: int) -> bool:
        """Whether the discriminator takes part, and should be trained, at `step` (from 0)."""
        return self.config.discriminator_weight > 0 and step >= self.config.discriminator_start

    def generator_step(
        self,
        images: Tensor,
        reconstructions: Tensor,
        step: int,
        *,
        quantizer_loss: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The tokenizer's weighted loss, and its parts by name, unweighted and detached; see
        `generator_losses`."""
        parts = self.generator_losses(images, reconstructions, step, quantizer_loss=quantizer_loss, kl=kl)
        total = sum(self.weights[name] * part for name, part in parts.items())
        return total, {name: part.detach() for name, part in parts.items()}

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each part of `generator_losses`."""
        config = self.config
        return {
            "reconstruction": config.reconstruction_weight,
            "perceptual": config.perceptual_weight,
            "adversarial": config.discriminator_weight,
            "quantizer": config.quantizer_weight,
            "kl": config.kl_weight,
        }

    def generator_losses(
        self,
        images: Tensor,
        reconstructions: Tensor,
        step: int,
        *,
        quantizer_loss: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The parts of the tokenizer's loss by name, unweighted, float32 scalars.

        `images`, `reconstructions`: [B, 3, H, W], images in [0, 1]; `quantizer_loss` and `kl` (summed over
        tokens and channels, mean over images) scalars where the bottleneck has them. Parts: `reconstruction`,
        and where they apply `perceptual`, `adversarial`, `quantizer`, `kl`. Raises ValueError when the two
        batches differ in shape.
        """
        _check_pair(images, reconstructions)
        config, parts = self.config, {}
        with torch.autocast(images.device.type, enabled=False):
            images, reconstructions = images.float(), reconstructions.float()
            distance = F.l1_loss if config.reconstruction == "l1" else F.mse_loss
            # A fixed log-variance scales the reconstruction term, as in VQGAN's and TA-TiTok's KL losses.
            parts["reconstruction"] = distance(reconstructions, images) * math.exp(-config.logvar)
            if config.perceptual_weight > 0:
                reduced = config.perceptual_precision == "bfloat16"
                pair = _same_crop(images, reconstructions, config.crop)
                with torch.autocast(images.device.type, torch.bfloat16, enabled=reduced):
                    parts["perceptual"] = self.perceptual_loss(*pair).float()
            if self.uses_discriminator(step):
                _, crops = _same_crop(images, reconstructions, config.crop)
                parts["adversarial"] = hinge_generator_loss(self._frozen_discriminator(crops))
            if quantizer_loss is not None:
                parts["quantizer"] = quantizer_loss.float()
            if kl is not None:
                parts["kl"] = kl.float()
        return parts

    def discriminator_step(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss, and its parts by name, unweighted and detached; moves the LeCam means.

        `images`, `reconstructions`: [B, 3, H, W], images in [0, 1]. Parts: `hinge`, `real_logits` and
        `fake_logits` (means) and, unless its weight is 0, `lecam`. Raises ValueError when the configuration
        has no discriminator or the two batches differ in shape.
        """
        if self.config.discriminator_weight == 0:
            raise ValueError(
                "discriminator_weight is 0, so there is no discriminator to train: set it above 0"
            )
        _check_pair(images, reconstructions)
        images, reconstructions = _same_crop(images, reconstructions, self.config.crop)
        with torch.autocast(images.device.type, enabled=False):
            both = torch.cat([images.detach().float(), reconstructions.detach().float()])
            real_logits, fake_logits = self.discriminator(both).chunk(2)  # 2 x [B, 1, 16, 16]
            total = hinge = hinge_discriminator_loss(real_logits, fake_logits)
            parts = {"hinge": hinge, "real_logits": real_logits.mean(), "fake_logits": fake_logits.mean()}
            if self.config.lecam_weight > 0:
                ema_means = self.ema_real_logits_mean, self.ema_fake_logits_mean
                parts["lecam"] = lecam_loss(real_logits, fake_logits, *ema_means)
                total = total + self.config.lecam_weight * parts["lecam"]
                self.ema_real_logits_mean.lerp_(parts["real_logits"].detach(), 1 - LECAM_DECAY)
                self.ema_fake_logits_mean.lerp_(parts["fake_logits"].detach(), 1 - LECAM_DECAY)
        return total, {name: part.detach() for name, part in parts.items()}

    def _frozen_discriminator(self, images: Tensor) -> Tensor:
        """Logits whose gradient reaches the images and not the discriminator's parameters."""
        network = self.discriminator
        if isinstance(network, DistributedDataParallel):
            network = network.module  # the wrapper would wait for gradients that never come
        return functional_call(
            network, {name: value.detach() for name, value in network.named_parameters()}, images
        )


def _same_crop(images: Tensor, reconstructions: Tensor, side: int | None) -> tuple[Tensor, Tensor]:
    """A square of `side` pixels at one random place of both batches [B, 3, H, W]; None: all of them."""
    if side is None:
        return images, reconstructions
    height, width = images.shape[-2:]
    if side > min(height, width):
        raise ValueError(f"crop is {side} and images are {height}x{width}; give a smaller one")
    top, left = (int(torch.randint(length - side + 1, ())) for length in (height, width))
    window = (..., slice(top, top + side), slice(left, left + side))
    return images[window], reconstructions[window]


def _check_pair(images: Tensor, reconstructions: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.shape != reconstructions.shape:
        raise ValueError(
            f"images are {list(images.shape)} and reconstructions {list(reconstructions.shape)}; both must "
            "be the same [B, 3, H, W]: crop or resize the images to what the decoder returns"
        )


# ---- tokens ------------------------------------------------------------------------------------------------


def proxy_code_losses(logits: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """TiTok stage 1: how well the MaskGIT-VQGAN codes of the image are predicted, two scalars.

    `logits` [B, V, h, w] (V = 1024); `codes` int64 [B, h*w] or [B, h, w], row by row. Returns
    `cross_entropy` and `accuracy`. Raises ValueError when the grids disagree.

    "An Image is Worth 32 Tokens for Reconstruction and Generation" (2024, arXiv 2406.07550), section 3.3.
    """
    logits, codes = logits.float().flatten(2).mT, codes.flatten(1)  # [B, h*w, V], [B, h*w]
    _check_tokens(logits, codes)
    return {
        "cross_entropy": F.cross_entropy(logits.mT, codes),
        "accuracy": (logits.argmax(-1) == codes).float().mean(),
    }


def proxy_code_loss(
    logits: Tensor, codes: Tensor, quantizer_loss: Tensor, quantizer_weight: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The cross entropy of `proxy_code_losses` plus the weighted quantizer loss, a scalar, and the parts
    `cross_entropy`, `accuracy` and `quantizer`, detached."""
    parts = {**proxy_code_losses(logits, codes), "quantizer": quantizer_loss}
    total = parts["cross_entropy"] + quantizer_weight * quantizer_loss
    return total, {name: part.detach() for name, part in parts.items()}


def feature_alignment_loss(features: Tensor, teacher: Tensor) -> Tensor:
    """Minus the mean cosine of a decoder's features and a frozen teacher's at the same places, a scalar.

    Both are [B, N, C]. Raises ValueError when the shapes differ. "Representation Alignment for Generation"
    (2024, arXiv 2410.06940), equation 3, as GigaTok (2025, arXiv 2504.08736) uses it with DINOv2.
    """
    if features.shape != teacher.shape:
        raise ValueError(
            f"features are {list(features.shape)} and the teacher's {list(teacher.shape)}; both are [B, N, C]"
        )
    return -F.cosine_similarity(features.float(), teacher.float(), dim=-1).mean()


def masked_token_loss(
    logits: Tensor, indices: Tensor, mask: Tensor, label_smoothing: float = 0.1, unmasked_weight: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Cross entropy of a masked token model, and its accuracy on the masked tokens, two scalars.

    `logits` [B, K, V], `indices` int64 [B, K], `mask` [B, K] true where the input was the mask token.
    Masked tokens weigh 1, the others `unmasked_weight`; the sum is divided by the weights' sum. Raises
    ValueError when the shapes disagree.

    "MaskGIT: Masked Generative Image Transformer" (2022, arXiv 2202.04200), equation 1, with the label
    smoothing and the unmasked weight of TiTok's generators.
    """
    _check_tokens(logits, indices)
    if mask.shape != indices.shape:
        raise ValueError(f"mask is {list(mask.shape)} and indices {list(indices.shape)}; both must be [B, K]")
    masked = mask.bool()
    token_loss = F.cross_entropy(
        logits.float().mT, indices, reduction="none", label_smoothing=label_smoothing
    )
    weights = torch.where(masked, 1.0, unmasked_weight)  # [B, K]
    loss = (token_loss * weights).sum() / (weights.sum() + 1e-8)
    correct = (logits.argmax(-1) == indices) & masked
    return loss, correct.sum() / masked.sum().clamp(min=1)


def autoregressive_token_loss(logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of next-token logits, and their accuracy, two scalars.

    `logits` [B, K, V], row i predicting `indices[:, i]`, int64 [B, K]: shift or drop rows before the call.
    Raises ValueError when the shapes disagree.
    """
    _check_tokens(logits, indices)
    loss = F.cross_entropy(logits.float().mT, indices)
    return loss, (logits.argmax(-1) == indices).float().mean()


def _check_tokens(logits: Tensor, indices: Tensor) -> None:
    if logits.ndim != 3 or logits.shape[:2] != indices.shape:
        raise ValueError(
            f"logits (as [B, K, V]) are {list(logits.shape)} and token indices {list(indices.shape)}; "
            "the indices must be [B, K], one for each row of logits"
        )
