"""Vision reducers in timm's `VisionTransformer` (ViT, DeiT, DINOv2 with registers, MAE, SigLIP, ...)."""

from typing import Any

from torch import Tensor, is_grad_enabled, nn

from ...extras import needs
from ..reducer import Budget, VisionReducer
from ..undo import Undo
from .merging import BlockParts, MergeTrace, VisionMerging

with needs("timm", "compress", "attaching to timm's models"):
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

PARTS = BlockParts(
    norm1="norm1",
    attention="attn",
    norm2="norm2",
    mlp="mlp",
    keys="k_norm",
    mask="attn_mask",
    after_attention=("ls1", "drop_path1"),
    after_mlp=("ls2", "drop_path2"),
)


def install(
    model: nn.Module, reducer: VisionReducer, undo: Undo | None = None, *, keep: Budget = None
) -> VisionMerging:
    """Make `model` merge tokens in every forward, until `remove` of what is returned.

    Class, distillation and register tokens never merge. `forward_features` returns the tokens that are left,
    heads that pool over patches count each as often as tokens merged into it, `forward_intermediates` is
    refused. Raises TypeError for models or blocks of other kinds, ValueError if something is attached.
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"{type(model).__name__} is not a timm VisionTransformer")
    for block in model.blocks:
        if type(block).forward is not Block.forward:
            raise TypeError(
                f"{type(model).__name__} has blocks of class {type(block).__name__}; merging needs timm's "
                "plain Block, where attention comes before the MLP"
            )
        if type(block.attn).forward is not Attention.forward:
            raise TypeError(f"attention of class {type(block.attn).__name__} does not expose its keys")
    merging = VisionMerging(reducer, list(model.blocks), PARTS, model.num_prefix_tokens, keep=keep, undo=undo)

    def forward_features(model: VisionTransformer, *args: Any, **kwargs: Any) -> Tensor:
        if model.grad_checkpointing and is_grad_enabled():
            raise ValueError("merging cannot recompute blocks: call model.set_grad_checkpointing(False)")
        if merging.earlier.include_this_one():
            return type(model).forward_features(model, *args, **kwargs)
        with merging.run() as trace:
            x = type(model).forward_features(model, *args, **kwargs)
        x.merge_trace = trace  # for pool, whichever forward its features come from
        return x

    def pool(model: VisionTransformer, x: Tensor, pool_type: str | None = None) -> Tensor:
        pool_type = model.global_pool if pool_type is None else pool_type
        if model.attn_pool is not None or pool_type not in ("", "token"):
            x = _trace_of(x).unmerge(x)
        return type(model).pool(model, x, pool_type)

    def forward_intermediates(model: VisionTransformer, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "forward_intermediates needs every patch in its place; detach first, or call forward_features "
            "and unmerge its tokens with the trace"
        )

    merging.replace(model, "forward_features", forward_features)
    merging.replace(model, "pool", pool)
    merging.replace(model, "forward_intermediates", forward_intermediates)
    return merging


def _trace_of(x: Tensor) -> MergeTrace:
    trace = getattr(x, "merge_trace", None)
    if trace is None:
        raise ValueError(
            "the head pools over merged tokens; give it what forward_features returned, unchanged"
        )
    return trace
