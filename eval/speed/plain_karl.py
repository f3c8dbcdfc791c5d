"""A straightforward KARL on a tokenizer's own weights: the baseline of its speed.

One image at a time and every token to the end, as the original runs: halted ones stay in the sequence and a
materialised mask keeps them from the others, whose cost is then that of all. It gives the same numbers as
`vistok.models.karl.model`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.karl.config import DEFAULT_TARGET, HALTED
from ...models.karl.model import Karl
from ...tokens import Tokens
from .plain_titok import multihead
from .variants import Variant


class PlainKarl(nn.Module):
    """`encode` and `decode` of a KARL on the same parameters, unoptimised.

    Codes are those of all T places: indices [B, T], -1 where the token is halted, or values [B, T, D], NaN
    there.
    """

    def __init__(self, tokenizer: Karl) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.attention = {
            block: multihead(block.attn)
            for side in (tokenizer.encoder, tokenizer.decoder)
            for block in side.transformer
        }

    def codes(self, tokens: Tokens) -> Tensor:
        """Tokens of the tokenizer as codes of all places."""
        if tokens.indices is not None:
            values, places = tokens.indices.unbind(-1)
            codes = values.new_full((len(values), self.tokenizer.num_tokens), -1)
        else:
            values, places = self.tokenizer.quantizer.split(tokens.latents)
            shape = (len(values), self.tokenizer.num_tokens, values.shape[2])
            codes = values.new_full(shape, torch.nan)
        counts = tokens.lengths.tolist() if tokens.lengths is not None else [places.shape[1]] * len(places)
        for image, count in enumerate(counts):
            codes[image, places[image, :count]] = values[image, :count]
        return codes

    @torch.no_grad()
    def encode(self, images: Tensor, target: float = DEFAULT_TARGET) -> Tensor:
        """Images [B, 3, H, W] → codes."""
        return torch.cat([self._encode(image[None], target) for image in images])

    def _encode(self, image: Tensor, target: float) -> Tensor:
        model = self.tokenizer
        count = model.num_tokens
        grid = torch.cat([model.patch_embed(image), model.base.features(image)], dim=1)
        grid = grid + _positions(model.encoder_positional_embedding, grid.shape[-1])
        condition = model.rec_loss_embeddings[model.target_bins(target, 1)].unsqueeze(1)
        x = torch.cat([condition, grid.flatten(2).transpose(1, 2), model.latent_tokens[:count][None]], dim=1)
        hidden = self._blocks(model.encoder, model.encoder_ln_pre(x))[:, -count:]
        halted = model.halting_mlp(model.encoder_ln_post_halt(hidden)).sigmoid() > HALTED  # [1, T, 1]
        values = model.pre_quantizer_mlp(model.encoder_ln_post(hidden))
        if not model.config.quantize_latent:
            return values.masked_fill(halted, torch.nan)
        return model.quantize.encode(values).masked_fill(halted.squeeze(-1), -1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes → images [B, 3, H, W] in [0, 1]."""
        return torch.cat([self._decode(each[None]) for each in codes]).clamp(0, 1)

    def _decode(self, codes: Tensor) -> Tensor:
        model = self.tokenizer
        side = model.config.image_size // model.config.patch_size
        if model.config.quantize_latent:
            active, values = codes[0] >= 0, model.quantize.decode(codes.clamp(min=0))
        else:
            active, values = ~codes[0, :, 0].isnan(), codes.nan_to_num()
        tokens = model.decoder_embed(values) + model.decoder_latent_tokens_timestep_embed[: codes.shape[1]]
        positions = _positions(model.decoder_positional_embedding, side).flatten(2).transpose(1, 2)
        x = model.decoder.ln_pre(torch.cat([model.decoder_mask_token + positions, tokens], dim=1))
        present = F.pad(active, (side**2, 0), value=True)
        blocked = ~(present[:, None] & present)
        blocked.fill_diagonal_(False)
        x = self._blocks(model.decoder, x, blocked)[:, : side**2]
        grid = model.base.grid(model.decoder.ffn(model.decoder.ln_post(x)))
        return self._pixels(grid.transpose(1, 2).unflatten(2, (side, side)))

    def _blocks(self, half: nn.Module, x: Tensor, blocked: Tensor | None = None) -> Tensor:
        x = x.transpose(0, 1)  # [N, 1, W]
        for block in half.transformer:
            normed = block.ln_1(x)
            x = x + self.attention[block](normed, normed, normed, need_weights=False, attn_mask=blocked)[0]
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        return x.transpose(0, 1)

    def _pixels(self, grid: Tensor) -> Tensor:
        decoder = self.tokenizer.base.decoder
        x = decoder.mid(decoder.conv_in(grid))
        for level in reversed(decoder.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return decoder.conv_out(F.silu(decoder.norm_out(x)))


def _positions(table: Tensor, side: int) -> Tensor:
    """A table [W, 64, 64] at the grid's size, [1, W, side, side]."""
    return F.interpolate(table[None], (side, side), mode="nearest")


def variants(model: Karl, images: Tensor) -> list[Variant]:
    """Encoding, and decoding of all, half and an eighth of the tokens, at places drawn at random."""
    plain, most, batch = PlainKarl(model), model.num_tokens, len(images)
    variants = [
        base := Variant("straightforward", images, plain.encode),
        Variant("vistok", images, lambda x: plain.codes(model.encode(x)), baseline=base),
    ]
    latents, kind = model.latents(images), model.quantizer.kind
    for count in (most, most // 2, most // 8):
        places = torch.rand(batch, most, device=images.device).argsort(1)[:, :count].sort(1).values
        tokens = model.as_tokens(
            model.quantizer.encode(latents.gather(1, places[..., None].expand(-1, -1, latents.shape[2])))
        )
        base = Variant(f"straightforward, {count} active tokens", plain.codes(tokens), decode=plain.decode)
        variants += [
            base,
            Variant(
                f"vistok, {count} active tokens", getattr(tokens, kind), decode=model.decode, baseline=base
            ),
        ]
    return variants
