"""Slot-MLLM's tokenizer: 32 object-like slots per image, each of four residual codes.

"Slot-MLLM: Object-Centric Visual Tokenization for Multimodal LLM" (Chi et al., 2025, arXiv 2505.17726). A
Q-Former whose cross-attention is slot attention ("Object-Centric Learning with Slot Attention", 2020, arXiv
2006.15055) reads the patch features of a frozen DINOv2; a residual quantizer with one codebook makes codes.
These decode to 32 states and a CLIP image embedding, and Stable unCLIP draws from both. Pictures show the
same content, not the same pixels.

    tokenizer.attach_backbone("facebook/dinov2-large")
    tokenizer.attach_renderer("stabilityai/stable-diffusion-2-1-unclip")
    images = tokenizer.preprocess(["cat.jpg"])  # whole pictures, squeezed to 448×448 pixels
    pictures = tokenizer.decode(tokenizer.encode(images))  # codes are [B, 32, 4]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import hub
from ..files import looks_like_path
from ..nn import qformer
from ..nn.cpu.linear import linear
from ..nn.qformer import QFormer, Reading
from ..nn.renderer import Kind
from ..nn.vit import ViTBlock
from ..quantizers import Quantized, SharedResidualQuantizer
from ..registry import Entry, register, register_family
from ..tokenizer import TrainingOutput
from .ranges import require_depths, require_multiple, require_sizes
from .rendered import RenderedTokenizer, head

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHT_OFFSET = 1e-6  # added to the attention of every patch
DECAY = 0.8  # of the codebook's running means
LOSS_WEIGHTS = {"commitment": 1.0, "reconstruction": 1.0, "condition": 0.1}
BACKBONE = "facebook/dinov2-large"


@dataclass(frozen=True)
class SlotMLLMConfig:
    """Sizes, as published by default."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    enc_width: int = 1408
    """Width of the adapted features that slots read."""
    slots: int = 32
    vis: int = 1024
    """Width of the backbone's features."""
    image_size: int = 448
    patch: int = 14
    """Side of the backbone's patches, in pixels."""
    cond: int = 1024
    """Width of the states and of the CLIP embedding that the renderer is given."""
    blocks: int = 4
    blk_heads: int = 16
    down: tuple[int, ...] = (256, 128, 32)
    """Widths of the head of the CLIP embedding, the last per slot."""
    rvq: int = 4
    codes: int = 8192
    cdim: int = 32
    iters: int = 3
    use_slot: bool = True
    """Whether cross-attention is slot attention; off, it is the Q-Former's own."""
    use_half_slot: bool = False
    """Whether only the first half of the slots takes part in slot attention; the others keep their state."""
    causal: bool = True
    positions: int = 512
    render_size: int = 256
    """Side of the pictures, in pixels."""

    def __post_init__(self) -> None:
        require_sizes(self, "hidden", "heads", "enc_width", "slots", "vis", "image_size", "patch", "cond")
        require_sizes(self, "blk_heads", "down", "codes", "cdim", "positions", "render_size")
        require_depths(self, "layers", "blocks", "rvq", "iters")
        require_multiple(self, "hidden", "heads", "blk_heads")
        require_multiple(self, "image_size", "patch")
        if self.use_half_slot and self.slots < 2:
            raise ValueError("use_half_slot needs slots of 2 or more; there is one")


