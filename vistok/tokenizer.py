"""The contract every tokenizer keeps: images → encoder → quantizer → decoder → images."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar, overload

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from . import configuration
from .adaptive import AdaptiveTokens, encode_to_quality
from .bounded_build import empty_weights
from .pretrained_model import PretrainedModel
from .quantizers import Quantizer
from .registry import TOKENIZERS
from .tiles import BATCH_SIZE, encode_tiles, takes_tiles
from .tokens import Tokens


@dataclasses.dataclass
class TrainingOutput:
    """Result of a training forward: images as the decoder made them (not clamped) and the quantizer's losses.

    Without images, or with images that carry no gradient, the objective is the sum of `losses` (flow
    matching, distillation). `targets` are what the images should be where that is not the input: images of
    another size.
    """

    images: Tensor | None
    codes: Tensor
    losses: dict[str, Tensor]
    targets: Tensor | None = None


LAYOUTS = {"image": "[B, 3, H, W]", "video": "[B, T, 3, H, W]", "shape": "[B, P, 3 or 6]"}
"""Modality → the shape of a batch of it."""
_AXES = {"image": 2, "video": 3}  # height, width, and frames
_CONVERSIONS = {  # (modality of the inputs, modality that is taken) → what to do
    ("image", "video"): "images.unsqueeze(1) makes each of them a video of one frame",
    ("video", "image"): "videos.flatten(0, 1) makes each frame an image",
}


class Tokenizer(PretrainedModel):
    """A tokenizer of images, or of another `modality`: `encode`, `decode`, `reconstruct`, `from_pretrained`,
    `save_pretrained`.

    Images are [B, 3, H, W] floats in [0, 1]; tokens are `vistok.Tokens`. A family subclasses this with a
    `config` dataclass, a `quantizer`, and two methods: `latents` (images → [B, K, D]) and `pixels` ([B, K, D]
    → images). Where the `modality` is "video", images are videos [B, T, 3, H, W] throughout; a family of
    another modality has its own `check_inputs`.
    """

    catalog = TOKENIZERS
    ordered: ClassVar[bool] = False
    """Whether prefixes of the tokens, of `prefix_lengths`, decode to a whole image."""
    adaptive: ClassVar[bool] = False
    """Whether `encode` gives images different numbers of tokens."""
    stochastic: ClassVar[bool] = False
    """Whether pictures are drawn from noise, in `steps`, with `guidance`."""
    conditions: ClassVar[tuple[str, ...]] = ()
    """The conditions that `decode` accepts beside tokens, such as ("text",) or ("class",)."""
    encodes_conditions: ClassVar[bool] = False
    """Whether `encode` takes the condition, too."""
    sized: ClassVar[bool] = False
    """Whether `decode` takes the `size` of the images, which tokens do not hold."""
    has_features: ClassVar[bool] = False
    """Whether the model also gives `features` for understanding."""
    semantic: ClassVar[bool] = False
    """Whether decoded pictures show the same content but not the same pixels, so that PSNR means nothing."""
    modality: ClassVar[str] = "image"
    """Kind of data: "image", "video" or "shape"."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "decode" in vars(cls):  # a family's own decode takes pictures in tiles as well as this class's
            cls.decode = takes_tiles(cls.decode)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._companions: dict[str, nn.Module]
        self.__dict__["_companions"] = {}

    # What a family sets -------------------------------------------------------------------------------------

    image_size: int
    """Side of the square images, in pixels."""
    num_tokens: int
    """Tokens per image, at full length."""
    size_multiple: int | None = None
    """Sides of images are multiples of this, in pixels; None: images have one size only."""
    frame_multiple: int = 1
    """Videos have one frame and a multiple of this many more."""
    quantizer: Quantizer

    @property
    def prefix_lengths(self) -> Sequence[int]:
        """Numbers of tokens that an image may have, rising, the last of them `num_tokens`.

        An ordered tokenizer has all from 1, or as a family states: 1 and some of the others; without order
        it is `num_tokens` alone.
        """
        return range(1 if self.ordered else self.num_tokens, self.num_tokens + 1)

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → what the quantizer takes, [B, K, D]."""
        raise NotImplementedError

    def pixels(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Quantized latents [B, K, D] → images [B, 3, H, W], not clamped.

        Ordered tokenizers take fewer latents than `num_tokens`, and `lengths` [B] when images have
        different numbers.
        """
        raise NotImplementedError

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of the family's configuration."""
        fields = {field.name for field in dataclasses.fields(cls.config_class)}
        if unknown := sorted(set(config) - fields):
            raise ValueError(
                f"{cls.family} has no configuration field {', '.join(unknown)}; it has "
                f"{', '.join(sorted(fields))}"
            )
        return cls(configuration.build(cls.config_class, config, cls.family))

    @classmethod
    def outline(cls, **config: Any) -> Self:
        """Build without memory for weights, to ask for tokens, codes and sizes; families leave out parts that
        need packages which do not come with vistok."""
        with empty_weights():
            return cls.create(**config)

    # What a user calls --------------------------------------------------------------------------------------

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → features for understanding [B, N, D], of families that have them
        (`has_features`).

        Raises:
            ValueError: a family without features; images that `encode` refuses.
        """
        raise ValueError(
            f"{self.label} has no features for understanding: its tokens are made for pictures alone. "
            "docs/tokenizers.md lists the families with features"
        )

    @overload
    def encode(self, images: Tensor, num_tokens: int | None = None) -> Tokens: ...

    @overload
    def encode(
        self, images: Tensor, num_tokens: int | None = None, *, target_psnr: float
    ) -> AdaptiveTokens: ...

    @torch.no_grad()
    def encode(
        self, images: Tensor, num_tokens: int | None = None, *, target_psnr: float | None = None
    ) -> Tokens | AdaptiveTokens:
        """Images [B, 3, H, W] in [0, 1] → tokens.

        `num_tokens`: ordered tokenizers keep that many, one of `prefix_lengths`; fixed-length ones accept
        only their own number. `target_psnr` (dB, ordered tokenizers): the shortest prefix that reaches it for
        each image, up to `num_tokens`, with the quality reached: see `vistok.adaptive`.

        Raises:
            ValueError: images of the wrong shape, type or size, with NaN or infinity, or outside [0, 1] by
                more than a rounding (0.001); counts the model does not have; latents that are not finite.
        """
        if target_psnr is not None:
            if self.modality not in _AXES:
                raise ValueError(f"{self.label} codes {self.modality}s, which have no PSNR; give num_tokens")
            return encode_to_quality(self, images, target_psnr, num_tokens=num_tokens)
        count = self.check_num_tokens(num_tokens)
        codes = self.quantizer.encode(self.check_latents(self.latents(self.check_inputs(images))))
        tokens = self.as_tokens(codes)
        return tokens if count == tokens.num_tokens else tokens.prefix(count)

    @overload
    def encode_tiles(
        self,
        images: Tensor | Sequence[Tensor],
        num_tokens: int | None = None,
        *,
        overlap: int | None = None,
        batch_size: int = BATCH_SIZE,
        **options: Any,
    ) -> Tokens: ...

    @overload
    def encode_tiles(
        self,
        images: Tensor | Sequence[Tensor],
        num_tokens: int | None = None,
        *,
        target_psnr: float,
        overlap: int | None = None,
        batch_size: int = BATCH_SIZE,
        **options: Any,
    ) -> AdaptiveTokens: ...

    def encode_tiles(
        self,
        images: Tensor | Sequence[Tensor],
        num_tokens: int | None = None,
        *,
        target_psnr: float | None = None,
        overlap: int | None = None,
        batch_size: int = BATCH_SIZE,
        **options: Any,
    ) -> Tokens | AdaptiveTokens:
        """Pictures of any size → tokens, in tiles of `image_size`; `decode` returns the pictures' own sizes.

        `images` are [B, 3, H, W] in [0, 1], or a list of [3, H, W] of several sizes. A picture has
        ceil(H / image_size) rows of ceil(W / image_size) tiles (`tokens.grid`), of `num_tokens` tokens each;
        where the last tiles reach beyond the picture, its edge continues. Neighbours share `overlap` pixels,
        an even number, by default a sixteenth of their side; 0 codes every tile alone. `batch_size` tiles
        are encoded at a time; `options` go to `encode`.

        With `target_psnr` (dB, ordered tokenizers) each tile keeps the shortest prefix that reaches it, up to
        `num_tokens`; where a whole picture then falls short, its tiles are encoded up to three more times,
        each time to a higher target. The returned `psnr` and `reached` are those of whole pictures.

        Raises:
            ValueError: pictures of another shape or type, without pixels, with NaN or outside [0, 1]; an
                overlap that is not even or not in 0..image_size; whatever `encode` refuses.
        """
        return encode_tiles(
            self,
            images,
            num_tokens,
            target_psnr=target_psnr,
            overlap=overlap,
            batch_size=batch_size,
            **options,
        )

    @takes_tiles
    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens | Tensor,
        *,
        condition: Any = None,
        steps: int | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tokens (or bare codes [B, K]) → images [B, 3, H, W] in [0, 1].

        `condition` is what `conditions` names, one per image. `steps`, `guidance` and `generator` are for
        stochastic decoders; a deterministic one ignores the generator and refuses the other two, as a decoder
        without conditions refuses one.

        Tokens of `encode_tiles` come back as pictures of their own sizes: [B, 3, H, W] where all have one,
        else a list of [3, H, W].
        """
        self.check_decoding(condition=condition, steps=steps, guidance=guidance)
        latents, lengths = self.dequantize(tokens)
        return self.pixels(latents, lengths).clamp(0, 1)

    def reconstruct(self, images: Tensor, num_tokens: int | None = None, **options: Any) -> Tensor:
        """Images → tokens → images; `options` go to `decode`."""
        return self.decode(self.encode(images, num_tokens), **options)

    def forward(self, images: Tensor) -> TrainingOutput:
        """One pass with gradients: straight-through or sampled codes, decoder output, quantizer losses."""
        quantized = self.quantizer(self.latents(images))
        return TrainingOutput(self.pixels(quantized.latents), quantized.codes, quantized.losses)

    # Codes ↔ Tokens -----------------------------------------------------------------------------------------

    def as_tokens(self, codes: Tensor) -> Tokens:
        """Wrap the quantizer's codes [B, K, …] with what is needed to pack and check them."""
        return Tokens(
            **{self.quantizer.kind: codes}, tokenizer=self.name, codebook_sizes=self.quantizer.codebook_sizes
        )

    def dequantize(self, tokens: Tokens | Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (or bare codes) → latents [B, K, D] and lengths, checked and on this model's device."""
        if isinstance(tokens, Tensor):
            tokens = self.as_tokens(tokens)
        if not isinstance(tokens, Tokens):
            raise ValueError(
                f"{self.label} decodes Tokens or a tensor of codes; a {type(tokens).__name__} was given"
            )
        if tokens.tiles is not None:
            raise ValueError(
                "these tokens are of pictures in tiles, which decode joins; their codes alone are not images"
            )
        codes = getattr(tokens, self.quantizer.kind)
        if codes is None:
            raise ValueError(f"{self.label} decodes {self.quantizer.kind}; these tokens hold none")
        if tokens.tokenizer and self.name and tokens.tokenizer != self.name:
            raise ValueError(
                f"tokens of {tokens.tokenizer!r} cannot be decoded by {self.name!r}; load that tokenizer"
            )
        if tokens.codebook_sizes != self.quantizer.codebook_sizes:
            raise ValueError(
                f"tokens have codebook sizes {tokens.codebook_sizes}; {self.label} has "
                f"{self.quantizer.codebook_sizes}"
            )
        if not torch.compiler.is_compiling():
            tokens.validate()
        if tokens.grid is None:
            self._check_lengths(codes.shape[1], tokens.lengths)
        elif self.size_multiple is None:
            raise ValueError(
                f"{self.label} decodes one image size; these tokens have a grid of {tokens.grid}"
            )
        elif len(tokens.grid) != _AXES[self.modality]:
            raise ValueError(
                f"{self.label} decodes {self.modality}s, whose tokens have a grid of "
                f"{_AXES[self.modality]} sides; these have {tokens.grid}"
            )
        lengths = tokens.lengths
        if lengths is not None:
            lengths = lengths.to(self.device)
            if not (self.ordered or self.adaptive) and bool((lengths != self.num_tokens).any()):
                raise ValueError(
                    f"{self.label} has exactly {self.num_tokens} tokens per image; these differ in length"
                )
        return self.quantizer.decode(codes.to(self.device)).to(self.dtype), lengths

    # Checks -------------------------------------------------------------------------------------------------

    def require_modality(self, accepted: str, purpose: str) -> None:
        """Raise ValueError unless this is a tokenizer of the `accepted` modality.

        `purpose` has the subject and the verb of the message: "coding in tiles takes".
        """
        if self.modality != accepted:
            raise ValueError(
                f"{self.label} tokenizes {self.modality}s {LAYOUTS[self.modality]}; {purpose} a tokenizer "
                f"of {accepted}s"
            )

    def check_inputs(self, inputs: Tensor) -> Tensor:
        """Inputs of this model's modality in its dtype and on its device, or a ValueError that names what to
        change."""
        return self.check_videos(inputs) if self.modality == "video" else self.check_images(inputs)

    def check_images(self, images: Tensor) -> Tensor:
        """Images in this model's dtype and on its device, or a ValueError that names what to change."""
        fix = f"use vistok.to_tensor(images, size={self.image_size})"
        self._check_kind(images, fix)
        tiled = f"{fix}, or encode_tiles for pictures of any size"
        self.check_image_size(images.shape[2], images.shape[3], tiled)
        self._check_range(images)
        return images.to(self.device, self.dtype)

    def check_videos(self, videos: Tensor) -> Tensor:
        """Videos [B, T, 3, H, W] in this model's dtype and on its device, or a ValueError that names what to
        change."""
        fix = f"use vistok.to_tensor(frames, size={self.image_size}).unsqueeze(0)"
        self._check_kind(videos, fix)
        self.check_num_frames(videos.shape[1])
        self.check_image_size(videos.shape[3], videos.shape[4], fix)
        self._check_range(videos)
        return videos.to(self.device, self.dtype)

    def check_num_frames(self, count: int) -> None:
        """Raise ValueError unless the model takes videos of so many frames."""
        step = self.frame_multiple
        if count < 1 or (count - 1) % step:
            accepted = ", ".join(str(1 + step * more) for more in range(4))
            raise ValueError(
                f"videos have {count} frames; {self.label} takes one and a multiple of {step} more: "
                f"{accepted}, … frames"
            )

    def check_pixels(self, images: Any, advice: str) -> None:
        """Raise ValueError, which ends in `advice`, unless images are [B, 3, H, W] floats in [0, 1] of any
        size, and this is a tokenizer of images."""
        self.require_modality("image", "coding in tiles takes")
        self._check_kind(images, advice)
        if not images.shape[2] or not images.shape[3]:
            raise ValueError(f"images of shape {list(images.shape)} have no pixels: {advice}")
        self._check_range(images)

    def _check_kind(self, images: Any, fix: str) -> None:
        """Raise ValueError unless these are images, or videos, whatever their size and values."""
        noun, layout = f"{self.modality}s", LAYOUTS[self.modality]
        if not isinstance(images, Tensor):
            raise ValueError(
                f"{noun} are a {type(images).__name__}; {self.label} takes a float tensor: {fix}"
            )
        modality = _pixel_modality(images)
        if modality is not None and modality != self.modality:
            raise ValueError(
                f"{self.label} takes {noun} {layout}; these are {modality}s {LAYOUTS[modality]}: "
                f"{_CONVERSIONS.get((modality, self.modality), fix)}"
            )
        if modality is None:
            raise ValueError(f"{noun} have shape {list(images.shape)}; {self.label} takes {layout}: {fix}")
        if not images.is_floating_point():
            raise ValueError(
                f"{noun} are {images.dtype}; {self.label} takes floats in [0, 1]: divide by 255, or {fix}"
            )
        if images.is_meta or images.layout != torch.strided:
            kind = "have no values (they are on the meta device)" if images.is_meta else "are sparse"
            raise ValueError(f"{noun} {kind}; {self.label} takes dense tensors in memory: {fix}")

    def _check_range(self, images: Tensor) -> None:
        if images.numel() and not torch.compiler.is_compiling():
            low, high = (float(bound) for bound in images.aminmax())
            if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails too; resizing overshoots by a rounding
                raise ValueError(
                    f"{self.modality}s span [{low:.4g}, {high:.4g}]; {self.label} takes [0, 1] without NaN: "
                    "undo any mean/std normalisation, clamp, or divide 8-bit values by 255"
                )

    def check_latents(self, latents: Tensor) -> Tensor:
        """Latents [B, …] as they are, or a ValueError that names the first image whose latents are not
        finite."""
        if latents.numel() and not torch.compiler.is_compiling():
            finite = latents.isfinite().flatten(1).all(1)  # [B]
            if not bool(finite.all()):
                first = int((~finite).nonzero()[0])
                raise ValueError(
                    f"the latents of image {first} of {len(latents)} hold NaN or infinity, so {self.label} "
                    f"has no tokens for it; values may overflow in {self.dtype}: load with dtype='float32', "
                    "or check the weights"
                )
        return latents

    def check_decoding(
        self, *, condition: Any = None, steps: int | None = None, guidance: float | None = None
    ) -> None:
        """Raise ValueError for options of `decode` that this family does not have."""
        if not self.stochastic and (steps is not None or guidance is not None):
            raise ValueError(
                f"{self.label} decodes in one deterministic pass; steps and guidance do not apply"
            )
        if condition is not None and not self.conditions:
            raise ValueError(f"{self.label} decodes tokens alone; leave condition out")

    def check_image_size(self, height: int, width: int, fix: str) -> None:
        """Raise ValueError unless the model takes images of this size."""
        multiple = self.size_multiple
        if multiple is None and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"{self.modality}s are {height}×{width} pixels; {self.label} takes "
                f"{self.image_size}×{self.image_size}: {fix}"
            )
        if multiple is not None and (height % multiple or width % multiple or not height or not width):
            raise ValueError(
                f"{self.modality}s are {height}×{width} pixels; {self.label} takes sides that are multiples "
                f"of {multiple}: {fix}"
            )

    def check_num_tokens(self, num_tokens: int | None) -> int:
        """The number of tokens that an image gets, or a ValueError that names what is accepted."""
        require_whole(num_tokens)
        if num_tokens is None or num_tokens == self.num_tokens:
            return self.num_tokens
        if not self.ordered:
            raise ValueError(
                f"{self.label} has exactly {self.num_tokens} tokens per image; {num_tokens} was asked for"
            )
        if not 1 <= num_tokens <= self.num_tokens:
            raise ValueError(
                f"{self.label} takes 1 to {self.num_tokens} tokens per image; {num_tokens} was asked for"
            )
        lengths = self.prefix_lengths
        if num_tokens not in lengths:
            below = [length for length in lengths if length < num_tokens][-1:]
            nearest = [*below, min(length for length in lengths if length > num_tokens)]
            raise ValueError(
                f"{self.label} does not decode from a prefix of {num_tokens} tokens; the nearest "
                f"{'that do have' if below else 'that does has'} {' and '.join(map(str, nearest))}"
            )
        return num_tokens

    def _check_lengths(self, count: int, lengths: Tensor | None) -> None:
        """Raise ValueError unless the model takes images of `count` tokens, or of the first `lengths` [B] of
        them."""
        if not self.ordered or lengths is None or len(self.prefix_lengths) == self.num_tokens:
            self.check_num_tokens(count)
        elif not torch.compiler.is_compiling():
            for length in lengths.unique().tolist():
                self.check_num_tokens(length)

    # Companions ---------------------------------------------------------------------------------------------

    def add_companion(self, name: str, module: nn.Module) -> None:
        """Add a frozen module that moves with this one but is not in its checkpoint (a text tower)."""
        self._companions[name] = module.eval().requires_grad_(False).to(self.device, self.dtype)

    def companion(self, name: str) -> nn.Module | None:
        """The companion of that name, if attached."""
        return self._companions.get(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for module in self._companions.values():
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _pixel_modality(pixels: Tensor) -> str | None:
    """The modality that a batch of pixels has by its shape, or None."""
    of_axes = {axes + 2: name for name, axes in _AXES.items()}
    return of_axes.get(pixels.ndim) if pixels.ndim > 2 and pixels.shape[-3] == 3 else None


def require_whole(num_tokens: Any) -> None:
    """Raise ValueError for a number of tokens that is not None or a whole number, NumPy's included."""
    if num_tokens is None:
        return
    if isinstance(num_tokens, (bool, np.bool_)) or not isinstance(num_tokens, numbers.Integral):
        raise ValueError(f"num_tokens is {num_tokens!r}; it is a whole number of tokens, such as 32")
