"""A straightforward FlexTok on a tokenizer's own weights: the baseline of its speed.

Images go one by one, every block computes every row under a materialised mask, all registers take part in
every step, and each call projects the registers and computes the modulations anew. It gives the same numbers
as `vistok.models.flextok.model`, slower.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.flextok.model import GUIDANCE, FlexTok
from ...models.flextok.network import timestep_features
from ...models.flextok.vae import vae_config
from .variants import Variant


def attention_mask(mode: Literal["full", "causal", "causal_last"], patches: int, registers: int) -> Tensor:
    """Which rows (patches, then registers) attend to which columns, bool [S, S]."""
    size = patches + registers
    mask = torch.ones(size, size, dtype=torch.bool)
    if mode == "full":
        return mask
    mask = mask.tril()
    if mode == "causal_last":
        mask[:, :patches] = True
    return mask


GUIDED_STEPS = 4  # of a flow; the VAE's share of the time falls, and the ratio rises, with more


class PlainFlexTok(nn.Module):
    """`encode` and `decode` of a FlexTok on the same parameters, unoptimised."""

    def __init__(self, tokenizer: FlexTok) -> None:
        from diffusers import AutoencoderKL

        super().__init__()
        self.tokenizer = tokenizer
        # A VAE as diffusers makes it, in PyTorch's default layout.
        own = tokenizer.autoencoder.vae
        self.vae = AutoencoderKL(**vae_config(tokenizer.config)).to(own.device)
        self.vae.load_state_dict(own.state_dict())
        self.vae.eval()
        grid = (tokenizer.config.latent_size // tokenizer.config.patch_size) ** 2
        self.patches = grid
        self.masks = {
            mode: attention_mask(mode, grid, tokenizer.num_tokens).to(own.device)
            for mode in ("full", "causal_last")
        }

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → codes [B, K]."""
        return torch.cat([self._encode(image[None]) for image in images])

    def _encode(self, image: Tensor) -> Tensor:
        model, parts = self.tokenizer, self.tokenizer.encoder.module_dict
        latents = self.vae.encode(2 * image - 1).latent_dist.mode() * model.autoencoder.scaling_factor
        registers = parts["enc_register_module"].values
        x = torch.cat([self._patches(parts, "enc_patch_emb", "enc_posemb_module", latents), registers])[None]
        for block in parts["enc_transformer"].blocks:
            x = x + self._attention(block.attn, _norm(x), self.masks["causal_last"])
            x = x + _mlp(block.mlp, _norm(x))
        return model.quantizer.encode(parts["enc_to_latents"].proj(_norm(x[:, self.patches :])))

    @torch.no_grad()
    def decode(self, codes: Tensor, noise: Tensor, steps: int, guidance: float) -> Tensor:
        """Codes [B, K], noise [B, C, h, w] → images [B, 3, H, W] in [0, 1], with normalized guidance."""
        images = [
            self._decode(each[None], start[None], steps, guidance)
            for each, start in zip(codes, noise, strict=True)
        ]
        return torch.cat(images).clamp(0, 1)

    def _decode(self, codes: Tensor, x: Tensor, steps: int, guidance: float) -> Tensor:
        average = torch.zeros_like(x)
        for step in range(steps, 0, -1):
            time = step / steps
            v = self._velocity(codes, x, time, null=False)
            if guidance != 1:
                average = v - self._velocity(codes, x, time, null=True) - 0.5 * average
                difference = average * (2.5 / average.norm()).clamp(max=1)
                direction = v.double() / v.double().norm()
                parallel = (difference.double() * direction).sum() * direction
                v = v + (guidance - 1) * (difference.double() - parallel).float()
            x = x - v / steps
        return (self.vae.decode(x / self.tokenizer.autoencoder.scaling_factor).sample + 1) / 2

    def _velocity(self, codes: Tensor, x: Tensor, time: float, null: bool) -> Tensor:
        model, parts = self.tokenizer, self.tokenizer.decoder.module_dict
        registers = parts["dec_from_latents"].proj(model.quantizer.decode(codes)[0])
        registers = registers + parts["dec_registers_posemb_module"].values[0, 0].T[: len(registers)]
        masked = parts["dec_nested_dropout"].values.expand(model.num_tokens - len(registers), -1)
        registers = torch.cat([registers, masked])
        if null:
            registers = parts["dec_latent_dropout"].values.expand_as(registers)
        patches = self._patches(parts, "dec_noise_patch_emb", "dec_patches_posemb_module", x)
        rows = torch.cat([patches, registers])[None]
        embedder = parts["dec_time_embedder"]
        times = torch.tensor([time], device=x.device)
        embedded = embedder.mlp(timestep_features(times, embedder.max_timestep, embedder.frequencies))
        for block in parts["dec_transformer"].blocks:
            modulation = block.adaLN_modulation(embedded).view(2, 6, -1)
            modulation = modulation.repeat_interleave(torch.tensor([self.patches, model.num_tokens]), dim=0)
            gate_a, gate_m, shift_a, scale_a, shift_m, scale_m = modulation.unbind(1)
            attended = self._attention(block.attn, _norm(rows) * (1 + scale_a) + shift_a, self.masks["full"])
            rows = rows + gate_a * attended
            rows = rows + gate_m * _mlp(block.mlp, _norm(rows) * (1 + scale_m) + shift_m)
        head = parts["dec_to_patches"]
        shift, scale = head.adaLN_modulation(embedded).view(2, -1)
        rows = head.proj(_norm(rows[:, : self.patches]) * (1 + scale) + shift)
        size, height = model.config.patch_size, model.config.latent_size // model.config.patch_size
        rows = rows.view(height, height, size, size, -1).permute(4, 0, 2, 1, 3)
        return rows.reshape(x.shape)

    def _patches(self, parts: Any, embedding: str, positions: str, latents: Tensor) -> Tensor:
        size = self.tokenizer.config.patch_size
        grid = latents.shape[2] // size
        cells = latents[0].view(-1, grid, size, grid, size).permute(1, 3, 2, 4, 0)
        table = parts[positions].posembs[0].permute(1, 2, 0)
        return (parts[embedding].patch_proj(cells.reshape(grid, grid, -1)) + table).flatten(0, 1)

    def _attention(self, attention: Any, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            layer(x).view(1, x.shape[1], -1, attention.head_dim)
            for layer in (attention.wq, attention.wk, attention.wv)
        )
        heads = (each.transpose(1, 2) for each in (_norm(query), _norm(key), value))
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask[None, None], scale=8 / attention.head_dim)
        return attention.proj(out.transpose(1, 2).reshape(x.shape))


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    return mlp.fc2(F.silu(mlp.fc1(x)) * mlp.fc3(x))


