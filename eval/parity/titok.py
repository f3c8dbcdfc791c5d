"""Parity of the TiTok family: tokenizers, the 2-D VQGAN, the text tower, preprocessing, losses, a training
step."""

import math
import re

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...configuration import shorten
from ...images import adm_center_crop, to_tensor
from ...loading import create
from ...models.maskgit_vqgan import MaskGITVQGAN
from ...models.titok import TATiTok, TiTok
from ...nn.clip_text import ACTIVATIONS, CLIPTextEncoder
from ...quantizers import DiagonalGaussian, VectorQuantizer
from ...train.losses import (
    ReconstructionLoss,
    ReconstructionLossConfig,
    autoregressive_token_loss,
    masked_token_loss,
    proxy_code_loss,
)
from ...train.schedule import constant_schedule, cosine_schedule, ema_decay, no_weight_decay
from . import generators
from .case import Case, Outputs
from .fields import check_size, whole

FAMILIES = ("titok", "tatitok", "maskgit-vqgan", "maskgit_vqgan")

SEQUENCE = "[:, ::16, ::32]"
PIXELS = "[..., 1::3, 1::3]"
SYSTEMS = (
    "TiTok",
    "TATiTok",
    "MaskGIT-VQGAN",
    "CLIP text",
    "preprocessing",
    "training losses",
    "training step",
)
ENCODED = (r"enc\..*", "z", "indices", "margin", "losses", "mean", "logvar", "kl", "sample")
DECODED = (r"dec\..*", "code.*", "soft_codes", "recon.*")
IMAGE_LOSSES = ("perceptual", "lpips", "disc_.*", "gen_.*", "gan_loss", "ema_after.*", "lecam.*")
LOSSES = (r"vq_l2\..*", r"vq_plain\..*", r"(cvq|kl|tok|stage1|lr|ema)\..*", *IMAGE_LOSSES)


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    if generators.system_of(case):
        yield from generators.run(case)
        return
    system = case.data.get("system", "")
    if system and not any(known in system for known in SYSTEMS):
        raise case.refusal(
            f"no adapter for the system {system!r}; known are {', '.join([*SYSTEMS, *generators.SYSTEMS])}"
        )
    for holds, outputs in (
        (_holds_training_step, _training_step),
        (_holds_tokenizer, _tokenizer),
        (_holds_vqgan, _vqgan),
        (lambda case: "token_embedding.weight" in case.keys, _text),
        (lambda case: case.records(r"(eval|adm)_\d+"), _preprocessing),
        (lambda case: case.records(*LOSSES), _losses),
    ):
        if holds(case):
            yield from outputs(case)
            return
    raise case.refusal(f"it holds none of {', '.join(SYSTEMS)}")


def _holds_training_step(case: Case) -> bool:
    return "parameters_with_grad" in case.data


def _holds_tokenizer(case: Case) -> bool:
    """Whether weights of a one-dimensional tokenizer are named, or of its encoder or decoder alone."""
    return any(key.endswith("latent_token_positional_embedding") for key in case.keys)


def _holds_vqgan(case: Case) -> bool:
    """Whether weights of the VQGAN are named, or of its encoder or decoder alone."""
    return any(key.startswith(("encoder.down.", "decoder.up.")) for key in case.keys)


def part(key: str) -> str:
    """The part of a model that a key belongs to: encoder, decoder, quantize, …"""
    return key.split(".")[0]


def _parts(case: Case) -> set[str]:
    return {part(key) for key in case.keys}


def column(latents: Tensor) -> Tensor:
    """[B, K, C] → [B, C, 1, K], the layout of the original."""
    return latents.transpose(1, 2).unsqueeze(2)


def margin(quantizer: VectorQuantizer, latents: Tensor) -> Tensor:
    """How much farther the second nearest code is, for latents [B, K, C]: [B, K]."""
    nearest = quantizer.distances(latents.double()).topk(2, largest=False).values
    return nearest[..., 1] - nearest[..., 0]


def _rows(column: Tensor) -> Tensor:
    """[B, C, 1, K] → [B, K, C]."""
    return column.squeeze(2).transpose(1, 2)


# Tokenizers -------------------------------------------------------------------------------------------------


