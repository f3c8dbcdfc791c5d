"""FlexTok's generators: the ordered tokens of an image one by one, from a class or from text features.

"FlexTok: Resampling Images into 1D Token Sequences of Flexible Length" (Bachmann et al., 2025, arXiv
2502.13967), stage 2. Every prefix of the tokens is an image for `vistok.models.flextok`, so that sampling may
stop early: `sample(condition, num_tokens=32)`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from .. import configuration, hub
from ..models.flextok.config import LICENSE
from ..models.ranges import require_between, require_depths, require_multiple, require_sizes
from ..nn.text_features import TextFeatures
from ..registry import Entry
from .base import Generator
from .cache import KeyValueCache
from .classes import ClassGenerator
from .layers import apply_linear, at_least_float32, initialise
from .llama import choose
from .noise import Noise
from .published import require_settings
from .registry import GENERATORS

_MODEL, _MLP = "models.ar_image_model.", "models.text_encoder.mlp."


@dataclass(frozen=True, kw_only=True)
class FlexARConfig:
    """Sizes and options of the transformer, and the name of the tokenizer.

    `temperature`, `guidance`, `top_k`, `top_p` and `sampled_tokens` are settings of `sample`. Raises
    ValueError for values out of range.
    """

    tokenizer: str | None = None
    embed_dim: int
    num_blocks: int
    num_heads: int
    codebook_size: int
    num_tokens: int
    """Tokens per image."""
    grid: tuple[int, int] | None = None
    """Sides of the grid of a tokenizer that has one."""
    pos_embed: Literal["absolute", "sincos1d"]
    """Positions that are learned, or a stored table of sines."""
    qk_norm: bool
    """Whether queries and keys of every head pass a LayerNorm."""
    post_trunk_norm: bool
    qkv_bias: bool = False
    use_bias: bool = False
    """Biases of all other layers of the blocks."""
    head_bias: bool = False
    swiglu_hidden: int | None = None
    """Hidden width of the MLP; None: 8/3 of `embed_dim`, rounded up to a multiple of 256."""
    norm_eps: float = 1e-5
    temperature: float | None = None
    guidance: float | None = None
    top_k: int = 0
    """Codes that are drawn from, the likeliest and those equal to the last of them; 0: all."""
    top_p: float = 1.0
    """Codes are drawn from the likeliest that together reach this probability."""
    sampled_tokens: int = 0
    """First tokens that are written; 0: all."""

    def __post_init__(self) -> None:
        require_sizes(self, "embed_dim", "num_heads", "codebook_size", "num_tokens")
        require_depths(self, "num_blocks")
        require_multiple(self, "embed_dim", "num_heads")
        require_between(self, ["norm_eps"], 0, 1)
        require_settings(self, "temperature", "guidance")
        require_between(self, ["top_k"], 0, 2**24)
        require_between(self, ["top_p"], 1e-6, 1)
        require_between(self, ["sampled_tokens"], 0, self.num_tokens)
        if self.swiglu_hidden is not None:
            require_sizes(self, "swiglu_hidden")
        if self.pos_embed == "sincos1d" and self.embed_dim % 4:
            raise ValueError(f"embed_dim is {self.embed_dim}; the table of sines takes a multiple of 4")
        if self.grid is not None and prod(self.grid) != self.num_tokens:
            raise ValueError(f"grid is {self.grid}; it has the {self.num_tokens} places of num_tokens")

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return self.swiglu_hidden or -(-int(8 * self.embed_dim / 3) // 256) * 256


@dataclass(frozen=True, kw_only=True)
class FlexARClassConfig(FlexARConfig):
    """A generator whose condition is a class.

    `reference_compat`, a setting of `sample`, repeats an error of the original: from the second token on, the
    pass without a class is that of class 0.
    """

    num_classes: int = 1000
    class_label_dropout: float = 0.1
    reference_compat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "num_classes")
        require_between(self, ["class_label_dropout"], 0, 1)


@dataclass(frozen=True, kw_only=True)
class FlexARTextConfig(FlexARConfig):
    """A generator whose condition is the states of a text encoder, 2048 wide for flan-t5-xl."""

    text_dim: int = 2048
    text_bias: bool = False
    """Biases of the MLP that the states pass first."""
    text_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "text_dim")
        require_between(self, ["text_dropout"], 0, 1)


# Network ----------------------------------------------------------------------------------------------------


class _Heads(nn.Module):
    """What both kinds of attention share: rows in heads, LayerNorm of queries and keys, and the way out."""

    def __init__(self, config: FlexARConfig) -> None:
        super().__init__()
        self.heads, width = config.num_heads, config.embed_dim // config.num_heads
        self.q_norm = nn.LayerNorm(width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.embed_dim, config.embed_dim, config.use_bias)

    def split(self, x: Tensor) -> Tensor:
        """[B, R, D] → [B, h, R, d]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """[B, h, R, d] → [B, R, D], projected."""
        return apply_linear(self.proj, x.transpose(1, 2).flatten(2))


