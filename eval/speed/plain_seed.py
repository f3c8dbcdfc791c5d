"""A straightforward SEED encoder on a tokenizer's own weights: the baseline of its speed.

Linear layers and attention op by op, with materialised attention. Decoding is the diffusion model's work and
is not timed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.seed import SEED
from ...nn.qformer import QFormerAttention, QFormerLayer
from ...nn.vit import ViTBlock
from .variants import Variant

MASKED = -1e4


class PlainSEED(nn.Module):
    """`encode` of a SEED tokenizer on the same parameters, unoptimised."""

    def __init__(self, tokenizer: SEED) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → codes [B, K]."""
        model, vit = self.tokenizer, self.tokenizer.visual_encoder
        x = vit.patch_embed.proj((images - model.mean) / model.std).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed
        for block in vit.blocks:
            x = _block(block, x)
        memory = model.ln_vision(x)
        bert, count = model.Qformer.bert, model.num_tokens
        mask = torch.zeros(count, count, device=images.device)
        if model.config.causal:
            mask = mask + torch.full_like(mask, MASKED).triu(1)
        x = bert.embeddings.LayerNorm(model.query_tokens.expand(len(images), -1, -1))
        for layer in bert.encoder.layer:
            x = _layer(layer, x, memory, mask)
        return model.quantize.encode(model.encode_task_layer(x))


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Queries [B, K, D] over keys and values [B, N, D] → [B, K, D]."""
    split = [x.reshape(*x.shape[:2], heads, -1).permute(0, 2, 1, 3) for x in (query, key, value)]
    scores = split[0] @ split[1].transpose(2, 3) / split[0].shape[3] ** 0.5
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1) @ split[2]).permute(0, 2, 1, 3).reshape(query.shape)


def _block(block: ViTBlock, x: Tensor) -> Tensor:
    attn = block.attn
    bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    rows = F.linear(block.norm1(x), attn.qkv.weight, bias).chunk(3, dim=-1)
    x = x + attn.proj(_attend(*rows, attn.heads))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def _read(part: QFormerAttention, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
    reading, output = part.self, part.output
    rows = reading.query(x), reading.key(memory), reading.value(memory)
    return output.LayerNorm(output.dense(_attend(*rows, reading.heads, mask)) + x)


def _layer(layer: QFormerLayer, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
    x = _read(layer.attention, x, x, mask)
    if hasattr(layer, "crossattention"):
        x = _read(layer.crossattention, x, memory)
    hidden = F.gelu(layer.intermediate_query.dense(x))
    return layer.output_query.LayerNorm(layer.output_query.dense(hidden) + x)


def variants(model: SEED, images: Tensor) -> list[Variant]:
    """Encoding, straightforward and as it is."""
    base = Variant("straightforward", images, PlainSEED(model).encode)
    return [base, Variant("vistok", images, lambda x: model.encode(x).indices, baseline=base)]