def _model(case: Case) -> TiTok:
    aware = "decoder.text_guidance_proj.weight" in case.keys or case.data.get("system") == "TATiTok"
    return case.build(lambda: create("tatitok" if aware else "titok", **case.config), part=part)


class Trunk:
    """Records a ViT's sequence after ln_pre, the first block, the whole last block, and ln_post."""

    def __init__(self, side: nn.Module) -> None:
        self.side, self.recorded = side, {}
        first, last = side.transformer[0], side.transformer[-1]
        self.hooks = [
            side.ln_pre.register_forward_hook(lambda m, i, out: self.recorded.update(ln_pre=out)),
            first.register_forward_hook(lambda m, i, out: self.recorded.update(block_first=out)),
            last.register_forward_pre_hook(lambda m, inputs: self.recorded.update(before_last=inputs[0])),
            side.ln_post.register_forward_hook(lambda m, i, out: self.recorded.update(ln_post=out)),
        ]

    def outputs(self, case: Case, prefix: str) -> Outputs:
        """The recorded slices; the last block is run again for the rows that the model itself never
        computes."""
        for hook in self.hooks:
            hook.remove()
        self.recorded["block_last"] = self.side.transformer[-1](self.recorded.pop("before_last"))
        if len(self.side.transformer) == 1:
            self.recorded["block_first"] = self.recorded["block_last"]
        for name in ("ln_pre", "block_first", "block_last", "ln_post"):
            yield f"{prefix}.{name}", case.subsample(f"{prefix}.{name}", self.recorded[name], SEQUENCE)


def _tokenizer(case: Case) -> Outputs:
    model, parts, sample = _model(case), _parts(case), None
    if {"encoder", "latent_tokens"} <= parts and case.records(*ENCODED):
        trunk = Trunk(model.encoder)
        latents = model.latents(case.images())
        yield from trunk.outputs(case, "enc")
        yield "z", case.subsample("z", column(latents))
        if model.config.quantize_mode == "vae":
            posterior = DiagonalGaussian(latents)
            yield "mean", column(posterior.mode())
            yield "logvar", column(posterior.logvar)
            yield "kl", posterior.kl()
            if "sample" in case.tensors:
                noise = case.normal(case.description("sample"), tuple(column(posterior.mean).shape))
                sample = posterior.sample(noise=_rows(noise).to(latents))
                yield "sample", column(sample)
        elif "quantize" in parts:
            yield from quantized_outputs(model, latents)
    if "decoder" in parts and case.records(*DECODED):
        if sample is None:
            sample = _decoder_input(case, model, parts)
        if "indices" in case.read:
            yield "z_q", column(sample)
        yield from _decoded(case, model, parts, sample)
    elif "quantize" in parts and "z_q" in case.tensors and model.config.quantize_mode == "vq":
        yield "z_q", column(_decoder_input(case, model, parts))


def quantized_outputs(model: TiTok, latents: Tensor) -> Outputs:
    """Indices, margins and losses of the latents [B, K, C]."""
    yield "indices", model.quantize.encode(latents).unsqueeze(1)
    yield "margin", margin(model.quantize, latents).flatten()
    yield "losses", quantizer_losses(model.quantize(latents).losses)


def _decoder_input(case: Case, model: TiTok, parts: set[str]) -> Tensor:
    """The decoder's input, [B, K, C], of the recorded indices or, without a codebook, as recorded."""
    if model.config.quantize_mode == "vq" and "quantize" in parts and "indices" in case.tensors:
        # Where a margin lets an index differ, everything after it would: continue from the recorded ones.
        return model.quantize.decode(case.recorded("indices").long().squeeze(1)).to(case.dtype)
    return _rows(case.recorded("sample" if "sample" in case.tensors else "z_q"))