class SelfAttention(_Heads):
    """Causal attention; keys `qkv` and `proj`."""

    def __init__(self, config: FlexARConfig) -> None:
        super().__init__(config)
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, config.qkv_bias)

    def forward(self, x: Tensor, layer: int, cache: KeyValueCache | None) -> Tensor:
        """A whole sequence [B, R, D], or with a cache the one row [B, 1, D] that follows it."""
        query, key, value = map(self.split, apply_linear(self.qkv, x).chunk(3, -1))
        query, key = self.q_norm(query), self.k_norm(key)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        return self.join(F.scaled_dot_product_attention(query, key, value, is_causal=cache is None))


class CrossAttention(_Heads):
    """Attention to the text; keys `Wq`, `Wk`, `Wv` and `proj`."""

    def __init__(self, config: FlexARConfig) -> None:
        super().__init__(config)
        dim = config.embed_dim
        self.Wq, self.Wk, self.Wv = (nn.Linear(dim, dim, config.qkv_bias) for _ in range(3))

    def keys_and_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Text [B, T, D] → its keys and values [B, h, T, d], the same for every row of the image."""
        key = self.k_norm(self.split(apply_linear(self.Wk, text)))
        return key, self.split(apply_linear(self.Wv, text))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Rows [B, R, D] to the text where `mask`, bool [B, 1, 1, T], allows it."""
        query = self.q_norm(self.split(apply_linear(self.Wq, x)))
        return self.join(F.scaled_dot_product_attention(query, keys, values, attn_mask=mask))


class FeedForward(nn.Module):
    """fc2(silu(fc1 x) · fc3 x)."""

    def __init__(self, config: FlexARConfig) -> None:
        super().__init__()
        dim, hidden, bias = config.embed_dim, config.hidden, config.use_bias
        self.fc1, self.fc3 = nn.Linear(dim, hidden, bias), nn.Linear(dim, hidden, bias)
        self.fc2 = nn.Linear(hidden, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, R, D] → [B, R, D]."""
        return apply_linear(self.fc2, F.silu(apply_linear(self.fc1, x)) * apply_linear(self.fc3, x))


Text = tuple[list[tuple[Tensor, Tensor]], Tensor]
"""Keys and values of the text in every block, and its mask, bool [B, 1, 1, T]."""


class ClassBlock(nn.Module):
    """Pre-norm block; keys norm_1, attn, norm_2, mlp."""

    def __init__(self, config: FlexARConfig) -> None:
        super().__init__()
        self.attn, self.mlp = SelfAttention(config), FeedForward(config)
        self.norm_1, self.norm_2 = (nn.LayerNorm(config.embed_dim, config.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, text: None, layer: int = 0, cache: KeyValueCache | None = None) -> Tensor:
        """[B, R, D] → [B, R, D]."""
        x = x + self.attn(self.norm_1(x), layer, cache)
        return x + self.mlp(self.norm_2(x))


class TextBlock(nn.Module):
    """Pre-norm block with attention to the text; keys norm_1, self_attn, norm_2, cross_attn, norm_3, mlp."""

    def __init__(self, config: FlexARConfig) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = SelfAttention(config), CrossAttention(config)
        self.mlp = FeedForward(config)
        norms = (nn.LayerNorm(config.embed_dim, config.norm_eps) for _ in range(3))
        self.norm_1, self.norm_2, self.norm_3 = norms

    def forward(self, x: Tensor, text: Text, layer: int = 0, cache: KeyValueCache | None = None) -> Tensor:
        """[B, R, D] → [B, R, D]."""
        keys_and_values, mask = text
        x = x + self.self_attn(self.norm_1(x), layer, cache)
        x = x + self.cross_attn(self.norm_2(x), *keys_and_values[layer], mask)
        return x + self.mlp(self.norm_3(x))


class ImageModel(nn.Module):
    """The transformer over the tokens; keys preprocessor, trunk and head."""

    def __init__(self, config: FlexARConfig, block: Callable[[FlexARConfig], nn.Module]) -> None:
        super().__init__()
        dim, count = config.embed_dim, config.num_tokens
        self.preprocessor = nn.Module()
        self.preprocessor.embedding = nn.Embedding(config.codebook_size, dim)
        self.preprocessor.sos_token_embed = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.preprocessor.sos_token_embed, std=0.02)
        if config.pos_embed == "sincos1d":
            self.preprocessor.register_buffer("positional_embedding", position_table(count, dim))
        else:
            self.preprocessor.positional_embedding = nn.Parameter(torch.empty(count, dim))
            nn.init.trunc_normal_(self.preprocessor.positional_embedding, std=0.02)
        self.trunk = nn.Module()
        self.trunk.blocks = nn.ModuleList(block(config) for _ in range(config.num_blocks))
        norm = nn.LayerNorm(dim, config.norm_eps) if config.post_trunk_norm else nn.Identity()
        self.trunk.post_trunk_norm = norm
        self.head = nn.ModuleDict({"linear": nn.Linear(dim, config.codebook_size, config.head_bias)})

    def forward(
        self, rows: Tensor, start: int, text: Text | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Logits [B, R, V] of rows [B, R, D] whose first has the position `start`."""
        x = rows + self.preprocessor.positional_embedding[start : start + rows.shape[1]]
        for layer, block in enumerate(self.trunk.blocks):
            x = block(x, text, layer, cache)
        return apply_linear(self.head["linear"], self.trunk.post_trunk_norm(x))


