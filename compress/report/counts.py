"""A session's report on its last prompt: tokens kept, computation and memory spared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..hosts import writes_cache
from .accounting import llm_block_macs, skipped_macs

if TYPE_CHECKING:
    from ..families import Host
    from ..language.call import Call
    from ..layout import Layout, Span


@dataclass(frozen=True)
class ImageReport:
    """Visual tokens of one image in one prompt: `tokens` it has, `layers` of them in each layer, and of a
    video whose layout is known `frames` of those in the first layer in each frame."""

    row: int
    number: int
    tokens: int
    layers: list[int]
    frames: list[int] | None = None

    @property
    def average(self) -> float:
        """Tokens averaged over the layers, the field's unit for comparing methods."""
        return sum(self.layers) / max(1, len(self.layers))


@dataclass(frozen=True)
class Report:
    """The last prompt with images. Floating-point operations are counted (two per multiply-add), not
    measured, and cover the language model's layers at prefill; cache bytes are those held after it; `seconds`
    is the time spent in the reducers themselves. They are None for models where they are not counted.
    `skipped` has, per layer that tokens skip parts of, how often each part (`accounting.skipped_macs`) was
    left out, over all prompts."""

    reducers: list[str]
    images: list[ImageReport]
    flops: int | None = None
    flops_full: int | None = None
    cache_bytes: int | None = None
    cache_bytes_full: int | None = None
    seconds: float | None = None
    skipped: dict[int, dict[str, int]] = field(default_factory=dict)

    @property
    def average_tokens(self) -> float:
        """Visual tokens per image, averaged over layers and images."""
        return sum(image.average for image in self.images) / max(1, len(self.images))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, for JSON."""
        images = [vars(image) | {"average": image.average} for image in self.images]
        return vars(self) | {"images": images, "average_tokens": self.average_tokens}

    def __str__(self) -> str:
        lines = [f"{' + '.join(self.reducers)}: {self.average_tokens:.1f} visual tokens per layer and image"]
        for image in self.images:
            steps = [f"{image.layers[0]}"] + [
                f"{after} from layer {i}"
                for i, (before, after) in enumerate(zip(image.layers[:-1], image.layers[1:], strict=True), 1)
                if after != before
            ]
            lines.append(
                f"  prompt {image.row}, image {image.number}: {image.tokens} tokens, kept {', '.join(steps)}"
            )
        if self.flops is not None:
            lines.append(f"  {self.flops / 1e9:.3g} of {self.flops_full / 1e9:.3g} GFLOPs")
        if self.cache_bytes is not None:
            held, full = self.cache_bytes / 1e6, self.cache_bytes_full / 1e6
            lines[-1] += (
                f" at prefill, cache {held:.3g} of {full:.3g} MB, {1000 * self.seconds:.1f} ms in the reducer"
            )
        return "\n".join(lines)


def count(host: Host, call: Call, reducers: list[str]) -> Report:
    """The report of one call."""
    layouts = call.layouts
    counted: dict[int, list[int]] = {}
    for layout in layouts:
        if id(layout) not in counted:
            image = call.prompt.image.gather(1, layout.index).masked_fill(~layout.valid, -1)
            counted[id(layout)] = torch.bincount(image[image >= 0], minlength=len(call.prompt.spans)).tolist()
    images = [
        ImageReport(
            span.row,
            span.number,
            len(span.places),
            [counted[id(layout)][i] for layout in layouts],
            _per_frame(layouts[0], span),
        )
        for i, span in enumerate(call.prompt.spans)
    ]
    entering = [_lengths(layout.valid) for layout in layouts]
    full = [_lengths(call.start.valid)] * len(layouts)
    held = entering
    if call.columns is not None:
        held = [
            lengths if columns is None else _lengths(columns)
            for lengths, columns in zip(entering, call.columns, strict=True)
        ]
    limits = call.limits or [None] * len(layouts)
    flops = _flops(host, entering)
    return Report(
        reducers,
        images,
        None if flops is None else flops - _skipped(host, entering, call),
        _flops(host, full),
        _cache_bytes(host, held, limits),
        _cache_bytes(host, full, limits),
        call.seconds,
        {i: {part: sum(rows) for part, rows in parts.items()} for i, parts in call.skipped.items()},
    )


def _per_frame(layout: Layout, span: Span) -> list[int] | None:
    """How many tokens of each frame of a video are in a layer; None for pictures and unknown layouts."""
    if span.grid is None or not span.grid.video:
        return None
    places = layout.index[span.row][layout.valid[span.row]]
    tile = span.grid.tile[torch.isin(span.places, places).cpu()]
    return torch.bincount(tile[tile >= 0], minlength=span.grid.cols).tolist()


def _lengths(valid: torch.Tensor) -> list[int]:
    return valid.sum(1).tolist()


def _flops(host: Host, lengths: list[list[int]]) -> int | None:
    """Operations of the language model; None where layers keep a running state, whose cost is not counted."""
    config, layers = host.lm.config, len(lengths)
    widths = getattr(config, "intermediate_size", None)
    if host.recurrent or widths is None:
        return None
    widths = widths if isinstance(widths, Sequence) else [widths] * layers
    return 2 * sum(
        llm_block_macs(n, config.hidden_size, widths[i], host.key_width(i))
        for i, rows in enumerate(lengths)
        for n in rows
    )


def _skipped(host: Host, lengths: list[list[int]], call: Call) -> int:
    """Operations of tokens that skip parts of a layer."""
    config, macs = host.lm.config, 0
    for i, parts in call.skipped.items():
        for row, n in enumerate(lengths[i]):
            counts = {part: values[row] for part, values in parts.items()}
            macs += skipped_macs(config.hidden_size, config.intermediate_size, host.key_width(i), n, **counts)
    return 2 * macs


def _cache_bytes(host: Host, lengths: list[list[int]], limits: list[int | None]) -> int:
    """Bytes of keys and values, of which a layer with a window holds up to its limit; layers that use
    another's keys hold none."""
    held = 0
    for i, (rows, limit) in enumerate(zip(lengths, limits, strict=True)):
        if writes_cache(host.attentions[i]):
            held += host.key_width(i) * sum(n if limit is None else min(n, limit) for n in rows)
    return 2 * held * host.lm.dtype.itemsize
