"""SEED-1 and SEED-2: 32 codes per image, in causal order, that carry what a picture shows.

"Planting a SEED of Vision in Large Language Model" (Ge et al., 2023, arXiv 2307.08041) and "Making LLaMA SEE
and Draw with SEED Tokenizer" (Ge et al., 2023, arXiv 2310.01218). A frozen ViT (EVA-CLIP-g) and a causal
Q-Former read the image, a plain codebook makes codes, and these decode to conditions of a diffusion model: 77
text states for Stable Diffusion (SEED-1), or a CLIP image embedding for unCLIP (SEED-2). Pictures show the
same content, without identity, colours or places: do not judge them by PSNR.

    tokenizer.attach_renderer("stabilityai/stable-diffusion-2-1-unclip")
    tokens = tokenizer.encode(tokenizer.preprocess(["cat.jpg"]))
    picture = tokenizer.decode(tokens)

Code j depends on queries 0 to j alone, so that a prefix is a shorter code for a language model; the decoders
need all 32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint
from ..files import atomic_write
from ..nn import qformer
from ..nn.qformer import QFormer
from ..nn.renderer import Kind
from ..nn.vit import ViTBlock
from ..quantizers import VectorQuantizer
from ..registry import Entry, register, register_family
from ..tokenizer import TrainingOutput
from .ranges import require_between, require_depths, require_multiple, require_sizes
from .rendered import RenderedTokenizer, head

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
REVERSE = {"seed1": (77, 4), "seed2": (1, 12)}  # queries and layers of the reverse Q-Former
CAUSAL_QUERIES = 32  # the number of queries at which the original is causal
DOWN = (256, 128)  # hidden widths of SEED-2's head
HEAD, VIT_HEAD = 64, 88  # width of each head of the Q-Former and of the ViT
VIT_PARTS, VIT_BLOCKS = ("cls_token", "pos_embed", "patch_embed.", "blocks."), 39
CODEBOOK_COST, LOSS_WEIGHTS = 0.25, {"codes": 5.0, "condition": 0.5, "reconstruction": 2.0}


@dataclass(frozen=True)
class SEEDConfig:
    """The original's sizes; `variant` decides what codes decode to.

    SEED-2 has an MLP head, or with `use_qformer_image` the reverse Q-Former that the paper draws.
    """

    variant: Literal["seed1", "seed2"] = "seed2"
    vit_depth: int = 39
    vit_width: int = 1408
    vit_heads: int = 16
    vit_mlp: int = 6144
    image_size: int = 224
    patch: int = 14
    num_query_token: int = 32
    codebook: int = 8192
    codebook_dim: int = 32
    qformer_width: int = 768
    qformer_layers: int = 12
    qformer_heads: int = 12
    causal: bool = True
    """Whether query j attends to queries 0 to j only."""
    decode_depth: int = 4
    use_qformer_image: bool = False
    image_features_dim: int = 1024
    reverse_tokens: int | None = None
    """Queries of the reverse Q-Former: the 77 text states of SEED-1, or the one embedding of SEED-2."""
    reverse_layers: int | None = None
    """Layers of the reverse Q-Former; by default 4 in SEED-1 and 12 in SEED-2."""
    text_features_dim: int = 768
    renderer_text_dim: int = 1024
    """Width of the text states of SEED-2's renderer, whose prompt is empty."""

    def __post_init__(self) -> None:
        require_sizes(self, "vit_width", "vit_heads", "vit_mlp", "image_size", "patch", "num_query_token")
        require_sizes(self, "codebook", "codebook_dim", "qformer_width", "qformer_heads")
        require_sizes(self, "image_features_dim", "text_features_dim", "renderer_text_dim")
        require_depths(self, "vit_depth", "qformer_layers", "decode_depth")
        require_between(self, ["image_size"], 1, 2**14)
        if self.reverse_tokens is not None:
            require_sizes(self, "reverse_tokens")
        if self.reverse_layers is not None:
            require_depths(self, "reverse_layers")
        if self.variant == "seed2" and self.reverse_tokens not in (None, 1):
            raise ValueError(f"reverse_tokens is {self.reverse_tokens}; SEED-2 has one embedding, so give 1")
        require_multiple(self, "vit_width", "vit_heads")
        require_multiple(self, "qformer_width", "qformer_heads")
        require_multiple(self, "image_size", "patch")
        if self.has_mlp_head:
            require_multiple(self, "image_features_dim", "num_query_token")

    @property
    def reverse(self) -> tuple[int, int]:
        """Queries and layers of the reverse Q-Former."""
        tokens, layers = REVERSE[self.variant]
        return self.reverse_tokens or tokens, self.reverse_layers or layers

    @property
    def has_mlp_head(self) -> bool:
        """Whether codes become an embedding through the MLP, not a reverse Q-Former."""
        return self.variant == "seed2" and not self.use_qformer_image


