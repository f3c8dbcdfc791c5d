"""The parts of DualToken: projections, quantizer, towers' heads and the CNN."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.convolution import GridAttention, ResidualBlock, group_norm
from ...nn.cpu.batching import in_chunks
from ...nn.cpu.linear import linear
from ...nn.vision_transformer import SiglipLayer, Sizes, run_layers
from ...quantizers import SharedResidualQuantizer
from ..gigatok import ReadingAttention
from .config import CodesConfig, DrawConfig, TextConfig, TowerConfig

EPSILON = 1e-6  # of the tower's norms and of the last norm of a projection's MLP


class Projection(nn.Module):
    """A transformer block whose width changes: y = proj(norm₃ x) + attention(norm₁ x), then y + mlp(norm₂ y).

    Inwards (`causal` off) heads are as wide as a code, and their mean is the result. Outwards each row reads
    the rows before it, and the heads lie side by side.
    """

    def __init__(self, inputs: int, outputs: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        width = max(inputs, outputs)
        self.heads, self.causal = heads, causal
        self.norm1, self.norm3, self.norm2 = nn.LayerNorm(inputs), nn.LayerNorm(inputs), nn.LayerNorm(outputs)
        self.proj = nn.Linear(inputs, outputs)
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(inputs, 3 * width, bias=False)
        self.attn.q_bias, self.attn.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.attn.register_buffer("zero_k_bias", torch.zeros(width))
        self.attn.proj = nn.Linear(outputs, outputs)
        self.mlp = nn.Module()
        self.mlp.norm = nn.LayerNorm(outputs, EPSILON)
        self.mlp.w0, self.mlp.w1 = (nn.Linear(outputs, 2 * outputs) for _ in range(2))
        self.mlp.w2 = nn.Linear(2 * outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, inputs] → [B, K, outputs]."""
        y = linear(self.norm3(x), self.proj.weight, self.proj.bias) + self._attend(self.norm1(x))
        hidden, mlp = self.mlp.norm(self.norm2(y)), self.mlp
        gate = F.gelu(linear(hidden, mlp.w0.weight, mlp.w0.bias), approximate="tanh")
        return y + linear(gate * linear(hidden, mlp.w1.weight, mlp.w1.bias), mlp.w2.weight, mlp.w2.bias)

    def _attend(self, x: Tensor) -> Tensor:
        attn = self.attn
        bias = torch.cat([attn.q_bias, attn.zero_k_bias, attn.v_bias])
        rows = linear(x, attn.qkv.weight, bias).chunk(3, -1)
        heads = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in rows)
        attended = F.scaled_dot_product_attention(*heads, is_causal=self.causal)  # [B, h, K, d]
        attended = attended.transpose(1, 2).flatten(2) if self.causal else attended.mean(1)
        return linear(attended, attn.proj.weight, attn.proj.bias)


class DualQuantizer(SharedResidualQuantizer):
    """Residual codes with one codebook; its table has one more row, which pads and is never matched."""

    def __init__(self, config: CodesConfig) -> None:
        size, dim = config.n_embed, config.embed_dim
        super().__init__(
            size, dim, config.depth, decay=config.decay, restart_unused=config.restart_unused_codes
        )
        table = torch.cat([torch.empty(size, dim).uniform_(-1 / size, 1 / size), torch.zeros(1, dim)])
        self.codebooks = nn.ModuleList()
        for _ in range(config.depth):
            book = nn.Module()
            book.register_buffer("weight", table.clone())
            book.register_buffer("cluster_size_ema", torch.ones(size))
            book.register_buffer("embed_ema", table[:-1].clone())
            self.codebooks.append(book)

    def books(self) -> nn.ModuleList:
        """The codebooks, one per depth."""
        return self.codebooks

    def tables(self, book: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, counts and sums of a codebook."""
        return book.weight[:-1], book.cluster_size_ema, book.embed_ema


def sizes_of(tower: TowerConfig | TextConfig) -> Sizes:
    """The sizes of a tower's layers."""
    return Sizes(
        tower.hidden_size,
        tower.num_hidden_layers,
        tower.num_attention_heads,
        tower.intermediate_size,
        EPSILON,
        tanh=True,
    )


class PoolingHead(nn.Module):
    """SigLIP's head: a learned probe reads the tokens, then an MLP beside a shortcut."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.probe = nn.Parameter(torch.randn(1, 1, width))
        self.attention = ReadingAttention(width, config.num_attention_heads)
        self.layernorm = nn.LayerNorm(width, EPSILON)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(width, config.intermediate_size)
        self.mlp.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] → a feature [B, D]."""
        pooled = self.attention(self.probe.expand(len(x), -1, -1), x, x)
        hidden = linear(self.layernorm(pooled), self.mlp.fc1.weight, self.mlp.fc1.bias)
        hidden = F.gelu(hidden, approximate="tanh")
        return (pooled + linear(hidden, self.mlp.fc2.weight, self.mlp.fc2.bias))[:, 0]


class TextTower(nn.Module):
    """SigLIP's text encoder: token ids [B, L] → the feature of the last place [B, D]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        sizes = sizes_of(config)
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.token_embedding = nn.Embedding(config.vocab_size, width)
        self.embeddings.position_embedding = nn.Embedding(config.max_position_embeddings, width)
        self.encoder.layers = nn.ModuleList(SiglipLayer(sizes) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(width, EPSILON)
        self.head = nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, L] → [B, D]."""
        places = self.embeddings.position_embedding.weight[: ids.shape[1]]
        x = self.embeddings.token_embedding(ids) + places
        return self.head(self.final_layer_norm(run_layers(self.encoder.layers, x)[:, -1]))


class BeforeDrawing(ResidualBlock):
    """From the tower's width to the CNN's: a residual block whose first convolution is 1×1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 1)


class DualTokenDecoder(nn.Module):
    """The CNN of VQGAN: a map [B, C, h, w] → images [B, 3, H, W] in about [-1, 1]."""

    def __init__(self, config: DrawConfig) -> None:
        super().__init__()
        widths = [config.ch * multiplier for multiplier in config.ch_mult]
        deepest = widths[-1]
        self.conv_in = nn.Conv2d(config.decoder_in_channels, deepest, 3, padding=1)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = (ResidualBlock(deepest, deepest) for _ in range(2))
        self.mid.attn_1 = GridAttention(deepest)
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[min(level + 1, len(widths) - 1)]
            part = nn.Module()
            inputs = [before] + [width] * config.num_res_blocks
            part.block = nn.ModuleList(ResidualBlock(each, width) for each in inputs)
            attends = config.resolution // 2**level in config.attn_resolutions
            part.attn = nn.ModuleList(GridAttention(width) for _ in (inputs if attends else ()))
            if level:
                part.upsample = nn.Module()
                part.upsample.conv = nn.Conv2d(width, width, 3, padding=1)
            self.up.append(part)
        self.norm_out, self.conv_out = group_norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, grid: Tensor) -> Tensor:
        """[B, C, h, w] → [B, 3, H, W]."""
        cells = grid.shape[2] * grid.shape[3]
        return in_chunks(self._draw, grid, cells * 4 ** (len(self.up) - 1))

    def _draw(self, grid: Tensor) -> Tensor:
        x = self.mid.block_1(self.conv_in(grid))
        x = self.mid.block_2(self.mid.attn_1(x))
        for part in reversed(self.up):
            for number, block in enumerate(part.block):
                x = block(x)
                if len(part.attn):
                    x = part.attn[number](x)
            if hasattr(part, "upsample"):
                x = part.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))
