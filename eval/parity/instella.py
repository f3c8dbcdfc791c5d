"""Parity of the Instella family: the binary tokenizer, its rotary tables and its quantizer."""

import dataclasses
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ... import configuration
from ...loading import create
from ...models.instella import Instella, InstellaConfig, Rotary
from ...quantizers import BinaryQuantizer
from .case import Case, Outputs
from .fields import check_size

FAMILIES = ("instella",)

VARIANT = re.compile(r"s(none|\d+)")
PARTS = {"encoder", "decoder", "quantizer", "to_pixel"}


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    generators = any(isinstance(entry, dict) for entry in case.data.get("state_dict", {}).values())
    if generators or any(key.endswith(".pos_emb") for key in case.keys):
        raise case.refusal("it holds the generators on Instella's bits, which are not in this version")
    if unknown := sorted({_part(key) for key in case.keys} - PARTS):
        raise case.refusal(
            f"its state_dict has {', '.join(unknown)}, not in this version; "
            f"an Instella tokenizer has {', '.join(sorted(PARTS))}"
        )
    tags = dict.fromkeys(_tag(name) for name in case.tensors if name not in case.data.get("inputs", {}))
    model = None
    for tag in tags:
        if tag == "q":
            yield from _quantizer(case)
        elif tag.startswith("rope"):
            yield from _rotary(case, tag)
        else:
            model = _model(case) if model is None else model
            for side in (getattr(model, name, None) for name in ("encoder", "decoder")):
                if side is not None:
                    side.scale = _scale(case, model, tag)
            yield from _tokenizer(case, model, f"{tag}." if tag else "")


def _part(key: str) -> str:
    return key.split(".")[0]


def _tag(name: str) -> str:
    """The prefix of a name: a variant (s1024, snone), rope…, q, or nothing where there is one variant."""
    first, _, rest = name.partition(".")
    return first if rest and (VARIANT.fullmatch(first) or first == "q" or first.startswith("rope")) else ""


def _model(case: Case) -> Instella:
    """The model, with the parts whose weights the case names."""
    return case.build(lambda: create("instella", **case.config), part=_part)


def _scale(case: Case, model: Instella, tag: str) -> int | None:
    """The side in pixels that coordinates are stretched to: of the tag, or of a case without variants.

    Its descriptions or its configuration state one; the original has none until it is set.
    """
    if match := VARIANT.fullmatch(tag):
        return None if match[1] == "none" else int(match[1])
    untagged = " ".join(text for name, text in case.data["tensors"].items() if not _tag(name))
    if match := re.search(r"set_scale\s*[=(]\s*(\d+|None)", untagged):
        return None if match[1] == "None" else int(match[1])
    return model.config.scale if "scale" in case.config else None


