"""MaskGIT on TiTok's tokens: all tokens of an image are predicted at once and the likeliest kept, in few
steps.

"MaskGIT: Masked Generative Image Transformer" (Chang et al., 2022, arXiv 2202.04200) with the two networks
and the sampling of TiTok ("An Image is Worth 32 Tokens for Reconstruction and Generation", Yu et al., 2024,
arXiv 2406.07550): a BERT encoder, and a U-ViT.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration import build
from ..models.ranges import require_sizes
from ..registry import Entry
from .classes import ClassGenerator
from .guidance import power_cosine
from .layers import apply_linear, at_least_float32, initialise
from .noise import Noise
from .published import TransformerConfig, generator_fields, require_settings
from .registry import GENERATORS

BERT_EPS = 1e-12
NETWORKS = {"maskgit": "ViT", "maskgit-uvit": "UViT"}
"""Family → `model_type` in the original's configuration."""


@dataclass(frozen=True, kw_only=True)
class MaskGITConfig(TransformerConfig):
    """`model.generator` of the original's configuration under its own names, the codebook's size, and the
    name of the tokenizer.

    From `num_steps` on they are the settings of `sample`, which needs those that the configuration does not
    state. `softmax_temperature_annealing` divides logits by 0.5 + 0.8·(share of the steps still to come).
    """

    num_steps: int | None = None
    randomize_temperature: float | None = None
    guidance_scale: float | None = None
    guidance_decay: Literal["constant", "linear", "power-cosine"] | None = None
    guidance_scale_pow: float = 3.0
    softmax_temperature_annealing: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps is not None:
            require_sizes(self, "num_steps")
        require_settings(self, "randomize_temperature", "guidance_scale", "guidance_scale_pow")


