"""Quality of a tokenizer's reconstructions: every metric in one pass over a dataset.

Images are resized and cropped as in `vistok.to_tensor`. A reconstruction is clamped to [0, 1], compared
with its original as it is, and becomes 8-bit before Inception sees it: by rounding, or truncated as TiTok's
evaluator does ("An Image is Worth 32 Tokens for Reconstruction and Generation", 2024, arXiv 2406.07550).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...commands.options import binding, recorded
from ...loading import load
from ...tokenizer import Tokenizer
from ...tokens import Tokens
from ..data.dataset import Batch, first_readable, one, open_dataset
from ..engine import passes
from ..engine.decoding import ICC_PROFILES, captions, decode_images, resizing, to_levels
from ..engine.instruments import SETS, Instruments, choose, fingerprint
from ..engine.record import Clock, Record
from ..engine.state import State
from ..metrics.codes import LARGEST_CODEBOOK, CodeStatistics
from ..metrics.feature_sets import PARTS, FeatureSet, compare, skipped, warn_of_few
from ..metrics.image import psnr
from ..metrics.metric import check_comparable, pair_metrics
from ..metrics.perturbation import ALPHAS, DELTAS, ChangedCodes, Perturbation, grid
from ..metrics.summary import interval
from ..options import ReconConfig

if TYPE_CHECKING:
    from accelerate import PartialState


def available() -> list[str]:
    """The names that `--metrics` takes."""
    return [*pair_metrics(), *SETS, "codes"]


@dataclass(frozen=True)
class Picture:
    """An image uint8 [3, H, W], its reconstruction, and the PSNR between them."""

    name: str
    psnr: float
    original: Tensor
    reconstruction: Tensor


@dataclass(frozen=True)
class Result:
    """The record, and further data for a report.

    `values` by name are of single images, [n] each; `picture` reconstructs one of those [n] again. Delete
    the `state` when all is written.
    """

    record: Record
    values: dict[str, np.ndarray]
    picture: Callable[[int], Picture]
    state: State


def run(
    config: ReconConfig, out: Path, device: torch.device, *, model: Tokenizer | None = None
) -> Result | None:
    """Evaluate, keeping the state in `out`/state; None on all processes but the first.

    `model` takes the place of loading `config.tokenizer`. Raises ValueError or OSError, before any long work,
    for data that is not there, settings that the tokenizer does not take and the unfinished state of another
    run; FloatingPointError for a tokenizer whose images are not finite.
    """
    process, device = passes.join(device)
    return _Reconstruction(config, out / "state", process, device, model).run()


class _Reconstruction:
    """One evaluation: its model, data, instruments and state."""

    def __init__(
        self,
        config: ReconConfig,
        folder: Path,
        process: "PartialState",
        device: torch.device,
        model: Tokenizer | None,
    ) -> None:
        self.config, self.device = config, device
        metrics = choose(config.metrics, available())
        if (config.pfid_alpha or config.pfid_delta) and not config.pfid:
            raise ValueError("--pfid-alpha and --pfid-delta are the grid of --pfid: give that as well")
        cells = grid(config.pfid_alpha or ALPHAS, config.pfid_delta or DELTAS) if config.pfid else []
        if config.protocol not in ("round", "titok"):
            raise ValueError(f"protocol is {config.protocol!r}; it is 'round', or 'titok' which truncates")
        self.dataset = open_dataset(config.data, split=config.split, column=config.column, limit=config.limit)
        self.model = (model or load(config.tokenizer, weights=config.weights)).to(device).eval()
        check_comparable(self.model, metrics, config.semantic)
        self.size = config.size or self.model.image_size
        self.multiple = 1 if config.crop else _multiple(self.model)
        self.model.check_image_size(self.size, self.size, "give another --size")
        self.model.check_num_tokens(config.tokens)
        self.perturbation = Perturbation(self.model.quantizer, cells, config.seed) if cells else None
        self.instruments = Instruments([*metrics, *(["fid"] if cells else [])], config.files, device)
        self.truncate = config.protocol == "titok"
        self.cells = cells if self.instruments.inception else []
        self.columns = [*self.instruments.pairs, "bits", "tokens"]
        self._try()
        self._declare(folder, process, metrics)
        self.state.open()
        self.clock = Clock(self.state.seconds, device)

    @torch.no_grad()
    def _try(self) -> None:
        """Evaluate one image, so that errors of decoding and comparing are raised now."""
        options = {"crop": self.config.crop, "multiple": self.multiple}
        first = first_readable(self.dataset, self.size, **options)
        if first is not None:
            images = first.images.to(self.device).float() / 255
            decoded = self._decode(self.model.encode(images, self.config.tokens), first)
            for instrument in self.instruments.pairs.values():
                instrument(decoded, images)

    def _declare(self, folder: Path, process: "PartialState", metrics: list[str]) -> None:
        """The tables and sums of this evaluation."""
        sets = self.instruments.sets
        settings = binding(self.config)
        settings |= {"metrics": [*self.columns, *sets, *(["codes"] if "codes" in metrics else [])]}
        settings |= {"images": len(self.dataset), "names": self.dataset.digest, "device": self.device.type}
        settings |= {"weights": fingerprint(self.model), "networks": self.instruments.fingerprint()}
        self.state = State(folder, len(self.dataset), settings, self.dataset.inventory(), process)
        self.state.add_table("values", "float64", len(self.columns))
        countable = max(self.model.quantizer.codebook_sizes or [0]) <= LARGEST_CODEBOOK
        counted = "codes" in metrics and countable
        self.usage = self.state.add("codes", CodeStatistics()) if counted else None
        if sets:
            self.originals = FeatureSet("originals", self.instruments, self.state, sets, judged=False)
            self.reconstructions = FeatureSet("reconstructions", self.instruments, self.state, sets)
        self.perturbed = [
            FeatureSet(f"pfid-{cell.index}", self.instruments, self.state, []) for cell in self.cells
        ]
        self.changed = self.state.add("pfid-changed", ChangedCodes(len(self.cells)))

    # The pass -----------------------------------------------------------------------------------------------

    def run(self) -> Result | None:
        """Pass over the images and, on the first process, compute the results."""
        config = self.config
        first = passes.run(
            self.state,
            self.dataset,
            self._measure,
            self.clock,
            size=self.size,
            batch_size=config.batch_size,
            crop=config.crop,
            multiple=self.multiple,
            workers=config.workers,
            checkpoint_every=config.checkpoint_every,
            title=f"reconstruct with {self.model.label}",
        )
        return self._result() if first else None

    @torch.no_grad()
    def _measure(self, batch: Batch) -> None:
        clock, numbers = self.clock, batch.indices
        levels = batch.images.to(self.device)
        images = levels.float() / 255
        with clock("encode"):
            tokens = self.model.encode(images, self.config.tokens)
        with clock("decode"):
            decoded = self._decode(tokens, batch)
        lengths = torch.full((len(tokens),), tokens.num_tokens) if tokens.lengths is None else tokens.lengths
        values = {"bits": tokens.bits_per_image, "tokens": lengths}
        for name, instrument in self.instruments.pairs.items():
            with clock(name):
                values[name] = instrument(decoded, images)
        columns = [values[name].cpu().double() for name in self.columns]
        self.state.write("values", numbers, torch.stack(columns, 1))
        if self.usage:
            with clock("codes"):
                self.usage.update(tokens, images.shape[2] * images.shape[3])
        if self.instruments.sets:
            self.originals.update(levels, numbers, clock)
            self.reconstructions.update(to_levels(decoded, truncate=self.truncate), numbers, clock)
        for cell, features in zip(self.cells, self.perturbed, strict=True):
            with clock("pfid: perturb and decode"):
                perturbed = self.perturbation(tokens, cell, numbers.tolist())
                self.changed.update(cell, perturbed)
                decoded = self._decode(perturbed.tokens, batch)
            features.update(to_levels(decoded, truncate=self.truncate), numbers, clock)

    def _decode(self, tokens: Tokens, batch: Batch) -> Tensor:
        """Tokens of a batch → float32 images in [0, 1]."""
        config = self.config
        return decode_images(
            self.model,
            tokens,
            tuple(batch.images.shape[2:]),
            batch.indices.tolist(),
            batch.names,
            seed=config.seed,
            steps=config.steps,
            guidance=config.guidance,
        )

    # The result ---------------------------------------------------------------------------------------------

    def _result(self) -> Result:
        state, config = self.state, self.config
        kept = state.measured()
        values = dict(zip(self.columns, state.rows("values").numpy().T.copy(), strict=True))
        metrics: dict[str, dict[str, Any]] = {}
        for name, reason in self.instruments.skipped.items():
            metrics |= skipped(name, reason)
        for name in self.instruments.pairs:
            with self.clock(f"{passes.LAST}intervals"):
                metrics[name] = interval(values[name], config.seed)
        if self.instruments.sets:
            metrics |= self._of_sets(self.instruments.sets)
        metrics |= self._pfid()
        if "codes" in choose(config.metrics, available()):
            metrics |= self._codes(values)
        record = Record(
            protocol=self._protocol(),
            n=len(kept),
            seed=config.seed,
            tokenizer=self.model.label,
            data={"source": self.dataset.source, "kind": self.dataset.kind, "images": len(self.dataset)},
            metrics=_in_order(metrics),
            warnings=warn_of_few(metrics, len(kept)),
            bad_images=state.unreadable(),
            left_out=self.dataset.left_out_summary(),
            duplicates=state.duplicates(self.dataset.names),
            seconds=state.seconds,
            rate=len(kept) / passes.duration(state),
        )
        return Result(record, values, lambda row: self._picture(int(kept[row])), state)

    def _of_sets(self, sets: list[str]) -> dict[str, dict[str, Any]]:
        metrics: dict[str, dict[str, Any]] = {}
        for name in sets:
            with self.clock(f"{passes.LAST}{name}"):
                metrics |= compare(
                    name,
                    self.reconstructions,
                    self.originals,
                    seed=self.config.seed,
                    kid_subset_size=self.config.kid_subset_size,
                )
        return metrics

    def _pfid(self) -> dict[str, dict[str, Any]]:
        """Each cell and their mean."""
        if not self.config.pfid:
            return {}
        if not self.cells:
            return skipped("pfid", self.instruments.skipped["fid"])
        cells = []
        for cell, features in zip(self.cells, self.perturbed, strict=True):
            with self.clock(f"{passes.LAST}pfid"):
                result = compare("fid", features, self.originals, seed=self.config.seed)["fid"]
            changed = self.changed.share(cell)
            cells.append({"alpha": cell.alpha, "delta": cell.delta, "changed": changed, **result})
        if "skipped" in cells[0]:
            return skipped("pfid", cells[0]["skipped"])
        mean = sum(cell["value"] for cell in cells) / len(cells)
        return {"pfid": {"value": mean, "cells": cells}}

    def _codes(self, values: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        """Bits and tokens per image, with intervals where images differ, and the use of the code space."""
        figures = {
            f"{name}-per-image": interval(values[name], self.config.seed) for name in ("bits", "tokens")
        }
        if self.usage is None:
            return figures | skipped(
                "codebook", f"codebooks above {LARGEST_CODEBOOK} entries are not counted"
            )
        usage = self.usage.result()
        figures["bits-per-pixel"] = {"value": usage.bits_per_pixel}
        for name, each in (("codebook-usage", usage.usage), ("perplexity", usage.perplexity)):
            if each is not None:
                figures[name] = {"value": sum(each) / len(each), "codebooks": list(each)}
        for name in ("bit_entropy", "lowest_bit_entropy", "bit_correlation"):
            if (value := getattr(usage, name)) is not None:
                figures[name.replace("_", "-")] = {"value": value}
        return figures

    def _protocol(self) -> dict[str, Any]:
        config = self.config
        return {
            "name": config.protocol,
            "images": resizing(self.size, crop=config.crop),
            "inception": "8-bit, truncated" if self.truncate else "8-bit, rounded",
            "size": self.size,
            "batch_size": config.batch_size,
            **ICC_PROFILES,
            **captions(self.model),
            **recorded(config),
        }

    def _picture(self, number: int) -> Picture:
        """Reconstruct an image again: not all reconstructions are kept."""
        options = {"crop": self.config.crop, "multiple": self.multiple}
        batch = one(self.dataset, number, self.size, **options)
        images = batch.images.to(self.device).float() / 255
        decoded = self._decode(self.model.encode(images, self.config.tokens), batch)
        pair = batch.images[0], to_levels(decoded[0]).cpu()
        return Picture(batch.names[0], float(psnr(decoded, images)), *pair)


def _in_order(metrics: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Metrics that were requested by name, in their usual order; then those computed with them."""
    order = [part for name in available() for part in PARTS.get(name, (name,))]
    return dict(sorted(metrics.items(), key=lambda item: order.index(item[0]) if item[0] in order else 99))


def _multiple(model: Tokenizer) -> int:
    """The number that sides of uncropped images must be a multiple of; ValueError where only squares
    decode."""
    if model.size_multiple is None:
        raise ValueError(
            f"{model.label} takes {model.image_size}×{model.image_size} only: leave --no-crop out"
        )
    return model.size_multiple
