"""Parity of GigaTok: its tokenizers and its quantizer in training."""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.gigatok import ENTROPY_OFFSET, USAGE_WINDOW, GigaTok, GigaTokConfig
from ...quantizers import VectorQuantizer
from ...train.losses import feature_alignment_loss
from .case import Case, Outputs
from .fields import check_size, whole
from .titok import column, margin

FAMILIES = ("gigatok",)
SEQUENCE = "[:, ::16, ::32]"
PIXELS = "[:, :, ::8, ::8]"
POINTS = 8  # along each axis of a recorded map of the CNNs


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    if "upstream" in case.tensors:
        yield from _quantizer(case)
        return
    config = GigaTokConfig.parse(case.config)
    depth = case.data.get("depth", {})
    config = dataclasses.replace(
        config, encoder_layers=depth.get("s2to1encoder"), decoder_layers=depth.get("s1to2decoder")
    )
    model = case.build(lambda: GigaTok(config))
    yield from _encoded(case, model)
    codes = case.recorded("indices").long()
    yield from _decoded(case, model, model.quantize.decode(codes).to(case.dtype))
    recipe = case.input("ids", dict)
    random = np.random.RandomState(whole(case.path.name, recipe, "S", 0, 2**32 - 1))
    ids = random.randint(0, config.codebook_size, size=codes.shape)
    latents = model.quantize.decode(torch.from_numpy(ids).to(case.device)).to(case.dtype)
    images = model.decoder(model.grid(latents))
    yield "recon_from_ids", case.subsample("recon_from_ids", images, PIXELS)


