"""Merging tokens inside the blocks of a vision transformer of any host.

While installed, each block carries its own `forward` (an instance attribute: no class is touched), which
merges between attention and MLP or after the block. What a forward merges is kept per thread, so that threads
may share a model.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms.merge import Matching, compose
from ..earlier import EarlierCalls
from ..hosts import forward_slot
from ..reducer import Budget, VisionReducer, count_of
from ..undo import InModel, Undo


@dataclass(frozen=True)
class BlockParts:
    """Where a pre-norm block x ← x + a(attention(norm1(x))), x ← x + b(mlp(norm2(x))) keeps its parts.

    `keys` is the module of the attention whose output are the keys, [B, H, N, D] or [B, N, H D]; `mask` the
    block's first argument after x, the attention's for an additive mask (in packed towers: for the borders of
    sequences). `after_attention` and `after_mlp` are the modules or scales that make up a and b.
    """

    norm1: str
    attention: str
    norm2: str
    mlp: str
    keys: str
    mask: str = "attention_mask"
    after_attention: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()


@dataclass
class MergeTrace:
    """The merges of one forward: N tokens went in, of which the first `prefix` (class, registers) never
    merge.

    `size` [B, M, 1] counts the original tokens in each of the M that are left.
    """

    prefix: int
    plan: list[int] = field(default_factory=list)
    matchings: list[Matching | None] = field(default_factory=list)
    batch: int = 0
    num_tokens: int = 0
    size: Tensor | None = None
    device: torch.device | None = None

    @property
    def tokens(self) -> list[int]:
        """Tokens after each block, prefix included."""
        counts, left = [], self.num_tokens
        for matching in self.matchings:
            left = left if matching is None else matching.kept.shape[1]
            counts.append(left)
        return counts

    def groups(self, blocks: int | None = None) -> Tensor:
        """The place [B, N], after the first `blocks` blocks (by default all), of the token that
        holds each token of the input."""
        groups = compose(self.matchings[:blocks])
        if groups is None:
            groups = torch.arange(self.num_tokens, device=self.device).expand(self.batch, -1)
        return groups

    def patch_groups(self, blocks: int | None = None) -> Tensor:
        """`groups` of the patches alone, [B, N - prefix], numbered from 0."""
        return self.groups(blocks)[:, self.prefix :] - self.prefix

    def exit_groups(self) -> Tensor:
        """`patch_groups` at the tower's output: patches of one group are equal in all that the tower
        returns."""
        return self.patch_groups()

    def unmerge(self, x: Tensor, blocks: int | None = None) -> Tensor:
        """Tokens after the first `blocks` blocks [B, M, D] → [B, N, D]; each input token gets its group's."""
        groups = compose(self.matchings[:blocks])
        return x if groups is None else x.gather(1, groups.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class VisionMerging(InModel):
    """A vision reducer attached to a model; `remove` restores the model.

    Tokens merge in the first `depth` blocks (by default all), up to the last whose output leaves the tower.
    `keep` overrides the reducer's budget: the patches left after them.
    """

    def __init__(
        self,
        reducer: VisionReducer,
        blocks: Sequence[nn.Module],
        parts: BlockParts,
        prefix: int,
        *,
        keep: Budget = None,
        depth: int | None = None,
        undo: Undo | None = None,
    ) -> None:
        self.reducer, self.prefix = reducer, prefix
        self.undo = Undo() if undo is None else undo
        self.earlier = EarlierCalls(())
        self._plans: dict[int, list[int]] = {}
        self.keep = keep
        self.num_blocks = len(blocks)
        self.depth = self.num_blocks if depth is None else depth
        if not 0 < self.depth <= self.num_blocks:
            raise ValueError(f"depth is {depth}; the tower has {self.num_blocks} blocks")
        self._parts = parts
        self._local = threading.local()
        for block in blocks:
            refuse_replaced(block)
        self.undo.attribute(blocks[0], "vistok_merging", self)  # so that copies of the model are refused
        keys = [getattr(block, parts.attention).get_submodule(parts.keys) for block in blocks]
        for index, block in enumerate(blocks):
            self.replace(block, forward_slot(block), self._block_forward(index))
            if reducer.metric == "keys":
                self.undo.hook(keys[index], self._keep_keys(), with_kwargs=False)

    @property
    def keep(self) -> float | int | None:
        """The budget: the reducer's own unless set."""
        return self._keep

    @keep.setter
    def keep(self, keep: Budget) -> None:
        keep = self.reducer.keep if keep is None else keep
        if callable(keep):
            raise ValueError(
                f"{type(self.reducer).__name__} merges a whole batch at once in the tower, so keep cannot "
                "be a function of the image; give a fraction or a count"
            )
        self._keep = keep
        self._plans.clear()

    @property
    def trace(self) -> MergeTrace | None:
        """The merges of this thread's last forward; None before one, or when it failed."""
        return getattr(self._local, "trace", None)

    @property
    def running(self) -> MergeTrace | None:
        """The forward that this thread is in, if any."""
        return getattr(self._local, "running", None)

    def reset(self) -> None:
        """Delete the trace of this thread's last forward."""
        self._local.trace = None

    def remove(self) -> None:
        """Remove everything. A second call does nothing."""
        self.undo.run()

    # For hosts ----------------------------------------------------------------------------------------------

    def replace(self, module: nn.Module, name: str, method: Callable) -> None:
        """Give `module` a method of its own until `remove`; `method` takes the module first."""
        self.undo.attribute(module, name, MethodType(method, module))

    def start(self, tower: nn.Module, *args: Any, **kwargs: Any) -> tuple[MergeTrace, tuple, dict[str, Any]]:
        """An empty trace for a forward of a tower with these arguments, and the arguments to call it with."""
        return MergeTrace(self.prefix), args, kwargs

    @contextmanager
    def run(self, trace: MergeTrace | None = None) -> Iterator[MergeTrace]:
        """Context of one forward of the tower."""
        self._local.trace, outer = None, self.running
        trace = self._local.running = MergeTrace(self.prefix) if trace is None else trace
        try:
            yield trace
        finally:
            self._local.running, self._local.keys = outer, None
        self._local.trace = trace

    # For packed towers --------------------------------------------------------------------------------------

    def begin(self, trace: MergeTrace, x: Tensor) -> None:
        """Fill in the trace at the first block, with its input [B, N, D]."""
        trace.batch, trace.num_tokens, trace.device = *x.shape[:2], x.device
        trace.plan = self.plan(trace.num_tokens)

    def arguments(
        self, trace: MergeTrace, x: Tensor, kwargs: dict[str, Any], attention: nn.Module, sized: bool
    ) -> dict[str, Any]:
        """The arguments of a block in which tokens merge or have merged before; `sized`: attention is
        proportional to the tokens that its input `x` stands for."""
        kwargs = _without_masks(kwargs, self._parts)
        if sized:
            kwargs[self._parts.mask] = log_size(trace.size, x, attention)
        return kwargs

    def match(self, trace: MergeTrace, index: int, metric: Tensor) -> Matching:
        """The merges of block `index`, by `metric` [B, N, C]."""
        return self.reducer.match(index, self.num_blocks, metric, trace.plan[index], self.prefix)

    # Blocks -------------------------------------------------------------------------------------------------

    def plan(self, num_tokens: int) -> list[int]:
        """Tokens merged in each block when `num_tokens` (prefix included) go in."""
        if num_tokens not in self._plans:
            patches = num_tokens - self.prefix
            count = None if self.keep is None else count_of(self.keep, patches)
            plan = self.reducer.plan(self.depth, patches, self.prefix, count)
            self._plans[num_tokens] = plan + [0] * (self.num_blocks - len(plan))
        return self._plans[num_tokens]

    def _keep_keys(self) -> Callable:
        def hook(module: nn.Module, args: tuple, keys: Tensor) -> None:
            if self.running is not None:
                self._local.keys = keys

        return hook

    def _block_forward(self, index: int) -> Callable:
        reducer, parts = self.reducer, self._parts

        def forward(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.running is None and self.earlier.include_this_one():
                return type(block).forward(block, x, *args, **kwargs)
            trace = self._enter(index, x)
            r, merged = trace.plan[index], x.shape[-2] != trace.num_tokens
            sized = reducer.prop_attn and merged
            attention = getattr(block, parts.attention)
            kwargs = dict(zip((parts.mask,), args, strict=False)) | kwargs
            if r or merged:
                kwargs = self.arguments(trace, x, kwargs, attention, sized)
            if not sized and (not r or reducer.where == "layer"):
                x = type(block).forward(block, x, **kwargs)
                return self._merge(trace, index, x, block) if r else _skip(trace, x)
            out = attention(getattr(block, parts.norm1)(x), **kwargs)
            x = x + _then(block, parts.after_attention, out[0] if isinstance(out, tuple) else out)
            if r and reducer.where == "attention":
                x = self._merge(trace, index, x, block)
            x = x + _then(block, parts.after_mlp, getattr(block, parts.mlp)(getattr(block, parts.norm2)(x)))
            if r and reducer.where == "layer":
                return self._merge(trace, index, x, block)
            return x if r else _skip(trace, x)

        return forward

    def _enter(self, index: int, x: Tensor) -> MergeTrace:
        trace = self.running
        if trace is None or len(trace.matchings) != index:
            raise RuntimeError(
                f"block {index} was called on its own while {type(self.reducer).__name__} is attached; call "
                "the model (timm: forward or forward_features), or detach first"
            )
        if not index:
            self.begin(trace, x)
        return trace

    def _merge(self, trace: MergeTrace, index: int, x: Tensor, block: nn.Module) -> Tensor:
        metric = x
        if self.reducer.metric == "keys":
            metric = _mean_over_heads(self._local.keys, getattr(block, self._parts.attention).head_dim)
        matching = self.match(trace, index, metric)
        trace.matchings.append(matching)
        if self.reducer.weighted:
            x, trace.size = matching.merge_weighted(x, trace.size)
            return x
        size = x.new_ones(*x.shape[:2], 1, dtype=torch.float32) if trace.size is None else trace.size
        trace.size = matching.merge(size, "sum")
        return matching.merge(x)


def refuse_replaced(module: nn.Module) -> None:
    """Raises ValueError if `module` carries a `forward` of its own, other than accelerate's, which would be
    hidden."""
    slot = forward_slot(module)
    own = vars(module).get(slot)
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        raise ValueError(
            f"a {type(module).__name__} already has a forward of its own: detach what was attached before"
        )


def _skip(trace: MergeTrace, x: Tensor) -> Tensor:
    trace.matchings.append(None)
    return x


def _then(block: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    for name in names:
        part = getattr(block, name)
        x = part(x) if isinstance(part, nn.Module) else part * x
    return x


def _mean_over_heads(keys: Tensor, head_dim: int) -> Tensor:
    """[B, H, N, D] or [B, N, H D] → [B, N, D] in float32 or wider."""
    exact = torch.promote_types(keys.dtype, torch.float32)
    if keys.ndim == 4:
        return keys.mean(1, dtype=exact)
    return keys.unflatten(-1, (-1, head_dim)).mean(2, dtype=exact)


def log_size(size: Tensor, x: Tensor, attention: nn.Module) -> Tensor:
    """Proportional attention's bias [B, 1, 1, N]: every key counts as often as tokens merged into it."""
    kernel = str(getattr(getattr(attention, "config", None), "_attn_implementation", ""))
    if "flash" in kernel or "flex" in kernel:
        raise ValueError(
            f"proportional attention needs a mask, which {kernel} does not take; use prop_attn=False or "
            "load the model with attn_implementation='sdpa'"
        )
    return size.log().to(x.dtype).transpose(1, 2).unsqueeze(1)


def _without_masks(kwargs: dict[str, Any], parts: BlockParts) -> dict[str, Any]:
    """The block's arguments without a mask that hides nothing. Raises ValueError if it hides something."""
    mask = kwargs.get(parts.mask)
    hidden = mask is not None and not bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all())
    if hidden or kwargs.get("is_causal"):
        raise ValueError(
            "merging inside the tower does not support attention masks: padded and real patches would "
            "merge; give images without padding"
        )
    return kwargs if mask is None else {**kwargs, parts.mask: None}