class SlotReading(Reading):
    """Slot attention in the place of cross-attention: slots compete for every patch, in every head.

    The attention of a patch is a softmax over all pairs of heads and slots; each slot then takes the mean of
    the patches by its weights, and a GRU (in float32) and an MLP change its state, `iterations` times.
    """

    def __init__(self, width: int, heads: int, memory_width: int, iterations: int, half: bool) -> None:
        super().__init__(width, heads, memory_width)
        self.iterations, self.half = iterations, half
        self.gru = nn.GRUCell(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.norm_slots, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        """Slots [B, S, D] read features [B, N, M] → their new states [B, S, D]."""
        count = x.shape[1]
        keys = self.split(self.key, memory) * count**-0.5  # [B, h, N, d]
        values = self.split(self.value, memory)
        active = count // 2 if self.half else count
        slots, rest = x[:, :active], x[:, active:]
        for _ in range(self.iterations):
            weights = self.weights(self.split(self.query, self.norm_slots(slots)), keys)
            context = (weights @ values).transpose(1, 2).flatten(2)  # [B, S, D]
            slots = self._update(context, slots)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return torch.cat([slots, rest], 1)

    def weights(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Queries [B, h, S, d] and keys [B, h, N, d] → each slot's weights of the patches [B, h, S, N], which
        sum to 1."""
        attention = self.attention(queries, keys) + WEIGHT_OFFSET
        return attention / attention.sum(-1, keepdim=True)

    def attention(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Queries [B, h, S, d] and keys [B, h, N, d] → how each patch is shared out [B, h, S, N]: the sum
        over heads and slots is 1."""
        logits = queries @ keys.transpose(2, 3)
        return logits.flatten(1, 2).softmax(1).view_as(logits)

    def _update(self, context: Tensor, slots: Tensor) -> Tensor:
        """One step of the GRU, in float32 or better: input and state [B, S, D] → state."""
        wide = torch.promote_types(slots.dtype, torch.float32)
        weights = {name: value.to(wide) for name, value in self.gru.named_parameters()}
        rows = context.flatten(0, 1).to(wide), slots.flatten(0, 1).to(wide)
        with torch.autocast(slots.device.type, enabled=False):
            updated = torch.func.functional_call(self.gru, weights, rows)
        return updated.view(slots.shape).to(slots.dtype)


class SlotQuantizer(SharedResidualQuantizer):
    """Residual codes of projected slots, in the key layout of vector-quantize-pytorch's `ResidualVQ`."""

    def __init__(self, config: SlotMLLMConfig) -> None:
        super().__init__(config.codes, config.cdim, config.rvq, decay=DECAY, moves_each_depth=False)
        self.project_in = nn.Linear(config.hidden, config.cdim)
        self.project_out = nn.Linear(config.cdim, config.hidden)
        rows = torch.empty(1, config.codes, config.cdim)
        nn.init.kaiming_uniform_(rows)
        self.layers = nn.ModuleList()
        for _ in range(config.rvq):
            layer = nn.Module()
            layer._codebook = nn.Module()
            layer._codebook.register_buffer("initted", torch.ones(1))
            layer._codebook.register_buffer("cluster_size", torch.ones(1, config.codes))
            layer._codebook.register_buffer("embed_avg", rows.clone())
            layer._codebook.register_buffer("embed", rows.clone())
            self.layers.append(layer)

    def books(self) -> nn.ModuleList:
        """The layers, one per depth."""
        return self.layers

    def tables(self, book: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, counts and sums of a layer."""
        codebook = book._codebook
        return codebook.embed[0], codebook.cluster_size[0], codebook.embed_avg[0]

    def encode(self, latents: Tensor) -> Tensor:
        """Slots [B, K, D] → indices int64 [B, K, Q]."""
        return super().encode(self.project_in(latents))

    def decode(self, codes: Tensor) -> Tensor:
        """Indices [B, K, Q], or only the first of the Q → slots [B, K, D]."""
        return self.project_out(super().decode(codes))

    def forward(self, latents: Tensor) -> Quantized:
        """Straight-through slots, their codes, and the commitment."""
        quantized = super().forward(self.project_in(latents))
        return Quantized(self.project_out(quantized.latents), quantized.codes, quantized.losses)


@register_family("slotmllm")
class SlotMLLM(RenderedTokenizer):
    """Slot-MLLM's tokenizer; see the module. `features` are its slots [B, 32, 768], not quantized."""

    config_class = SlotMLLMConfig
    has_features = True
    steps = 100
    guidance = 2.0
    solver = "DPMSolverMultistepScheduler"
    renderer_kind: Kind = "unclip"
    renderer_name = "stabilityai/stable-diffusion-2-1-unclip"
    checkpoint_ignores = tuple(
        f"image_tokenizer.model.{pattern}"
        for pattern in (
            *(f"Qformer.{pattern}" for pattern in (*qformer.TEXT_BRANCH, qformer.POSITIONS)),
            *("Qformer.image_cls.*", "Qformer.pred_ln.*"),
            # Every attention of the original carries the parts of slot attention.
            *(f"Qformer.bert.encoder.layer.*.attention.self.{part}.*" for part in
              ("gru", "mlp", "norm_slots", "norm_mlp")),
            *(f"Qformer.bert.encoder.layer.*.crossattention.self.{part}.*" for part in
              ("key_proj", "value_proj")),
        )
    )  # fmt: skip

    def __init__(self, config: SlotMLLMConfig) -> None:
        super().__init__(config)
        self.image_size, self.num_tokens = config.image_size, config.slots
        width = config.hidden
        self.visual_embedding_layernorm = nn.LayerNorm(config.vis)
        self.visual_embedding_encoder = nn.Sequential(
            nn.Linear(config.vis, config.vis), nn.ReLU(), nn.Linear(config.vis, config.enc_width)
        )
        self.image_tokenizer = nn.Module()
        self.image_tokenizer.model = nn.Module()
        self.image_tokenizer.model.query_tokens = nn.Parameter(0.02 * torch.randn(1, config.slots, width))
        self.image_tokenizer.model.Qformer = QFormer(
            width,
            config.layers,
            config.heads,
            config.enc_width,
            causal=config.causal,
            positions=config.positions,
            reading=self._reading,
        )
        self.image_tokenizer.model.Qformer.apply(qformer.initialise)
        self.quantize = SlotQuantizer(config)
        self.pos_embed, self.pos_embed_image = (
            nn.Parameter(torch.zeros(1, config.slots, width)) for _ in range(2)
        )
        self.blocks, self.blocks_image = (
            nn.Sequential(*(ViTBlock(width, config.blk_heads, 4 * width) for _ in range(config.blocks)))
            for _ in range(2)
        )
        self.out_layer_norm, self.out_linear_1024 = nn.LayerNorm(width), nn.Linear(width, config.cond)
        self.image_down = head(width, *config.down)
        self.distill_image_proj = nn.Linear(config.slots * config.down[-1], config.cond, bias=False)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def _reading(self, width: int, heads: int, memory_width: int) -> Reading:
        config = self.config
        if not config.use_slot:
            return Reading(width, heads, memory_width)
        return SlotReading(width, heads, memory_width, config.iters, config.use_half_slot)

    @property
    def quantizer(self) -> SlotQuantizer:
        """The bottleneck; its key in checkpoints is `quantize`."""
        return self.quantize

    @property
    def qformer(self) -> QFormer:
        """The slots' transformer; its key in checkpoints is `image_tokenizer.model.Qformer`."""
        return self.image_tokenizer.model.Qformer

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Sizes follow from keys and shapes; the width of a head and what leaves no weights behind are as
        published."""
        if "image_tokenizer.model.query_tokens" not in shapes or "out_linear_1024.weight" not in shapes:
            return None
        return _config_from_shapes(shapes)

    # Images → slots -----------------------------------------------------------------------------------------

    def attach_backbone(self, source: nn.Module | str | Path) -> None:
        """Attach the frozen DINOv2 whose patch features slots read: a transformers `Dinov2Model`, a folder
        with one, or a hub repository (`hf://owner/name`; the original's own without the prefix).

        Raises:
            FileNotFoundError: there is no such folder, or the repository is neither cached nor reachable.
            ValueError: another kind of model, or features of another width or patches of another side.
        """
        from transformers import Dinov2Model

        backbone = source if isinstance(source, nn.Module) else _load_backbone(source)
        if not isinstance(backbone, Dinov2Model):
            raise ValueError(
                f"a {type(backbone).__name__} was given; the backbone is a transformers Dinov2Model"
            )
        config = backbone.config
        if (config.hidden_size, config.patch_size) != (self.config.vis, self.config.patch):
            raise ValueError(
                f"this backbone has features of width {config.hidden_size} of patches of "
                f"{config.patch_size} pixels; {self.label} takes width {self.config.vis} and "
                f"{self.config.patch} pixels"
            )
        self.add_companion("backbone", backbone)

    def patch_features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → the backbone's patch features [B, N, C]; ValueError without one."""
        backbone = self.companion("backbone")
        if backbone is None:
            raise ValueError(
                f"{self.label} reads features of DINOv2, which its weights do not hold; attach it: "
                f"tokenizer.attach_backbone({BACKBONE!r}), or give a folder with its weights"
            )
        cells = (self.image_size // self.config.patch) ** 2
        if not len(images):
            return images.new_zeros(0, cells, self.config.vis)
        with torch.no_grad():
            return backbone((images - self.mean) / self.std).last_hidden_state[:, 1:].to(self.dtype)

    def adapted(self, features: Tensor) -> Tensor:
        """The backbone's features [B, N, C] → what slots read [B, N, M]."""
        return self.visual_embedding_encoder(self.visual_embedding_layernorm(features))

    def slots(self, memory: Tensor) -> Tensor:
        """Adapted features [B, N, M] → slots [B, K, D]."""
        queries = self.image_tokenizer.model.query_tokens.expand(len(memory), -1, -1)
        return self.qformer(queries, memory)

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → slots [B, K, D]."""
        return self.slots(self.adapted(self.patch_features(images)))

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → slots [B, K, D] before they are quantized.

        Raises ValueError for images that `encode` refuses and without a backbone.
        """
        with torch.no_grad():
            return self.latents(self.check_images(images))

    # Slots → conditions -------------------------------------------------------------------------------------

    def rebuilt(self, latents: Tensor) -> Tensor:
        """Quantized slots [B, K, D] through the first blocks, which training compares with the slots."""
        return self.blocks(latents + self.pos_embed)

    def conditions_of(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized slots [B, K, D] → states [B, K, 1024] and a CLIP embedding [B, 1024]."""
        rows = self.blocks_image(self.rebuilt(latents) + self.pos_embed_image)
        states = linear(self.out_layer_norm(rows), self.out_linear_1024.weight, self.out_linear_1024.bias)
        return states, self.distill_image_proj(self.image_down(rows).flatten(1))

    def renderer_options(self) -> dict[str, Any]:
        """Widths and size of the renderer."""
        config = self.config
        return {
            "text_width": config.cond,
            "image_width": config.cond,
            "length": config.slots,
            "size": config.render_size,
        }

    def forward(self, images: Tensor, targets: Tensor | None = None) -> TrainingOutput:
        """Training pass of the quantizer's stage without the diffusion model's loss; it draws no images.

        `targets` [B, 1024] are CLIP image embeddings of the same images. Losses, with the original's weights:
        `commitment`, `reconstruction` (mean squared error of the slots) and, with targets, `condition`.
        """
        slots = self.latents(images)
        quantized = self.quantize(slots)
        rebuilt = self.rebuilt(quantized.latents)
        losses = {
            "commitment": LOSS_WEIGHTS["commitment"] * quantized.losses["commitment"],
            "reconstruction": LOSS_WEIGHTS["reconstruction"] * F.mse_loss(rebuilt, slots.detach()),
        }
        if targets is not None:
            embedding = self.conditions_of(quantized.latents)[1]
            if targets.shape != embedding.shape:
                raise ValueError(
                    f"targets have shape {list(targets.shape)}; these images decode to "
                    f"{list(embedding.shape)}"
                )
            losses["condition"] = LOSS_WEIGHTS["condition"] * F.mse_loss(embedding, targets)
        return TrainingOutput(None, quantized.codes, losses)


def _load_backbone(source: str | Path) -> nn.Module:
    """A Dinov2Model from a folder or hub repository, from safetensors files."""
    from transformers import Dinov2Model

    location = str(source).removeprefix(hub.PREFIX)
    if isinstance(source, Path) or (looks_like_path(source) and source != BACKBONE):
        location = str(Path(source).expanduser())
        if not (Path(location) / "config.json").is_file():
            raise FileNotFoundError(
                f"{source} is not a folder with a DINOv2: it has no config.json; give one, or "
                f"{hub.PREFIX}{BACKBONE}"
            )
    elif not str(source).startswith(hub.PREFIX) and location != BACKBONE:
        raise FileNotFoundError(
            f"{source} is neither a folder here nor {BACKBONE}; another repository of the Hugging Face hub "
            f"is given as {hub.PREFIX}{source}"
        )
    else:
        hub.announce(location)
    try:
        return Dinov2Model.from_pretrained(location, use_safetensors=True)
    except OSError as error:
        raise FileNotFoundError(
            f"the backbone {source} cannot be read or fetched ({' '.join(str(error).split())[:200]}); "
            "download its repository on a connected machine and give the folder"
        ) from error


def _config_from_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    def count(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})

    layer = "image_tokenizer.model.Qformer.bert.encoder.layer."
    _, slots, width = shapes["image_tokenizer.model.query_tokens"]
    _, codes, dim = shapes["quantize.layers.0._codebook.embed"]
    positions = shapes.get("image_tokenizer.model.Qformer.bert.embeddings.position_ids", (1, 512))
    return {
        "hidden": width,
        "layers": count(layer),
        "heads": max(1, width // 64),
        "enc_width": shapes["visual_embedding_encoder.2.weight"][0],
        "slots": slots,
        "vis": shapes["visual_embedding_layernorm.weight"][0],
        "cond": shapes["out_linear_1024.weight"][0],
        "blocks": count("blocks."),
        "blk_heads": max(1, width // 48),
        "down": [shapes[f"image_down.{i}.weight"][0] for i in range(0, 2 * count("image_down."), 2)],
        "rvq": count("quantize.layers."),
        "codes": codes,
        "cdim": dim,
        "use_slot": f"{layer}0.crossattention.self.gru.weight_ih" in shapes,
        "positions": positions[1],
    }


register(
    Entry(
        name="slot-mllm",
        family="slotmllm",
        config={},
        repo="https://github.com/KU-AGI/Slot-MLLM",
        file="weights of the 7B or 14B model",
        license="MIT",
        paper="Slot-MLLM (arXiv 2505.17726)",
        parameters=197.0,
        notes="semantic: pictures show the same content, not the same pixels; 32 slots of 4 codes; reads "
        "DINOv2 ViT-L/14 and is drawn by Stable Diffusion 2.1 unCLIP; licence of the code",
    )
)
