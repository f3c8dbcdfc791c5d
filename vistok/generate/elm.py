"""ELM's language model: the bits of an image's tokens, in one or several sub-codes per token.

"ELM: Elucidating the design space of language models for image generation" (Liu et al., 2024, arXiv
2410.16257). It writes the bits of `vistok.models.elm`; no weights of it are published.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..configuration import build
from ..models.ranges import require_between
from ..quantizers.binary import bits_to_integers, integers_to_bits
from ..tokens import Tokens
from .layers import apply_linear
from .llama import LlamaConfig, LlamaGenerator, stated_config, with_preset
from .registry import GENERATORS

PRESETS = {"L": (1024, 24, 16), "XL": (1280, 36, 20), "XXL": (1536, 48, 24), "2B": (1792, 48, 28)}
"""Names of the paper's sizes → dim, n_layer, n_head."""
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda step, steps: 1.0,
    "linear": lambda step, steps: (step + 1) / steps,
    "cos": lambda step, steps: math.cos(math.pi / 2 * ((step + 1) / steps - 1)),
    "log": lambda step, steps: math.log1p((step + 1) / steps * (math.e - 1)),
    "square": lambda step, steps: ((step + 1) / steps) ** 2,
    # Parity: this one counts steps from 0.
    "square_root": lambda step, steps: math.sqrt(step / steps),
}
"""Names of schedules → the share (0..1) of the guidance's rise from 1 that a step of all steps has."""


@dataclass(frozen=True, kw_only=True)
class ELMLanguageModelConfig(LlamaConfig):
    """The original's configuration under its own names.

    A token of n = token_each · code_dim bits is written in `token_each` sub-codes. Raises ValueError for
    values out of range.
    """

    token_each: int
    """Sub-codes per token."""
    code_dim: int
    """Bits per sub-code."""
    cfg_schedule: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_between(self, ["token_each"], 1, 64)
        require_between(self, ["code_dim"], 1, 24)
        if isqrt(self.block_size) ** 2 != self.block_size:
            raise ValueError(f"block_size is {self.block_size}; tokens fill a square grid, such as 256")
        if self.cfg_schedule is not None and self.cfg_schedule not in SCHEDULES:
            raise ValueError(f"cfg_schedule is {self.cfg_schedule!r}; it takes {', '.join(SCHEDULES)}")