class WideNorm(nn.LayerNorm):
    """A layer norm that computes in float32 or better."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class VisualEncoder(nn.Module):
    """EVA-CLIP's ViT without its last block and norm: normalised images → a class token and patches."""

    def __init__(self, config: SEEDConfig) -> None:
        super().__init__()
        width = config.vit_width
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        cells = (config.image_size // config.patch) ** 2
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, cells + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, config.patch, config.patch)
        self.blocks = nn.ModuleList(
            ViTBlock(width, config.vit_heads, config.vit_mlp, key_bias=False) for _ in range(config.vit_depth)
        )

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W], normalised → [B, 1 + HW/p², D]."""
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x


@register_family("seed")
class SEED(RenderedTokenizer):
    """SEED-1 and SEED-2; see the module. `features` are what the codes are made from, [B, 32, 768]."""

    config_class = SEEDConfig
    has_features = True
    checkpoint_ignores = (
        *(f"{part}.{pattern}" for part in ("Qformer", "Reverse_Qformer") for pattern in
          (*qformer.TEXT_BRANCH, qformer.POSITIONS)),
        *("vision_proj.*", "text_proj.*", "itm_head.*", "temp"),
    )  # fmt: skip

    def __init__(self, config: SEEDConfig) -> None:
        super().__init__(config)
        self.image_size, self.num_tokens = config.image_size, config.num_query_token
        width, dim = config.qformer_width, config.codebook_dim
        self.visual_encoder = VisualEncoder(config)
        self.ln_vision = WideNorm(config.vit_width)
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, self.num_tokens, width))
        self.Qformer = QFormer(
            width, config.qformer_layers, config.qformer_heads, config.vit_width, causal=config.causal
        )
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dim))
        self.quantize = VectorQuantizer(config.codebook, dim, commitment_cost=1.0)
        self.decode_task_layer = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, width))
        if config.variant == "seed1":
            self.pos_embed_text, self.blocks_text = self._places(), self._blocks()
            self._add_reverse()
            self.distill_text_proj = nn.Linear(width, config.text_features_dim)
        else:
            # Used in training alone, to rebuild what was quantized.
            self.pos_embed, self.blocks = self._places(), self._blocks()
            self.pos_embed_image, self.blocks_image = self._places(), self._blocks()
            if config.use_qformer_image:
                self._add_reverse()
                self.distill_image_proj = nn.Linear(width, config.image_features_dim)
            else:
                self.image_down = head(width, *DOWN, config.image_features_dim // self.num_tokens)
                self.distill_image_proj = nn.Linear(config.image_features_dim, config.image_features_dim)
        self.Qformer.apply(qformer.initialise)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def _places(self) -> nn.Parameter:
        return nn.Parameter(torch.zeros(1, self.num_tokens, self.config.qformer_width))

    def _blocks(self) -> nn.Sequential:
        width, heads = self.config.qformer_width, self.config.qformer_heads
        return nn.Sequential(*(ViTBlock(width, heads, 4 * width) for _ in range(self.config.decode_depth)))

    def _add_reverse(self) -> None:
        (tokens, layers), width = self.config.reverse, self.config.qformer_width
        self.reverse_tokens = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.Reverse_Qformer = QFormer(width, layers, self.config.qformer_heads, width, causal=False)
        self.Reverse_Qformer.apply(qformer.initialise)

    @property
    def quantizer(self) -> VectorQuantizer:
        """The codebook, compared by plain distances; its key in checkpoints is `quantize`."""
        return self.quantize

    @property
    def steps(self) -> int:
        """Denoising steps of the original."""
        return 50 if self.config.variant == "seed1" else 20

    @property
    def guidance(self) -> float:
        """Guidance scale of the original."""
        return 7.5 if self.config.variant == "seed1" else 10.0

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Everything follows from keys and shapes but the width of a head, which is as published, and
        causality, which is the original's: at 32 queries."""
        if "encode_task_layer.0.weight" not in shapes or not any(k.startswith("distill_") for k in shapes):
            return None
        return _config_from_shapes(shapes)

    # Images → codes -----------------------------------------------------------------------------------------

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → the Q-Former's states [B, K, D] before they are quantized; state j
        depends on queries 0 to j only.

        Raises ValueError for images that `encode` refuses.
        """
        with torch.no_grad():
            return self.states(self.check_images(images))

    def states(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → states of the Q-Former [B, K, D]."""
        return self.states_of_normalised((images - self.mean) / self.std)

    def states_of_normalised(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] with CLIP's mean and deviation taken out → states of the Q-Former [B, K, D]."""
        memory = self.ln_vision(self.visual_encoder(images))
        return self.Qformer(self.query_tokens.expand(len(images), -1, -1), memory)

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → [B, K, C]."""
        return self.encode_task_layer(self.states(images))

    # Codes → conditions -------------------------------------------------------------------------------------

    def conditions_of(self, latents: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Quantized latents [B, K, C] → text states [B, 77, 768] (SEED-1) or a CLIP embedding [B, 1024]
        (SEED-2)."""
        rows = self.decode_task_layer(latents)
        if self.config.variant == "seed1":
            memory = self.blocks_text(rows + self.pos_embed_text)
            return self.distill_text_proj(self._reverse(memory)), None
        memory = self.blocks_image(rows + self.pos_embed_image)
        if self.config.use_qformer_image:
            return None, self.distill_image_proj(self._reverse(memory)[:, 0])
        return None, self.distill_image_proj(self.image_down(memory).flatten(1))

    def _reverse(self, memory: Tensor) -> Tensor:
        return self.Reverse_Qformer(self.reverse_tokens.expand(len(memory), -1, -1), memory)

    @property
    def renderer_kind(self) -> Kind:
        """Stable Diffusion for SEED-1, Stable unCLIP for SEED-2."""
        return "text" if self.config.variant == "seed1" else "unclip"

    @property
    def renderer_name(self) -> str:
        """The hub repository of the original's renderer."""
        if self.config.variant == "seed1":
            return "CompVis/stable-diffusion-v1-4"
        return "stabilityai/stable-diffusion-2-1-unclip"

    def renderer_options(self) -> dict[str, Any]:
        """Widths that the renderer's network must take."""
        if self.config.variant == "seed1":
            return {"text_width": self.config.text_features_dim, "length": self.config.reverse[0]}
        return {
            "text_width": self.config.renderer_text_dim,
            "image_width": self.config.image_features_dim,
        }

    # Training -----------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, targets: Tensor | None = None) -> TrainingOutput:
        """Training pass of the codebook's stage; it draws no images.

        `targets` are what a frozen teacher gives for the same images: CLIP image embeddings [B, 1024] for
        SEED-2, text states [B, 77, 768] of their captions for SEED-1. Losses, with the original's weights:
        `commitment`, `codebook` (a quarter of it), `condition` (mean squared error to the targets, if there
        are any), and for SEED-2 `reconstruction` (1 - cosine of the states before and after).
        """
        states = self.states(images)
        quantized = self.quantize(self.encode_task_layer(states))
        # Parity: the quarter is on the codebook's term, not on the commitment.
        losses = {
            "commitment": LOSS_WEIGHTS["codes"] * quantized.losses["commitment"],
            "codebook": LOSS_WEIGHTS["codes"] * CODEBOOK_COST * quantized.losses["codebook"],
        }
        if self.config.variant == "seed2":
            rebuilt = self.blocks(self.decode_task_layer(quantized.latents) + self.pos_embed)
            difference = 1 - F.cosine_similarity(rebuilt, states, dim=-1).mean()
            losses["reconstruction"] = LOSS_WEIGHTS["reconstruction"] * difference
        if targets is not None:
            text, image = self.conditions_of(quantized.latents)
            condition = image if text is None else text
            if targets.shape != condition.shape:
                raise ValueError(
                    f"targets have shape {list(targets.shape)}; these images decode to "
                    f"{list(condition.shape)}"
                )
            losses["condition"] = LOSS_WEIGHTS["condition"] * F.mse_loss(condition, targets)
        return TrainingOutput(None, quantized.codes, losses)


