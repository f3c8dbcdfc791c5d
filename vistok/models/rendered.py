"""Semantic tokenizers: a diffusion model outside the checkpoint draws pictures from what tokens decode to."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..images import ImageFile, load_image, to_tensor
from ..nn.renderer import Generators, Kind, Renderer, load_pipeline
from ..tokenizer import Tokenizer
from ..tokens import Tokens
from .image_sizes import Size, read_size


class RenderedTokenizer(Tokenizer):
    """A tokenizer whose tokens decode to conditions of a diffusion model: pictures with the same content, not
    the same pixels.

    A family has `conditions_of` and the class attributes below. The renderer is a companion:

        tokenizer.attach_renderer("stabilityai/stable-diffusion-2-1-unclip")
        pictures = tokenizer.decode(tokens, generator=torch.Generator().manual_seed(1))
    """

    semantic = True
    stochastic = True
    sized = True
    steps: ClassVar[int]
    """Denoising steps of the original."""
    guidance: ClassVar[float]
    """Guidance scale of the original."""
    solver: ClassVar[str | None] = None
    """The diffusers scheduler of the original, where it is not the pipeline's."""

    @property
    def renderer_kind(self) -> Kind:
        """The kind of diffusers pipeline that draws: "text" or "unclip"."""
        raise NotImplementedError

    @property
    def renderer_name(self) -> str:
        """The hub repository of the renderer that the model was trained with."""
        raise NotImplementedError

    def renderer_options(self) -> dict[str, Any]:
        """Further arguments of `Renderer`: widths, and what differs from the pipeline."""
        raise NotImplementedError

    def conditions_of(self, latents: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Quantized latents [B, K, D] → text states [B, L, W] or None, and CLIP embeddings [B, E] or None."""
        raise NotImplementedError

    def preprocess(
        self,
        images: Sequence[ImageFile | Image.Image],
        *,
        keep_ratio: bool = False,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    ) -> Tensor:
        """Files or PIL images → [B, 3, S, S] in [0, 1], the whole picture squeezed into the square.

        With `keep_ratio` the shorter side becomes S and the centre is cropped. SEED's tokenizer squeezes with
        "bicubic", its scripts with "bilinear": their codes differ.

        Raises ValueError for another interpolation and for what is not an image.
        """
        if interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation is {interpolation!r}; it is 'bicubic' or 'bilinear'")
        method, side = Image.Resampling[interpolation.upper()], self.image_size
        batches = [torch.zeros(0, 3, side, side)]
        for source in images:
            image = load_image(source)
            size = (side, side)
            if keep_ratio:
                size = tuple(int(side * length / min(image.size)) for length in image.size)
            resized = np.array(image.resize(size, method))
            top, left = (round((length - side) / 2) for length in resized.shape[:2])
            batches.append(to_tensor(resized[top : top + side, left : left + side], size=None))
        return torch.cat(batches)

    def attach_renderer(self, source: Any, *, size: int | None = None) -> None:
        """Attach the diffusion model that draws pictures: a diffusers pipeline, a folder with one, or a hub
        repository (`hf://owner/name`; the original's own without the prefix).

        The pipeline's parts move with the tokenizer and take its dtype. Pictures have `size` pixels per side,
        by default what the model was made for.

        Raises:
            ModuleNotFoundError: diffusers is not installed.
            FileNotFoundError: there is no such folder or repository.
            ValueError: another kind of pipeline, one whose network takes other conditions, or a size that it
                does not draw.
        """
        options = self.renderer_options()
        if size is not None:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"size is the side of pictures in pixels, 1 or more; got {size!r}")
            options["size"] = size
        pipeline = load_pipeline(source, self.renderer_kind, self.renderer_name)
        self.add_companion("renderer", Renderer(pipeline, solver=self.solver, **options))

    @property
    def renderer(self) -> Renderer:
        """The attached renderer; ValueError that names what to attach if there is none."""
        renderer = self.companion("renderer")
        if renderer is None:
            raise ValueError(
                f"{self.label} decodes to conditions of a diffusion model, which its weights do not hold; "
                f"attach it: tokenizer.attach_renderer({self.renderer_name!r}), or give a folder with its "
                "pipeline; embeddings(tokens) needs none"
            )
        return renderer

    def encode_tiles(self, images: Any, *arguments: Any, **options: Any) -> Any:
        """As `Tokenizer.encode_tiles`; ValueError where the renderer draws another size than images have."""
        size = self.renderer.size
        if size != self.image_size:
            raise ValueError(
                f"{self.label} reads {self.image_size} pixels and its renderer draws {size}, so pictures in "
                "tiles cannot be joined; resize them and use encode"
            )
        return super().encode_tiles(images, *arguments, **options)

    @torch.no_grad()
    def embeddings(self, tokens: Tokens | Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Tokens (or bare codes) → what the renderer is given: text states [B, L, W] or None, and CLIP
        embeddings [B, E] or None."""
        return self.conditions_of(self.dequantize(tokens)[0])

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens | Tensor,
        *,
        size: int | Size | None = None,
        condition: Any = None,
        steps: int | None = None,
        guidance: float | None = None,
        generator: Generators = None,
        negative: Tokens | Tensor | None = None,
        noise: Tensor | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Tokens (or bare codes) → pictures [B, 3, H, W] in [0, 1], drawn by the attached renderer.

        Pictures have the renderer's size, or are resized to `size`, a side or (height, width) in pixels.
        `steps` and `guidance` are the original's by default; a guidance of 1 takes half the time. One
        `generator` gives every image the noise it would have alone, a sequence has one per image, and None is
        seed 0. `negative` tokens, of an unCLIP renderer, are what guidance leads away from. `noise`
        [B, C, h, w] is where the picture starts from. `progress` shows a bar per four images.

        Raises:
            ValueError: no renderer is attached; tokens of another model; steps below 1, a guidance that is
                not finite, and noise or generators that do not fit.
        """
        self.check_decoding(condition=condition)
        options = {"steps": steps, "guidance": guidance, "generator": generator, "noise": noise}
        if negative is not None:
            if self.renderer_kind != "unclip":
                raise ValueError(f"{self.label} is drawn by a model of text states; leave negative out")
            options["negative"] = self.dequantize(negative)[0]
        pictures = self.pixels(self.dequantize(tokens)[0], progress=progress, **options)
        if size is not None and (resized := read_size(size)) != tuple(pictures.shape[2:]):
            scaled = pictures.float() if pictures.dtype.itemsize < 4 else pictures
            scaled = F.interpolate(scaled, resized, mode="bicubic", antialias=True)
            pictures = scaled.to(pictures.dtype)
        return pictures.clamp(0, 1)

    def pixels(
        self,
        latents: Tensor,
        lengths: Tensor | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        negative: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Quantized latents [B, K, D] → pictures [B, 3, S, S], not clamped; `negative` are latents too, and
        the other options are those of `decode`."""
        renderer = self.renderer
        guidance = self.guidance if guidance is None else guidance
        if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not math.isfinite(guidance):
            raise ValueError(f"guidance is a finite number, 1 for none; got {guidance!r}")
        if negative is not None:
            if negative.shape != latents.shape:
                raise ValueError(
                    f"negative tokens are of {len(negative)} images for {len(latents)}; give as many"
                )
            negative = self.conditions_of(negative)[1]
        text, image = self.conditions_of(latents)
        steps = self.steps if steps is None else steps
        return renderer(text, image, steps=steps, guidance=guidance, negative=negative, **options)


def head(*widths: int) -> nn.Sequential:
    """Linear layers without bias from each width to the next, ReLU between them: each token's share of an
    embedding."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