class MaskGIT(ClassGenerator):
    """Token space, sampling and training masks of both networks.

    Input ids are 0..V-1 for codes, V for a masked token, V+1+c for class c and V+1001 for no class.
    """

    config_class = MaskGITConfig
    settings: ClassVar[Mapping[str, str]] = {
        "temperature": "randomize_temperature",
        "guidance": "guidance_scale",
        "steps": "num_steps",
        "guidance_decay": "guidance_decay",
        "guidance_power": "guidance_scale_pow",
        "annealing": "softmax_temperature_annealing",
    }

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__(config)
        self.codebook_size, self.num_tokens = config.codebook_size, config.image_seq_len
        self.num_classes = config.condition_num_classes

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> MaskGITConfig:
        """Read field names, or the original's nested configuration, whose other keys are ignored."""
        if "model" not in values:
            return build(MaskGITConfig, values, cls.family)
        fields = generator_fields(MaskGITConfig, values)
        network = values["model"]["generator"].get("model_type", NETWORKS[cls.family])
        if network != NETWORKS[cls.family]:
            family = next((name for name, kind in NETWORKS.items() if kind == network), None)
            raise ValueError(
                f"the configuration's model_type is {network!r}; {cls.family} is {NETWORKS[cls.family]!r}: "
                + (f"use the family {family!r}" if family else f"known are {', '.join(NETWORKS.values())}")
            )
        return build(MaskGITConfig, fields, "the configuration's generator")

    def network(self, ids: Tensor) -> Tensor:
        """Input ids [B, 1+N], the class first → logits [B, N, V]."""
        raise NotImplementedError

    def logits(self, indices: Tensor, classes: Tensor) -> Tensor:
        """Token indices int64 [B, N], V where masked, and classes int64 [B] → logits [B, N, V] of all
        tokens."""
        if indices.ndim != 2 or indices.shape[1] != self.num_tokens:
            raise ValueError(
                f"token indices have shape {list(indices.shape)}; {self.label} takes [B, {self.num_tokens}]"
            )
        return self.network(torch.cat([self.codebook_size + 1 + classes[:, None], indices], 1))

    # Sampling -----------------------------------------------------------------------------------------------

    def unguided(self, settings: MaskGITConfig) -> float:
        """1 with power-cosine guidance, which extrapolates from the unconditional logits and with less than 1
        moves towards them; else 0."""
        return 1.0 if settings.guidance_decay == "power-cosine" else 0.0

    def write(self, classes: Tensor, settings: MaskGITConfig, noise: Noise) -> Tensor:
        """Write token indices int64 [B, N] for classes int64 [B]."""
        *_, indices = self.states(classes, settings, noise)
        return indices

    @torch.no_grad()
    def states(self, classes: Tensor, settings: MaskGITConfig, noise: Noise) -> Iterator[Tensor]:
        """Yield the token indices [B, N] that enter each step, V where masked, and the result last."""
        indices = classes.new_full((len(classes), self.num_tokens), self.codebook_size)
        yield indices
        finite = torch.ones((), dtype=torch.bool, device=classes.device)
        for step in range(settings.num_steps):
            logits = self.guided_logits(step, indices, classes, settings)
            finite = finite & logits.isfinite().all()
            indices = self.next_state(step, indices, logits, settings, noise)
            if step == settings.num_steps - 1:
                self.check_finite(finite)
            yield indices

    def guided_logits(self, step: int, indices: Tensor, classes: Tensor, settings: MaskGITConfig) -> Tensor:
        """Logits [B, N, V], float32 or wider, of one step (counted from 0): conditional and unconditional
        ones combined."""
        from_unconditional = settings.guidance_decay == "power-cosine"
        scale = guidance_at(step, settings)
        if scale == 0 or (from_unconditional and scale == 1):
            logits = at_least_float32(self.logits(indices, classes))
        else:
            no_class = torch.full_like(classes, self.num_classes)
            both = self.logits(torch.cat([indices, indices]), torch.cat([classes, no_class]))
            conditional, unconditional = at_least_float32(both).chunk(2)
            # Parity: two of the schedules extrapolate from the conditional logits, the third does not.
            base = unconditional if from_unconditional else conditional
            logits = base + (conditional - unconditional) * scale
        if settings.softmax_temperature_annealing:
            logits = logits / (0.5 + 0.8 * (1 - (step + 1) / settings.num_steps))
        return logits

    def next_state(
        self, step: int, indices: Tensor, logits: Tensor, settings: MaskGITConfig, noise: Noise
    ) -> Tensor:
        """Choose codes for the masked tokens and mask the least confident of them again; all stay in
        the last step."""
        progress = (step + 1) / settings.num_steps
        temperature = settings.randomize_temperature * (1 - progress)
        noisy = logits
        if temperature > 0:
            noisy = logits + temperature * noise.gumbel(self.num_tokens, self.codebook_size)
        choice = noisy.argmax(-1)  # [B, N]
        masked = indices == self.codebook_size
        indices = torch.where(masked, choice, indices)
        if progress == 1:
            return indices
        # The confidence in a choice is its logit without noise; a token once kept stays.
        confidence = logits.gather(2, choice[..., None])[..., 0].masked_fill(~masked, math.inf)
        if temperature > 0:
            confidence = confidence + temperature * noise.gumbel(self.num_tokens)
        planned = math.floor(self.num_tokens * math.acos(progress) / (math.pi / 2))
        counts = (masked.sum(1) - 1).clamp(max=planned).clamp(min=1)  # [B], all equal but for ties
        cut = confidence.sort(1).values.gather(1, counts[:, None] - 1)
        return indices.masked_fill(confidence <= cut, self.codebook_size)

    # Training -----------------------------------------------------------------------------------------------

    def mask_tokens(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Mask random tokens for training: indices with V at the masked ones, and the mask, both [B, N].

        The share of an image is arccos(u) / (π/2) with u uniform, at least one token. The generator is on
        the indices' device.
        """
        batch, count = indices.shape
        uniform = torch.rand(batch, generator=generator, device=indices.device)
        share = (uniform.acos() / (math.pi / 2)).clamp(1e-6, 1)
        counts = (count * share).round().clamp(min=1)
        order = torch.rand(batch, count, generator=generator, device=indices.device).argsort(1).argsort(1)
        mask = order < counts[:, None]
        return indices.masked_fill(mask, self.codebook_size), mask


def guidance_at(step: int, settings: MaskGITConfig) -> float:
    """The guidance scale of a step, counted from 0."""
    scale, share = settings.guidance_scale, step / settings.num_steps
    if settings.guidance_decay == "constant":
        return scale
    if settings.guidance_decay == "linear":
        return scale * share
    return power_cosine(scale, settings.guidance_scale_pow, share)


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, dropout: float) -> Tensor:
    """Multi-head attention of all rows to all rows, [B, N, D] each."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


# BERT -------------------------------------------------------------------------------------------------------


class BertLayer(nn.Module):
    """Post-norm layer: `x = LN(x + attention(x))`, `x = LN(x + MLP(x))`, erf GELU; keys as in BERT."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        dim, hidden = config.hidden_size, config.intermediate_size
        self.heads, self.attn_drop = config.num_attention_heads, config.attn_drop
        project = {name: nn.Linear(dim, dim) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(project), "output": _residual(dim, dim)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(dim, hidden)})
        self.output = _residual(hidden, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        projected = (apply_linear(layer, x) for layer in self.attention["self"].values())
        attended = _attend(*projected, self.heads, self.attn_drop if self.training else 0.0)
        x = self._add(x, attended, self.attention["output"])
        return self._add(x, F.gelu(apply_linear(self.intermediate["dense"], x)), self.output)

    def _add(self, x: Tensor, change: Tensor, parts: nn.ModuleDict) -> Tensor:
        return parts["LayerNorm"](x + self.dropout(apply_linear(parts["dense"], change)))


def _residual(dim_in: int, dim: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(dim_in, dim), "LayerNorm": nn.LayerNorm(dim, eps=BERT_EPS)})


class Bert(nn.Module):
    """The encoder with its embeddings and output layer; input ids [B, 1+N] → logits [B, N, V]."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        dim, length = config.hidden_size, config.image_seq_len + 1
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(_rows_of(config), dim),
                "position_embeddings": nn.Embedding(length, dim),
                "token_type_embeddings": nn.Embedding(2, dim),
                "LayerNorm": nn.LayerNorm(dim, eps=BERT_EPS),
            }
        )
        layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.lm_head = nn.Linear(dim, config.codebook_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, 1+N] → [B, N, V]."""
        parts = self.embeddings
        places = parts["position_embeddings"].weight + parts["token_type_embeddings"].weight[0]
        x = self.dropout(parts["LayerNorm"](parts["word_embeddings"](ids) + places))
        for layer in self.encoder["layer"]:
            x = layer(x)
        return apply_linear(self.lm_head, x[:, 1:])


def _rows_of(config: MaskGITConfig) -> int:
    """Rows of the embedding: codes, the mask, classes, and no class."""
    return config.codebook_size + config.condition_num_classes + 2


@GENERATORS.family("maskgit")
class MaskGITBert(MaskGIT):
    """MaskGIT with a BERT encoder, for TiTok-L-32 and TiTok-B-64."""

    checkpoint_ignores = ("model.embeddings.position_ids",)

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__(config)
        self.model = Bert(config).apply(initialise)

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by BERT's keys; the heads are those of the config.json, which must come with it."""
        return _nested(cls, "model.embeddings.word_embeddings.weight" in shapes, config)

    def network(self, ids: Tensor) -> Tensor:
        """Input ids [B, 1+N], the class first → logits [B, N, V]."""
        return self.model(ids)


