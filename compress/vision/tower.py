"""Vision reducers in the Hugging Face towers of vision-language models, and in such towers alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import AttentionChange, change_attention, watched
from ..hosts import forward_slot, recomputes, takes
from ..reducer import Budget, VisionReducer
from ..undo import Undo
from .merging import BlockParts, MergeTrace, VisionMerging, log_size, refuse_replaced
from .packed import PixtralMerging, QwenMerging

_CLIP = BlockParts("layer_norm1", "self_attn", "layer_norm2", "mlp", keys="k_proj")
_INTERNVL = BlockParts(
    "layernorm_before",
    "attention",
    "layernorm_after",
    "mlp",
    keys="k_norm",
    after_attention=("lambda_1",),
    after_mlp=("dropout", "lambda_2"),
)
_QWEN = BlockParts("norm1", "attn", "norm2", "mlp", keys="qkv", mask="cu_seqlens")
_PIXTRAL = BlockParts("attention_norm", "attention", "ffn_norm", "feed_forward", keys="k_proj")
_DINO = BlockParts(
    "norm1",
    "attention",
    "norm2",
    "mlp",
    keys=("k_proj", "attention.key"),  # the second: before transformers 5.24
    after_attention=("layer_scale1", "drop_path"),
    after_mlp=("layer_scale2", "drop_path"),
)


class RotaryMerging(VisionMerging):
    """Merging in DINOv3, whose patches have rotary positions.

    A merged token has the position of the token that the others merged into; keys are compared before
    rotation.
    """

    def arguments(
        self, trace: MergeTrace, x: Tensor, kwargs: dict[str, Any], attention: nn.Module, sized: bool
    ) -> dict[str, Any]:
        """Also the positions of the tokens that are left."""
        kwargs = super().arguments(trace, x, kwargs, attention, sized)
        if trace.origin is None:
            return kwargs
        patches = trace.origin[:, self.prefix :] - self.prefix
        rotation = tuple(part[patches.to(part.device)][:, None] for part in kwargs["position_embeddings"])
        return {**kwargs, "position_embeddings": rotation}


class UnmaskedMerging(VisionMerging):
    """Merging in towers whose attention modules take no mask: that of sizes is added behind them."""

    @contextmanager
    def run(self, trace: MergeTrace | None = None) -> Iterator[MergeTrace]:
        """Context of one forward of the tower."""
        before = change_attention(None)
        change_attention({**(before or {}), **self._changes})
        try:
            with super().run(trace) as trace:
                yield trace
        finally:
            change_attention(before)

    def observe(self, blocks: list[nn.Module]) -> None:
        """Also make the change to each block's attention."""
        super().observe(blocks)
        attentions = [self._self_attention(block)[0] for block in blocks]
        self._changes = {attention: self._change(attention) for attention in attentions}

    def arguments(
        self, trace: MergeTrace, x: Tensor, kwargs: dict[str, Any], attention: nn.Module, sized: bool
    ) -> dict[str, Any]:
        """The arguments as they are."""
        return super().arguments(trace, x, kwargs, attention, False)

    def _change(self, attention: nn.Module) -> AttentionChange:
        def change(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            size = None if self.running is None else self.running.size
            if size is not None:
                bias = log_size(size, query, attention)
                mask = bias if mask is None else mask + bias
            return key, value, mask

        return change


@dataclass(frozen=True)
class _Tower:
    """`blocks` is the path of the layers, `block` their class, `prefix` the tokens before the patches (with
    `registers` as many more as the configuration states), `outlets` the modules (or lists of them) that take
    a block's output and need every patch in its place, `pooling` those that pool over patches."""

    blocks: str
    block: str
    parts: BlockParts
    prefix: int = 0
    merging: type[VisionMerging] = VisionMerging
    outlets: tuple[str, ...] = ()
    pooling: tuple[str, ...] = ()
    registers: bool = False


def _qwen(block: str) -> _Tower:
    return _Tower("blocks", block, _QWEN, merging=QwenMerging, outlets=("merger", "deepstack_merger_list"))


TOWERS = {
    "CLIPVisionModel": _Tower("encoder.layers", "CLIPEncoderLayer", _CLIP, 1),
    # SigLIP's head pools over patches: it counts each as often as tokens merged into it.
    "SiglipVisionModel": _Tower("encoder.layers", "SiglipEncoderLayer", _CLIP, pooling=("head",)),
    "Idefics3VisionTransformer": _Tower("encoder.layers", "Idefics3EncoderLayer", _CLIP),
    "SmolVLMVisionTransformer": _Tower("encoder.layers", "SmolVLMEncoderLayer", _CLIP),
    "InternVLVisionModel": _Tower("encoder.layer", "InternVLVisionLayer", _INTERNVL, 1),
    "Qwen2VisionTransformerPretrainedModel": _qwen("Qwen2VLVisionBlock"),
    "Qwen2_5_VisionTransformerPretrainedModel": _qwen("Qwen2_5_VLVisionBlock"),
    "Qwen3VLVisionModel": _qwen("Qwen3VLVisionBlock"),
    "Qwen3VLMoeVisionModel": _qwen("Qwen3VLMoeVisionBlock"),
    "PixtralVisionModel": _Tower(
        "transformer.layers", "PixtralAttentionLayer", _PIXTRAL, merging=PixtralMerging
    ),
    "Dinov2Model": _Tower("encoder.layer", "Dinov2Layer", _DINO, 1),
    "Dinov2WithRegistersModel": _Tower("encoder.layer", "Dinov2WithRegistersLayer", _DINO, 1, registers=True),
    "DINOv3ViTModel": _Tower(
        "model.layer", "DINOv3ViTLayer", _DINO, 1, merging=RotaryMerging, registers=True
    ),
}


def install(
    tower: nn.Module,
    reducer: VisionReducer,
    undo: Undo | None = None,
    *,
    keep: Budget = None,
    depth: int | None = None,
    unmerge: bool = True,
) -> VisionMerging:
    """Make `tower` merge or drop tokens in every forward, until `remove` of what is returned.

    With `unmerge`, `last_hidden_state` and `hidden_states` leave at full length, each patch with its group's
    vector (a dropped one with that of the most similar patch that is left), and
    `merging.trace.patch_groups()` returns the groups; otherwise merged tokens leave. `depth` is the number of
    layers up to the one whose output is used (all but one for `vision_feature_layer=-2`).
    Towers that pack images into one sequence merge as `packed.PackedMerging` does. Raises TypeError for
    towers of other classes.
    """
    kind = supported(tower)
    refuse_replaced(tower)
    blocks = list(tower.get_submodule(kind.blocks))
    merges = kind.merging
    if reducer.prop_attn and merges is VisionMerging:
        attention = getattr(blocks[0], kind.parts.attention)
        merges = merges if takes(attention, kind.parts.mask) else UnmaskedMerging
    prefix = kind.prefix + (tower.config.num_register_tokens if kind.registers else 0)
    merging = merges(reducer, blocks, kind.parts, prefix, keep=keep, depth=depth, undo=undo)
    if reducer.reads_attention or merges is UnmaskedMerging:
        _watch(tower, merging.undo)

    def forward(tower: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if merging.earlier.include_this_one():
            return type(tower).forward(tower, *args, **kwargs)
        as_tuple = kwargs.pop("return_dict", getattr(tower.config, "return_dict", True)) is False
        if torch.is_grad_enabled() and recomputes(tower):
            raise ValueError("merging cannot recompute layers: turn the model's gradient checkpointing off")
        merging.reset()
        trace, args, kwargs = merging.start(tower, *args, **kwargs)
        with merging.run(trace):
            output = type(tower).forward(tower, *args, return_dict=True, **kwargs)
        if unmerge:
            output.last_hidden_state = trace.unmerge(output.last_hidden_state)
            states = getattr(output, "hidden_states", None)
            if states is not None:
                output.hidden_states = tuple(
                    None if state is None else trace.unmerge(state, blocks=layer)
                    for layer, state in enumerate(states)
                )
        return output.to_tuple() if as_tuple else output

    def spread(outlet: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        trace = merging.running
        return args if trace is None else (trace.unmerge(args[0]), *args[1:])

    merging.replace(tower, forward_slot(tower), forward)
    for name in kind.outlets if reducer.prunes else kind.outlets + kind.pooling:
        outlets = getattr(tower, name, None)
        for outlet in outlets if isinstance(outlets, nn.ModuleList) else [outlets]:
            if isinstance(outlet, nn.Module):
                merging.undo.pre_hook(outlet, spread, with_kwargs=False)
    return merging


def _watch(tower: nn.Module, undo: Undo) -> None:
    """Make the tower's attention report to probes; the kernels stay."""
    stock = tower.config._attn_implementation
    name = watched(stock)

    def restore() -> None:  # what the user has set since stays
        if tower.config._attn_implementation == name:
            tower.set_attn_implementation(stock)

    undo.step(restore)
    tower.set_attn_implementation(name)


def supported(tower: nn.Module) -> _Tower:
    """The table entry of `tower`'s class. Raises TypeError naming the class if merging inside it is not
    known."""
    name = type(tower).__name__
    kind = TOWERS.get(name)
    if kind is None:
        raise TypeError(f"cannot merge inside a {name}: merging supports {', '.join(TOWERS)}")
    for layer in tower.get_submodule(kind.blocks):
        if type(layer).__name__ != kind.block:
            raise TypeError(f"{name} has {type(layer).__name__} layers; merging supports {kind.block}")
    return kind
