"""A straightforward TiTok on a tokenizer's own weights: the baseline of its speed.

Sequence-first attention modules with a transpose around them, every row of every block computed, convolutions
and normalisations op by op in their input's layout. This is how the original research code runs; it gives
the same numbers as `vistok.models.titok`, slower.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.titok import TiTok


class PlainTiTok(nn.Module):
    """`encode` and `decode` of a TiTok on the same parameters, unoptimised."""

    def __init__(self, tokenizer: TiTok) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.attention = {
            block: multihead(block.attn)
            for side in (tokenizer.encoder, tokenizer.decoder)
            for block in side.transformer
        }
        # Convolution weights in PyTorch's default layout, as a plain module would hold them.
        self.kernels = {
            module: module.weight.detach().clone(memory_format=torch.contiguous_format)
            for module in tokenizer.modules()
            if isinstance(module, nn.Conv2d)
        }

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → codes [B, K]."""
        model, encoder = self.tokenizer, self.tokenizer.encoder
        batch = len(images)
        x = self._conv(encoder.patch_embed, images)
        x = x.reshape(batch, x.shape[1], -1).permute(0, 2, 1)
        x = torch.cat([encoder.class_embedding.unsqueeze(0).expand(batch, -1, -1), x], dim=1)
        x = x + encoder.positional_embedding
        latents = model.latent_tokens.unsqueeze(0).expand(batch, -1, -1)
        latents = latents + encoder.latent_token_positional_embedding
        x = self._blocks(encoder, torch.cat([x, latents], dim=1))
        x = encoder.ln_post(x[:, encoder.patches + 1 :])
        if encoder.is_legacy:
            x = x.reshape(batch, x.shape[2], x.shape[1], 1)
        else:
            x = x.permute(0, 2, 1).unsqueeze(-1)
        z = self._conv(encoder.conv_out, x).squeeze(-1).permute(0, 2, 1)
        return model.quantize.encode(z)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, K] → images [B, 3, H, W] in [0, 1]."""
        model, decoder = self.tokenizer, self.tokenizer.decoder
        x = decoder.decoder_embed(model.quantize.decode(codes))
        batch = len(x)
        masks = decoder.mask_token.repeat(batch, decoder.side**2, 1)
        masks = torch.cat([decoder.class_embedding.unsqueeze(0).expand(batch, -1, -1), masks], dim=1)
        masks = masks + decoder.positional_embedding
        x = self._blocks(decoder, torch.cat([masks, x + decoder.latent_token_positional_embedding], dim=1))
        x = decoder.ln_post(x[:, 1 : 1 + decoder.side**2])
        x = x.permute(0, 2, 1).reshape(batch, -1, decoder.side, decoder.side).contiguous()
        for layer in decoder.ffn:
            x = self._conv(layer, x) if isinstance(layer, nn.Conv2d) else layer(x)
        if not decoder.is_legacy:
            p = decoder.patch_size
            x = x.reshape(batch, p, p, 3, decoder.side, decoder.side).permute(0, 3, 4, 1, 5, 2)
            x = x.reshape(batch, 3, decoder.side * p, decoder.side * p)
            return self._conv(decoder.conv_out, x).clamp(0, 1)
        x = torch.einsum("nchw,cd->ndhw", x.softmax(1), model.pixel_quantize.embedding.weight)
        return self._pixels(x.contiguous()).clamp(0, 1)

    def _conv(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernels[conv], conv.bias, conv.stride, conv.padding)

    def _blocks(self, side: nn.Module, x: Tensor) -> Tensor:
        x = side.ln_pre(x).permute(1, 0, 2)  # [L, B, W]
        for block in side.transformer:
            normed = block.ln_1(x)
            x = x + self.attention[block](normed, normed, normed, need_weights=False)[0]
            x = x + block.mlp(block.ln_2(x))
        return x.permute(1, 0, 2)

    def _pixels(self, x: Tensor) -> Tensor:
        decoder = self.tokenizer.pixel_decoder
        x = self._conv(decoder.conv_in, x)
        for block in decoder.mid:
            x = self._residual(block, x)
        for level in reversed(decoder.up):
            for block in level.block:
                x = self._residual(block, x)
            if hasattr(level, "upsample_conv"):
                x = self._conv(level.upsample_conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self._conv(decoder.conv_out, F.silu(decoder.norm_out(x)))

    def _residual(self, block: nn.Module, x: Tensor) -> Tensor:
        h = self._conv(block.conv1, F.silu(block.norm1(x)))
        h = self._conv(block.conv2, F.silu(block.norm2(h)))
        return h + self._conv(block.nin_shortcut, h) if hasattr(block, "nin_shortcut") else x + h


def multihead(attention: nn.Module) -> nn.MultiheadAttention:
    """`torch.nn.MultiheadAttention` (sequence-first) on the same parameters."""
    width = attention.in_proj_weight.shape[1]
    with torch.device("meta"):
        module = nn.MultiheadAttention(width, attention.heads)
    module.load_state_dict(attention.state_dict(), assign=True)
    return module.eval()


def baseline(model: TiTok) -> PlainTiTok:
    """The straightforward form of a TiTok."""
    return PlainTiTok(model)
