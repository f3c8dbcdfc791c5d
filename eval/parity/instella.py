"""Parity of the Instella family: the binary tokenizer, its rotary tables and its quantizer."""

import ast
import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ...models.instella import Instella, InstellaConfig, Rotary
from ...quantizers import BinaryQuantizer
from ...registry import create
from .case import CannotBuild, Case, Outputs


def run(case: Case) -> Outputs:
    """Our outputs for every recorded tensor, in the order they were made."""
    if "encoder.latent_tokens" not in case.data.get("state_dict", {}):
        raise CannotBuild(
            f"{case.path.name} records {case.data.get('case', 'another system')!r}, which is no binary "
            "tokenizer; the generators on its bits are not in this version"
        )
    tags = dict.fromkeys(name.split(".")[0] for name in case.tensors)
    model = None
    for tag in tags:
        if found := re.fullmatch(r"s(none|\d+)", tag):
            model = case.build(lambda: create("instella", **case.data["config"])) if model is None else model
            scale = None if found[1] == "none" else int(found[1])
            model.encoder.scale = model.decoder.scale = scale
            yield from _tokenizer(case, model, tag)
        elif tag.startswith("rope"):
            yield from _rotary(case, tag)
        elif tag == "q":
            yield from _quantizer(case)


def _input(case: Case, name: str) -> Tensor:
    """A stored tensor, or the recipe "np.random.RandomState(seed).method(arguments)"."""
    if name in case.tensors:
        return case.recorded(name)
    recipe = case.data.get("inputs", {}).get(name, "")
    found = re.search(
        r"RandomState\(\d+\)\.(uniform|standard_normal|random_sample|normal)\((.*?)\)\.", recipe
    )
    if not found:
        raise CannotBuild(f"{case.path.name}: cannot read the recipe {recipe!r} of input {name!r}")
    arguments = ast.literal_eval(f"({found[2]},)")
    drawn = getattr(case.draw(recipe), found[1])(*arguments)
    return case.place(torch.from_numpy(np.asarray(drawn, np.float32)))


def _tokenizer(case: Case, model: Instella, tag: str) -> Outputs:
    def has(name: str) -> bool:
        return f"{tag}.{name}" in case.tensors

    images = _input(case, "x")  # in [-1, 1], as the encoder takes them
    encoder, decoder = _Trunk(model.encoder, "enc", "down"), _Trunk(model.decoder, "dec", "up")
    latents = model.encoder(images)
    logits = model.quantizer.logits(latents)
    bits = model.quantizer.encode(latents)
    # Where a logit is near zero a bit may differ in half precision: go on from the recorded ones.
    recorded = case.recorded(f"{tag}.bits").bool() if has("bits") else bits
    summed = model.quantizer.decode(recorded).to(case.dtype)
    recon = model.pixels(summed, size=tuple(images.shape[2:]))
    found = encoder.outputs(has) | decoder.outputs(has)
    found |= {"logits": logits, "bits": bits.to(torch.uint8), "z_q": summed, "recon": 2 * recon - 1}
    found["code_loss"] = model.quantizer(latents).losses["code"].reshape(1) / model.quantizer.code_weight
    for name, value in found.items():
        if has(name):
            yield f"{tag}.{name}", case.subsample(f"{tag}.{name}", value)
    for name in case.tensors:
        if other := re.fullmatch(rf"{tag}\.recon_(\d+)x(\d+)", name):
            images = model.pixels(summed[: len(case.tensors[name])], size=(int(other[1]), int(other[2])))
            yield name, case.subsample(name, 2 * images - 1)