def merge_weights(target: str | Path, *sources: str | Path) -> None:
    """Join weights that SEED publishes in several files into one .safetensors file at `target`.

    SEED-1 is two files, and neither release need hold its ViT, which is BLIP-2's `eva_vit_g.pth`: give that
    first. Of a key in several files the last one's value counts.

    Raises FileNotFoundError or ValueError for files that are not there or hold no weights.
    """
    from safetensors.torch import save_file

    merged: dict[str, Tensor] = {}
    for source in sources:
        state = checkpoint.read(source)
        if "patch_embed.proj.weight" in state:
            used = {key: value for key, value in state.items() if key.startswith(VIT_PARTS)}
            last = f"blocks.{VIT_BLOCKS}."  # of BLIP-2's file, which SEED does not run
            state = {f"visual_encoder.{k}": v for k, v in used.items() if not k.startswith(last)}
        merged |= state
    if not merged:
        raise ValueError("no weights to merge; give one or more files")
    with atomic_write(target) as aside:
        save_file({key: value.contiguous().clone() for key, value in merged.items()}, aside)


def _config_from_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    def count(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})

    first = "distill_text_proj.weight" in shapes
    _, queries, width = shapes["query_tokens"]
    config: dict[str, Any] = {
        "variant": "seed1" if first else "seed2",
        "num_query_token": queries,
        "causal": queries == CAUSAL_QUERIES,
        "codebook": shapes["quantize.embedding.weight"][0],
        "codebook_dim": shapes["quantize.embedding.weight"][1],
        "qformer_width": width,
        "qformer_heads": max(1, width // HEAD),
        "qformer_layers": count("Qformer.bert.encoder.layer."),
        "decode_depth": count("blocks_text." if first else "blocks_image."),
    }
    vit = "visual_encoder.patch_embed.proj.weight"
    if vit in shapes:
        patch = shapes[vit][2]
        cells = shapes["visual_encoder.pos_embed"][1] - 1
        config |= {
            "vit_width": shapes[vit][0],
            "vit_heads": max(1, shapes[vit][0] // VIT_HEAD),
            "vit_depth": count("visual_encoder.blocks."),
            "vit_mlp": shapes["visual_encoder.blocks.0.mlp.fc1.weight"][0],
            "patch": patch,
            "image_size": patch * round(cells**0.5),
        }
    if first:
        config["text_features_dim"] = shapes["distill_text_proj.weight"][0]
    else:
        config["use_qformer_image"] = "image_down.0.weight" not in shapes
        config["image_features_dim"] = shapes["distill_image_proj.weight"][0]
    if "reverse_tokens" in shapes:
        config["reverse_tokens"] = shapes["reverse_tokens"][1]
        config["reverse_layers"] = count("Reverse_Qformer.bert.encoder.layer.")
    return config


LICENSE = "Apache-2.0 with Tencent's terms; research only"
_NOTES = "semantic: pictures show the same content, not the same pixels; trained on image-text pairs; "

register(
    Entry(
        name="seed-1",
        family="seed",
        config={"variant": "seed1"},
        repo="https://github.com/AILab-CVC/SEED",
        file="seed_tokenizer.pth",
        license=LICENSE,
        paper="SEED (arXiv 2307.08041)",
        parameters=1154.1,
        notes=_NOTES + "two files and BLIP-2's ViT: models.seed.merge_weights; drawn by Stable Diffusion 1.4",
        verified="cut to 2 ViT blocks: codes equal, latents 4.1e-6, text states 3.3e-6",
    ),
    Entry(
        name="seed-2",
        family="seed",
        config={"variant": "seed2"},
        repo="AILab-CVC/seed-tokenizer-2",
        file="seed_quantizer.pt",
        license=LICENSE,
        paper="SEED-2 (arXiv 2310.01218)",
        parameters=1150.0,
        notes=_NOTES + "drawn by Stable Diffusion 2.1 unCLIP",
        verified="cut to 3 ViT blocks: codes equal, latents 3.9e-6, embeddings 3.2e-6",
    ),
)