def _decoded(case: Case, model: TiTok, parts: set[str], latents: Tensor) -> Outputs:
    text = _text_guidance(case, model, len(latents))
    trunk = Trunk(model.decoder)
    output = model.decoder(latents, text)
    yield from trunk.outputs(case, "dec")
    if model.config.is_legacy:
        yield "code_logits", case.subsample("code_logits", output, "[:, ::16]")
        yield "codes", output.argmax(1)
        best = output.topk(2, dim=1).values
        yield "codes_margin", best[:, 0] - best[:, 1]
    if "soft_codes" in case.tensors:
        mixture = output.softmax(1).movedim(1, -1) @ model.pixel_quantize.embedding.weight
        yield "soft_codes", case.subsample("soft_codes", mixture.movedim(-1, 1), "[:, ::4]")
    if case.records("recon", "recon_stats"):
        images = model.pixels(latents, text=text)
        yield "recon", case.subsample("recon", images, PIXELS)
        dims = (0, 2, 3)
        yield (
            "recon_stats",
            torch.stack([images.mean(dims), images.std(dims), images.amin(dims), images.amax(dims)]),
        )
    if "recon_from_ids" in case.tensors:
        shape = (len(output), model.num_tokens)
        ids = case.draw(case.description("recon_from_ids")).randint(0, model.config.codebook_size, size=shape)
        latents = model.quantize.decode(torch.from_numpy(ids).to(case.device)).to(case.dtype)
        if not model.config.is_legacy or "pixel_decoder" in parts:
            decoded = model.pixels(latents, text=text)
            yield "recon_from_ids", case.subsample("recon", decoded, PIXELS)
        else:
            yield "recon_from_ids", model.decoder(latents, text)[:, ::16]


def quantizer_losses(losses: dict[str, Tensor]) -> Tensor:
    """[quantizer, commitment, codebook], as recorded."""
    return torch.stack([losses["commitment"] + losses["codebook"], losses["commitment"], losses["codebook"]])


def _text_guidance(case: Case, model: TiTok, batch: int) -> Tensor | None:
    if not isinstance(model, TATiTok):
        return None
    shape = (batch, model.config.text_context_length, model.config.text_embed_dim)
    if "text_guidance" in case.tensors:
        return case.recorded("text_guidance")
    return case.place(case.normal(case.input("text_guidance"), shape))