def _tokenizer(case: Case, model: Instella, prefix: str) -> Outputs:
    def has(name: str) -> bool:
        return f"{prefix}{name}" in case.tensors

    parts = {_part(key) for key in case.keys}
    outputs: dict[str, Tensor] = {}
    size, bits = None, None
    if "encoder" in parts:
        images = case.array("x")  # in [-1, 1], as the encoder takes them
        size = tuple(images.shape[2:])
        model.check_image_size(*size, "the case draws them")
        trunk = _Trunk(model.encoder, "enc", "down")
        latents = model.encoder(images)
        outputs |= trunk.outputs(has)
        if "quantizer" in parts:
            bits = model.quantizer.encode(latents)
            loss = model.quantizer(latents).losses["code"].reshape(1) / model.quantizer.code_weight
            outputs |= {"logits": model.quantizer.logits(latents), "bits": bits.to(torch.uint8)}
            outputs["code_loss"] = loss
    draws = "decoder" in parts and case.records(rf"{re.escape(prefix)}(dec_|recon).*")
    if draws or has("z_q"):
        summed = _summed(case, model, prefix, bits, "quantizer" in parts)
        outputs["z_q"] = summed
    if draws:
        size = size or _decoded_size(case, model, prefix)
        trunk = _Trunk(model.decoder, "dec", "up")
        if "to_pixel" in parts:
            outputs["recon"] = 2 * model.pixels(summed, size=size) - 1
        else:
            model.decoder(summed, *(side // model.config.patch_size for side in size))
        outputs |= trunk.outputs(has)
    for name, value in outputs.items():
        if has(name):
            yield f"{prefix}{name}", case.subsample(f"{prefix}{name}", value)
    for name in case.tensors:
        if other := re.fullmatch(rf"{re.escape(prefix)}recon_(\d+)x(\d+)", name):
            size = (int(other[1]), int(other[2]))
            count = len(case.tensors[name])
            check_size(case.path.name, name, (count, 3, *size))
            images = model.pixels(summed[:count], size=size)
            yield name, case.subsample(name, 2 * images - 1)


def _summed(case: Case, model: Instella, prefix: str, bits: Tensor | None, quantizer: bool) -> Tensor:
    """The decoder's input: the sum of the embeddings of the bits, or where they have no weights z_q."""
    if not quantizer:
        return case.recorded(f"{prefix}z_q" if f"{prefix}z_q" in case.tensors else "z_q")
    # Where a logit is near zero a bit may differ in half precision: continue from the recorded ones.
    if f"{prefix}bits" in case.tensors or bits is None:
        bits = case.recorded(f"{prefix}bits" if f"{prefix}bits" in case.tensors else "bits").bool()
    return model.quantizer.decode(bits).to(case.dtype)


def _decoded_size(case: Case, model: Instella, prefix: str) -> tuple[int, int]:
    """Height and width in pixels of "decode(bits,H=16,W=16)", where no image was encoded."""
    table = case.data["tensors"]
    description = " ".join(
        text for name, text in table.items() if name.startswith((f"{prefix}recon", f"{prefix}dec_"))
    )
    match = re.search(r"H=(\d+), ?W=(\d+)", description)
    if not match:
        raise case.refusal("no description of a decoded tensor states its grid as H=…,W=… patches")
    patch = model.config.patch_size
    return int(match[1]) * patch, int(match[2]) * patch


class _Trunk:
    """Records the outputs of the blocks and resizing layers of one side, and of the side itself."""

    def __init__(self, side: nn.Module, prefix: str, kind: str) -> None:
        self.prefix, self.recorded, self.last_call = prefix, {}, ()
        self.blocks = side.transformer_blocks
        named = {f"block{depth}": block for depth, block in enumerate(self.blocks)}
        named |= {f"{kind}{n or ''}": layer for n, layer in enumerate(getattr(side, f"{kind}_layers"))}
        self.hooks = [
            module.register_forward_hook(lambda m, i, out, name=name: self.recorded.update({name: out}))
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
            self.recorded[last] = self.blocks[-1](*self.last_call)
        grids = {name: out.flatten(2).mT if out.ndim == 4 else out for name, out in self.recorded.items()}
        return {f"{self.prefix}_{name}": out for name, out in grids.items()}


def _rotary(case: Case, tag: str) -> Outputs:
    names = [name for name in case.tensors if name.startswith(f"{tag}.")]
    description = " ".join(case.description(name) for name in names)
    count, height, width, scale = _sizes(case, tag, description)
    slices = re.search(r"\[[^\]]*:[^\]]*\]", description)
    check_size(case.path.name, f"the table of {tag}", (count + height * width, 1))
    known = {field.name for field in dataclasses.fields(InstellaConfig)} - {"rope_id_dtype"}
    config = {name: value for name, value in case.config.items() if name in known}
    config["num_latent_tkns"] = count
    for name in names:
        id_dtype = "bfloat16" if "bf16" in name else "float32"
        values = {**config, "rope_id_dtype": id_dtype}
        rotary = Rotary(configuration.build(InstellaConfig, values, "the configuration"))
        cos, sin = rotary(height, width, scale, case.device)
        table = sin if ".sin" in name else cos
        yield name, case.subsample(name, table, slices[0] if slices else "")


def _sizes(case: Case, tag: str, description: str) -> tuple[int, int, int, float | None]:
    """Latent tokens, rows, columns and scale of "(128+1024,64) … H=W=32, scale=64"."""
    grid = re.search(r"H=(?:W=)?(\d+)(?:,? *W=(\d+))?", description)
    tokens, scale = re.search(r"\((\d+)\+", description), re.search(r"scale=([\d.]+|None)", description)
    if not grid or not tokens or not scale:
        raise case.refusal(f"cannot read grid, tokens and scale of {tag} in {description!r}")
    height = int(grid[1])
    width = int(grid[2]) if grid[2] else height
    return int(tokens[1]), height, width, None if scale[1] == "None" else float(scale[1].rstrip("."))


def _quantizer(case: Case) -> Outputs:
    shapes = {key: shape for key, (_, shape) in case.data.get("quantizer_state_dict", {}).items()}
    if len(shapes.get("embed", ())) != 2:
        raise case.refusal("quantizer_state_dict names no matrix embed, the quantizer's embeddings")
    check_size(case.path.name, "quantizer_state_dict's embed", tuple(shapes["embed"]))
    quantizer = BinaryQuantizer(*shapes["embed"])
    state = quantizer.state_dict()
    if {key: list(value.shape) for key, value in state.items()} != shapes:
        raise case.refusal(f"quantizer keys {sorted(state)} are not {sorted(shapes)}")
    quantizer.load_state_dict(case.filled(state))
    quantizer = quantizer.to(case.device, case.dtype).eval()
    latents, weights = case.array("q.h").requires_grad_(), case.array("q.w")
    with torch.enable_grad():
        result = quantizer(latents)
        factor = re.search(r"\+\s*([\d.]+)\s*\*\s*loss", case.description("q.grad_h"))
        loss = (result.latents * weights).sum() + float(factor[1] if factor else 0) * result.losses["code"]
        grad_latents, grad_embed = torch.autograd.grad(loss, [latents, quantizer.embed])
    outputs = {"z_q": result.latents, "bits": result.codes.to(torch.uint8)}
    outputs |= {"loss": result.losses["code"].reshape(1), "grad_h": grad_latents, "grad_embed": grad_embed}
    for name, value in outputs.items():
        if f"q.{name}" in case.tensors:
            yield f"q.{name}", case.subsample(f"q.{name}", value)
