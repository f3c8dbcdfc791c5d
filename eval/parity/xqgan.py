"""Parity of XQ-GAN, ImageFolder and RobustTok: tokenizers, quantizers in training, latent perturbation."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.xqgan import XQGAN, XQGANConfig
from ...quantizers import (
    MultiScaleBinaryQuantizer,
    MultiScaleVectorQuantizer,
    Quantizer,
    VectorQuantizer,
    perturb,
    perturbation_ratio,
)
from ...train.losses import feature_alignment_loss
from .case import Case, Outputs
from .fields import whole

FAMILIES = ("robusttok", "xqgan")
MIDDLE = 4  # the scale after which cumulative latents are recorded


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    if "cases" in case.config:
        yield from _perturbation(case)
    elif "bits" in case.config:
        yield from _quantizers(case)
    else:
        yield from _tokenizer(case)


def _map(rows: Tensor) -> Tensor:
    """[B, K, C] → [B, C, s, s], the layout of the original."""
    side = math.isqrt(rows.shape[1])
    return rows.transpose(1, 2).unflatten(2, (side, side))


def _rows(grid: Tensor) -> Tensor:
    """[B, C, s, s] → [B, K, C]."""
    return grid.flatten(2).transpose(1, 2)


# Tokenizers -------------------------------------------------------------------------------------------------


def _tokenizer(case: Case) -> Outputs:
    model: XQGAN = case.build(lambda: XQGAN(XQGANConfig.parse(case.config)))
    images = (case.array("image") + 1) / 2
    tokens = model.encoder(2 * images - 1)
    yield "encoder_out", case.subsample("encoder_out", tokens, "[:, ::4, ::8]")
    latents = model.latents(images)
    dim = model.config.codebook_embed_dim
    decoded, middle, scales = [], [], len(model.config.v_patch_nums)
    for number, (branch, own) in enumerate(zip(model.branches, latents.split(dim, -1), strict=True)):
        yield f"latent_{number}", _map(own)
        yield f"indices_{number}", branch.encode(own)
        codes = case.recorded(f"indices_{number}").long()
        decoded.append(branch.decode(codes))
        yield f"fhat_{number}", _map(decoded[-1])
        if scales > 1:
            count = sum(side**2 for side in model.config.v_patch_nums[: MIDDLE + 1])
            middle.append(branch.decode(codes[:, :count]))
            yield f"fhat_{number}_mid", _map(middle[-1])
    yield "recon", case.subsample("recon", _drawn(model, decoded), "[..., ::4, ::4]")
    if middle:
        yield "recon_mid", case.subsample("recon_mid", _drawn(model, middle), "[..., ::8, ::8]")
    if "var_input" in case.tensors:
        yield from _generator_inputs(case, model)


def _drawn(model: XQGAN, branches: list[Tensor]) -> Tensor:
    return 2 * model.pixels(torch.cat(branches, -1)).clamp(0, 1) - 1


def _generator_inputs(case: Case, model: XQGAN) -> Outputs:
    codes = [case.recorded(f"indices_{number}").long() for number in range(len(model.branches))]
    pairs = list(zip(model.branches, codes, strict=True))
    inputs = torch.cat([branch.generator_inputs(own) for branch, own in pairs], -1)
    yield "var_input", case.subsample("var_input", inputs, "[:, ::3]")
    scale = 3
    steps = [branch.added(branch.split(own)[scale], scale) for branch, own in pairs]
    yield "next_fhat", torch.cat(steps, 1)
    side = model.config.v_patch_nums[scale + 1]
    yield "next_map", F.interpolate(torch.cat(steps, 1), (side, side), mode="area")


# Quantizers in training -------------------------------------------------------------------------------------


def _quantizers(case: Case) -> Outputs:
    size, dim, settings = case.config["codebook_size"], case.config["dim"], case.config
    for name in ("vq", "vq_plain"):
        own = settings[name]
        make = VectorQuantizer(size, dim, l2_norm=own["l2"], commitment_cost=own["beta"], hit_statistics=True)
        yield from _trained(case, name, make)
    scaled = settings["msvr"]
    yield from _trained(
        case,
        "msvr",
        MultiScaleVectorQuantizer(
            size,
            dim,
            scaled["v_patch_nums"],
            commitment_cost=scaled["beta"],
            shared_convolutions=scaled["share_quant_resi"],
            dropout=scaled["codebook_drop"],
        ),
    )
    yield from _trained(
        case,
        "msvr_unshared",
        MultiScaleVectorQuantizer(
            size,
            dim,
            settings["msvr_unshared"]["v_patch_nums"],
            l2_norm=settings["msvr_unshared"]["using_znorm"],
            shared_convolutions=settings["msvr_unshared"]["share_quant_resi"],
        ),
    )
    binary = settings["msbr"]
    yield from _trained(
        case,
        "msbr",
        MultiScaleBinaryQuantizer(
            settings["bits"],
            binary["v_patch_nums"],
            normalise=binary["using_znorm"],
            scale=binary["scale"],
            entropy_weight=binary["entropy_weight"],
            shared_convolutions=binary["share_quant_resi"],
            dropout=binary["codebook_drop"],
        ),
    )
    pooled = (case.array(f"orthogonal_{side}") for side in "ab")
    yield "orthogonal", -feature_alignment_loss(*pooled).view(1)


def _trained(case: Case, name: str, quantizer: Quantizer) -> Outputs:
    """Two training steps on the same latents, and inference."""
    quantizer.load_state_dict(case.filled(quantizer.state_dict()))
    quantizer = quantizer.to(case.device, case.dtype).train()
    latents = case.array(name).requires_grad_()
    depths = ()
    if isinstance(quantizer, MultiScaleVectorQuantizer | MultiScaleBinaryQuantizer):
        drawn = case.recorded("dropout").long()
        drawn[int(len(drawn) * quantizer.dropout) :] = len(quantizer.sides)
        depths = (drawn,)
    with torch.enable_grad():
        quantized = quantizer(_rows(latents), *depths)
        out, losses = _map(quantized.latents), quantized.losses
        objective = sum(losses.values()) + out.square().mean()
        objective.backward()
    vectors = latents.shape[0] * latents.shape[2] * latents.shape[3]
    yield f"{name}.out", out
    zero = torch.zeros((), device=case.device)
    yield (
        f"{name}.vq",
        torch.stack([losses["codebook"], losses["commitment"], losses.get("entropy", zero)]),
    )
    yield f"{name}.usage1", 100 * quantizer.hit_usage(vectors).view(-1)
    yield f"{name}.grad", latents.grad
    if hasattr(quantizer, "embedding"):
        yield f"{name}.grad_codebook_norm", quantizer.embedding.weight.grad.norm(dim=1)
    quantizer(_rows(latents.detach()), *depths)
    yield f"{name}.ema", quantizer.ema_vocab_hit_SV
    yield f"{name}.usage2", 100 * quantizer.hit_usage(vectors).view(-1)
    codes = quantizer.eval().encode(_rows(latents.detach()))
    yield f"{name}.indices", codes
    yield f"{name}.fhat", _map(quantizer.decode(codes))


# Latent perturbation ----------------------------------------------------------------------------------------


def _perturbation(case: Case) -> Outputs:
    size, dim, grid = (case.config[name] for name in ("codebook_size", "dim", "grid"))
    batch, seed = case.config["N"], case.seed
    for setting in case.config["cases"]:
        number = whole(case.path.name, setting, "index", 0, 10_000)

        def draw(offset: int, number: int = number) -> np.random.RandomState:
            return np.random.RandomState(seed + offset + number)

        def latents(offset: int, draw: object = draw) -> Tensor:
            values = draw(offset).standard_normal((batch, dim, grid, grid)).astype(np.float32)
            return _rows(case.place(torch.from_numpy(values)))

        quantizer = VectorQuantizer(size, dim, l2_norm=setting["l2"]).to(case.device, case.dtype)
        rows = draw(500).standard_normal((size, dim)).astype(np.float32)
        quantizer.embedding.weight.data.copy_(torch.from_numpy(rows))
        count = batch * grid**2
        chances = torch.from_numpy(draw(1500).rand(count).astype(np.float32)).view(batch, -1)
        ranks = torch.from_numpy(draw(2000).randint(0, setting["delta"], (count,))).view(batch, -1)
        perturbed = perturb(
            quantizer,
            latents(0),
            latents(1000),
            **{name: setting[name] for name in ("alpha", "beta", "delta")},
            chances=chances.to(case.device),
            ranks=ranks.to(case.device),
        )
        yield f"out_{number}", _map(perturbed)
    epochs = case.recorded("schedule_epoch").tolist()
    ratios = torch.tensor([perturbation_ratio(epoch) for epoch in epochs], dtype=torch.float64)
    yield "schedule_ratio", ratios
    yield "schedule_delta", (100 * ratios).int()
    yield "schedule_alpha", ratios
    jump = [perturbation_ratio(epoch, start=10, end=30, end_ratio=0.2) for epoch in range(0, 41, 2)]
    yield "schedule_b", torch.tensor(jump, dtype=torch.float64)
