"""LLaMA transformers that write the tokens of an image from a class, one or several tokens per step.

The blocks follow "LLaMA: Open and Efficient Foundation Language Models" (Touvron et al., 2023, arXiv
2302.13971) as "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (Sun et al., 2024,
arXiv 2406.06525) has them for images: a class in place of the prompt, and rotary positions of two axes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.ranges import require_between, require_depths, require_sizes
from .cache import KeyValueCache
from .classes import ClassGenerator
from .layers import apply_linear, at_least_float32
from .noise import Noise
from .published import require_settings


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of the transformer under the originals' names, and the name of the tokenizer.

    `temperature`, `cfg_scale`, `top_k` and `top_p` are settings of `sample`. Raises ValueError for values out
    of range.
    """

    tokenizer: str | None = None
    dim: int
    n_layer: int
    n_head: int
    block_size: int
    """Tokens per image."""
    num_classes: int = 1000
    multiple_of: int = 256
    """The hidden width of the MLP, 8/3 of `dim`, is rounded up to a multiple of this."""
    norm_eps: float = 1e-5
    rope_base: float = 10_000
    token_dropout_p: float = 0.1
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    class_dropout_prob: float = 0.1
    temperature: float | None = None
    cfg_scale: float | None = None
    top_k: int = 0
    """Codes that are drawn from, the likeliest and those equal to the last of them; 0: all."""
    top_p: float = 1.0
    """Codes are drawn from the likeliest that together reach this probability."""

    def __post_init__(self) -> None:
        require_sizes(self, "dim", "n_head", "block_size", "num_classes", "multiple_of")
        require_depths(self, "n_layer")
        require_between(self, ["norm_eps"], 0, 1)
        require_between(self, ["rope_base"], 1, 1e9)
        names = ["token_dropout_p", "resid_dropout_p", "ffn_dropout_p", "class_dropout_prob"]
        require_between(self, names, 0, 1)
        require_settings(self, "temperature", "cfg_scale")
        require_between(self, ["top_k"], 0, 2**24)
        require_between(self, ["top_p"], 1e-6, 1)
        if self.dim % (4 * self.n_head):
            raise ValueError(
                f"dim is {self.dim} and n_head {self.n_head}; dim is a multiple of 4 · n_head, for rotations "
                "of pairs along two axes"
            )

    @property
    def class_label_dropout(self) -> float:
        """The share of classes that training drops."""
        return self.class_dropout_prob

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return -(-(8 * self.dim // 3) // self.multiple_of) * self.multiple_of


class Attention(nn.Module):
    """Attention with rotary positions; keys `wqkv` and `wo`, without biases."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads = config.n_head
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, layer: int, cache: KeyValueCache | None
    ) -> Tensor:
        """The new rows [B, R, D] to themselves and those in the cache, where `mask` allows it (None: to
        all)."""
        query, key, value = apply_linear(self.wqkv, x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))  # [B, h, R, d]
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return apply_linear(self.wo, out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """w2(silu(w1 x) · w3 x), without biases."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, R, D] → [B, R, D]."""
        return apply_linear(self.w2, F.silu(apply_linear(self.w1, x)) * apply_linear(self.w3, x))


class Block(nn.Module):
    """Pre-norm block; keys attention_norm, attention, ffn_norm, feed_forward."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.resid_dropout, self.ffn_dropout = config.resid_dropout_p, config.ffn_dropout_p

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        mask: Tensor | None = None,
        layer: int = 0,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """New rows [B, R, D] with the rotations [R, d/2, 2] of their positions → [B, R, D]."""
        change = self.attention(self.attention_norm(x), rotation, mask, layer, cache)
        x = x + F.dropout(change, self.resid_dropout, self.training)
        change = self.feed_forward(self.ffn_norm(x))
        return x + F.dropout(change, self.ffn_dropout, self.training)


def rotation_table(places: int, width: int, head_dim: int, base: float) -> Tensor:
    """The rotations of a class and `places` tokens, float64 [1 + places, head_dim / 2, 2] of (cos, sin).

    Token k turns the first half of the pairs by k // width and the second half by k mod width; the row of
    the class is zero.
    """
    # Parity: a row of zeros does not rotate, it removes the query and key of the class.
    axis = head_dim // 4
    frequencies = base ** (-torch.arange(axis, dtype=torch.float64) / axis)
    index = torch.arange(places)
    angles = torch.cat([(index // width)[:, None] * frequencies, (index % width)[:, None] * frequencies], 1)
    return F.pad(torch.stack([angles.cos(), angles.sin()], -1), (0, 0, 0, 0, 1, 0))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the neighbouring pairs of the last axis of x [B, h, R, d] by (cos, sin) [R, d/2, 2]."""
    first, second = at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotation.unbind(-1)
    turned = torch.stack([first * cosine - second * sine, second * cosine + first * sine], -1)
    return turned.flatten(-2).to(x.dtype)


class LlamaGenerator(ClassGenerator):
    """A transformer whose row r of the sequence predicts token r of the image.

    Row 0 is the class. A step of sampling appends the rows of its tokens, which attend to one another and to
    all earlier ones, so that keys and values once computed stay as they are.
    """

    settings: ClassVar[Mapping[str, str]] = {
        "temperature": "temperature",
        "guidance": "cfg_scale",
        "top_k": "top_k",
        "top_p": "top_p",
    }

    rotation_width: int
    """Tokens per row of the grid of rotary positions."""
    output: nn.Module
    """The heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.num_tokens, self.num_classes = config.block_size, config.num_classes
        table = nn.Embedding(config.num_classes + 1, config.dim)  # the last row is no class
        self.cls_embedding = nn.ModuleDict({"embedding_table": table})
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)

    # What a family provides ---------------------------------------------------------------------------------

    def step_sizes(self) -> Sequence[int]:
        """Tokens that each step of sampling writes."""
        raise NotImplementedError

    def next_rows(self, codes: Tensor, start: int, count: int) -> Tensor:
        """The embedded rows `start` to `start + count` [B, count, D] of a step after the first, from the
        codes before `start`."""
        raise NotImplementedError

    def heads(self, x: Tensor) -> Tensor:
        """Normalised rows [B, R, D] → logits [B, R, …, V] of their tokens."""
        raise NotImplementedError

    def guidance_at(self, start: int, settings: Any) -> float:
        """The guidance of the step whose first token is `start`."""
        raise NotImplementedError

    # Network ------------------------------------------------------------------------------------------------

    def start_weights(self) -> None:
        """Draw all weights from N(0, 0.02), except heads, which start at zero, and norms."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.output.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)

    def rotations(self) -> Tensor:
        """The rotations of all rows, [1 + K, d/2, 2], float32 or better."""
        config = self.config
        head_dim = config.dim // config.n_head
        table = rotation_table(config.block_size, self.rotation_width, head_dim, config.rope_base)
        return table.to(self.device, torch.promote_types(self.dtype, torch.float32))

    def attention_mask(self, rows: int | None = None) -> Tensor:
        """Which of the first `rows` rows (by default all) attend to which: bool [rows, rows], a row to those
        of its step and of earlier ones."""
        sizes = torch.tensor(self.step_sizes())
        steps = torch.arange(len(sizes)).repeat_interleave(sizes)[:rows].to(self.device)
        return steps[:, None] >= steps

    def class_row(self, classes: Tensor) -> Tensor:
        """Classes int64 [B] → their rows [B, 1, D]."""
        return self.cls_embedding["embedding_table"](classes)[:, None]

    def read(self, x: Tensor) -> Tensor:
        """Logits [B, R, …, V] of a whole sequence of rows [B, R, D]."""
        x = F.dropout(x, self.config.token_dropout_p, self.training)
        rotation, mask = self.rotations()[: x.shape[1]], self.attention_mask(x.shape[1])
        for block in self.layers:
            x = block(x, rotation, mask)
        return self.heads(self.norm(x))

    # Sampling -----------------------------------------------------------------------------------------------

    def unguided(self, settings: Any) -> float:
        """1."""
        return 1.0

    def empty_codes(self, batch: int) -> Tensor:
        """Room for the codes of a batch, int64 [B, K, …]."""
        return torch.zeros(batch, self.num_tokens, dtype=torch.int64, device=self.device)

    def guided_logits(self, classes: Tensor, settings: Any, codes: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The first token and the guided logits [B, R, …, V] of each step of sampling.

        The caller writes the step's tokens into `codes` int64 [B, K, …] before it asks for the next step;
        where they are there from the start, each step follows them.
        """
        guided = settings.cfg_scale != self.unguided(settings)
        rows = torch.cat([classes, torch.full_like(classes, self.num_classes)]) if guided else classes
        config, rotations, start = self.config, self.rotations(), 0
        shape = (len(rows), config.n_head, self.num_tokens, config.dim // config.n_head)
        cache = KeyValueCache(config.n_layer, shape, dtype=self.dtype, device=self.device)
        for count in self.step_sizes():
            if start == 0:
                x = self.class_row(rows)
            else:
                x = self.next_rows(codes, start, count)
                x = torch.cat([x, x]) if guided else x
            for layer, block in enumerate(self.layers):
                x = block(x, rotations[start : start + count], None, layer, cache)
            logits = at_least_float32(self.heads(self.norm(x)))
            if guided:
                conditional, unconditional = logits.chunk(2)
                scale = self.guidance_at(start, settings)
                logits = unconditional + (conditional - unconditional) * scale
            yield start, logits
            start += count

    @torch.no_grad()
    def write(self, classes: Tensor, settings: Any, noise: Noise) -> Tensor:
        """Write codes int64 [B, K, …] for classes int64 [B], step by step."""
        codes = self.empty_codes(len(classes))
        finite = torch.ones((), dtype=torch.bool, device=classes.device)
        for start, logits in self.guided_logits(classes, settings, codes):
            finite = finite & logits.isfinite().all()
            codes[:, start : start + logits.shape[1]] = choose(logits, settings, noise)
        self.check_finite(finite)
        return codes


def choose(logits: Tensor, settings: Any, noise: Noise) -> Tensor:
    """Draw codes int64 [B, …] from logits [B, …, V]; the likeliest at temperature 0."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    logits = restrict(logits / settings.temperature, settings.top_k, settings.top_p)
    return (logits + noise.gumbel(*logits.shape[1:])).argmax(-1)


def restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [..., V] with -inf for all but the `top_k` largest and those equal to the last of them (0: all),
    and for all but the likeliest of these that together reach probability `top_p`."""
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits


def with_preset(
    values: Mapping[str, Any],
    presets: Mapping[str, tuple[int, ...]],
    fields: Sequence[str] = ("dim", "n_layer", "n_head"),
) -> dict[str, Any]:
    """The fields of a configuration in which a `preset` such as "GPT-L" stands for `fields`.

    Raises ValueError for an unknown preset.
    """
    values = dict(values)
    if "preset" not in values:
        return values
    name = values.pop("preset")
    if not isinstance(name, str) or name not in presets:
        raise ValueError(f"preset is {name!r}; it takes {', '.join(presets)}")
    return {**dict(zip(fields, presets[name], strict=True)), **values}


def stated_config(family: str, is_own: bool, config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The configuration that comes with weights of a family; None for weights of another.

    Raises ValueError for weights without one: keys show neither heads nor the number of tokens.
    """
    if not is_own:
        return None
    if not config or "block_size" not in config:
        raise ValueError(
            f"these are weights of the family {family!r}, whose heads and number of tokens the keys do not "
            f"show; give config={{'family': {family!r}, 'config': {{…}}}}, or load them by a published name "
            "with weights="
        )
    return dict(config)
