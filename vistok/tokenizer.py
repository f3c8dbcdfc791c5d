"""The contract every tokenizer keeps: images → encoder → quantizer → decoder → images."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, overload

import torch
from torch import Tensor, nn

from . import checkpoint, registry
from .quantizers import Quantizer
from .tokens import Tokens

if TYPE_CHECKING:
    from .adaptive import AdaptiveTokens


@dataclasses.dataclass
class TrainingOutput:
    """Of a training forward: images as the decoder made them (not clamped) and the quantizer's losses.

    Without images, or with images that carry no gradient, the objective is the sum of `losses` (flow
    matching, distillation).
    """

    images: Tensor | None
    codes: Tensor
    losses: dict[str, Tensor]


class Tokenizer(nn.Module):
    """An image tokenizer: `encode`, `decode`, `reconstruct`, `from_pretrained`, `save_pretrained`.

    Images are [B, 3, H, W] floats in [0, 1]; tokens are `vistok.Tokens`. A family subclasses this with a
    `config` dataclass, a `quantizer`, and two methods: `latents` (images → [B, K, D]) and `pixels` ([B, K, D]
    → images).
    """

    family: ClassVar[str]
    config_class: ClassVar[type]
    ordered: ClassVar[bool] = False
    """Whether any prefix of the tokens decodes to a whole image."""
    adaptive: ClassVar[bool] = False
    """Whether `encode` gives images different numbers of tokens."""
    stochastic: ClassVar[bool] = False
    """Whether pictures are drawn from noise, in `steps`, with `guidance`."""
    checkpoint_ignores: ClassVar[tuple[str, ...]] = ()
    """Patterns of keys that a checkpoint may have or lack without harm (training statistics)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.name: str | None = None
        self._companions: dict[str, nn.Module]
        self.__dict__["_companions"] = {}

    # What a family says -------------------------------------------------------------------------------------

    image_size: int
    """Side of the square images, in pixels."""
    num_tokens: int
    """Tokens an image, at full length."""
    quantizer: Quantizer

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → what the quantizer takes, [B, K, D]."""
        raise NotImplementedError

    def pixels(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Quantized latents [B, K, D] → images [B, 3, H, W], not clamped.

        Ordered tokenizers take fewer latents than `num_tokens`, and `lengths` [B] when images differ in
        count.
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
        return cls(cls.config_class(**config))

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """The configuration of a checkpoint with these keys and shapes, or None if it is not of this family.

        `config` is the config.json found with it, in whatever form its authors wrote it.
        """
        return None

    @classmethod
    def check_variant(cls, shapes: Mapping[str, torch.Size], config: Mapping[str, Any]) -> None:
        """Raise ValueError for a checkpoint of another variant than `config` where a sentence can say so."""

    # What a user calls --------------------------------------------------------------------------------------

    @overload
    def encode(self, images: Tensor, num_tokens: int | None = None) -> Tokens: ...

    @overload
    def encode(
        self, images: Tensor, num_tokens: int | None = None, *, target_psnr: float
    ) -> "AdaptiveTokens": ...

    @torch.no_grad()
    def encode(
        self, images: Tensor, num_tokens: int | None = None, *, target_psnr: float | None = None
    ) -> "Tokens | AdaptiveTokens":
        """Images [B, 3, H, W] in [0, 1] → tokens.

        `num_tokens`: ordered tokenizers keep that many; fixed-length ones accept only their own number.
        `target_psnr` (dB, ordered tokenizers): the shortest prefix that reaches it for each image, up to
        `num_tokens`, with the quality reached: see `vistok.adaptive`.
        Raises ValueError for images of the wrong shape, type, range or size, and for counts the model does
        not have.
        """
        if target_psnr is not None:
            from .adaptive import encode_to_quality

            return encode_to_quality(self, images, target_psnr, num_tokens=num_tokens)
        count = self.check_num_tokens(num_tokens)
        codes = self.quantizer.encode(self.latents(self.check_images(images)))
        tokens = self.as_tokens(codes)
        return tokens if count == tokens.num_tokens else tokens.prefix(count)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens | Tensor,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tokens (or bare codes [B, K]) → images [B, 3, H, W] in [0, 1].

        `steps`, `guidance` and `generator` are for stochastic decoders; a deterministic one ignores the
        generator and refuses the other two.
        """
        if steps is not None or guidance is not None:
            raise ValueError(
                f"{self.label} decodes in one deterministic pass; steps and guidance do not apply"
            )
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
        self.check_num_tokens(codes.shape[1])
        lengths = tokens.lengths
        if lengths is not None:
            lengths = lengths.to(self.device)
            if not (self.ordered or self.adaptive) and bool((lengths != self.num_tokens).any()):
                raise ValueError(
                    f"{self.label} has exactly {self.num_tokens} tokens an image; these differ in length"
                )
        return self.quantizer.decode(codes.to(self.device)).to(self.dtype), lengths

    # Checks -------------------------------------------------------------------------------------------------

    def check_images(self, images: Tensor) -> Tensor:
        """Images in this model's dtype and on its device, or a ValueError that says what to change."""
        fix = f"use vistok.to_tensor(images, size={self.image_size})"
        if not isinstance(images, Tensor):
            raise ValueError(
                f"images are a {type(images).__name__}; {self.label} takes a float tensor: {fix}"
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images have shape {list(images.shape)}; {self.label} takes [B, 3, H, W]: {fix}"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype}; {self.label} takes floats in [0, 1]: divide by 255, or {fix}"
            )
        self.check_image_size(images.shape[2], images.shape[3], fix)
        if images.numel() and not torch.compiler.is_compiling():
            low, high = (float(bound) for bound in images.aminmax())
            if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails too; resizing overshoots by a rounding
                raise ValueError(
                    f"images span [{low:.4g}, {high:.4g}]; {self.label} takes [0, 1] without NaN: undo any "
                    "mean/std normalisation, clamp, or divide 8-bit values by 255"
                )
        return images.to(self.device, self.dtype)

    def check_image_size(self, height: int, width: int, fix: str) -> None:
        """Raise ValueError unless the model takes images of this size."""
        if height != self.image_size or width != self.image_size:
            raise ValueError(
                f"images are {height}×{width} pixels; {self.label} takes "
                f"{self.image_size}×{self.image_size}: {fix}"
            )

    def check_num_tokens(self, num_tokens: int | None) -> int:
        """The number of tokens an image gets, or a ValueError that says what is accepted."""
        require_whole(num_tokens)
        if num_tokens is None or num_tokens == self.num_tokens:
            return self.num_tokens
        if not self.ordered:
            raise ValueError(
                f"{self.label} has exactly {self.num_tokens} tokens an image; {num_tokens} was asked for"
            )
        if not 1 <= num_tokens <= self.num_tokens:
            raise ValueError(
                f"{self.label} takes 1 to {self.num_tokens} tokens an image; {num_tokens} was asked for"
            )
        return num_tokens

    # Where it lives -----------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """What messages call this model."""
        return self.name or self.family

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the weights."""
        return next(self.parameters()).dtype

    def add_companion(self, name: str, module: nn.Module) -> None:
        """Take over a module, frozen: it moves with this one but is not in its checkpoint (a text tower)."""
        self._companions[name] = module.eval().requires_grad_(False).to(self.device, self.dtype)

    def companion(self, name: str) -> nn.Module | None:
        """The companion of that name, if attached."""
        return self._companions.get(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for module in self._companions.values():
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    # Checkpoints --------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weights: str | Path | None = None,
        config: Mapping[str, Any] | str | Path | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load by registry name, hub repository, folder or file; see `vistok.load`.

        Weights become float32 unless `dtype` says otherwise; a `config` given here wins over every other.
        """
        hub = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        entry = registry.entries().get(str(source))
        if weights is not None:
            located = checkpoint.locate(weights)
        elif entry is not None:
            located = _published(entry, hub)
        elif isinstance(source, Path) or _looks_local(source):
            located = checkpoint.locate(source)
        elif source.count("/") == 1:
            located = checkpoint.fetch(str(source), **hub)
        else:
            raise ValueError(registry.unknown_name(str(source)))
        if config is not None and not isinstance(config, Mapping):
            config = checkpoint.read_config(Path(config))
        state = checkpoint.read(located.weights)
        family, fields = _identify(state, config, located, entry)
        if not issubclass(family, cls):
            raise ValueError(
                f"{source} is a {family.family!r} checkpoint, not one of {cls.__name__}; use vistok.load"
            )
        family.check_variant({key: value.shape for key, value in state.items()}, fields)
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model = family.create(**fields)
        ignore = family.checkpoint_ignores
        checkpoint.load_strictly(
            model, state, dtype=dtype or torch.float32, ignore=ignore, source=located.weights
        )
        model.name = entry.name if entry else (config or located.config or {}).get("name")
        return model.requires_grad_(True).to(device=device).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which `load(folder)` reads back exactly."""
        config = {"family": self.family, "name": self.name, "config": dataclasses.asdict(self.config)}
        checkpoint.save(folder, self.state_dict(), config)


def require_whole(num_tokens: Any) -> None:
    """Raise ValueError for a number of tokens that is given and no integer."""
    if num_tokens is not None and (isinstance(num_tokens, bool) or not isinstance(num_tokens, int)):
        raise ValueError(f"num_tokens is {num_tokens!r}; it is a whole number of tokens, such as 32")


def _published(entry: registry.Entry, hub: dict[str, Any]) -> checkpoint.Located:
    """The weights of a registry row: in this package or on the hub; FileNotFoundError for those on a page."""
    from importlib.resources import files

    if entry.repo is None:
        return checkpoint.locate(Path(str(files("vistok.assets") / entry.file)))
    if "://" in entry.repo:
        raise FileNotFoundError(
            f"the weights of {entry.name} are not on the hub; download {entry.file} as {entry.repo} says "
            f"and pass its path: load({entry.name!r}, weights='path/to/{Path(entry.file).name}')"
        )
    return checkpoint.fetch(entry.repo, entry.file, **hub)


def _looks_local(source: str) -> bool:
    """Whether a string names a path rather than a hub repository (owner/name) or a registry name."""
    path = Path(source).expanduser()
    return path.exists() or path.is_absolute() or source.startswith(".") or path.suffix in checkpoint.SUFFIXES


def _identify(
    state: Mapping[str, Tensor],
    given: Mapping[str, Any] | None,
    located: checkpoint.Located,
    entry: registry.Entry | None,
) -> tuple[type[Tokenizer], dict[str, Any]]:
    """Family and fields: by the `given` config, the registry row, a config.json, or the keys."""
    known = registry.families()
    config = given or located.config
    named = (config or {}).get("family")
    if named is not None:
        if named not in known:
            raise ValueError(
                f"{located.weights}: unknown family {named!r}; this version has {', '.join(known)}"
            )
        if entry and named != entry.family:
            raise ValueError(f"{located.weights} is of family {named!r}; {entry.name} is {entry.family!r}")
        return known[named], dict(config.get("config", {}))
    if entry and given is None:
        return known[entry.family], dict(entry.config)
    shapes = {key: value.shape for key, value in state.items()}
    for family in known.values():
        fields = family.recognise(shapes, dict(config) if config else None)
        if fields is not None:
            return family, fields
    raise ValueError(
        f"{located.weights} is of no known family ({', '.join(known)}); it has {len(state)} keys such as "
        f"{', '.join(list(state)[:3])}. Give config={{'family': …, 'config': {{…}}}}"
    )
