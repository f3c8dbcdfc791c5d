"""The head by which a language model draws one latent at a time: a rectified flow per token.

A generator hands the state of its language model at a place to `FlowHead.sample`, and the drawn latent,
normalised as `MingTok.encode` gives it, to `MingTok.stream`. (Ming-UniVision, 2025, arXiv 2510.06590.)
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.flow import noised
from ...nn.vit import EPSILON
from .config import FlowHeadConfig, hidden_width
from .network import SwiGLU

FREQUENCIES = 128  # of the time embedding, each as cosine and sine
TIME_SCALE = 1000.0


class TimeEmbedding(nn.Module):
    """Times [B] in [0, 1] → [B, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        """See the class."""
        wide = times.to(torch.promote_types(times.dtype, torch.float32))
        powers = torch.arange(FREQUENCIES, device=times.device, dtype=wide.dtype) / FREQUENCIES
        angles = TIME_SCALE * wide[:, None] * 10_000.0**-powers
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class FlowBlock(nn.Module):
    """A gated feed-forward layer whose input is shifted and scaled, and whose output is gated, by the
    condition."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, EPSILON)
        self.mlp = SwiGLU(width, hidden_width(width, ratio))
        self.adaLN_modulation = _modulation(width, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Rows and conditions [B, 1, W] → [B, 1, W]."""
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """Shift, scale and projection to the channels of a latent."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Rows and conditions [B, 1, W] → [B, 1, C]."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, -1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + scale) + shift)


class FlowNetwork(nn.Module):
    """Noisy latents [B, C], times [B] in [0, 1] and conditions [B, Z] → velocities, data - noise, [B, C]."""

    def __init__(self, config: FlowHeadConfig) -> None:
        super().__init__()
        width = config.width
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(config.z_channels, width)
        self.input_proj = nn.Linear(config.target_channels, width)
        self.res_blocks = nn.ModuleList(FlowBlock(width, config.mlp_mult) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.target_channels)

    def forward(self, x: Tensor, times: Tensor, conditions: Tensor) -> Tensor:
        """See the class."""
        condition = (self.time_embed(times) + self.cond_embed(conditions)).unsqueeze(1)
        x = self.input_proj(x).unsqueeze(1)
        for block in self.res_blocks:
            x = block(x, condition)
        return self.final_layer(x, condition).squeeze(1)


class FlowHead(nn.Module):
    """Draws latents from noise under conditions; see the module."""

    def __init__(self, config: FlowHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.net = FlowNetwork(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.net.time_embed.mlp[0], self.net.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        final = self.net.final_layer
        silent = [block.adaLN_modulation[1] for block in self.net.res_blocks]
        for layer in [*silent, final.adaLN_modulation[1], final.linear]:
            nn.init.zeros_(layer.weight)

    def loss(
        self, latents: Tensor, conditions: Tensor, times: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Mean squared error of the velocity at latents [B, C], normalised, under conditions [B, Z].

        `times` [B] are uniform on 0..1 and `noise` [B, C] normal where they are not given.
        """
        noise = torch.randn_like(latents) if noise is None else noise
        times = torch.rand(len(latents), device=latents.device) if times is None else times
        velocity = self.net(noised(latents, noise, times.to(latents)), times, conditions)
        return F.mse_loss(velocity, latents - noise)

    @torch.no_grad()
    def sample(
        self,
        conditions: Tensor,
        noise: Tensor,
        *,
        unconditional: Tensor | None = None,
        image_conditions: Tensor | None = None,
        guidance: float = 3.0,
        image_guidance: float = 1.1,
        temperature: float = 1.0,
        steps: int | None = None,
        shift: float = 1.0,
        renormalise: bool = False,
    ) -> Tensor:
        """Conditions [B, Z] and standard normal noise [B, C] → normalised latents [B, C].

        With `unconditional` [B, Z] the velocity is v_u + guidance · (v_c - v_u). With `image_conditions`
        [B, Z] too, which have the image but not the text, it is v_u + image_guidance · (v_i - v_u) +
        guidance · (v_c - v_i). `renormalise` shortens it to the length of v_c. `temperature` multiplies the
        noise, `steps` are Euler steps (the configuration's by default), and a `shift` above 1 puts more of
        them near the noise.

        Raises:
            ValueError: tensors whose shapes do not fit, `image_conditions` without `unconditional`, fewer
                than one step, a shift or a temperature that is not above 0.
        """
        rows = self._rows(conditions, noise, unconditional, image_conditions)
        steps = self.config.num_sampling_steps if steps is None else steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is {steps!r}; it is a number of Euler steps, 1 or more")
        if not 0 < shift < float("inf") or not 0 < temperature < float("inf"):
            raise ValueError(f"shift is {shift} and temperature {temperature}; both are positive numbers")
        progress = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        progress = (progress / (progress + shift - shift * progress)).tolist()
        x, count = temperature * noise, 1 + (unconditional is not None) + (image_conditions is not None)
        for start, end in pairwise(progress):
            times = torch.full((len(rows),), 1 - start, device=x.device)
            parts = self.net(x.repeat(count, 1), times, rows).view(count, *x.shape)
            velocity = parts[0]
            if len(parts) == 2:
                velocity = parts[1] + guidance * (parts[0] - parts[1])
            elif len(parts) == 3:
                velocity = parts[1] + image_guidance * (parts[2] - parts[1])
                velocity = velocity + guidance * (parts[0] - parts[2])
            if renormalise:
                length = velocity.norm(dim=-1, keepdim=True).clamp_min(1e-12)
                velocity = velocity * (parts[0].norm(dim=-1, keepdim=True) / length + 1e-8).clamp(0, 1)
            x = x + (end - start) * velocity
        return x

    def _rows(
        self, conditions: Tensor, noise: Tensor, unconditional: Tensor | None, image: Tensor | None
    ) -> Tensor:
        """All conditions [k · B, Z], checked."""
        config = self.config
        if conditions.ndim != 2 or conditions.shape[1] != config.z_channels:
            raise ValueError(
                f"conditions have shape {list(conditions.shape)}; this head takes [B, {config.z_channels}]"
            )
        if noise.shape != (len(conditions), config.target_channels):
            raise ValueError(
                f"noise has shape {list(noise.shape)}; for {len(conditions)} conditions it is "
                f"[{len(conditions)}, {config.target_channels}]"
            )
        if image is not None and unconditional is None:
            raise ValueError("image_conditions guide only beside unconditional ones; give both")
        others = {"unconditional": unconditional, "image_conditions": image}
        for name, rows in others.items():
            if rows is not None and rows.shape != conditions.shape:
                raise ValueError(
                    f"{name} has shape {list(rows.shape)}; it has that of the conditions, "
                    f"{list(conditions.shape)}"
                )
        return torch.cat([conditions, *(rows for rows in others.values() if rows is not None)])