# U-ViT ------------------------------------------------------------------------------------------------------


class UViTBlock(nn.Module):
    """Pre-norm block; one of the second half first joins the output of its match in the first half."""

    def __init__(self, config: MaskGITConfig, skip: bool = False) -> None:
        super().__init__()
        dim, hidden = config.hidden_size, config.intermediate_size
        self.heads, self.attn_drop = config.num_attention_heads, config.attn_drop
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim, bias=False), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        if skip:
            self.skip_linear = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        if skip is not None:
            x = apply_linear(self.skip_linear, torch.cat([x, skip], -1))
        # Parity: attention runs in float32 whatever the weights' dtype.
        query, key, value = at_least_float32(apply_linear(self.attn["qkv"], self.norm1(x))).chunk(3, -1)
        attended = _attend(query, key, value, self.heads, self.attn_drop if self.training else 0.0)
        x = x + self.dropout(apply_linear(self.attn["proj"], attended.to(x.dtype)))
        hidden = F.gelu(apply_linear(self.mlp["fc1"], self.norm2(x)))
        return x + self.dropout(apply_linear(self.mlp["fc2"], hidden))


@GENERATORS.family("maskgit-uvit")
class MaskGITUViT(MaskGIT):
    """MaskGIT with a U-ViT, for TiTok-S-128: half of `num_hidden_layers` blocks, one, and the other half."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__(config)
        dim, half = config.hidden_size, config.num_hidden_layers // 2
        self.embeddings = nn.Embedding(_rows_of(config), dim)
        self.pos_embed = nn.Parameter(torch.empty(1, config.image_seq_len + 1, dim))
        self.in_blocks = nn.ModuleList(UViTBlock(config) for _ in range(half))
        self.mid_block = UViTBlock(config)
        self.out_blocks = nn.ModuleList(UViTBlock(config, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, config.codebook_size)
        self.apply(initialise)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by the U-ViT's keys; the heads are those of the config.json, which must come with it."""
        return _nested(cls, "mid_block.attn.qkv.weight" in shapes, config)

    def network(self, ids: Tensor) -> Tensor:
        """Input ids [B, 1+N], the class first → logits [B, N, V]."""
        x, skips = self.embeddings(ids) + self.pos_embed, []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return apply_linear(self.lm_head, self.norm(x[:, 1:]))