def variants(model: FlexTok, images: Tensor) -> list[Variant]:
    """Encoding and guided decoding of all tokens and of an eighth, and decoding one image at many lengths."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():  # else all tokens are the same
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    plain, batch, most = PlainFlexTok(model), len(images), model.num_tokens
    few, side = max(1, most // 8), model.config.latent_size
    variants = [
        base := Variant(f"straightforward, {most} tokens", images, plain.encode),
        optimised := Variant(
            f"vistok, {most} tokens", images, lambda x: model.encode(x).indices, baseline=base
        ),
        Variant(f"vistok, {few} tokens", images, lambda x: model.encode(x, few).indices, baseline=optimised),
    ]
    codes, options = model.encode(images).indices, {"steps": GUIDED_STEPS, "guidance": GUIDANCE}
    noise = torch.randn(batch, model.config.latent_channels, side, side, device=images.device)
    options["noise"] = noise
    for count in (most, few):
        kept, setting = codes[:, :count], f"{count} tokens, {GUIDED_STEPS} guided steps"
        base = Variant(f"straightforward, {setting}", kept, decode=partial(plain.decode, **options))
        optimised = Variant(
            f"vistok, {setting}", kept, decode=partial(model.decode, **options), baseline=base
        )
        variants += [base, optimised]
    # As many prefixes of the first image as there are images, all from one noise.
    copies, shared = codes[:1].expand(batch, -1), noise[:1].expand(batch, -1, -1, -1)
    lengths = [round(most ** ((row + 1) / batch)) for row in range(batch)]

    def alone(x: Tensor) -> Tensor:
        prefixes = [row[:, :count] for row, count in zip(x.split(1), lengths, strict=True)]
        return torch.cat([model.decode(each, **options | {"noise": shared[:1]}) for each in prefixes])

    def together(x: Tensor) -> Tensor:
        tokens = dataclasses.replace(model.as_tokens(x), lengths=torch.tensor(lengths))
        return model.decode(tokens, **options | {"noise": shared})

    setting = f"vistok, prefixes of {', '.join(map(str, lengths))}"
    base = Variant(f"{setting}, one call per prefix", copies, decode=alone)
    return [*variants, base, Variant(f"{setting}, one batch", copies, decode=together, baseline=base)]