def _vqgan(case: Case) -> Outputs:
    model: MaskGITVQGAN = case.build(lambda: create("maskgit-vqgan", **case.config), part=part)
    parts, size = _parts(case), None
    if "encoder" in parts and case.records(r"enc\..*", "z", "codes", "margin"):
        images = case.images()
        size = tuple(side // model.factor for side in images.shape[2:])
        yield from _vqgan_encoded(case, model, images, "quantize" in parts)
    if "decoder" in parts and case.records(r"dec\..*", "recon.*"):
        yield from _vqgan_decoded(case, model, size, "quantize" in parts)


def _vqgan_encoded(case: Case, model: MaskGITVQGAN, images: Tensor, quantize: bool) -> Outputs:
    levels: dict[str, Tensor] = {}
    last = len(model.encoder.down) - 1
    for depth, level in enumerate(model.encoder.down):
        pooled = (lambda x: x) if depth == last else (lambda x: F.avg_pool2d(x, 2))
        level.register_forward_hook(
            lambda m, i, out, name=f"enc.down{depth}", pooled=pooled: levels.update({name: pooled(out)})
        )
    z = model.encoder(images)
    if quantize:
        latents = z.flatten(2).transpose(1, 2)
        yield "codes", model.quantize.encode(latents)
        yield "margin", margin(model.quantize, latents).flatten()
    yield "z", case.subsample("z", z, "[:, ::4]")
    for name, value in levels.items():
        yield name, case.subsample(name, value, "[:, ::32, ::8, ::8]")


def _vqgan_decoded(case: Case, model: MaskGITVQGAN, size: tuple[int, int] | None, quantize: bool) -> Outputs:
    """Outputs of the decoder on the recorded codes, or without a codebook on recorded latents z_q."""
    parts: dict[str, list[Tensor]] = {}
    for depth, level in enumerate(model.decoder.up):
        level.register_forward_hook(
            lambda m, i, out, name=f"dec.up{depth}": parts.setdefault(name, []).append(out)
        )
    if quantize:
        codes = case.recorded("codes").long()
        if size is None:
            size = codes.shape[1:] if codes.ndim == 3 else (math.isqrt(codes.shape[1]),) * 2
        grid = model.quantize.decode(codes.flatten(1)).transpose(1, 2).unflatten(2, size)
    else:
        grid = case.recorded("z_q")
    raw = model.decoder(grid.to(case.dtype))
    for name, pieces in parts.items():
        yield name, case.subsample(name, torch.cat(pieces), "[:, ::32, ::8, ::8]")
    yield "recon_raw", case.subsample("recon_raw", raw, PIXELS)
    name = "recon_raw" if case.description("recon_raw") else "recon"
    yield "recon", case.subsample(name, raw.clamp(0, 1), PIXELS)


def _text(case: Case) -> Outputs:
    captions = case.data.get("inputs")
    if not isinstance(captions, list) or not all(isinstance(each, str) for each in captions):
        raise case.refusal(f"inputs is {shorten(captions)}; a text tower takes a list of captions")
    for activation in ACTIVATIONS:
        if not case.records("ids", rf"\w+_{activation}"):
            continue
        encoder = case.build(lambda activation=activation: _TextModel(case.config, activation))
        if activation == ACTIVATIONS[0]:
            yield "ids", encoder.owner[0].tokenize(captions)
        result = encoder.owner[0](captions)
        for name, value in (
            ("penultimate", result.penultimate),
            ("pooled", result.pooled.unsqueeze(1)),
            ("guidance", result.states),
        ):
            yield f"{name}_{activation}", case.subsample(f"{name}_{activation}", value)


def _TextModel(config: dict, activation: str) -> nn.Module:
    """The bare open_clip module, whose keys are the published ones; it stores the encoder around it."""
    encoder = CLIPTextEncoder(**config, activation=activation)
    encoder.model.owner = (encoder,)
    return encoder.model


# Preprocessing ----------------------------------------------------------------------------------------------


def _preprocessing(case: Case) -> Outputs:
    if int(PIL.__version__.split(".")[0]) < 13:
        raise case.refusal(f"it was recorded with Pillow 13, and Pillow {PIL.__version__} resizes otherwise")
    size = whole(case.path.name, case.config, "size", 1, 4096)
    for number, entry in enumerate(case.input("images [H,W,S]", list)):
        if not isinstance(entry, list) or not all(isinstance(each, int) for each in entry) or len(entry) != 3:
            raise case.refusal(f"image {number} is {shorten(entry)}; it is a list [height, width, seed]")
        height, width, seed = entry
        check_size(case.path.name, f"image {number}", (height, width, 3))
        random = np.random.RandomState(seed)
        blocks = random.randint(0, 256, (math.ceil(height / 7), math.ceil(width / 7), 3))
        picture = np.kron(blocks, np.ones((7, 7, 1)))[:height, :width]
        picture = np.clip(picture + random.randint(-20, 21, (height, width, 3)), 0, 255).astype(np.uint8)
        image = Image.fromarray(picture)
        levels = (to_tensor(image, size)[0] * 255).round().to(torch.uint8).permute(1, 2, 0)
        yield f"eval_{number}", case.subsample("eval_k", levels, "[::2, ::2]")
        crop = torch.from_numpy(np.array(adm_center_crop(image, size)))
        yield f"adm_{number}", case.subsample("adm_k", crop, "[::2, ::2]")


# Training ---------------------------------------------------------------------------------------------------


def _training_step(case: Case) -> Outputs:
    model = _model(case).train()
    images = case.images()
    # One generator, in this order: text states if text-aware, then targets or posterior noise.
    random = case.draw(case.input("rest"))
    text = None
    if isinstance(model, TATiTok):
        shape = (len(images), model.config.text_context_length, model.config.text_embed_dim)
        text = case.place(torch.from_numpy(random.standard_normal(shape).astype(np.float32)))
    weights = case.config.get("losses", {})
    if not isinstance(weights, dict):
        raise case.refusal(f"losses is {shorten(weights)}; it maps names of losses to weights")
    with torch.enable_grad():
        latents = model.latents(images)
        if model.config.quantize_mode == "vae":
            posterior = DiagonalGaussian(latents)
            noise = random.standard_normal(tuple(column(posterior.mean).shape)).astype(np.float32)
            output = model.pixels(
                posterior.sample(noise=_rows(torch.from_numpy(noise)).to(latents)), text=text
            )
            loss = F.mse_loss(output, images) + weights.get("kl_weight", 1e-6) * posterior.kl().sum() / len(
                images
            )
        else:
            quantized = model.quantize(latents)
            quantizer_loss = sum(quantized.losses.values())
            output = model.decoder(quantized.latents, text)
            if model.config.is_legacy:
                targets = torch.from_numpy(
                    random.randint(0, 1024, (len(images), output.shape[2] * output.shape[3]))
                )
                yield "targets", targets
                loss, _ = proxy_code_loss(
                    output, targets.to(case.device), quantizer_loss, weights.get("quantizer_weight", 1.0)
                )
            else:
                loss = F.mse_loss(output, images) + weights.get("quantizer_weight", 1.0) * quantizer_loss
        loss.backward()
    yield "loss", loss
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = case.data["parameters_with_grad"]
    if set(gradients) != set(names):
        raise case.refusal("gradients reach other parameters than recorded")
    yield "grad_norms", torch.stack([gradients[name].norm() for name in names])
    yield "grad_latent_tokens", case.subsample("grad_latent_tokens", gradients["latent_tokens"], "[:, ::16]")
    undecayed = [name for name in names if no_weight_decay(name, dict(model.named_parameters())[name])]
    if sorted(undecayed) != sorted(case.data["no_weight_decay"]):
        raise case.refusal("weight decay spares other parameters than recorded")


def _losses(case: Case) -> Outputs:
    for owner in ("vq_l2", "vq_plain"):
        if case.records(rf"{owner}\..*"):
            yield from _vector_quantizer(case, owner)
    if case.records(r"cvq\..*"):
        yield from _clustering(case)
    if case.records(r"kl\..*", *IMAGE_LOSSES):
        posterior = DiagonalGaussian(_rows(case.recorded("kl.params")))
        yield "kl.mean", column(posterior.mean)
        yield "kl.logvar", column(posterior.logvar)
        yield "kl.std", column(posterior.std)
        yield "kl.kl", posterior.kl()
        if case.records(*IMAGE_LOSSES):
            yield from _image_losses(case, posterior)
    if case.records(r"tok\..*", r"stage1\..*"):
        yield from _token_losses(case)
    if case.records(r"lr\..*", r"ema\.decay"):
        yield from _schedules(case)


def _schedules(case: Case) -> Outputs:
    description = case.description("lr.cosine")
    base, end, warmup, total = (
        float(re.search(rf"{name} ([-+.e\d]+)", description)[1])
        for name in ("base", "end", "warmup", "total")
    )
    steps = range(len(case.tensors["lr.cosine"]))
    cosine = [cosine_schedule(step, base, end, int(warmup), int(total)) for step in steps]
    yield "lr.cosine", torch.tensor(cosine, dtype=torch.float64)
    constant = [constant_schedule(step, base, int(warmup)) for step in steps]
    yield "lr.constant", torch.tensor(constant, dtype=torch.float64)
    listed = re.search(r"steps ([\d,]+)", case.description("ema.decay"))[1]
    decays = [ema_decay(int(step)) for step in listed.split(",")]
    yield "ema.decay", torch.tensor(decays, dtype=torch.float64)


def _vector_quantizer(case: Case, owner: str) -> Outputs:
    size, dim = case.data["state_dict"][f"{owner}:embedding.weight"][1]
    quantizer = case.build(lambda: VectorQuantizer(size, dim, l2_norm=owner == "vq_l2"), f"{owner}:")
    latents = case.recorded(f"{owner}.z").requires_grad_()
    with torch.enable_grad():
        quantized = quantizer(_rows(latents))
        total = sum(quantized.losses.values())
        objective = (column(quantized.latents) * case.recorded(f"{owner}.G")).sum() + total
        grad_z, grad_embedding = torch.autograd.grad(objective, [latents, quantizer.embedding.weight])
    yield f"{owner}.zq", column(quantized.latents)
    yield f"{owner}.indices", quantized.codes.unsqueeze(1)
    yield f"{owner}.losses", quantizer_losses(quantized.losses)
    yield f"{owner}.grad_z", grad_z
    yield f"{owner}.grad_embedding", grad_embedding
    yield f"{owner}.soft_entry", quantizer.decode_soft(case.recorded(f"{owner}.soft"))


def _clustering(case: Case) -> Outputs:
    before = case.recorded("cvq.embedding_before")
    quantizer = VectorQuantizer(*before.shape, clustering=True).to(case.device, case.dtype).train()
    quantizer.embedding.weight.data.copy_(before)
    quantizer.embed_prob.copy_(case.recorded("cvq.embed_prob_before"))
    quantized = quantizer(_rows(case.recorded("cvq.z")))
    yield "cvq.indices", quantized.codes.unsqueeze(1)
    yield "cvq.zq", column(quantized.latents)
    yield "cvq.quantizer_loss", sum(quantized.losses.values())
    yield "cvq.embed_prob_after", quantizer.embed_prob
    yield "cvq.embedding_after", quantizer.embedding.weight


def _image_losses(case: Case, posterior: DiagonalGaussian) -> Outputs:
    settings = case.config["losses"]
    config = ReconstructionLossConfig(
        reconstruction=settings["reconstruction_loss"],
        reconstruction_weight=settings["reconstruction_weight"],
        logvar=settings["logvar_init"],
        perceptual=settings["perceptual_loss"],
        perceptual_weight=settings["perceptual_weight"],
        discriminator_weight=settings["discriminator_weight"],
        discriminator_start=settings["discriminator_start"],
        lecam_weight=settings["lecam_regularization_weight"],
        quantizer_weight=settings["quantizer_weight"],
        kl_weight=settings["kl_weight"],
    )
    loss = ReconstructionLoss(config, perceptual_weights=None)
    # The lpips package registers its linear layers twice; the published keys are the first names.
    state = {key: value for key, value in loss.state_dict().items() if ".lpips.lins." not in key}
    loss.load_state_dict(case.filled(state), strict=False)
    loss = loss.to(case.device, case.dtype).eval()
    images, recon = case.recorded("images"), case.recorded("recon").requires_grad_()
    # The recording fed a constant quantizer loss that its json does not state; its totals give this value.
    quantizer_loss = torch.tensor(float(case.data.get("quantizer_loss", 0.37)), device=case.device)
    start = config.discriminator_start
    yield "perceptual", loss.perceptual_loss(images, recon)
    yield "lpips", loss.perceptual_loss.lpips(images, recon, normalize=True)
    yield "disc_real", loss.discriminator(images)
    yield "disc_fake", loss.discriminator(recon)
    total, _ = loss.generator_step(images, recon, start - 1, quantizer_loss=quantizer_loss)
    yield "gen_total_before_start", total
    with torch.enable_grad():
        total, parts = loss.generator_step(images, recon, start, quantizer_loss=quantizer_loss)
        gradient = torch.autograd.grad(total, recon)[0]
    yield "gen_total_after_start", total
    yield "gan_loss", parts["adversarial"]
    yield "gen_grad_recon", gradient[..., ::2, ::2]
    for call in (1, 2):
        total, parts = loss.discriminator_step(images, recon)
        yield f"disc_loss_{call}", total
        yield f"ema_after{call}", torch.cat([loss.ema_real_logits_mean, loss.ema_fake_logits_mean])
    yield "lecam_2", config.lecam_weight * parts["lecam"]
    total, _ = loss.generator_step(images, recon, 0, kl=posterior.kl().sum() / len(images))
    yield "gen_total_vae", total


def _token_losses(case: Case) -> Outputs:
    logits, targets = case.recorded("tok.logits"), case.recorded("tok.targets").long()
    mask = case.recorded("tok.mask")
    loss, accuracy = masked_token_loss(logits, targets, mask)
    yield "tok.mlm", loss
    yield "tok.mlm_acc", accuracy
    loss, accuracy = autoregressive_token_loss(logits[:, :-1], targets[:, :-1])
    yield "tok.ar", loss
    yield "tok.ar_acc", accuracy
    # The stage-1 logits follow logits, targets and mask from the same generator.
    random = case.draw(case.description("stage1.total"))
    random.standard_normal(tuple(logits.shape))
    random.randint(0, logits.shape[-1], tuple(targets.shape))
    random.random_sample(tuple(mask.shape))
    stage1 = case.place(
        torch.from_numpy(random.standard_normal((len(logits), 1024, 4, 4)).astype(np.float32))
    )
    quantizer_loss = torch.tensor(float(case.data.get("quantizer_loss", 0.37)), device=case.device)
    total, _ = proxy_code_loss(stage1, case.recorded("stage1.targets").long(), quantizer_loss)
    yield "stage1.total", total
