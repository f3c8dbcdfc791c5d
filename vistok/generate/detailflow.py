"""DetailFlow's generator: the first tokens of an image one by one, then groups of tokens at once.

"DetailFlow: 1D Coarse-to-Fine Autoregressive Image Generation via Next-Detail Prediction" (Liu et al., 2025,
arXiv 2505.21473). It writes the tokens of `vistok.models.detailflow`, whose prefixes are coarse pictures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..configuration import build
from ..models.ranges import require_between, require_multiple, require_sizes
from ..registry import Entry
from .layers import apply_linear
from .llama import LlamaConfig, LlamaGenerator, stated_config, with_preset
from .registry import GENERATORS

PRESETS = {"GPT-L": (1024, 24, 16)}
"""Names of published sizes → dim, n_layer, n_head."""


@dataclass(frozen=True, kw_only=True)
class DetailFlowGPTConfig(LlamaConfig):
    """The original's configuration under its own names.

    `gradual_cfg` lowers the guidance of each later group. Raises ValueError for values out of range.
    """

    vocab_size: int
    group_size: int = 8
    causal_num: int | None = None
    """Tokens that are written one by one; None: `group_size`."""
    cls_token_num: int = 1
    gradual_cfg: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "vocab_size", "group_size")
        require_between(self, ["cls_token_num"], 1, 1)
        require_multiple(self, "block_size", "group_size")
        if self.causal_num is not None:
            require_between(self, ["causal_num"], 1, self.block_size)
            require_multiple(self, "causal_num", "group_size")

    @property
    def first(self) -> int:
        """Tokens that are written one by one."""
        return self.group_size if self.causal_num is None else self.causal_num


@GENERATORS.family("detailflow-gpt")
class DetailFlowGPT(LlamaGenerator):
    """DetailFlow's generator of one-dimensional tokens.

    With c tokens one by one and groups of g, rows of the transformer are the class, tokens 0..c-1, g-1
    learned rows, and the tokens from c on. Rows c..c+g-1 predict the first group, and from there each token
    the one g places later.
    """

    config_class = DetailFlowGPTConfig
    settings: ClassVar[Mapping[str, str]] = {**LlamaGenerator.settings, "gradual": "gradual_cfg"}

    def __init__(self, config: DetailFlowGPTConfig) -> None:
        super().__init__(config)
        # Parity: tokens turn by their group and their place in it, but a token's row is one after its place.
        self.codebook_size, self.rotation_width = config.vocab_size, config.group_size
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        special = nn.Embedding(config.group_size - 1, config.dim)
        self.spe_tok_embeddings = nn.ModuleDict({"special_embeddings": special})
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.start_weights()

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> DetailFlowGPTConfig:
        """Read field names, with a `preset` in place of the transformer's sizes."""
        return build(DetailFlowGPTConfig, with_preset(values, PRESETS), cls.family)

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by its learned rows; heads and tokens are those of the configuration beside it."""
        own = {"spe_tok_embeddings.special_embeddings.weight", "tok_embeddings.weight"}
        return stated_config(cls.family, own <= shapes.keys(), config)

    def logits(self, indices: Tensor, classes: Tensor) -> Tensor:
        """Logits of every token that a prefix of each image decides, for training and parity.

        Args:
            indices: int64 [B, P], the first P tokens of each image: up to c, or c and whole groups, but not
                the last group.
            classes: int64 [B], `num_classes` for no class.

        Returns:
            [B, R, V] with R = P + 1 below c tokens, else P + g; row r predicts token r.

        Raises:
            ValueError: indices of another shape.
        """
        config, count = self.config, indices.shape[-1]
        first, group = config.first, config.group_size
        last = config.block_size - (group if first < config.block_size else 1)
        whole = count <= first or (count - first) % group == 0
        if indices.ndim != 2 or count > last or not whole or len(indices) != len(classes):
            raise ValueError(
                f"token indices have shape {list(indices.shape)} for {len(classes)} classes; {self.label} "
                f"takes [B, P] for B classes, with up to {min(first, last)} tokens, or {first} and whole "
                f"groups of {group} up to {last}"
            )
        tokens = self.tok_embeddings(indices)
        rows = [self.class_row(classes), tokens[:, :first]]
        if count >= first:
            rows += [self._special(len(indices)), tokens[:, first:]]
        return self.read(torch.cat(rows, 1))

    def _special(self, batch: int) -> Tensor:
        """The learned rows [B, g-1, D]."""
        return self.spe_tok_embeddings["special_embeddings"].weight.expand(batch, -1, -1)

    def step_sizes(self) -> list[int]:
        """c single tokens, then groups."""
        first, group = self.config.first, self.config.group_size
        return [1] * first + [group] * ((self.num_tokens - first) // group)

    def next_rows(self, codes: Tensor, start: int, count: int) -> Tensor:
        """The rows of a step: the latest token, with the learned rows before the first group, or the latest
        group."""
        if start > self.config.first:
            return self.tok_embeddings(codes[:, start - count : start])
        latest = self.tok_embeddings(codes[:, start - 1 : start])
        if start < self.config.first:
            return latest
        return torch.cat([latest, self._special(len(codes))], 1)

    def heads(self, x: Tensor) -> Tensor:
        """[B, R, D] → [B, R, V]."""
        return apply_linear(self.output, x)

    def guidance_at(self, start: int, settings: DetailFlowGPTConfig) -> float:
        """The scale, which `gradual_cfg` lowers linearly from group to group."""
        if not settings.gradual_cfg or start < settings.first:
            return settings.cfg_scale
        groups = self.num_tokens // settings.group_size
        return settings.cfg_scale * (groups - start // settings.group_size + 1) / (groups + 1)


GENERATORS.register(
    *(
        Entry(
            name=f"detailflow-{letter}-gpt-l",
            family="detailflow-gpt",
            config={
                "tokenizer": f"detailflow-{letter}",
                "preset": "GPT-L",
                "vocab_size": 8192,
                "block_size": count,
                "temperature": 1.0,
                "cfg_scale": guidance,
                "top_k": 8192,
            },
            repo=f"ByteFlow-AI/DetailFlow-{letter}-GPT-L",
            file=f"checkpoints/{count}.pt",
            license="Apache-2.0",
            paper="DetailFlow (arXiv 2505.21473)",
            parameters=326.1,
            figures={"gFID": gfid},
            notes=f"guidance {guidance}, temperature 1, all codes; trained on ImageNet; the "
            "original's gFID varies by up to 0.3 between seeds",
            verified=verified,
        )
        for letter, count, gfid, guidance, verified in (
            ("16", 128, 2.96, 1.45, "logits 8.0e-6"),
            ("32", 256, 2.75, 1.5, ""),
            ("64", 512, 2.59, 1.32, ""),
        )
    )
)
