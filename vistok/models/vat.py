"""VAT: a solid as a few hundred bytes, by residual quantization of a set of latents, scale by scale.

"3D representation in 512-Byte: Variational tokenizer is the key for autoregressive 3D generation" (Zhang et
al., 2024, arXiv 2412.02202). Neither code nor weights nor sizes were published: this is a re-implementation
from the paper. Surface points and learned queries share one sequence; the queries become a Gaussian set of
latents, whose scales are numbers of tokens; from three planes of features follows which places are inside.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..extras import needs
from ..files import atomic_write
from ..nn.transformer import Transformer, initialise
from ..quantizers import VariationalResidualQuantizer
from ..registry import register_family
from ..tokenizer import Tokenizer, TrainingOutput
from ..tokens import Tokens
from .ranges import require_between, require_depths, require_multiple, require_sizes

CHUNK = 2**16  # points of the field that are evaluated at a time


@dataclass(frozen=True)
class VATConfig:
    """Sizes of a tokenizer of shapes; `scales` are numbers of tokens in rising order, up to `num_latents`.

    Points have 3 coordinates and, with `normals`, 3 components of their normals. Planes have `plane_side`
    cells per side, written as patches of `plane_patch` cells.
    """

    num_latents: int = 64
    scales: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    codebook_size: int = 1024
    token_size: int = 16
    normals: bool = True
    bands: int = 6
    width: int = 256
    heads: int = 4
    encoder_depth: int = 6
    decoder_depth: int = 6
    plane_side: int = 32
    plane_patch: int = 4
    plane_channels: int = 16
    field_width: int = 64
    kl_weight: float = 1e-4
    commitment_cost: float = 0.25
    scale_dropout: float = 0.5

    def __post_init__(self) -> None:
        require_sizes(
            self,
            *("num_latents", "scales", "codebook_size", "token_size", "bands", "width", "heads"),
            *("plane_side", "plane_patch", "plane_channels", "field_width"),
        )
        require_depths(self, "encoder_depth", "decoder_depth")
        require_multiple(self, "width", "heads")
        require_multiple(self, "plane_side", "plane_patch")
        require_between(self, ("scale_dropout",), 0, 1)


@dataclass(frozen=True)
class Mesh:
    """Triangles: `vertices` float32 [V, 3] in [-1, 1], `faces` int32 [F, 3]."""

    vertices: np.ndarray
    faces: np.ndarray

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a binary PLY file. Raises ValueError for another ending."""
        path = Path(path)
        if path.suffix.lower() != ".ply":
            raise ValueError(f"{path.name} is not a .ply file; meshes are written as PLY")
        header = (
            f"ply\nformat binary_little_endian 1.0\nelement vertex {len(self.vertices)}\n"
            "property float x\nproperty float y\nproperty float z\n"
            f"element face {len(self.faces)}\nproperty list uchar int vertex_indices\nend_header\n"
        )
        faces = np.empty(len(self.faces), dtype=[("count", "u1"), ("corners", "<i4", (3,))])
        faces["count"], faces["corners"] = 3, self.faces
        with atomic_write(path) as temporary:
            body = self.vertices.astype("<f4").tobytes() + faces.tobytes()
            Path(temporary).write_bytes(header.encode("ascii") + body)


