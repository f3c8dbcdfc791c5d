"""Vision reducers in timm's vision transformers: `VisionTransformer` (ViT, DeiT, DINOv2 with registers, MAE,
SigLIP, ...), `Eva` (EVA-02, DINOv3, ...) and `Beit`."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn

from ...extras import needs
from ..attention import attention_rows
from ..reducer import Budget, VisionReducer
from ..undo import Undo
from .merging import BlockParts, MergeTrace, VisionMerging, log_size

with needs("timm", "compress", "attaching to timm's models"):
    from timm.layers import apply_rot_embed_cat
    from timm.layers.attention import AttentionRope
    from timm.models import beit, eva, vision_transformer
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

_VIT = BlockParts(
    norm1="norm1",
    attention="attn",
    norm2="norm2",
    mlp="mlp",
    keys="k_norm",
    mask="attn_mask",
    after_attention=("ls1", "drop_path1"),
    after_mlp=("ls2", "drop_path2"),
)
_EVA = replace(_VIT, after_attention=("gamma_1", "drop_path1"), after_mlp=("gamma_2", "drop_path2"))
_POST_NORM = replace(
    _EVA,
    norm1=None,
    norm2=None,
    after_attention=("norm1", "drop_path1"),
    after_mlp=("norm2", "drop_path2"),
)
_BEIT = replace(_EVA, keys=(), mask="shared_rel_pos_bias")

_REASONS = {
    "SwinTransformer": "its blocks attend within shifted windows of a grid that must stay whole",
    "SwinTransformerV2": "its blocks attend within shifted windows of a grid that must stay whole",
    "SwinTransformerV2Cr": "its blocks attend within shifted windows of a grid that must stay whole",
    "MaxxVit": "its blocks attend within windows of a grid that must stay whole",
    "Hiera": "its blocks pool queries within units of a grid that must stay whole",
    "MultiScaleVit": "its blocks pool keys and values over a grid that must stay whole",
    "PyramidVisionTransformerV2": "its blocks reduce keys and values over a grid that must stay whole",
    "VisionTransformerSAM": "its blocks attend within windows of a grid that must stay whole",
    "VisionTransformerRelPos": "its relative positions are made for a whole grid inside the attention",
    "Cait": "its class token joins in the last blocks only, behind the patches",
    "Xcit": "its attention is between channels and not between tokens",
    "NaFlexVit": "it masks the padding of pictures of different sizes, which merging does not support",
}


class _QueriesAndKeys(VisionMerging):
    """Merging in attention that norms queries and keys in modules, by what those return.

    The rotary positions of `Eva` are those of the token that the others merged into; keys are compared
    before rotation.
    """

    def observe(self, blocks: Sequence[nn.Module]) -> None:
        """Keep queries, too, if the reducer reads attention."""
        super().observe(blocks)
        for block in blocks if self.reducer.reads_attention else ():
            self.undo.hook(block.attn.q_norm, self._keep_queries, with_kwargs=False)

    def _keep_queries(self, module: nn.Module, args: tuple, queries: Tensor) -> None:
        if self.running is not None:
            self._local.queries = queries

    def arguments(
        self, trace: MergeTrace, x: Tensor, kwargs: dict[str, Any], attention: nn.Module, sized: bool
    ) -> dict[str, Any]:
        """Also the rotary positions of the tokens that are left."""
        kwargs = super().arguments(trace, x, kwargs, attention, sized)
        rope = kwargs.get("rope")
        if rope is None or trace.origin is None:
            return kwargs
        # [N, d], [heads, N, d] or, where patches drop out in training, [B, 1 or heads, N, d]
        rope = rope if rope.ndim == 4 else rope.reshape(1, -1, *rope.shape[-2:])
        patches = trace.origin[:, self.prefix :] - self.prefix
        index = patches[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[-1])
        return {**kwargs, "rope": rope.expand(len(patches), -1, -1, -1).gather(2, index)}

    def attending(self, block: nn.Module, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Keeps the rotary positions."""
        self._local.rope = kwargs.get("rope")
        return nullcontext()

    def weights(self, block: nn.Module, rows: Tensor | None = None) -> Tensor:
        """The attention among the tokens of a block, [B, H, N, N]."""
        query, key, rope = self._local.queries, self._local.keys, self._local.rope
        if rope is not None:
            half = getattr(block.attn, "rotate_half", False)
            query, key = (
                torch.cat(
                    [x[:, :, : self.prefix], apply_rot_embed_cat(x[:, :, self.prefix :], rope, half)], 2
                )
                for x in (query, key)
            )
        return attention_rows(query, key, scaling=block.attn.scale)