def position_table(count: int, dim: int) -> Tensor:
    """Positions [count, dim]: zeros, then D/4 zeros, D/4 ones, sines and cosines of 0, 1, ….

    The table of a grid of one column, with a row of zeros before it.
    """
    frequencies = 10_000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(count - 1)[:, None] * frequencies
    column = torch.zeros_like(angles)
    table = torch.cat([column.sin(), column.cos(), angles.sin(), angles.cos()], 1)
    return F.pad(table, (0, 0, 1, 0)).float()


# Generators -------------------------------------------------------------------------------------------------


class FlexARGenerator(Generator):
    """A causal transformer whose row r predicts token r; row 0 is a learned start."""

    settings: ClassVar[Mapping[str, str]] = {
        "temperature": "temperature",
        "guidance": "guidance",
        "top_k": "top_k",
        "top_p": "top_p",
        "num_tokens": "sampled_tokens",
    }
    own_config_wins = True
    checkpoint_ignores = (
        "models.image_tokenizer.*",
        "models.text_encoder.[!m]*",  # all of the text encoder but its mlp
        "models.text_encoder.m[!l]*",
    )
    block_class: ClassVar[type[nn.Module]]

    def __init__(self, config: FlexARConfig) -> None:
        super().__init__(config)
        self.num_tokens, self.codebook_size, self.grid = config.num_tokens, config.codebook_size, config.grid
        self.models = nn.ModuleDict({"ar_image_model": ImageModel(config, self.block_class)})

    @property
    def image_model(self) -> ImageModel:
        """The transformer over the tokens."""
        return self.models["ar_image_model"]

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """As for every generator; a published name warns of its licence and of what is assumed."""
        repo = str(source).removeprefix(hub.PREFIX)
        for entry in GENERATORS.entries().values():
            if entry.family == cls.family and repo in (entry.name, entry.repo):
                warnings.warn(f"{entry.name}: {entry.license}; {entry.notes}", stacklevel=2)
        return super().from_pretrained(source, **options)

    # What a family provides ---------------------------------------------------------------------------------

    def prepare(self, condition: Any, guided: bool) -> tuple[Tensor, Text | None]:
        """The first rows [B, 1, D] of images with a condition, and the text in all blocks.

        With `guided` they are 2 B, with the condition and without.
        """
        raise NotImplementedError

    def later_start(self, condition: Any, settings: Any) -> Tensor | None:
        """The first rows [2 B, 1, D] that guided passes after the first read in place of those that it
        read; None: the same."""
        return None

    # Network ------------------------------------------------------------------------------------------------

    def rows(self, first: Tensor, indices: Tensor) -> Tensor:
        """The first rows [B, 1, D] and those of tokens int64 [B, P] → [B, P + 1, D], without positions."""
        return torch.cat([first, self.image_model.preprocessor.embedding(indices)], 1)

    def logits(self, indices: Tensor, condition: Any) -> Tensor:
        """Logits of each next token, for training and parity.

        Args:
            indices: int64 [B, P], the first P (0..K-1) tokens of each image.
            condition: what `check_condition` returns.

        Returns:
            [B, P + 1, V]; row r predicts token r.

        Raises:
            ValueError: indices of another shape.
        """
        last = self.num_tokens - 1
        if indices.ndim != 2 or indices.shape[1] > last or len(indices) != len(condition):
            raise ValueError(
                f"token indices have shape {list(indices.shape)} for {len(condition)} conditions; "
                f"{self.label} takes [B, P] with up to {last} tokens for each of B conditions"
            )
        first, text = self.prepare(condition, False)
        return self.image_model(self.rows(first, indices), 0, text)

    # Sampling -----------------------------------------------------------------------------------------------

    def unguided(self, settings: Any) -> float:
        """1."""
        return 1.0

    def check_settings(self, values: Mapping[str, Any]) -> Any:
        """As for every generator; `num_tokens` is at least 1, and all of a grid."""
        settings = super().check_settings(values)
        least = self.num_tokens if self.grid is not None else 1
        if "num_tokens" in values and settings.sampled_tokens < least:
            raise ValueError(
                f"num_tokens is {settings.sampled_tokens}; {self.label} writes {least}..{self.num_tokens}"
            )
        return settings

    def check_tokenizer(self, tokenizer: Any) -> None:
        """As for every generator; a grid is not for a tokenizer of ordered tokens."""
        super().check_tokenizer(tokenizer)
        if self.grid is not None and tokenizer.ordered:
            raise ValueError(
                f"{self.label} writes a grid of {self.grid} tokens; {tokenizer.label} decodes ordered tokens"
            )

    def empty_codes(self, batch: int, count: int | None = None) -> Tensor:
        """Room for the codes of a batch, int64 [B, K], by default for all tokens."""
        count = count or self.num_tokens
        return torch.zeros(batch, count, dtype=torch.int64, device=self.device)

    def guided_logits(self, condition: Any, settings: Any, codes: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The number and the guided logits [B, 1, V] of each token.

        The caller writes the token into `codes` int64 [B, K] before it asks for the next one; where they are
        there from the start, each follows them.
        """
        guided = settings.guidance != self.unguided(settings)
        x, text = self.prepare(condition, guided)
        config, model = self.config, self.image_model
        shape = (len(x), config.num_heads, codes.shape[1], config.embed_dim // config.num_heads)
        cache = KeyValueCache(config.num_blocks, shape, dtype=self.dtype, device=self.device)
        for place in range(codes.shape[1]):
            if place > 0:
                x = model.preprocessor.embedding(codes[:, place - 1 : place])
                x = torch.cat([x, x]) if guided else x
            logits = at_least_float32(model(x, place, text, cache))
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + (conditional - unconditional) * settings.guidance
            if place == 0 and guided and (start := self.later_start(condition, settings)) is not None:
                cache.length = 0
                model(start, 0, text, cache)
            yield place, logits

    @torch.no_grad()
    def write(self, condition: Any, settings: Any, noise: Noise) -> Tensor:
        """Write codes int64 [B, K], one by one."""
        codes = self.empty_codes(len(condition), settings.sampled_tokens)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for place, logits in self.guided_logits(condition, settings, codes):
            finite = finite & logits.isfinite().all()
            codes[:, place : place + 1] = choose(logits, settings, noise)
        self.check_finite(finite)
        return codes


@GENERATORS.family("flextok-ar-class")
class FlexARClass(FlexARGenerator, ClassGenerator):
    """FlexTok's generator of a class, which is added to the start of the sequence."""

    config_class = FlexARClassConfig
    settings: ClassVar[Mapping[str, str]] = {
        **FlexARGenerator.settings,
        "reference_compat": "reference_compat",
    }
    block_class = ClassBlock

    def __init__(self, config: FlexARClassConfig) -> None:
        super().__init__(config)
        self.num_classes = config.num_classes
        table = nn.Embedding(config.num_classes, config.embed_dim)
        self.image_model.preprocessor.cls_embedding = table
        self.apply(initialise)

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by its table of classes; sizes are those of the weights, heads those of the
        configuration."""
        table = shapes.get(f"{_MODEL}preprocessor.cls_embedding.weight")
        if table is None:
            return None
        return {**_sizes(shapes, "attn", config, cls.family), "num_classes": table[0]}

    def start(self, classes: Tensor) -> Tensor:
        """Classes int64 [B], `num_classes` for none → first rows [B, 1, D]."""
        model = self.image_model.preprocessor
        added = model.cls_embedding(classes.clamp(max=self.num_classes - 1))
        added = torch.where((classes < self.num_classes)[:, None], added, torch.zeros_like(added))
        return model.sos_token_embed + added[:, None]

    def prepare(self, condition: Tensor, guided: bool) -> tuple[Tensor, None]:
        """The starts of classes int64 [B], and with guidance of no class."""
        if guided:
            condition = torch.cat([condition, torch.full_like(condition, self.num_classes)])
        return self.start(condition), None

    def later_start(self, condition: Tensor, settings: FlexARClassConfig) -> Tensor | None:
        """With `reference_compat` the starts of the classes and of class 0."""
        if not settings.reference_compat:
            return None
        # Parity: the original writes 0 over its mark for no class during the first pass.
        return self.start(torch.cat([condition, torch.zeros_like(condition)]))


@dataclass(frozen=True)
class TextCondition:
    """Text features of B images, and for guidance those of the empty text: of one row for all, or of B."""

    text: TextFeatures
    unconditional: TextFeatures | None = None

    def __len__(self) -> int:
        """Images."""
        return len(self.text.states)


@GENERATORS.family("flextok-ar-text")
class FlexARText(FlexARGenerator):
    """FlexTok's generator of a text, which every block attends to.

    The condition is a `TextCondition`; `TextFeatures` alone, for guidance 1; or captions, after
    `attach_text_encoder`. The text encoder is never in the checkpoint.
    """

    config_class = FlexARTextConfig
    conditions = ("text",)
    block_class = TextBlock

    def __init__(self, config: FlexARTextConfig) -> None:
        super().__init__(config)
        mlp = nn.Module()
        mlp.fc1 = nn.Linear(config.text_dim, config.text_dim, config.text_bias)
        mlp.fc2 = nn.Linear(config.text_dim, config.embed_dim, config.text_bias)
        self.models["text_encoder"] = nn.ModuleDict({"mlp": mlp})
        self._text_encoders: list[Callable[[Sequence[str]], TextFeatures]] = []  # a list is not a submodule
        self.apply(initialise)

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by its attention to text; sizes are those of the weights, heads those of the
        configuration."""
        if f"{_MODEL}trunk.blocks.0.cross_attn.Wq.weight" not in shapes or f"{_MLP}fc1.weight" not in shapes:
            return None
        fields = _sizes(shapes, "self_attn", config, cls.family)
        return {
            **fields,
            "text_dim": shapes[f"{_MLP}fc1.weight"][1],
            "text_bias": f"{_MLP}fc1.bias" in shapes,
        }

    # Text ---------------------------------------------------------------------------------------------------

    def attach_text_encoder(self, encoder: Callable[[Sequence[str]], TextFeatures]) -> None:
        """Attach what turns captions into features, such as a `T5TextEncoder` of flan-t5-xl."""
        self._text_encoders[:] = [encoder]

    def check_condition(self, condition: Any) -> TextCondition:
        """The condition with features of this model's device and dtype.

        Raises ValueError for captions without a text encoder, features of another width, masks that do not
        fit them, and texts without a token.
        """
        if isinstance(condition, str):
            condition = [condition]
        if isinstance(condition, list | tuple) and not isinstance(condition, TextFeatures):
            if not all(isinstance(caption, str) for caption in condition):
                raise ValueError(
                    f"the condition is {configuration.shorten(condition)}; {self.label} takes a "
                    "TextCondition, TextFeatures or captions"
                )
            if not self._text_encoders:
                raise ValueError(f"{self.label} has no text encoder for captions; call attach_text_encoder")
            condition = TextCondition(*map(self._text_encoders[0], (condition, [""])))
        if isinstance(condition, TextFeatures):
            condition = TextCondition(condition)
        if not isinstance(condition, TextCondition):
            raise ValueError(
                f"the condition is a {type(condition).__name__}; {self.label} takes a TextCondition, "
                "TextFeatures or captions"
            )
        text = self._checked(condition.text, "text")
        if condition.unconditional is None:
            return TextCondition(text)
        unconditional = self._checked(condition.unconditional, "unconditional text")
        if len(unconditional.states) not in (1, len(text.states)):
            raise ValueError(
                f"the unconditional text has {len(unconditional.states)} rows for {len(text.states)} images; "
                "give 1, or one per image"
            )
        return TextCondition(text, unconditional)

    def _checked(self, features: TextFeatures, name: str) -> TextFeatures:
        """Features on this model's device, zero at padded places; ValueError for other shapes and masks."""
        states, mask = features
        width = self.config.text_dim
        fits = states.ndim == 3 and states.shape[2] == width and states.is_floating_point()
        if not fits or mask.shape != states.shape[:2]:
            raise ValueError(
                f"the {name} has states {list(states.shape)} ({states.dtype}) and a mask "
                f"{list(mask.shape)}; {self.label} takes states [B, T, {width}] and a mask [B, T]"
            )
        if mask.is_floating_point() or bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError(f"the mask of the {name} has {mask.dtype}; it is bool, or whole numbers 0 and 1")
        mask = mask.to(self.device, torch.bool)
        if not bool(mask.any(1).all()):
            raise ValueError(
                f"the mask of the {name} leaves an image without a token; the empty text has one, its end"
            )
        # What stands at padded places must not matter, be it infinite.
        states = states.to(self.device, self.dtype).masked_fill(~mask[..., None], 0)
        return TextFeatures(states, mask)

    def project(self, states: Tensor) -> Tensor:
        """States [B, T, text_dim] → what the blocks attend to, [B, T, D]."""
        mlp = self.models["text_encoder"]["mlp"]
        return apply_linear(mlp.fc2, F.gelu(apply_linear(mlp.fc1, states), approximate="tanh"))

    def prepare(self, condition: TextCondition, guided: bool) -> tuple[Tensor, Text]:
        """The start of every image, and its text, with guidance also the empty one."""
        text = condition.text
        if guided:
            both = _padded(text, self._unconditional(condition))
            text = TextFeatures(*map(torch.cat, zip(*both, strict=True)))
        states = self.project(text.states)
        blocks = self.image_model.trunk.blocks
        keys_and_values = [block.cross_attn.keys_and_values(states) for block in blocks]
        start = self.image_model.preprocessor.sos_token_embed.expand(len(states), -1, -1)
        return start, (keys_and_values, text.mask[:, None, None])

    def _unconditional(self, condition: TextCondition) -> TextFeatures:
        """The features of no text, one row per image; ValueError where there are none."""
        if condition.unconditional is None:
            raise ValueError(
                f"guidance of {self.label} compares with the empty text, whose features are not given; give "
                "TextCondition(text, unconditional), or guidance=1"
            )
        batch = len(condition)
        return TextFeatures(*(each.expand(batch, *each.shape[1:]) for each in condition.unconditional))

    # Training -----------------------------------------------------------------------------------------------

    def drop_texts(self, condition: TextCondition, generator: torch.Generator | None = None) -> TextCondition:
        """Replace a random `text_dropout` of the texts by the unconditional one, for training with guidance.

        The generator is on the features' device. Raises ValueError without an unconditional text.
        """
        text, empty = _padded(condition.text, self._unconditional(condition))
        uniform = torch.rand(len(condition), generator=generator, device=text.mask.device)
        drop = (uniform < self.config.text_dropout)[:, None]
        states = torch.where(drop[..., None], empty.states, text.states)
        return TextCondition(
            TextFeatures(states, torch.where(drop, empty.mask, text.mask)), condition.unconditional
        )


def _padded(*features: TextFeatures) -> list[TextFeatures]:
    """The features with as many places as the longest of them."""
    longest = max(each.mask.shape[1] for each in features)
    spaces = [longest - each.mask.shape[1] for each in features]
    return [
        TextFeatures(F.pad(states, (0, 0, 0, space)), F.pad(mask, (0, space)))
        for (states, mask), space in zip(features, spaces, strict=True)
    ]


def _sizes(
    shapes: Mapping[str, torch.Size], attention: str, config: Mapping[str, Any] | None, family: str
) -> dict[str, Any]:
    """The fields that keys and shapes show, with those of a configuration.

    Raises ValueError where neither shows the heads.
    """
    block = f"{_MODEL}trunk.blocks.0."
    codes, dim = shapes[f"{_MODEL}preprocessor.embedding.weight"]
    prefix = f"{_MODEL}trunk.blocks."
    numbers = {key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)}
    norm = shapes.get(f"{block}{attention}.q_norm.weight")
    fields = {
        "embed_dim": dim,
        "num_blocks": len(numbers),
        "codebook_size": codes,
        "num_tokens": shapes[f"{_MODEL}preprocessor.positional_embedding"][0],
        # A stored table reads the same whether it was learned or computed.
        "pos_embed": "absolute",
        "qk_norm": norm is not None,
        "post_trunk_norm": f"{_MODEL}trunk.post_trunk_norm.weight" in shapes,
        "qkv_bias": f"{block}{attention}.qkv.bias" in shapes,
        "use_bias": f"{block}mlp.fc1.bias" in shapes,
        "head_bias": f"{_MODEL}head.linear.bias" in shapes,
        "swiglu_hidden": shapes[f"{block}mlp.fc1.weight"][0],
        **({"num_heads": dim // norm[0]} if norm else {}),
        **(config or {}),
    }
    if "num_heads" not in fields:
        raise ValueError(
            f"these are weights of the family {family!r}, whose heads the keys do not show; give "
            "config={'num_heads': …}"
        )
    return fields


# Published names --------------------------------------------------------------------------------------------


def _rows() -> list[Entry]:
    text, classes = "flextok-ar-text", "flextok-ar-class"
    no_gfid = "trained on texts, no gFID stated"
    figure = "the paper's class model of 1.33 B has gFID 1.86 with flextok-d18-d28-in1k at 32 tokens"
    grid = f"{no_gfid}; its tokenizer of a grid is not in this version, and decodes with guidance 5"
    dfn, in1k = "flextok-d18-d28-dfn", "flextok-d18-d28-in1k"
    table = [  # name, repository, family, blocks, M parameters, tokenizer, notes
        ("flexar-113m-t2i", "FlexAR-113M-T2I", text, 12, 217.6, dfn, no_gfid),
        ("flexar-382m-t2i", "FlexAR-382M-T2I", text, 18, 536.6, dfn, no_gfid),
        ("flexar-1b-t2i", "FlexAR-1B-T2I", text, 26, 1395.3, dfn, no_gfid),
        ("flexar-3b-t2i", "FlexAR-3B-T2I", text, 36, 3362.6, dfn, no_gfid),
        ("flexar-1b-c2i", "FlexAR-1B-C2I", classes, 26, 1101.3, in1k, figure),
        ("gridar-3b-t2i", "GridAR-3B-T2I", text, 36, 3362.6, None, grid),
    ]
    return [
        Entry(
            name=name,
            family=family,
            config={
                "tokenizer": tokenizer,
                "embed_dim": 64 * blocks,
                "num_blocks": blocks,
                "num_heads": blocks,
                "codebook_size": 64_000,
                "num_tokens": 256,
                **({} if tokenizer else {"grid": (16, 16)}),
                "pos_embed": "absolute",
                "qk_norm": False,
                "post_trunk_norm": True,
                "temperature": 1.0,
                "guidance": 3.0 if family == text else 1.5,
            },
            repo=f"EPFL-VILAB/{repo}",
            license=f"{LICENSE}; see the repository",
            paper="FlexTok (arXiv 2502.13967)",
            parameters=parameters,
            notes=f"{notes}; heads, norms, biases and tokenizer are not public: they are assumed here, and "
            "load(name, config={'num_heads': …}) reads all but the heads from the weights",
        )
        for name, repo, family, blocks, parameters, tokenizer, notes in table
    ]


GENERATORS.register(*_rows())
