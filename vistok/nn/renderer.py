"""Pictures from embeddings: the denoising loop of Stable Diffusion over the parts of a diffusers pipeline.

Two kinds of pipelines: Stable Diffusion, whose network reads a sequence of text states (Rombach et al., 2022,
arXiv 2112.10752), and Stable unCLIP, whose network also takes the CLIP embedding of an image (Ramesh et al.,
2022, arXiv 2204.06125). The parts are diffusers'; the loop is here so that every image has its own noise, in
float32, whatever its neighbours and the dtype of the weights.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import hub
from ..extras import needs
from ..files import looks_like_path
from . import flow

Kind = Literal["text", "unclip"]
Generators = torch.Generator | Sequence[torch.Generator] | None
IMAGES_PER_PASS = 4
"""Images that go through the network at a time: each has several gigabytes of activations at 768 pixels."""
PURPOSE = "drawing pictures from embeddings"


class Renderer(nn.Module):
    """The network, VAE and schedulers of a pipeline, frozen, and its states of an empty prompt.

    Args:
        pipeline: a diffusers StableDiffusionPipeline or StableUnCLIPImg2ImgPipeline.
        text_width: width of the text states that the network must take.
        image_width: width of CLIP embeddings that an unCLIP network must take; None for Stable Diffusion.
        length: states of an empty prompt; None: as many as the text encoder has.
        size: side of the pictures in pixels; None: the side that the network was made for.
        solver: name of the diffusers scheduler that takes the pipeline's place, or None.

    Raises:
        ValueError: a part is missing, the network takes other widths, or the VAE does not draw this size.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        text_width: int,
        image_width: int | None = None,
        length: int | None = None,
        size: int | None = None,
        solver: str | None = None,
    ) -> None:
        super().__init__()
        parts = ["unet", "vae", "scheduler", "tokenizer", "text_encoder"]
        parts += [] if image_width is None else ["image_normalizer", "image_noising_scheduler"]
        if missing := [name for name in parts if getattr(pipeline, name, None) is None]:
            raise ValueError(f"this pipeline has no {', '.join(missing)}, which drawing pictures needs")
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.size = size or self.unet.config.sample_size * self.factor
        if self.size % self.factor:
            raise ValueError(
                f"pictures of {self.size} pixels were asked for; this VAE takes multiples of {self.factor}"
            )
        _check_widths(self.unet.config, text_width, image_width)
        self.scheduler = pipeline.scheduler
        if solver is not None:
            import diffusers

            self.scheduler = getattr(diffusers, solver).from_config(pipeline.scheduler.config)
        if image_width is not None:
            self.normalizer, self.noising = pipeline.image_normalizer, pipeline.image_noising_scheduler
        length = length or pipeline.tokenizer.model_max_length
        like = next(pipeline.text_encoder.parameters())
        with torch.no_grad():
            # The negative prompt of a prompt with that many states is an empty one of the same length.
            empty = pipeline.encode_prompt(
                None, like.device, 1, True, prompt_embeds=like.new_zeros(1, length, text_width)
            )[1]
        self.register_buffer("empty_prompt", empty.detach().clone())

    def forward(
        self,
        text: Tensor | None,
        image: Tensor | None,
        *,
        steps: int,
        guidance: float,
        generator: Generators = None,
        negative: Tensor | None = None,
        noise: Tensor | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Text states [B, L, D] (None: an empty prompt) and CLIP embeddings [B, E] → pictures [B, 3, S, S],
        about [0, 1], not clamped.

        Away from `negative` embeddings [B, E], by default zeros, `guidance` pushes. `noise` [B, C, h, w] is
        that of the picture; without it, and for the noise of the embedding always, numbers come from
        `generator`: one that gives every image what it would have alone, or one per image; None is seed 0.
        """
        require_steps(steps)
        condition = text if image is None else image
        batch, device = len(condition), condition.device
        dtype = torch.promote_types(condition.dtype, torch.float32)
        side = self.size // self.factor
        shape = (self.unet.config.in_channels, side, side)
        draw = noise_source(generator, batch, device, dtype)
        latents = draw(shape) if noise is None else _checked_noise(noise, (batch, *shape)).to(device, dtype)
        labels = opposite = None
        if image is not None:
            embedding_noise = draw(image.shape[1:])
            labels = self._labels(image, embedding_noise)
            opposite = torch.zeros_like(labels)
            if negative is not None:
                opposite = self._labels(negative, embedding_noise)
        empty = self.empty_prompt.expand(batch, -1, -1)
        text = empty if text is None else text
        pictures = [condition.new_zeros(0, 3, self.size, self.size)]
        for start in range(0, batch, IMAGES_PER_PASS):
            rows = slice(start, start + IMAGES_PER_PASS)
            both = [(text[rows], None if labels is None else labels[rows])]
            if guidance != 1:
                both.insert(0, (empty[rows], None if opposite is None else opposite[rows]))
            sampled = self._denoise(latents[rows], both, steps, guidance, progress)
            pictures.append(self._draw(sampled.to(condition.dtype)))
        return torch.cat(pictures)

    def _labels(self, image: Tensor, noise: Tensor) -> Tensor:
        """CLIP embeddings and noise [B, E] → what the network takes, [B, 2 E]: the embedding with the noise
        of level 0, and the features of that level."""
        normalizer = self.normalizer
        mean, std = normalizer.mean.to(noise), normalizer.std.to(noise)
        level = torch.zeros(len(image), dtype=torch.long, device=image.device)
        scaled = self.noising.add_noise((image.to(noise) - mean) / std, noise, level)
        half = torch.ones_like(noise[:, : noise.shape[1] // 2])
        level_features = F.pad(half, (0, noise.shape[1] - half.shape[1]))  # cosines of 0, then sines
        return torch.cat([scaled * std + mean, level_features], -1).to(image.dtype)

    def _denoise(
        self,
        latents: Tensor,
        conditions: list[tuple[Tensor, Tensor | None]],
        steps: int,
        guidance: float,
        progress: bool,
    ) -> Tensor:
        """Noise [b, C, h, w] → latents; `conditions` are text and labels, the opposite ones first."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # it has the state of one pass
        scheduler.set_timesteps(steps, device=latents.device)
        text = torch.cat([text for text, _ in conditions])
        labels = torch.cat([label for _, label in conditions]) if conditions[0][1] is not None else None
        latents = latents * scheduler.init_noise_sigma
        for time in tqdm(scheduler.timesteps, desc="denoising", disable=not progress, leave=False):
            x = scheduler.scale_model_input(torch.cat([latents] * len(conditions)), time)
            predicted = self.unet(
                x.to(text.dtype), time, encoder_hidden_states=text, class_labels=labels, return_dict=False
            )[0].to(latents.dtype)
            if len(conditions) == 2:
                opposite, predicted = predicted.chunk(2)
                predicted = flow.classifier_free_guidance(predicted, opposite, guidance)
            latents = scheduler.step(predicted, time, latents, return_dict=False)[0]
        return latents

    def _draw(self, latents: Tensor) -> Tensor:
        decoded = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return (decoded + 1) / 2


def _check_widths(config: Any, text_width: int, image_width: int | None) -> None:
    states = config.cross_attention_dim
    states = set(states) if isinstance(states, list | tuple) else {states}
    labels = config.projection_class_embeddings_input_dim if config.class_embed_type == "projection" else None
    if states != {text_width} or labels != (None if image_width is None else 2 * image_width):
        own = f"text states of width {', '.join(map(str, states))}"
        own += " alone" if labels is None else f" and CLIP embeddings of width {labels // 2}"
        asked = f"text states of width {text_width}"
        asked += " alone" if image_width is None else f" and CLIP embeddings of width {image_width}"
        raise ValueError(f"this pipeline's network takes {own}; the tokenizer gives {asked}")


def _checked_noise(noise: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(noise, Tensor) or noise.shape != shape:
        form = f"shape {list(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"noise of {form} was given; {list(shape)} is needed")
    return noise


def require_steps(steps: Any) -> None:
    """Raise ValueError unless `steps` is a whole number of 1 or more."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is the number of denoising steps, an integer of 1 or more; got {steps!r}")


def noise_source(
    generator: Generators, batch: int, device: torch.device, dtype: torch.dtype
) -> Callable[[Sequence[int]], Tensor]:
    """A function that draws standard normal noise [batch, *shape] for a shape.

    One generator gives every image the noise that it would have alone; a sequence has one per image; None is
    seed 0. ValueError for another number of generators than images.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    if isinstance(generator, torch.Generator):
        shared = generator

        def draw_shared(shape: Sequence[int]) -> Tensor:
            values = torch.randn(tuple(shape), generator=shared, device=shared.device)
            return values.to(device, dtype).expand(batch, *shape)

        return draw_shared
    generators = list(generator)
    if len(generators) != batch:
        raise ValueError(
            f"{len(generators)} generators were given for {batch} images; give one, or one per image"
        )

    def draw(shape: Sequence[int]) -> Tensor:
        rows = [torch.randn(tuple(shape), generator=each, device=each.device) for each in generators]
        values = [row.to(device, dtype) for row in rows]
        return torch.stack(values) if values else torch.zeros(0, *shape, device=device, dtype=dtype)

    return draw


def load_pipeline(source: Any, kind: Kind, published: str) -> Any:
    """Return the pipeline itself, or load it from a folder or hub repository (`hf://owner/name`).

    `published` is the repository of the family's own renderer, which needs no prefix. Only safetensors files
    are read, and of an unCLIP pipeline not the image encoder, which nothing here uses.

    Raises:
        FileNotFoundError: there is no such folder, or the repository is neither cached nor reachable.
        ValueError: it is another kind of pipeline, or no pipeline at all.
    """
    with needs("diffusers", "diffusers", PURPOSE):
        from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableUnCLIPImg2ImgPipeline

    classes = {"text": StableDiffusionPipeline, "unclip": StableUnCLIPImg2ImgPipeline}
    if isinstance(source, DiffusionPipeline):
        if not isinstance(source, classes[kind]):
            raise ValueError(
                f"a {type(source).__name__} was given; this tokenizer is rendered by a "
                f"{classes[kind].__name__}, such as that of {published}"
            )
        return source
    if not isinstance(source, str | Path):
        raise ValueError(
            f"a renderer is a diffusers pipeline, a folder or a hub repository; got {type(source).__name__}"
        )
    unused = {"text": {"safety_checker": None, "requires_safety_checker": False}, "unclip": {}}[kind]
    if kind == "unclip":
        unused = {"image_encoder": None}
    location: str | Path
    if isinstance(source, Path) or (looks_like_path(source) and source != published):
        location = Path(source).expanduser()
        if not (location / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{source} is not the folder of a diffusers pipeline: it has no model_index.json; give one, "
                f"or {hub.PREFIX}{published}"
            )
    else:
        location = source.removeprefix(hub.PREFIX)
        if location.count("/") != 1 or not all(location.split("/")):
            raise ValueError(f"{source} is not a hub repository; give {hub.PREFIX}owner/name")
        if not source.startswith(hub.PREFIX) and location != published:
            raise FileNotFoundError(
                f"{source} is neither a folder here nor {published}; another repository of the Hugging Face "
                f"hub is given as {hub.PREFIX}{source}"
            )
        hub.announce(location)
    try:
        return classes[kind].from_pretrained(location, use_safetensors=True, **unused)
    except OSError as error:
        raise FileNotFoundError(
            f"the pipeline {source} cannot be read or fetched ({' '.join(str(error).split())[:200]}); "
            "download its repository on a connected machine and give the folder"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{source} is not a {classes[kind].__name__} of diffusers: {' '.join(str(error).split())[:200]}"
        ) from error