def _nested(cls: type[MaskGIT], is_own: bool, config: dict[str, Any] | None) -> dict[str, Any] | None:
    """The nested configuration of a checkpoint whose keys are those of the class; None for others."""
    if not is_own:
        return None
    if not config or "model" not in config:
        raise ValueError(
            f"these are weights of the family {cls.family!r}, whose heads and settings the keys do not show; "
            "load them by a published name with weights=, or give their config.json as config="
        )
    return config


# Published weights ------------------------------------------------------------------------------------------


def _rows() -> Iterator[Entry]:
    bert = {
        "codebook_size": 4096,
        "hidden_size": 768,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
    }
    uvit = bert | {"hidden_size": 1024, "num_hidden_layers": 20, "intermediate_size": 4096}
    table = [  # name, family, network, N, M parameters, gFID, steps, guidance, its schedule, temperature
        ("l32", "maskgit", bert, 32, 177.2, 2.77, 8, 4.5, "linear", 9.5),
        ("b64", "maskgit", bert, 64, 177.2, 2.48, 8, 3.0, "linear", 11.0),
        ("s128", "maskgit-uvit", uvit, 128, 295.0, 1.97, 64, 6.9, "power-cosine", 2.8),
    ]
    verified = {
        "l32": "sampled codes equal, logits 9.1e-6",
        "s128": "4 of 20 layers: sampled codes equal, logits 9.3e-6",
    }
    for size, family, network, tokens, parameters, gfid, steps, guidance, decay, temperature in table:
        yield Entry(
            name=f"maskgit-{size}",
            family=family,
            config={
                "tokenizer": f"titok-{size}",
                "image_seq_len": tokens,
                **network,
                "num_steps": steps,
                "guidance_scale": guidance,
                "guidance_decay": decay,
                "randomize_temperature": temperature,
            },
            repo=f"yucornetto/generator_titok_{size}_imagenet",
            license="Apache-2.0",
            paper="TiTok (arXiv 2406.07550)",
            parameters=parameters,
            figures={"gFID": gfid},
            notes="trained on ImageNet, described as research-only",
            verified=verified.get(size, ""),
        )


GENERATORS.register(*_rows())
