"""RAR: an image's tokens one after another, by a causal transformer trained on random orders.

"Randomized Autoregressive Visual Generation" (Yu et al., 2024, arXiv 2411.00776). Every row of the
sequence carries the position that it predicts (target-aware positions), so that training may take any order;
sampling goes row by row through the image.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration import build
from ..registry import Entry
from .cache import KeyValueCache
from .classes import ClassGenerator
from .guidance import power_cosine
from .layers import apply_linear, at_least_float32, initialise
from .noise import Noise
from .published import TransformerConfig, generator_fields, require_settings
from .registry import GENERATORS

EPS = 1e-6
MORE_POSITIONS, MORE_ROWS = 1024, 100  # of the published tables, beyond the tokens of an image
MODULATION_NUMBERS = 2**25  # modulations computed at once


@dataclass(frozen=True, kw_only=True)
class RARConfig(TransformerConfig):
    """`model.generator` of the original's configuration under its own names, the codebook's size, and the
    name of the tokenizer with the sides of its grid (None: one-dimensional tokens).

    The last three are the settings of `sample`, which needs those that the configuration does not state.
    Training takes random orders until step `randomness_anneal_start`, and ever fewer until
    `randomness_anneal_end`.
    """

    grid: tuple[int, int] | None = None
    randomness_anneal_start: int = 125_000
    randomness_anneal_end: int = 187_500
    randomize_temperature: float | None = None
    guidance_scale: float | None = None
    guidance_scale_pow: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_settings(self, "randomize_temperature", "guidance_scale", "guidance_scale_pow")
        if self.grid is not None and (
            min(self.grid) < 1 or self.grid[0] * self.grid[1] != self.image_seq_len
        ):
            raise ValueError(
                f"grid is {self.grid}; it has the {self.image_seq_len} places of image_seq_len, or is null"
            )
        if not 0 <= self.randomness_anneal_start <= self.randomness_anneal_end:
            raise ValueError(
                f"randomness_anneal_start is {self.randomness_anneal_start} and randomness_anneal_end "
                f"{self.randomness_anneal_end}; they are steps from 0, the first not after the second"
            )


class Attention(nn.Module):
    """Causal attention whose queries and keys are normalised per head."""

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        dim, self.heads, self.attn_drop = config.hidden_size, config.num_attention_heads, config.attn_drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // self.heads, eps=EPS)
        self.k_norm = nn.LayerNorm(dim // self.heads, eps=EPS)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layer: int, cache: KeyValueCache | None) -> Tensor:
        """The new rows [B, R, D] to themselves and those in the cache: several at its start, then one."""
        query, key, value = apply_linear(self.qkv, x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        dropout = self.attn_drop if self.training else 0.0
        causal = query.shape[2] > 1
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=causal)
        return apply_linear(self.proj, out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block with AdaLN: shift, scale and gate of attention, then of the MLP."""

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        dim, hidden = config.hidden_size, config.intermediate_size
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(config)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, modulation: Tensor, layer: int = 0, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Rows [B, R, D] and their modulation [B, R, 6·D] → [B, R, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        change = self.attn(_modulate(self.norm1(x), shift1, scale1), layer, cache)
        x = x + gate1 * self.dropout(change)
        hidden = self.dropout(F.gelu(apply_linear(self.mlp["fc1"], _modulate(self.norm2(x), shift2, scale2))))
        return x + gate2 * self.dropout(apply_linear(self.mlp["fc2"], hidden))


class FinalNorm(nn.Module):
    """LayerNorm without weights, then scale and shift from the condition."""

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_final = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Rows and their condition, both [B, R, D] → [B, R, D]."""
        # Parity: scale first, shift second, the other way round than in the blocks.
        scale, shift = self.adaLN_modulation(condition).chunk(2, -1)
        return _modulate(self.norm_final(x), shift, scale)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


@GENERATORS.family("rar")
class RAR(ClassGenerator):
    """RAR over a grid of tokens, such as the 256 of MaskGIT-VQGAN.

    Rows of the transformer: a start row, the class, and the tokens so far. Input ids are 0..V-1 for codes,
    V+1+c for class c and V+1001 for no class; row V is unused.
    """

    config_class = RARConfig
    settings: ClassVar[Mapping[str, str]] = {
        "temperature": "randomize_temperature",
        "guidance": "guidance_scale",
        "guidance_power": "guidance_scale_pow",
    }

    def __init__(self, config: RARConfig) -> None:
        super().__init__(config)
        self.codebook_size, self.num_tokens = config.codebook_size, config.image_seq_len
        self.num_classes, self.grid = config.condition_num_classes, config.grid
        dim, positions = config.hidden_size, config.image_seq_len + MORE_POSITIONS
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, positions, dim))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, positions, dim))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, config.image_seq_len + MORE_ROWS, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.embeddings = nn.Embedding(config.codebook_size + config.condition_num_classes + 2, dim)
        self.adaln_before_head = FinalNorm(config)
        self.lm_head = nn.Linear(dim, config.codebook_size)
        self.apply(initialise)
        for table in (self.cls_token, self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
            nn.init.trunc_normal_(table, std=0.02)
        for block in (*self.blocks, self.adaln_before_head):
            nn.init.zeros_(block.adaLN_modulation[1].weight)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RARConfig:
        """Read field names, or the original's nested configuration, whose other keys are ignored."""
        if "model" not in values:
            return build(RARConfig, values, cls.family)
        return build(RARConfig, generator_fields(RARConfig, values), "the configuration's generator")

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by the target-aware positions; shapes give sizes, only a config.json gives settings."""
        if not {"target_aware_pos_embed", "blocks.0.attn.q_norm.weight", "lm_head.weight"} <= shapes.keys():
            return None
        return config if config and "model" in config else _config_from_shapes(shapes)

    def logits(self, indices: Tensor, classes: Tensor, orders: Tensor | None = None) -> Tensor:
        """Logits of each next token, with every earlier one as it is.

        Args:
            indices: int64 [B, K], the first K (0..N) tokens of each image in its order.
            classes: int64 [B], `num_classes` for no class.
            orders: int64 [B, N], a permutation of the positions 0..N-1 per image; None goes row by row.

        Returns:
            [B, K+1, V]; row i predicts the i-th token of the order. With all N tokens the last row predicts
            nothing.

        Raises:
            ValueError: indices or orders of another shape.
        """
        rows = self._checked_rows(indices, classes, orders)
        x, condition = self._inputs(indices, classes, orders, rows)
        for block in self.blocks:
            x = block(x, block.adaLN_modulation(condition))
        return apply_linear(self.lm_head, self.adaln_before_head(x[:, 1:], condition[:, 1:]))

    def _checked_rows(self, indices: Tensor, classes: Tensor, orders: Tensor | None) -> int:
        """Rows of the sequence, start row and class included."""
        if indices.ndim != 2 or indices.shape[1] > self.num_tokens or len(indices) != len(classes):
            raise ValueError(
                f"token indices have shape {list(indices.shape)} for {len(classes)} classes; {self.label} "
                f"takes [B, K] with up to {self.num_tokens} tokens for each of B classes"
            )
        if orders is not None and orders.shape != (len(indices), self.num_tokens):
            raise ValueError(
                f"orders have shape {list(orders.shape)}; they are permutations of all "
                f"{self.num_tokens} positions, {[len(indices), self.num_tokens]}"
            )
        return indices.shape[1] + 2

    def _inputs(
        self, indices: Tensor, classes: Tensor, orders: Tensor | None, rows: int
    ) -> tuple[Tensor, Tensor]:
        """The embedded sequence and the condition of each row, both [B, rows, D]."""
        label = self.embeddings(self.codebook_size + 1 + classes)[:, None]
        x = torch.cat([self.cls_token.expand(len(indices), -1, -1), label, self.embeddings(indices)], 1)
        if orders is None:
            orders = torch.arange(self.num_tokens, device=indices.device)[None]
        own, target = self.pos_embed[0], self.target_aware_pos_embed[0]
        places = torch.cat([own[:2].expand(len(orders), -1, -1), own[2 + orders]], 1)  # [1 or B, 2+N, D]
        zeros = target.new_zeros(len(orders), 1, target.shape[1])
        targets = torch.cat([zeros, target[2 + orders], zeros], 1)
        return x + (places + targets)[:, :rows], label + self.timesteps_embeddings[:, :rows]

    # Sampling -----------------------------------------------------------------------------------------------

    def unguided(self, settings: RARConfig) -> float:
        """1. Parity: 0 gives the same, as in the original."""
        return 1.0

    @torch.no_grad()
    def write(
        self, classes: Tensor, settings: RARConfig, noise: Noise, forced: Tensor | None = None
    ) -> Tensor:
        """Write token indices int64 [B, N] for classes int64 [B], row by row through the image.

        With `forced` int64 [B, N] each token follows those of `forced`, not those written before it.
        """
        guided = settings.guidance_scale not in (0, 1)
        rows = torch.cat([classes, torch.full_like(classes, self.num_classes)]) if guided else classes
        decoder = _Decoder(self, rows)
        indices = classes.new_empty(len(classes), self.num_tokens)
        finite = torch.ones((), dtype=torch.bool, device=classes.device)
        for step in range(self.num_tokens):
            previous = None if step == 0 else (indices if forced is None else forced)[:, step - 1]
            if guided and previous is not None:
                previous = torch.cat([previous, previous])
            logits = at_least_float32(decoder.next_logits(previous))  # [B or 2·B, V]
            if guided:
                conditional, unconditional = logits.chunk(2)
                share = step / self.num_tokens
                scale = power_cosine(settings.guidance_scale, settings.guidance_scale_pow, share)
                logits = unconditional + (conditional - unconditional) * scale
            finite = finite & logits.isfinite().all()
            indices[:, step] = self.choose(logits, settings, noise)
        self.check_finite(finite)
        return indices

    def choose(self, logits: Tensor, settings: RARConfig, noise: Noise) -> Tensor:
        """Draw one code per image from logits [B, V]; the likeliest at temperature 0."""
        if settings.randomize_temperature > 0:
            logits = logits / settings.randomize_temperature + noise.gumbel(self.codebook_size)
        return logits.argmax(-1)

    # Training -----------------------------------------------------------------------------------------------

    def training_orders(self, batch: int, step: int, generator: torch.Generator | None = None) -> Tensor:
        """Orders int64 [B, N] for training: random ones, with the probability of that step, else row by row.

        The probability is 1 until `randomness_anneal_start` and falls linearly to 0 at
        `randomness_anneal_end`. Drawn on the CPU.
        """
        start, end = self.config.randomness_anneal_start, self.config.randomness_anneal_end
        probability = 1.0 if step < start else 0.0 if step >= end else (end - step) / (end - start)
        random = torch.rand(batch, self.num_tokens, generator=generator).argsort(1)
        is_random = torch.rand(batch, 1, generator=generator) < probability
        return torch.where(is_random, random, torch.arange(self.num_tokens))


class _Decoder:
    """Runs the transformer row after row for sampling, with keys and values kept.

    The modulation of a row (AdaLN) depends on class and row alone. It is computed for many rows at once, and
    once per class: a third of the weights are then read a few times per image, not once per token.
    """

    def __init__(self, model: RAR, classes: Tensor) -> None:
        self.model, self.row = model, 0
        self.classes, self.inverse = classes.unique(return_inverse=True)
        config = model.config
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (len(classes), config.num_attention_heads, config.image_seq_len + 1, head_dim)
        self.cache = KeyValueCache(len(model.blocks), shape, dtype=model.dtype, device=model.device)
        self.labels = model.embeddings(model.codebook_size + 1 + self.classes)[:, None]  # [U, 1, D]
        per_row = max(1, 6 * config.hidden_size * len(model.blocks) * len(self.classes))
        self.rows_at_once = max(2, MODULATION_NUMBERS // per_row)
        self.first, self.modulations, self.conditions = 0, [], self.labels[:, :0]

    def next_logits(self, tokens: Tensor | None) -> Tensor:
        """Append the newest tokens int64 [B], None at the start, and return the logits [B, V] of the next
        ones."""
        model, row = self.model, self.row
        if tokens is None:
            start = model.cls_token.expand(len(self.inverse), -1, -1)
            x = torch.cat([start, self.labels[self.inverse]], 1) + model.pos_embed[:, :2]
            x[:, 1] += model.target_aware_pos_embed[0, 2]
        else:
            x = model.embeddings(tokens)[:, None] + model.pos_embed[:, row : row + 1]
            x = x + model.target_aware_pos_embed[:, row + 1 : row + 2]
        rows = x.shape[1]
        self._prepare(row, row + rows)
        part = slice(row - self.first, row - self.first + rows)
        for layer, block in enumerate(model.blocks):
            x = block(x, self.modulations[layer][:, part][self.inverse], layer, self.cache)
        self.row += rows
        condition = self.conditions[:, part][self.inverse]
        return model.lm_head(model.adaln_before_head(x[:, -1:], condition[:, -1:]))[:, 0]

    def _prepare(self, row: int, end: int) -> None:
        """Compute the modulations of rows `row` to `end` and of many that follow, unless they are there."""
        if end <= self.first + self.conditions.shape[1]:
            return
        model = self.model
        stop = min(row + self.rows_at_once, model.num_tokens + 1)
        self.first = row
        self.conditions = self.labels + model.timesteps_embeddings[:, row:stop]  # [U, rows, D]
        self.modulations = [block.adaLN_modulation(self.conditions) for block in model.blocks]


def _config_from_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """The configuration that keys and shapes imply."""
    codes, dim = shapes["lm_head.weight"]
    depth = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks."))
    return {
        "codebook_size": codes,
        "image_seq_len": shapes["pos_embed"][1] - MORE_POSITIONS,
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "num_attention_heads": dim // shapes["blocks.0.attn.q_norm.weight"][0],
        "intermediate_size": shapes["blocks.0.mlp.fc1.weight"][0],
        "condition_num_classes": shapes["embeddings.weight"][0] - codes - 2,
    }


def _rows() -> Iterator[Entry]:
    table = [  # size, width, depth, MLP width, M parameters, gFID, temperature, guidance, power
        ("b", 768, 24, 3072, 261, 1.95, 1.0, 16.0, 2.75),
        ("l", 1024, 24, 4096, 462, 1.70, 1.02, 15.5, 2.5),
        ("xl", 1280, 32, 5120, 955, 1.50, 1.02, 6.9, 1.5),
        ("xxl", 1408, 40, 6144, 1499, 1.48, 1.02, 8.0, 1.2),
    ]
    verified = {"b": "sampled codes equal, logits 6.2e-6"}
    for size, width, depth, hidden, parameters, gfid, temperature, guidance, power in table:
        yield Entry(
            name=f"rar-{size}",
            family="rar",
            config={
                "tokenizer": "maskgit-vqgan",
                "grid": (16, 16),
                "codebook_size": 1024,
                "image_seq_len": 256,
                "hidden_size": width,
                "num_hidden_layers": depth,
                "num_attention_heads": 16,
                "intermediate_size": hidden,
                "randomize_temperature": temperature,
                "guidance_scale": guidance,
                "guidance_scale_pow": power,
            },
            repo="yucornetto/RAR",
            file=f"rar_{size}.bin",
            license="Apache-2.0",
            paper="RAR (arXiv 2411.00776)",
            parameters=parameters,
            figures={"gFID": gfid},
            notes="trained on ImageNet, described as research-only",
            verified=verified.get(size, ""),
        )


GENERATORS.register(*_rows())
