"""Merging and dropping tokens inside the blocks of a vision transformer of any host.

While installed, each block carries its own `forward` (an instance attribute: no class is touched), which
merges between attention and MLP or after the block. What a forward merges is kept per thread, so that threads
may share a model.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms.merge import Matching, compose
from ..attention import attention_rows, probing
from ..earlier import EarlierCalls
from ..hosts import forward_slot
from ..reducer import Budget, TowerAttention, VisionReducer, count_of
from ..undo import InModel, Undo


@dataclass(frozen=True)
class BlockParts:
    """Where a block x ← x + a(attention(norm1(x))), x ← x + b(mlp(norm2(x))) keeps its parts.

    `norm1` and `norm2` are None in blocks that norm afterwards. `keys` is the module of the attention whose
    output are the keys, [B, H, N, D] or [B, N, H D], or names of which one is there; `mask` the argument for
    an additive mask (in packed towers: for the borders of sequences). `after_attention` and `after_mlp` are
    the modules or scales that make up a and b; those that are None do nothing.
    """

    norm1: str | None
    attention: str
    norm2: str | None
    mlp: str
    keys: str | tuple[str, ...] = ()
    mask: str = "attention_mask"
    after_attention: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()


@dataclass
class MergeTrace:
    """The merges of one forward: N tokens went in, of which the first `prefix` (class, registers) never
    merge.

    `size` [B, M, 1] counts the original tokens in each of the M that are left, and `origin` [B, M] are their
    places among the N: of a merged token that of the one that the others merged into. Tokens that were
    dropped belong to the group of the most similar one that is left. Without merges both are None.
    """

    prefix: int
    plan: list[int] = field(default_factory=list)
    matchings: list[Matching | None] = field(default_factory=list)
    batch: int = 0
    num_tokens: int = 0
    size: Tensor | None = None
    origin: Tensor | None = None
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

    def patches_left(self, blocks: int | None = None) -> Tensor:
        """Which patches are left after the first `blocks` blocks, bool [B, N - prefix], numbered as in
        `patch_groups`."""
        places = torch.arange(self.num_tokens, device=self.device).expand(self.batch, -1)
        for matching in self.matchings[:blocks]:
            places = places if matching is None else places.gather(1, matching.kept)
        left = torch.zeros(self.batch, self.num_tokens, dtype=torch.bool, device=self.device)
        return left.scatter_(1, places, True)[:, self.prefix :]

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
    `keep` overrides the reducer's budget: the patches left after them. `class_token`: the first of the
    `prefix` tokens is the class token.
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
        class_token: bool | None = None,
    ) -> None:
        self.reducer, self.prefix = reducer, prefix
        self.class_token = prefix > 0 if class_token is None else class_token
        self.undo = Undo() if undo is None else undo
        self.earlier = EarlierCalls(())
        self._plans: dict[int, list[int]] = {}
        self.keep = keep
        self.num_blocks = len(blocks)
        self.depth = self.num_blocks if depth is None else depth
        if not 0 < self.depth <= self.num_blocks:
            raise ValueError(f"depth is {depth}; the tower has {self.num_blocks} blocks")
        self._parts = parts
        self._arguments = list(inspect.signature(type(blocks[0]).forward).parameters)[2:]  # after x
        self._local = threading.local()
        for block in blocks:
            refuse_replaced(block)
        self.undo.attribute(blocks[0], "vistok_merging", self)  # so that copies of the model are refused
        for index, block in enumerate(blocks):
            self.replace(block, forward_slot(block), self._block_forward(index))
        self.observe(blocks)

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
            vars(self._local).clear()  # what was kept of the blocks' attention
            self._local.running = outer
        self._local.trace = trace

    # For kinds of towers ------------------------------------------------------------------------------------

    def observe(self, blocks: Sequence[nn.Module]) -> None:
        """Keep the keys of every block's attention, if the reducer compares them."""
        if self.reducer.metric == "keys":
            for block in blocks:
                attention, name = self._self_attention(block)
                self.undo.hook(attention.get_submodule(name), self._keep_keys(), with_kwargs=False)

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

    def attending(self, block: nn.Module, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Context of a call of `block`, with these arguments, whose attention `weights` gives afterwards."""
        calls = self._local.calls = []
        attention, _ = self._self_attention(block)
        return probing({attention: lambda module, *call: calls.append(call)})

    def weights(self, block: nn.Module, rows: Tensor | None = None) -> Tensor:
        """The attention among the tokens of a block, [B, H, N, N], or among those at the places of each of
        some `rows` [b, n] of a packed sequence, [b, H, n, n]."""
        query, key = (torch.cat(parts, 2) for parts in list(zip(*self._local.calls, strict=True))[:2])
        mask, scaling = self._local.calls[0][2:]
        if rows is not None:
            query, key, mask = query[0][:, rows].transpose(0, 1), key[0][:, rows].transpose(0, 1), None
        return attention_rows(query, key, scaling=scaling, mask=mask)

    def match(self, trace: MergeTrace, index: int, metric: Tensor, block: nn.Module) -> Matching:
        """The merges of a block, number `index`, by `metric` [B, N, C]."""
        return self.match_rows(index, metric, trace.plan[index], block)

    def match_rows(
        self, index: int, metric: Tensor, r: int, block: nn.Module, rows: Tensor | None = None
    ) -> Matching:
        """What the reducer merges in a block among B images, or among the tokens at the places `rows`
        [B, N] of a packed sequence, by `metric` [B, N, C]."""
        read = {}
        with torch.no_grad():
            if self.reducer.reads_attention:
                read["attention"] = TowerAttention(self.weights(block, rows), self.class_token)
            return self.reducer.match(index, self.num_blocks, metric, r, self.prefix, **read)

    # Blocks -------------------------------------------------------------------------------------------------

    def plan(self, num_tokens: int) -> list[int]:
        """Tokens merged in each block when `num_tokens` (prefix included) go in."""
        if num_tokens not in self._plans:
            patches = num_tokens - self.prefix
            count = None if self.keep is None else count_of(self.keep, patches)
            plan = self.reducer.plan(self.depth, patches, self.prefix, count)
            self._plans[num_tokens] = plan + [0] * (self.num_blocks - len(plan))
        return self._plans[num_tokens]

    def _self_attention(self, block: nn.Module) -> tuple[nn.Module, str]:
        """The module that computes a block's attention, and the name of the one in it that makes its keys."""
        attention = getattr(block, self._parts.attention)
        paths = [self._parts.keys] if isinstance(self._parts.keys, str) else self._parts.keys
        for path in paths:
            module, name = path.rpartition(".")[::2]
            owner = getattr(attention, module, None) if module else attention
            if isinstance(getattr(owner, name, None), nn.Module):
                return owner, name
        raise TypeError(
            f"{type(attention).__name__} has no keys called {' or '.join(paths)}, so its tokens cannot be "
            "compared"
        )

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
            kwargs = dict(zip(self._arguments, args, strict=False)) | kwargs
            if r or merged:
                kwargs = self.arguments(trace, x, kwargs, attention, sized)
            attending = self.attending(block, kwargs) if r and reducer.reads_attention else nullcontext()
            if not sized and (not r or reducer.where == "layer"):
                with attending:
                    x = type(block).forward(block, x, **kwargs)
                return self._merge(trace, index, x, block) if r else _skip(trace, x)
            with attending:
                out = attention(_normed(block, parts.norm1, x), **kwargs)
            x = x + _then(block, parts.after_attention, out[0] if isinstance(out, tuple) else out)
            if r and reducer.where == "attention":
                x = self._merge(trace, index, x, block)
            x = x + _then(block, parts.after_mlp, getattr(block, parts.mlp)(_normed(block, parts.norm2, x)))
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
        metric = x if self.reducer.metric == "hidden" else self._mean_keys(block)
        matching = self.match(trace, index, metric, block)
        trace.matchings.append(matching)
        trace.origin = matching.kept if trace.origin is None else trace.origin.gather(1, matching.kept)
        if self.reducer.prunes:
            trace.size = x.new_ones(*matching.kept.shape, 1, dtype=torch.float32)
            return matching.merge(x, "prune")
        if self.reducer.weighted:
            x, trace.size = matching.merge_weighted(x, trace.size)
            return x
        size = x.new_ones(*x.shape[:2], 1, dtype=torch.float32) if trace.size is None else trace.size
        trace.size = matching.merge(size, "sum")
        return matching.merge(x)

    def _mean_keys(self, block: nn.Module) -> Tensor:
        """The block's keys, [B, H, N, D] or [B, N, H D], → their mean over heads [B, N, D] in float32 or
        wider."""
        keys = self._local.keys
        exact = torch.promote_types(keys.dtype, torch.float32)
        if keys.ndim == 4:
            return keys.mean(1, dtype=exact)
        attention, _ = self._self_attention(block)
        width = getattr(attention, "head_dim", None) or attention.attention_head_size
        return keys.unflatten(-1, (-1, width)).mean(2, dtype=exact)


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


def _normed(block: nn.Module, name: str | None, x: Tensor) -> Tensor:
    return x if name is None else getattr(block, name)(x)


def _then(block: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    for name in names:
        part = getattr(block, name)
        if part is not None:
            x = part(x) if isinstance(part, nn.Module) else part * x
    return x


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