class _Trunk:
    """Records what the blocks and resizing layers of one side, and the side itself, put out."""

    def __init__(self, side: nn.Module, prefix: str, kind: str) -> None:
        self.prefix, self.seen, self.last_call = prefix, {}, ()
        self.blocks = side.transformer_blocks
        named = {f"block{depth}": block for depth, block in enumerate(self.blocks)}
        named |= {f"{kind}{n or ''}": layer for n, layer in enumerate(getattr(side, f"{kind}_layers"))}
        self.hooks = [
            module.register_forward_hook(lambda m, i, out, name=name: self.seen.update({name: out}))
            for name, module in [*named.items(), ("out", side)]
        ]
        self.hooks.append(self.blocks[-1].register_forward_pre_hook(self._keep_call))

    def _keep_call(self, module: nn.Module, inputs: tuple) -> None:
        self.last_call = inputs

    def outputs(self, has: Callable[[str], bool]) -> dict[str, Tensor]:
        """Sequences by recorded name; the last block is run again for rows that the model never computes."""
        for hook in self.hooks:
            hook.remove()
        last = f"block{len(self.blocks) - 1}"
        if has(f"{self.prefix}_{last}"):
            self.seen[last] = self.blocks[-1](*self.last_call)
        grids = {name: out.flatten(2).mT if out.ndim == 4 else out for name, out in self.seen.items()}
        return {f"{self.prefix}_{name}": out for name, out in grids.items()}


def _rotary(case: Case, tag: str) -> Outputs:
    names = [name for name in case.tensors if name.startswith(f"{tag}.")]
    said = " ".join(case.description(name) for name in names)
    count, height, width, scale = _sizes(case, tag, said)
    slices = re.search(r"\[[^\]]*:[^\]]*\]", said)
    config = {**case.data["config"], "num_latent_tkns": count}
    for name in names:
        id_dtype = "bfloat16" if "bf16" in name else "float32"
        rotary = Rotary(InstellaConfig(**config, rope_id_dtype=id_dtype))
        cos, sin = rotary(height, width, scale, case.device)
        table = sin if ".sin" in name else cos
        yield name, case.subsample(name, table, slices[0] if slices else "")


def _sizes(case: Case, tag: str, said: str) -> tuple[int, int, int, float | None]:
    """Latent tokens, rows, columns and scale of "(128+1024,64) … H=W=32, scale=64"."""
    grid = re.search(r"H=(?:W=)?(\d+)(?:,? *W=(\d+))?", said)
    tokens, scale = re.search(r"\((\d+)\+", said), re.search(r"scale=([\d.]+|None)", said)
    if not grid or not tokens or not scale:
        raise CannotBuild(f"{case.path.name}: cannot read grid, tokens and scale of {tag} in {said!r}")
    height = int(grid[1])
    width = int(grid[2]) if grid[2] else height
    return int(tokens[1]), height, width, None if scale[1] == "None" else float(scale[1].rstrip("."))


def _quantizer(case: Case) -> Outputs:
    shapes = {key: shape for key, (_, shape) in case.data["quantizer_state_dict"].items()}
    quantizer = BinaryQuantizer(*shapes["embed"])
    state = quantizer.state_dict()
    if {key: list(value.shape) for key, value in state.items()} != shapes:
        raise CannotBuild(f"{case.path.name}: quantizer keys {sorted(state)} are not {sorted(shapes)}")
    quantizer.load_state_dict(case.filled(state))
    quantizer = quantizer.to(case.device, case.dtype).eval()
    latents, weights = _input(case, "q.h").requires_grad_(), _input(case, "q.w")
    with torch.enable_grad():
        result = quantizer(latents)
        factor = re.search(r"\+\s*([\d.]+)\s*\*\s*loss", case.description("q.grad_h"))
        loss = (result.latents * weights).sum() + float(factor[1] if factor else 0) * result.losses["code"]
        grad_latents, grad_embed = torch.autograd.grad(loss, [latents, quantizer.embed])
    found = {"z_q": result.latents, "bits": result.codes.to(torch.uint8)}
    found |= {"loss": result.losses["code"].reshape(1), "grad_h": grad_latents, "grad_embed": grad_embed}
    for name, value in found.items():
        if f"q.{name}" in case.tensors:
            yield f"q.{name}", case.subsample(f"q.{name}", value)