class _Biased(VisionMerging):
    """Merging in `Beit`, whose attention adds a bias to each pair of positions.

    Merged tokens have the position of the token that the others merged into. Queries and keys are computed
    again from the input of the attention, which does not give them out.
    """

    def observe(self, blocks: Sequence[nn.Module]) -> None:
        """Keep the inputs of every attention, and give it the biases of the tokens that are left."""
        for block in blocks:
            self.undo.hook(block.norm1, self._keep_inputs, with_kwargs=False)
            if block.attn.relative_position_bias_table is not None:
                self.replace(block.attn, "_get_rel_pos_bias", self._own_bias)

    def _keep_inputs(self, module: nn.Module, args: tuple, inputs: Tensor) -> None:
        if self.running is not None:
            self._local.inputs = inputs

    def _own_bias(self, attention: nn.Module) -> Tensor:
        bias = type(attention)._get_rel_pos_bias(attention)
        trace = self.running
        return bias if trace is None or trace.origin is None else _at_pairs(bias[0], trace.origin)

    def arguments(
        self, trace: MergeTrace, x: Tensor, kwargs: dict[str, Any], attention: nn.Module, sized: bool
    ) -> dict[str, Any]:
        """The bias that all blocks share for the tokens that are left, and that of their sizes."""
        bias = kwargs.get("shared_rel_pos_bias")
        if bias is not None and trace.origin is not None:
            bias = _at_pairs(bias, trace.origin)
        if sized:
            sizes = log_size(trace.size, x, attention)
            bias = sizes if bias is None else bias + sizes
        return {**kwargs, "shared_rel_pos_bias": bias}

    def attending(self, block: nn.Module, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Keeps the bias of the call."""
        shared, attention = kwargs["shared_rel_pos_bias"], block.attn
        own = None if attention.relative_position_bias_table is None else attention._get_rel_pos_bias()
        self._local.bias = own if shared is None else shared if own is None else own + shared
        return nullcontext()

    def weights(self, block: nn.Module, rows: Tensor | None = None) -> Tensor:
        """The attention among the tokens of a block, [B, H, N, N]."""
        query, key = (self._projected(block.attn, part) for part in (0, 1))
        bias = self._local.bias
        mask = bias[None] if bias is not None and bias.ndim == 3 else bias
        return attention_rows(query, key, scaling=block.attn.scale, mask=mask)

    def _mean_keys(self, block: nn.Module) -> Tensor:
        self._local.keys = self._projected(block.attn, 1)
        return super()._mean_keys(block)

    def _projected(self, attention: nn.Module, part: int) -> Tensor:
        """The queries (part 0) or keys (1) of the block's attention [B, H, N, D]."""
        weight = attention.qkv.weight.chunk(3)[part]
        bias = (attention.q_bias, attention.k_bias)[part]
        return (
            F.linear(self._local.inputs, weight, bias)
            .unflatten(-1, (attention.num_heads, -1))
            .transpose(1, 2)
        )


def _at_pairs(bias: Tensor, origin: Tensor) -> Tensor:
    """The bias [H, N, N] between the tokens at places `origin` [B, M] of each image, [B, H, M, M]."""
    return bias[:, origin[:, :, None], origin[:, None, :]].transpose(0, 1)


# The class of a model → its blocks, their attention, where a block keeps its parts, and how it merges.
_BLOCKS = {
    VisionTransformer: {vision_transformer.Block: _VIT},
    Eva: {eva.EvaBlock: _EVA, eva.EvaBlockPostNorm: _POST_NORM},
    Beit: {beit.Block: _BEIT},
}
_ATTENTIONS = {
    VisionTransformer: (vision_transformer.Attention,),
    Eva: (eva.EvaAttention, AttentionRope),
    Beit: (beit.Attention,),
}


def install(
    model: nn.Module, reducer: VisionReducer, undo: Undo | None = None, *, keep: Budget = None
) -> VisionMerging:
    """Make `model` merge or drop tokens in every forward, until `remove` of what is returned.

    Class, distillation and register tokens never merge. `forward_features` returns the tokens that are left;
    heads that pool over patches count each as often as tokens merged into it, and dropped ones not at all.
    `forward_intermediates` is refused. Raises TypeError for models or blocks of other kinds, ValueError if
    something is attached.
    """
    kind, parts = _kind_of(model)
    merging = (_Biased if kind is Beit else _QueriesAndKeys)(
        reducer,
        list(model.blocks),
        parts,
        model.num_prefix_tokens,
        keep=keep,
        undo=undo,
        class_token=model.cls_token is not None,
    )

    def forward_features(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if model.grad_checkpointing and is_grad_enabled():
            raise ValueError("merging cannot recompute blocks: call model.set_grad_checkpointing(False)")
        if merging.earlier.include_this_one():
            return type(model).forward_features(model, *args, **kwargs)
        with merging.run() as trace:
            x = type(model).forward_features(model, *args, **kwargs)
        x.merge_trace = trace  # for the head, whichever forward its features come from
        return x

    def pooled(x: Tensor) -> Tensor:
        """The tokens that a head takes the mean of."""
        return x if reducer.prunes else _trace_of(x).unmerge(x)

    def pool(model: nn.Module, x: Tensor, pool_type: str | None = None) -> Tensor:
        pool_type = model.global_pool if pool_type is None else pool_type
        if model.attn_pool is not None or pool_type not in ("", "token"):
            x = pooled(x)
        return type(model).pool(model, x, pool_type)

    def forward_head(model: Beit, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return type(model).forward_head(
            model, pooled(x) if model.global_pool == "avg" else x, *args, **kwargs
        )

    def forward_intermediates(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "forward_intermediates needs every patch in its place; detach first, or call forward_features "
            "and unmerge its tokens with the trace"
        )

    merging.replace(model, "forward_features", forward_features)
    if kind is Beit:
        merging.replace(model, "forward_head", forward_head)
    else:
        merging.replace(model, "pool", pool)
    merging.replace(model, "forward_intermediates", forward_intermediates)
    return merging


def _kind_of(model: nn.Module) -> tuple[type[nn.Module], BlockParts]:
    """The class of `_BLOCKS` that a model is of, and where its blocks keep their parts.

    Raises TypeError, naming the class and the reason, for models, blocks and attention of other kinds.
    """
    name = type(model).__name__
    kind = next((kind for kind in _BLOCKS if isinstance(model, kind)), None)
    if kind is None:
        reason = _REASONS.get(name, "how its blocks keep their tokens is not known")
        known = ", ".join(kind.__name__ for kind in _BLOCKS)
        raise TypeError(f"cannot merge inside a timm {name}: {reason}. Models that can: {known}")
    parts = None
    for block in model.blocks:
        match = next((x for x in _BLOCKS[kind] if type(block).forward is x.forward), None)
        if match is None:
            raise TypeError(
                f"{name} has blocks of class {type(block).__name__}; merging needs "
                f"{' or '.join(x.__name__ for x in _BLOCKS[kind])}, where attention comes before the MLP"
            )
        if all(type(block.attn).forward is not x.forward for x in _ATTENTIONS[kind]):
            raise TypeError(f"attention of class {type(block.attn).__name__} does not expose its keys")
        parts = _BLOCKS[kind][match]
    return kind, parts


def _trace_of(x: Tensor) -> MergeTrace:
    trace = getattr(x, "merge_trace", None)
    if trace is None:
        raise ValueError(
            "the head pools over merged tokens; give it what forward_features returned, unchanged"
        )
    return trace