@register_family("vat")
class VAT(Tokenizer):
    """VAT: surface points [B, P, 3 or 6] in [-1, 1] ↔ tokens ↔ which places are inside.

    Whole scales decode alone (`prefix_lengths`), coarse shapes first. `decode` returns the field on a grid,
    `occupancy` at any points, `meshes` its surface.
    """

    config_class = VATConfig
    ordered = True
    modality = "shape"

    def __init__(self, config: VATConfig) -> None:
        super().__init__(config)
        width, cells = config.width, config.plane_side // config.plane_patch
        self.quantizer = VariationalResidualQuantizer(
            config.codebook_size,
            config.token_size,
            config.num_latents,
            config.scales,
            kl_weight=config.kl_weight,
            commitment_cost=config.commitment_cost,
            dropout=config.scale_dropout,
        )
        self.num_tokens = sum(config.scales)
        features = 3 + 6 * config.bands + 3 * config.normals
        self.point_embed = nn.Linear(features, width)
        self.latent_queries = nn.Parameter(0.02 * torch.randn(config.num_latents, width))
        self.encoder = Transformer(width, config.encoder_depth, config.heads)
        self.encoder_norm = nn.LayerNorm(width)
        self.to_moments = nn.Linear(width, 2 * config.token_size)
        self.from_latents = nn.Linear(config.token_size, width)
        self.latent_positions = nn.Parameter(0.02 * torch.randn(config.num_latents, width))
        self.plane_queries = nn.Parameter(0.02 * torch.randn(3 * cells**2, width))
        self.decoder = Transformer(width, config.decoder_depth, config.heads)
        self.decoder_norm = nn.LayerNorm(width)
        self.to_planes = nn.Linear(width, config.plane_patch**2 * config.plane_channels)
        self.field = nn.Sequential(
            nn.Linear(config.plane_channels, config.field_width),
            nn.GELU(),
            nn.Linear(config.field_width, config.field_width),
            nn.GELU(),
            nn.Linear(config.field_width, 1),
        )
        self.apply(initialise)
        for layer in self.field:  # trained from scratch at full scale
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    @property
    def prefix_lengths(self) -> Sequence[int]:
        """Numbers of codes at which a scale ends."""
        return self.quantizer.lengths

    # Shapes ↔ tokens ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens | Tensor,
        *,
        resolution: int = 64,
        condition: None = None,
        steps: int | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tokens → the probability of being inside, float32 [B, R, R, R] over (x, y, z) in [-1, 1], at cell
        centres. `resolution` R is 2 to 512."""
        self.check_decoding(condition=condition, steps=steps, guidance=guidance)
        if not 2 <= resolution <= 512:
            raise ValueError(f"resolution is {resolution}; it is 2 to 512 cells per side")
        line = (torch.arange(resolution, device=self.device) + 0.5) * (2 / resolution) - 1
        grid = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).view(-1, 3)
        planes = self._planes_of(tokens)
        field = planes.new_empty(len(planes), len(grid), dtype=torch.float32)
        for part in torch.arange(len(grid), device=self.device).split(CHUNK):
            field[:, part] = self.logits(planes, grid[part].expand(len(planes), -1, -1)).float()
        return field.sigmoid_().view(-1, resolution, resolution, resolution)

    @torch.no_grad()
    def occupancy(self, tokens: Tokens | Tensor, points: Tensor) -> Tensor:
        """Tokens, and points [B, M, 3] → the probability that each is inside, float32 [B, M]."""
        return self.logits(self._planes_of(tokens), points.to(self.device, self.dtype)).float().sigmoid()

    def meshes(self, tokens: Tokens | Tensor, resolution: int = 64) -> list[Mesh]:
        """Tokens → the surface of each shape, by marching cubes; empty where nothing is inside."""
        with needs("scikit-image", "train", "marching cubes"):
            from skimage.measure import marching_cubes

        meshes = []
        for field in self.decode(tokens, resolution=resolution).cpu().numpy():
            padded = np.pad(field, 1)  # closes surfaces at the border
            if padded.max() <= 0.5:
                meshes.append(Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32)))
                continue
            vertices, faces, _, _ = marching_cubes(padded, 0.5)
            place = (vertices - 0.5) * (2 / resolution) - 1
            meshes.append(Mesh(place.astype(np.float32), faces.astype(np.int32)))
        return meshes

    def forward(self, points: Tensor, queries: Tensor) -> TrainingOutput:
        """One pass with gradients; `images` are the logits [B, M] of being inside at `queries` [B, M, 3]."""
        quantized = self.quantizer(self.latents(points))
        return TrainingOutput(
            self.logits(self.planes(quantized.latents), queries), quantized.codes, quantized.losses
        )

    # Parts --------------------------------------------------------------------------------------------------

    def latents(self, points: Tensor) -> Tensor:
        """Points [B, P, 3 or 6] → moments [B, N, 2C]."""
        place = points[..., :3]
        powers = torch.pi * 2.0 ** torch.arange(self.config.bands, device=place.device, dtype=place.dtype)
        waves = (place[..., None] * powers).flatten(2)  # [B, P, 3 · bands]
        x = self.point_embed(torch.cat([points[..., :3], waves.sin(), waves.cos(), points[..., 3:]], -1))
        x = torch.cat([self.latent_queries.expand(len(x), -1, -1), x], 1)
        return self.to_moments(self.encoder_norm(self.encoder(x, slice(0, len(self.latent_queries)))))

    def planes(self, latents: Tensor) -> Tensor:
        """Latents [B, N, C] → feature planes (xy, xz, yz) [B, 3, F, S, S]."""
        config = self.config
        x = self.from_latents(latents) + self.latent_positions
        x = torch.cat([self.plane_queries.expand(len(x), -1, -1), x], 1)
        x = self.to_planes(self.decoder_norm(self.decoder(x, slice(0, len(self.plane_queries)))))
        side, patch = config.plane_side // config.plane_patch, config.plane_patch
        x = x.unflatten(1, (3, side, side)).unflatten(4, (patch, patch, config.plane_channels))
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def logits(self, planes: Tensor, points: Tensor) -> Tensor:
        """Planes [B, 3, F, S, S] and points [B, M, 3] in [-1, 1] → logits of being inside [B, M]."""
        pairs = torch.stack([points[..., axes] for axes in ((0, 1), (0, 2), (1, 2))], 1)  # [B, 3, M, 2]
        where = pairs.flatten(0, 1)[:, :, None].to(planes.dtype)
        read = F.grid_sample(planes.flatten(0, 1), where, padding_mode="border", align_corners=False)[..., 0]
        return self.field(read.unflatten(0, (-1, 3)).sum(1).transpose(1, 2))[..., 0]

    def _planes_of(self, tokens: Tokens | Tensor) -> Tensor:
        if not isinstance(tokens, Tokens) or tokens.lengths is None:
            return self.planes(self.dequantize(tokens)[0])
        planes = {}
        for length in tokens.lengths.unique().tolist():
            rows = (tokens.lengths == length).nonzero().squeeze(1).tolist()
            latents, _ = self.dequantize(tokens.indices[rows, :length])
            planes |= dict(zip(rows, self.planes(latents), strict=True))
        return torch.stack([planes[row] for row in range(len(planes))])

    def check_inputs(self, points: Tensor) -> Tensor:
        """Surface points [B, P, 3], with normals [B, P, 6], in this model's dtype and on its device; their
        order does not matter.

        Raises:
            ValueError: points of another shape or type, outside [-1, 1] or not finite, normals that are not
                of length 1.
        """
        width = 6 if self.config.normals else 3
        shape = list(points.shape) if isinstance(points, Tensor) else type(points).__name__
        if not isinstance(shape, list) or len(shape) != 3 or shape[2] != width or not shape[1]:
            raise ValueError(
                f"points have shape {shape}; {self.label} takes shapes as surface points [B, P, {width}]"
                + (", places and unit normals" if width == 6 else "")
            )
        if not points.is_floating_point():
            raise ValueError(f"points are {points.dtype}; {self.label} takes floats in [-1, 1]")
        if points.numel() and not bool((points[..., :3].abs() <= 1 + 1e-3).all()):  # NaN fails, too
            raise ValueError(
                "points reach beyond [-1, 1] or are not finite; centre the shape and scale it into the cube"
            )
        if width == 6 and points.numel():
            length = points[..., 3:].float().norm(dim=-1)
            if not bool(((length - 1).abs() < 0.05).all()):
                raise ValueError(
                    f"normals have lengths from {float(length.min()):.3g} to {float(length.max()):.3g}; "
                    "divide them by their length"
                )
        return points.to(self.device, self.dtype)