@GENERATORS.family("elm-lm")
class ELMLanguageModel(LlamaGenerator):
    """ELM over a grid of tokens, row by row.

    A row of the transformer is the class or a token; one head per sub-code predicts the next token, each
    independently of the others.
    """

    config_class = ELMLanguageModelConfig
    settings: ClassVar[Mapping[str, str]] = {**LlamaGenerator.settings, "schedule": "cfg_schedule"}

    def __init__(self, config: ELMLanguageModelConfig) -> None:
        super().__init__(config)
        self.codebook_size, side = 2**config.code_dim, isqrt(config.block_size)
        self.grid, self.rotation_width = (side, side), side
        parts = range(config.token_each)
        tables = [nn.Embedding(self.codebook_size, config.dim) for _ in parts]
        outputs = [nn.Linear(config.dim, self.codebook_size, bias=False) for _ in parts]
        if config.token_each == 1:
            self.tok_embedder, self.output = tables[0], outputs[0]
        else:
            self.tok_embedder, self.output = nn.ModuleList(tables), nn.ModuleList(outputs)
            self.proj = nn.Linear(config.token_each * config.dim, config.dim, bias=False)
        self.start_weights()

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> ELMLanguageModelConfig:
        """Read field names, with a `preset` in place of the transformer's sizes."""
        return build(ELMLanguageModelConfig, with_preset(values, PRESETS), cls.family)

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by its tables of sub-codes; heads and tokens are those of the configuration beside
        it."""
        tables = {"tok_embedder.weight", "tok_embedder.0.weight"}
        is_own = bool(tables & shapes.keys()) and "layers.0.attention.wqkv.weight" in shapes
        return stated_config(cls.family, is_own, config)

    def logits(self, indices: Tensor, classes: Tensor) -> Tensor:
        """Logits of each next token's sub-codes, for training and parity.

        Args:
            indices: sub-codes int64 [B, P, t] of the first P (0..K-1) tokens of each image.
            classes: int64 [B], `num_classes` for no class.

        Returns:
            [B, P + 1, t, V]; row r predicts token r.

        Raises:
            ValueError: indices of another shape.
        """
        parts, last = self.config.token_each, self.num_tokens - 1
        fits = indices.ndim == 3 and indices.shape[1] <= last and indices.shape[2] == parts
        if not fits or len(indices) != len(classes):
            raise ValueError(
                f"sub-codes have shape {list(indices.shape)} for {len(classes)} classes; {self.label} takes "
                f"[B, P, {parts}] with up to {last} tokens for each of B classes"
            )
        return self.read(torch.cat([self.class_row(classes), self._embed(indices)], 1))

    def _embed(self, codes: Tensor) -> Tensor:
        """Sub-codes [B, P, t] → rows [B, P, D]."""
        if self.config.token_each == 1:
            return self.tok_embedder(codes[..., 0])
        parts = [table(part) for table, part in zip(self.tok_embedder, codes.unbind(-1), strict=True)]
        return apply_linear(self.proj, torch.cat(parts, -1))

    def step_sizes(self) -> list[int]:
        """One token per step."""
        return [1] * self.num_tokens

    def next_rows(self, codes: Tensor, start: int, count: int) -> Tensor:
        """The row of the latest token."""
        return self._embed(codes[:, start - 1 : start])

    def heads(self, x: Tensor) -> Tensor:
        """[B, R, D] → [B, R, t, V]."""
        outputs = [self.output] if self.config.token_each == 1 else self.output
        return torch.stack([apply_linear(output, x) for output in outputs], 2)

    def empty_codes(self, batch: int) -> Tensor:
        """Room for sub-codes, int64 [B, K, t]."""
        return super().empty_codes(batch)[..., None].repeat(1, 1, self.config.token_each)

    def guidance_at(self, start: int, settings: ELMLanguageModelConfig) -> float:
        """The guidance of a step by `cfg_schedule`."""
        return 1 + (settings.cfg_scale - 1) * SCHEDULES[settings.cfg_schedule](start, self.num_tokens)

    # Bits ---------------------------------------------------------------------------------------------------

    def as_tokens(self, indices: Tensor) -> Tokens:
        """Wrap sub-codes int64 [B, K, t] as bits with the tokenizer's name and the grid."""
        bits = subcodes_to_bits(indices, self.config.code_dim)
        return Tokens(bits=bits, tokenizer=self.config.tokenizer, grid=self.grid)

    def subcodes(self, tokens: Tokens) -> Tensor:
        """The sub-codes int64 [B, K, t] of a tokenizer's bits, for training.

        Raises ValueError for tokens that are not bits, or have another number of them.
        """
        bits = self.config.token_each * self.config.code_dim
        if tokens.bits is None or tokens.bits.shape[2] != bits:
            raise ValueError(f"{self.label} reads tokens of {bits} bits; the tokens given are {tokens}")
        return bits_to_subcodes(tokens.bits, self.config.token_each)

    def check_codes(self, tokenizer: Any) -> None:
        """Raise ValueError unless a tokenizer's tokens have this number of bits."""
        bits, quantizer = self.config.token_each * self.config.code_dim, tokenizer.quantizer
        if quantizer.kind != "bits" or len(quantizer.rows) != bits:
            other = f"{len(quantizer.rows)} bits" if quantizer.kind == "bits" else quantizer.kind
            raise ValueError(
                f"{self.label} writes tokens of {bits} bits; those of {tokenizer.label} are {other}"
            )


def bits_to_subcodes(bits: Tensor, parts: int) -> Tensor:
    """Bits bool [..., n] → `parts` sub-codes int64 [..., parts] of consecutive bits, the first bit of each
    worth most.

    Raises ValueError where n is not a multiple of `parts`.
    """
    if bits.shape[-1] % parts:
        raise ValueError(f"{bits.shape[-1]} bits do not make {parts} sub-codes of one size")
    return bits_to_integers(bits.unflatten(-1, (parts, -1)).flip(-1))


def subcodes_to_bits(codes: Tensor, code_dim: int) -> Tensor:
    """Undo `bits_to_subcodes`: int64 [..., t] → bool [..., t · code_dim]."""
    return integers_to_bits(codes, code_dim).flip(-1).flatten(-2)
