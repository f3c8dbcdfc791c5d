"""xAR: the latents of an image cluster by cluster, each by flow matching from the clusters before it.

"Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (Ren et al., 2025, arXiv
2502.20388). The grid of latents of `vistok.models.kl16` is cut into 2×2 clusters; in training every cluster
is noisy at a time of its own, so that the network learns from imperfect context.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration import build
from ..models.karl.config import VAE_SCALE
from ..models.ranges import require_between, require_depths, require_sizes
from ..nn.flow import classifier_free_guidance, logit_normal_times, noised
from ..registry import Entry
from ..tokens import Tokens
from .cache import KeyValueCache
from .classes import ClassGenerator
from .layers import apply_linear
from .llama import rotate, rotation_table, with_preset
from .noise import Noise
from .published import require_settings
from .registry import GENERATORS

EPS = 1e-6
SIDES = 2  # clusters along each axis of the grid
CLUSTERS = SIDES**2
TIME_FEATURES = 256
LAST_TIME = 0.04  # of the last noisy step
FEWEST_STEPS = 3
PRESETS = {"B": (768, 8, 12), "L": (1024, 16, 16), "H": (1280, 20, 16)}
"""Names of published sizes → width, layers and heads of the encoder and of the decoder."""
PRESET_FIELDS = [
    f"{part}_{field}" for part in ("encoder", "decoder") for field in ("embed_dim", "depth", "num_heads")
]


@dataclass(frozen=True, kw_only=True)
class XARConfig:
    """The original's configuration under its own names.

    Latents are predicted times `scale`, and tokens hold them without it. `cfg` and `num_steps` are settings
    of `sample`. Raises ValueError for values out of range.
    """

    tokenizer: str | None = None
    encoder_embed_dim: int
    encoder_depth: int
    encoder_num_heads: int
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
    mlp_ratio: float = 4.0
    img_size: int = 256
    vae_stride: int = 16
    vae_embed_dim: int = 16
    class_num: int = 1000
    label_drop_prob: float = 0.1
    scale: float = VAE_SCALE
    cfg: float | None = None
    num_steps: int | None = None

    def __post_init__(self) -> None:
        require_sizes(self, "encoder_embed_dim", "decoder_embed_dim", "encoder_num_heads", "img_size")
        require_sizes(self, "decoder_num_heads", "vae_stride", "vae_embed_dim", "class_num")
        require_depths(self, "encoder_depth", "decoder_depth")
        require_between(self, ["mlp_ratio"], 0.1, 64)
        require_between(self, ["label_drop_prob"], 0, 1)
        require_between(self, ["scale"], 1e-6, 1e6)
        require_settings(self, "cfg")
        if self.num_steps is not None:
            require_between(self, ["num_steps"], FEWEST_STEPS, 10_000)
        if self.encoder_embed_dim != self.decoder_embed_dim:
            raise ValueError(
                f"encoder_embed_dim is {self.encoder_embed_dim} and decoder_embed_dim "
                f"{self.decoder_embed_dim}; both read one condition, so they are equal"
            )
        for name in ("encoder_num_heads", "decoder_num_heads"):
            heads = getattr(self, name)
            if self.encoder_embed_dim % (4 * heads):
                raise ValueError(
                    f"encoder_embed_dim is {self.encoder_embed_dim} and {name} {heads}; the width is a "
                    f"multiple of 4 · {name}, for rotations of pairs along two axes"
                )
        if self.img_size % (SIDES * self.vae_stride):
            raise ValueError(
                f"img_size is {self.img_size} and vae_stride {self.vae_stride}; the grid of latents has "
                f"{SIDES}×{SIDES} clusters, so img_size is a multiple of {SIDES * self.vae_stride}"
            )

    @property
    def side(self) -> int:
        """Side of the grid of latents."""
        return self.img_size // self.vae_stride

    @property
    def class_label_dropout(self) -> float:
        """The share of classes that training drops."""
        return self.label_drop_prob


# Network ----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention with rotary positions; keys `qkv` and `proj`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, layer: int, cache: KeyValueCache | None
    ) -> Tensor:
        """Rows [B, R, D] to themselves and those in the cache, where `mask` allows it (None: to all)."""
        rows = apply_linear(self.qkv, x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key, value = (each.transpose(1, 2) for each in rows)  # [B, h, R, d]
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return apply_linear(self.proj, out.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """fc2(gelu(fc1_g x) · fc1_x x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, R, D] → [B, R, D]."""
        return apply_linear(self.fc2, F.gelu(apply_linear(self.fc1_g, x)) * apply_linear(self.fc1_x, x))


class Block(nn.Module):
    """Pre-norm block whose gates, scales and shifts come from the condition of a row's cluster."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(dim, heads), GatedMLP(dim, int(2 * mlp_ratio * dim / 3))
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        layer: int,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """Rows [B, R, D] and the conditions [B, clusters, D] → [B, R, D]."""
        parts = self.ada_lin(condition).unsqueeze(2).chunk(6, -1)  # of [B, clusters, 1, D]
        gate1, gate2, scale1, scale2, shift1, shift2 = parts
        clusters = (condition.shape[1], -1)

        def normalised(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            x = F.rms_norm(x, x.shape[-1:], eps=EPS).unflatten(1, clusters)
            return (x * (1 + scale) + shift).flatten(1, 2)

        change = self.attn(normalised(x, scale1, shift1), rotation, mask, layer, cache)
        x = x + (gate1 * change.unflatten(1, clusters)).flatten(1, 2)
        change = self.mlp(normalised(x, scale2, shift2))
        return x + (gate2 * change.unflatten(1, clusters)).flatten(1, 2)


class TimeEmbedding(nn.Module):
    """Times in [0, 1], to a thousandth, as sinusoids through an MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, times: Tensor) -> Tensor:
        """[...] → [..., D]."""
        # Parity: times are cut to whole thousandths.
        thousandths = (1000 * times.float()).long().float()
        half = TIME_FEATURES // 2
        waves = 10_000 ** (-torch.arange(half, device=times.device) / half)
        angles = thousandths.unsqueeze(-1) * waves
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


@GENERATORS.family("xar")
class XAR(ClassGenerator):
    """xAR over the 16×16 latents of KL-16; see the module.

    Rows of the transformer are latents in cluster order: the clusters row by row, and the cells of each row
    by row. A row attends to its own cluster and earlier ones. There are no logits: `velocity` is what the
    network predicts, noise - latents.
    """

    config_class = XARConfig
    checkpoint_ignores = ("mask", "*.attn.rope.*")  # constants, which are computed here
    settings: ClassVar[Mapping[str, str]] = {"guidance": "cfg", "steps": "num_steps"}

    def __init__(self, config: XARConfig) -> None:
        super().__init__(config)
        self.num_tokens, self.grid = config.side**2, (config.side, config.side)
        self.num_classes, self.cluster_size = config.class_num, config.side**2 // CLUSTERS
        dim = config.encoder_embed_dim
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, self.num_tokens, dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, self.num_tokens, dim))
        self.class_emb = nn.Embedding(config.class_num + 1, dim)  # the last row is no class
        self.time_embed = TimeEmbedding(dim)
        self.z_proj, self.z_proj_ln = nn.Linear(config.vae_embed_dim, dim), nn.RMSNorm(dim, EPS)
        self.encoder_blocks = nn.ModuleList(
            Block(dim, config.encoder_num_heads, config.mlp_ratio) for _ in range(config.encoder_depth)
        )
        self.encoder_norm, self.decoder_embed = nn.RMSNorm(dim, EPS), nn.Linear(dim, dim)
        self.decoder_blocks = nn.ModuleList(
            Block(dim, config.decoder_num_heads, config.mlp_ratio) for _ in range(config.decoder_depth)
        )
        self.decoder_norm, self.pred = nn.RMSNorm(dim, EPS), nn.Linear(dim, config.vae_embed_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.encoder_pos_embed_learned, self.decoder_pos_embed_learned, self.class_emb.weight):
            nn.init.normal_(table, std=0.02)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> XARConfig:
        """Read field names, with a `preset` in place of the transformer's sizes."""
        both = {name: sizes * 2 for name, sizes in PRESETS.items()}  # encoder and decoder
        return build(XARConfig, with_preset(values, both, PRESET_FIELDS), cls.family)

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by its learned positions in encoder and decoder. Heads follow from the stored rotations;
        where these are missing, the configuration beside the weights has them.

        Raises ValueError for weights with neither.
        """
        own = {
            "encoder_pos_embed_learned",
            "decoder_pos_embed_learned",
            "z_proj_ln.weight",
            "class_emb.weight",
        }
        if not own <= shapes.keys():
            return None
        if config and "encoder_num_heads" in config:
            return dict(config)
        names = [f"{part}_blocks.0.attn.rope.freqs_cos" for part in ("encoder", "decoder")]
        if not set(names) <= shapes.keys():
            raise ValueError(
                f"these are weights of the family {cls.family!r} without stored rotations, so that their "
                f"heads do not show; give config={{'family': {cls.family!r}, 'config': {{…}}}}, or load them "
                "by a published name with weights="
            )
        return _config_from_shapes(shapes, *(shapes[name][1] for name in names))

    # Clusters -----------------------------------------------------------------------------------------------

    def clusterify(self, rows: Tensor) -> Tensor:
        """Latents of the grid, row by row [B, N, C] → clusters [B, 4, N/4, C]."""
        return rows.unflatten(1, self._cells()).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def unclusterify(self, clusters: Tensor) -> Tensor:
        """Clusters [B, 4, N/4, C] → latents of the grid, row by row [B, N, C]."""
        sides, cells, _, _ = self._cells()
        grid = clusters.unflatten(2, (cells, cells)).unflatten(1, (sides, sides))
        return grid.transpose(2, 3).flatten(1, 4)

    def _cells(self) -> tuple[int, int, int, int]:
        cells = self.config.side // SIDES
        return SIDES, cells, SIDES, cells

    # Velocity -----------------------------------------------------------------------------------------------

    def rotations(self, head_dim: int) -> Tensor:
        """The rotations of all rows [N, d/2, 2], float32 or better, in cluster order."""
        table = rotation_table(self.num_tokens, self.config.side, head_dim, 10_000)[1:]
        table = self.clusterify(table.flatten(1)[None]).flatten(0, 2).unflatten(-1, (-1, 2))
        return table.to(self.device, torch.promote_types(self.dtype, torch.float32))

    def velocity(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        """The velocity of the first clusters of each image, for training and parity.

        Args:
            x: noisy latents times `scale` [B, R, C] of the first k (1..4) clusters, in cluster order.
            times: [B, k], the time of each cluster: 0 is data and 1 noise.
            classes: int64 [B], `num_classes` for no class.

        Returns:
            [B, R, C]; that of a cluster does not depend on later ones.

        Raises:
            ValueError: latents or times of another shape.
        """
        count = times.shape[-1]
        shape = (len(classes), count * self.cluster_size, self.config.vae_embed_dim)
        if times.shape != (len(classes), count) or not 1 <= count <= CLUSTERS or x.shape != shape:
            raise ValueError(
                f"latents have shape {list(x.shape)} and times {list(times.shape)} for {len(classes)} "
                f"classes; {self.label} takes [B, {self.cluster_size} k, {shape[2]}] and [B, k] with k from "
                f"1 to {CLUSTERS} for each of B classes"
            )
        return self._run(x, times, classes, 0, None)

    def _run(
        self,
        x: Tensor,
        times: Tensor,
        classes: Tensor,
        first: int,
        caches: Sequence[KeyValueCache] | None,
    ) -> Tensor:
        """The velocity of the clusters from `first` on; the caches hold those before."""
        size, count = self.cluster_size, times.shape[1]
        rows = slice(first * size, (first + count) * size)
        condition = self.class_emb(classes)[:, None] + self.time_embed(times)
        index = torch.arange(rows.stop, device=x.device) // size
        mask = index[rows, None] >= index if count > 1 else None
        x = apply_linear(self.z_proj, x.to(self.dtype)) + self.encoder_pos_embed_learned[:, rows]
        x = self._through(self.encoder_blocks, self.z_proj_ln(x), condition, rows, mask, caches and caches[0])
        x = apply_linear(self.decoder_embed, self.encoder_norm(x)) + self.decoder_pos_embed_learned[:, rows]
        x = self._through(self.decoder_blocks, x, condition, rows, mask, caches and caches[1])
        return apply_linear(self.pred, self.decoder_norm(x))

    def _through(
        self,
        blocks: nn.ModuleList,
        x: Tensor,
        condition: Tensor,
        rows: slice,
        mask: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        rotation = self.rotations(x.shape[-1] // blocks[0].attn.heads)[rows]
        for layer, block in enumerate(blocks):
            x = block(x, condition, rotation, mask, layer, cache)
        return x

    # Training -----------------------------------------------------------------------------------------------

    def loss(
        self,
        latents: Tensor,
        classes: Tensor,
        *,
        times: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The flow matching loss [] of latents times `scale`, row by row [B, N, C].

        Every cluster is noisy, and so is the context that later ones see. `times` [B, 4], by default
        sigmoids of normal draws, and `noise` [B, 4, N/4, C] are those of the clusters; what is not given is
        drawn from `generator`, on the latents' device. Classes are as `drop_classes` returns them.
        """
        clusters = self.clusterify(latents)
        options = {"generator": generator, "device": latents.device}
        if times is None:
            times = logit_normal_times(torch.randn(len(latents), CLUSTERS, **options))
        if noise is None:
            noise = torch.randn(clusters.shape, **options)
        noise = noise.to(clusters)
        x = noised(clusters.flatten(0, 1), noise.flatten(0, 1), times.flatten().to(clusters))
        x = x.unflatten(0, clusters.shape[:2]).flatten(1, 2)
        velocity = self.velocity(x, times, classes)
        return F.mse_loss(velocity.float(), (noise - clusters).flatten(1, 2).float())

    # Sampling -----------------------------------------------------------------------------------------------

    def unguided(self, settings: Any) -> float:
        """1."""
        return 1.0

    @torch.no_grad()
    def write(self, classes: Tensor, settings: XARConfig, noise: Noise) -> Tensor:
        """Write latents times `scale`, row by row [B, N, C], for classes int64 [B], cluster by cluster."""
        guided, size = settings.cfg > self.unguided(settings), self.cluster_size
        both = torch.cat([classes, torch.full_like(classes, self.num_classes)]) if guided else classes
        caches, clusters = self.caches(len(both)), []
        finite = torch.ones((), dtype=torch.bool, device=classes.device)
        for cluster in range(CLUSTERS):
            # The first cluster is never guided, so that it needs no pass without its class.
            scale = 1 + (settings.cfg - 1) * cluster / (CLUSTERS - 1)
            labels = both if cluster else classes
            x = _precise(noise.normal(size, self.config.vae_embed_dim))
            for time, following in pairwise(solver_times(settings.num_steps)):
                context = clusters[-1:] if time == 1 else []
                velocity = self.next_velocity(x, time, labels, cluster, caches, context)
                finite = finite & velocity.isfinite().all()
                velocity = velocity.to(x.dtype)
                if len(labels) > len(classes):
                    velocity = classifier_free_guidance(*velocity.chunk(2), scale)
                draws = noise.normal(*x.shape[1:]).to(x) if following else None
                x = sde_step(x, velocity, time, following, draws)
            clusters.append(x)
        self.check_finite(finite)
        return self.unclusterify(torch.stack(clusters, 1))

    def next_velocity(
        self,
        x: Tensor,
        time: float,
        labels: Tensor,
        cluster: int,
        caches: Sequence[KeyValueCache],
        context: Sequence[Tensor] = (),
    ) -> Tensor:
        """The velocity of one cluster [B, N/4, C] at a time, after the clusters that the caches hold.

        `context` is the cluster just before it where the caches do not hold that yet, which they do
        afterwards. There are as many labels as images, or twice as many for both passes of guidance.
        """
        parts = [each.to(self.dtype) for each in (*context, x)]
        rows = torch.cat(parts, 1).repeat(len(labels) // max(len(x), 1), 1, 1)
        times = torch.tensor([0.0] * len(context) + [time], device=x.device).expand(len(labels), -1)
        velocity = self._run(rows, times, labels, cluster - len(context), caches if cluster else None)
        for cache in caches:
            cache.length = cluster * self.cluster_size  # the cluster itself is still noisy
        return velocity[:, -self.cluster_size :]

    def caches(self, batch: int) -> list[KeyValueCache]:
        """Empty caches of the encoder's and the decoder's blocks for all rows of `batch` sequences."""
        caches = []
        for blocks in (self.encoder_blocks, self.decoder_blocks):
            heads = blocks[0].attn.heads
            shape = (batch, heads, self.num_tokens, self.config.encoder_embed_dim // heads)
            caches.append(KeyValueCache(len(blocks), shape, dtype=self.dtype, device=self.device))
        return caches

    # Tokens -------------------------------------------------------------------------------------------------

    def as_tokens(self, latents: Tensor) -> Tokens:
        """Wrap latents times `scale` [B, N, C] as those of the tokenizer, float32, with its name and the
        grid."""
        latents = (latents / self.config.scale).float()
        return Tokens(latents=latents, tokenizer=self.config.tokenizer, grid=self.grid)

    def check_codes(self, tokenizer: Any) -> None:
        """Raise ValueError unless a tokenizer's tokens are latents of as many channels."""
        quantizer, channels = tokenizer.quantizer, self.config.vae_embed_dim
        if quantizer.kind != "latents" or quantizer.dim != channels:
            other = f"latents of {quantizer.dim} channels" if quantizer.kind == "latents" else quantizer.kind
            raise ValueError(
                f"{self.label} writes latents of {channels} channels; tokens of {tokenizer.label} are {other}"
            )

    def check_finite(self, finite: Tensor) -> None:
        """Raise ValueError where `finite`, bool [], reports that velocities held NaN or infinity."""
        if not torch.compiler.is_compiling() and not bool(finite):
            raise ValueError(
                f"the velocities of {self.label} hold NaN or infinity, so there are no latents; values may "
                f"overflow in {self.dtype}: load with dtype='float32', or check the weights"
            )


def solver_times(steps: int) -> list[float]:
    """The times of a solver of `steps` steps, from 1 evenly to 0.04, then 0."""
    return [*torch.linspace(1, LAST_TIME, steps, dtype=torch.float64).tolist(), 0.0]


def sde_step(x: Tensor, velocity: Tensor, time: float, following: float, noise: Tensor | None) -> Tensor:
    """One Euler-Maruyama step of the reverse SDE with diffusion 2t, from `time` to `following`, with standard
    normal `noise` or None.

    The score of x_t = t · noise + (1 - t) · data is -(x + (1 - t) v) / t, so that the drift v - t · score is
    (2 - t) v + x. ("SiT: Exploring Flow and Diffusion-based Generative Models", Ma et al., 2024, arXiv
    2401.08740, equations 5 and 9.)
    """
    x = x + ((2 - time) * velocity + x) * (following - time)
    return x if noise is None else x + (2 * time * (time - following)) ** 0.5 * noise


def _precise(x: Tensor) -> Tensor:
    """In float64 where the device has it."""
    return x if x.device.type == "mps" else x.double()


def _config_from_shapes(
    shapes: Mapping[str, torch.Size], encoder_head: int, decoder_head: int
) -> dict[str, Any]:
    def layers(prefix: str) -> int:
        return len({key.split(".")[1] for key in shapes if key.startswith(prefix)})

    hidden, dim = shapes["encoder_blocks.0.mlp.fc1_g.weight"]
    places = shapes["encoder_pos_embed_learned"][1]
    return {
        "encoder_embed_dim": dim,
        "encoder_depth": layers("encoder_blocks."),
        "encoder_num_heads": dim // encoder_head,
        "decoder_embed_dim": shapes["decoder_pos_embed_learned"][2],
        "decoder_depth": layers("decoder_blocks."),
        "decoder_num_heads": dim // decoder_head,
        "mlp_ratio": 4.0 if hidden == 8 * dim // 3 else 1.5 * hidden / dim,
        "img_size": 16 * round(places**0.5),
        "vae_embed_dim": shapes["z_proj.weight"][1],
        "class_num": shapes["class_emb.weight"][0] - 1,
    }


GENERATORS.register(
    *(
        Entry(
            name=f"xar-{size.lower()}",
            family="xar",
            config={"tokenizer": "kl16", "preset": size, "cfg": guidance, "num_steps": steps},
            repo="OliverRen/xAR",
            file=f"xAR-{size}.pth",
            license="none stated",
            paper="xAR (arXiv 2502.20388)",
            parameters=parameters,
            figures={"gFID": gfid},
            notes=f"no licence stated, so all rights are reserved; guidance {guidance}, {steps} steps per "
            "cluster; trained on ImageNet; gFID with ADM statistics",
            verified="of a small configuration: velocities 8.9e-6, latents 8.6e-6",
        )
        for size, guidance, steps, gfid, parameters in (
            ("B", 2.7, 40, 1.72, 172.6),
            ("L", 2.3, 50, 1.28, 608.4),
            ("H", 2.2, 50, 1.24, 1186.0),
        )
    )
)