def _images(case: Case) -> Tensor:
    """The pictures of the case's recipe, in [-1, 1]: large blocks, textures of small ones, noise."""
    recipe = case.input("images", dict)
    batch = whole(case.path.name, recipe, "B", 1, 4096)
    height, width = (whole(case.path.name, recipe, side, 32, 2**14) for side in "HW")
    check_size(case.path.name, "images", (batch, 3, height, width))
    random = np.random.RandomState(whole(case.path.name, recipe, "S", 0, 2**32 - 1))

    def blocks(side: int) -> np.ndarray:
        return random.random_sample((batch, 3, height // side, width // side))

    def spread(values: np.ndarray, side: int) -> np.ndarray:
        return np.kron(values, np.ones((1, 1, side, side)))

    large, small, middle = blocks(32), (blocks(4) < 0.5).astype(np.float64), blocks(16)
    picture = 0.5 * spread(large, 32) + 0.3 * spread(middle, 16) * spread(small, 4)
    picture = 2 * (picture + 0.2 * random.random_sample((batch, 3, height, width))).astype(np.float32) - 1
    if abs(float(picture.astype(np.float64).sum()) - recipe.get("sum", np.inf)) > 1:
        raise case.refusal("the image recipe gave another picture than was recorded")
    return case.place(torch.from_numpy(picture))


class _Recorder:
    """Keeps what modules return from now on; the CNN takes images in several calls."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.pieces: dict[str, list[Tensor]] = {name: [] for name in modules}
        for name, module in modules.items():
            module.register_forward_hook(lambda m, i, out, name=name: self.pieces[name].append(out))

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat(self.pieces[name])


def _points(x: Tensor) -> Tensor:
    """Every 32nd channel of a map [B, C, H, W], at up to 8 points per axis."""
    rows, columns = (max(1, side // POINTS) for side in x.shape[2:])
    return x[:, ::32, ::rows, ::columns]


def _encoded(case: Case, model: GigaTok) -> Outputs:
    reader = model.s2to1encoder
    levels = _Recorder({f"cnn_enc.{i}": level.res for i, level in enumerate(model.encoder.conv_blocks)})
    rows = _Recorder(
        {
            "enc.memory": reader.encoder_embed,
            "enc.query_init": reader.global_proj,
            "enc.block_first": reader.transformer[0],
            "enc.block_last": reader.transformer[-1],
        }
    )
    spatial = model.encoder(_images(case))
    for name in levels.pieces:
        yield name, _points(levels[name])
    yield "spatial", case.subsample("spatial", spatial, "[:, ::16]")
    tokens = reader(spatial)
    for name in ("enc.memory", "enc.query_init", "enc.block_first", "enc.block_last"):
        yield name, case.subsample(name, rows[name], SEQUENCE)
    yield "z256", case.subsample("z256", column(tokens), "[:, ::16, :, ::4]")
    latents = F.linear(tokens, model.quant_conv.weight.flatten(1), model.quant_conv.bias)
    yield "z", column(latents)
    yield "indices", model.quantize.encode(latents)
    yield "margin", margin(model.quantize, latents)
    yield "quant", case.subsample("quant", column(model.quantize(latents).latents), "[:, :, :, ::4]")


def _decoded(case: Case, model: GigaTok, latents: Tensor) -> Outputs:
    reader, draw = model.s1to2decoder, model.decoder
    rows = _Recorder(
        {
            "dec.memory": reader.decoder_embed,
            "dec.block_first": reader.transformer[0],
            "dec.block_last": reader.transformer[-1],
        }
    )
    if model.config.distill_depth is not None:
        distilled = _Recorder({"grid": reader.transformer[model.config.distill_depth - 1]})
    grid = model.grid(latents)
    for name in ("dec.memory", "dec.block_first", "dec.block_last"):
        yield name, case.subsample(name, rows[name], SEQUENCE)
    if model.config.distill_depth is not None:
        features = reader.distill_mlp(distilled["grid"])
        yield "inner_feat", case.subsample("inner_feat", features, "[:, ::16, ::16]")
    yield "rec_spatial", case.subsample("rec_spatial", grid, "[:, ::16]")
    begin = _Recorder({"cnn_dec.conv_in": draw.conv_in})
    maps = _Recorder({f"cnn_dec.adaptive.{i}": norm for i, norm in enumerate(draw.adaptive)})
    for i, norm in enumerate(draw.adaptive[1:]):
        pieces = maps.pieces[f"cnn_dec.up.{i}"] = []
        norm.register_forward_pre_hook(lambda m, inputs, pieces=pieces: pieces.append(inputs[0]))
    images = draw(grid)
    yield "cnn_dec.conv_in", begin["cnn_dec.conv_in"][:, ::32, ::4, ::4]
    for name in maps.pieces:
        yield name, _points(maps[name])
    yield "recon", case.subsample("recon", images, PIXELS)
    yield "recon_mean", images.mean((2, 3))
    yield "recon_corner", images[:, :, :8, -8:]


# The quantizer in training ----------------------------------------------------------------------------------


def _quantizer(case: Case) -> Outputs:
    codebook, upstream = case.recorded("codebook"), case.recorded("upstream")
    for name, rotation in (("rot0", False), ("rot1", True)):
        quantizer = VectorQuantizer(
            *codebook.shape,
            l2_norm=case.config["codebook_l2_norm"],
            commitment_cost=case.config["commit_loss_beta"],
            entropy_weight=case.config["entropy_loss_ratio"],
            entropy_offset=ENTROPY_OFFSET,
            rotation=rotation,
            usage_window=USAGE_WINDOW,
        ).to(case.device, case.dtype)
        quantizer.embedding.weight.data.copy_(codebook)
        latents = case.recorded("z").requires_grad_()
        with torch.enable_grad():
            quantized = quantizer.train()(latents.squeeze(2).transpose(1, 2))
            output = column(quantized.latents)
            (through,) = torch.autograd.grad((output * upstream).sum(), latents, retain_graph=True)
        yield f"{name}.quant", output
        yield f"{name}.grad_z.through", through
        yield f"{name}.quant_eval", column(quantizer.eval()(latents.squeeze(2).transpose(1, 2)).latents)
        if rotation:
            continue
        yield "indices", quantized.codes
        yield "margin", margin(quantizer, latents.detach().squeeze(2).transpose(1, 2))
        yield "usage", torch.tensor(quantizer.recent_usage)
        losses = {"vq": "codebook", "commit": "commitment", "entropy": "entropy"}
        yield "losses", torch.stack([quantized.losses[loss] for loss in losses.values()])
        for term, loss in losses.items():
            grads = torch.autograd.grad(
                quantized.losses[loss],
                [latents, quantizer.embedding.weight],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            yield f"grad_z.{term}", grads[0]
            yield f"grad_codebook.{term}", grads[1]
    yield "proj_loss", feature_alignment_loss(*_features(case))


def _features(case: Case) -> list[Tensor]:
    """The decoder's and the teacher's features of the recipe, [B, N, C] each: they follow the stored inputs
    in the draws of one generator."""
    inputs = case.data["inputs"]
    random = np.random.RandomState(whole(case.path.name, inputs, "seed", 0, 2**32 - 1))
    for name in ("z", "codebook", "upstream"):
        random.standard_normal(tuple(case.tensors[name].shape))
    shape = (whole(case.path.name, inputs, "B", 1, 4096), 16, 768)
    draws = [random.standard_normal(shape).astype(np.float32) for _ in range(2)]
    return [case.place(torch.from_numpy(values)) for values in draws]
