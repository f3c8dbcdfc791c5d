"""Quality of a tokenizer by bytes, at every length it has, beside codecs at the same bytes.

Images are read, compared and, for FID, made 8-bit as in `vistok.eval.tasks.reconstruction`. The settings of
codecs are chosen on the first images of the data and then measured on all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...commands.options import binding, recorded
from ...images import to_pil
from ...loading import load
from ...tokenizer import Tokenizer
from ..data.dataset import Batch, first_readable, one, open_dataset
from ..engine import passes
from ..engine.decoding import ICC_PROFILES, captions, resizing, to_levels
from ..engine.instruments import Instruments, choose, fingerprint
from ..engine.record import Clock, Record
from ..engine.state import State
from ..metrics.feature_sets import FeatureSet, compare, skipped, warn_of_few
from ..metrics.metric import check_comparable, pair_metrics
from ..metrics.summary import interval
from ..options import BASELINES, CurvesConfig
from . import codecs
from .sweeps import CodecSweep, TokenizerSweep

if TYPE_CHECKING:
    from accelerate import PartialState

LEAST_RANGE = 2048
"""Bytes an image up to which codecs are measured; four times the longest tokens, if that is more."""
SHOWN = 4
"""Images, and lengths of each tokenizer, that a report shows."""


@dataclass(frozen=True)
class Point:
    """One setting of a tokenizer or codec: bytes per image, mean squared error, and every metric.

    A metric is {"value": …} with "low" and "high" for means over images, or {"skipped": why}; PSNR has
    "exact", the number of exact reconstructions, which are not in its mean.
    """

    codec: str
    setting: str
    baseline: bool
    bytes: float
    mse: float
    metrics: dict[str, dict[str, Any]]


@dataclass
class CurvesRecord(Record):
    """A record with a point for each setting; its own metrics are those that no point has."""

    points: list[Point] = field(default_factory=list)

    def matched(self, point: Point) -> dict[str, Point | None]:
        """For each baseline the point of the least squared error that takes no more bytes than `point`."""
        points: dict[str, Point | None] = {}
        for other in self.points:
            if other.baseline:
                best = points.setdefault(other.codec, None)
                if other.bytes <= point.bytes and (best is None or other.mse < best.mse):
                    points[other.codec] = other
        return points


@dataclass(frozen=True)
class Picture:
    """An image uint8 [3, H, W], and its reconstructions at some settings, each with a caption."""

    name: str
    original: Tensor
    versions: list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Result:
    """The record, and some pictures for a report; delete the `state` when all is written."""

    record: CurvesRecord
    pictures: Callable[[], list[Picture]]
    state: State


def run(
    config: CurvesConfig, out: Path, device: torch.device, *, models: Sequence[Tokenizer] | None = None
) -> Result | None:
    """Measure, keeping the state in `out`/state; None on all processes but the first.

    `models` take the place of loading `config.tokenizers`. Raises ValueError or OSError, before any long
    work, for data that is not there, settings that no tokenizer takes and the unfinished state of another
    run; FloatingPointError for a tokenizer whose images are not finite.
    """
    process, device = passes.join(device)
    return _Curves(config, out / "state", process, device, models).run()


class _Curves:
    """One measurement: its settings, instruments and state."""

    def __init__(
        self,
        config: CurvesConfig,
        folder: Path,
        process: "PartialState",
        device: torch.device,
        models: Sequence[Tokenizer] | None,
    ) -> None:
        self.config, self.device = config, device
        metrics = [
            "psnr",
            *(name for name in choose(config.metrics, [*pair_metrics(), "fid"]) if name != "psnr"),
        ]
        if unknown := sorted(set(config.baselines) - set(BASELINES)):
            raise ValueError(f"there is no baseline {', '.join(unknown)}; there are {', '.join(BASELINES)}")
        self.dataset = open_dataset(config.data, split=config.split, column=config.column, limit=config.limit)
        if config.weights and len(config.tokenizers) > 1:
            raise ValueError("--weights is for one tokenizer; name a folder or file as --tokenizer for more")
        _refuse_twice(config.tokenizers)
        loaded = models or [load(name, weights=config.weights) for name in config.tokenizers]
        loaded = [model.to(device).eval() for model in loaded]
        names = _names(loaded, config)
        _check_choices(names, loaded, config)
        for model in loaded:
            check_comparable(model, metrics, config.semantic)
        self.size = config.size or max(model.image_size for model in loaded)
        self.instruments = Instruments(metrics, config.files, device)
        self.skipped = dict(self.instruments.skipped)
        options = {"lengths": config.lengths, "targets": config.targets, "seed": config.seed}
        options |= {"steps": config.steps, "guidance": config.guidance}
        self.sweeps: list[TokenizerSweep | CodecSweep] = [
            TokenizerSweep(*each, self.size, **options) for each in zip(names, loaded, strict=True)
        ]
        self.sweeps += self._codecs(*self._choose())
        self.columns = ["bytes", *self.instruments.pairs]
        self._declare(folder, process, loaded)
        self.state.open()
        self.clock = Clock(self.state.seconds, device)

    # Settings -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _choose(self) -> tuple[Tensor, list[float]]:
        """The first images, and the bytes per image of every setting of every tokenizer."""
        first = first_readable(self.dataset, self.size, self.config.batch_size)
        if first is None:
            raise ValueError(f"none of the {len(self.dataset)} images of {self.dataset.source} can be read")
        images = first.images.float() / 255
        there = images.to(self.device)
        sizes = [size for sweep in self.sweeps for size in sweep.choose(there)]
        alone = replace(first, indices=first.indices[:1], images=first.images[:1], names=first.names[:1])
        for sweep in self.sweeps:  # errors of decoding and comparing are raised now
            decoded, _ = next(sweep(there[:1], alone))
            for instrument in self.instruments.pairs.values():
                instrument(decoded, there[:1])
        self.calibrated = len(images)
        return images, sizes

    def _codecs(self, images: Tensor, sizes: list[float]) -> list[CodecSweep]:
        """The baselines, each with its best settings around these bytes and up to the end of the range."""
        pictures, most = to_pil(images), max(LEAST_RANGE, 4 * max(sizes))
        steps = [2 ** (step / 2) for step in range(int(2 * math.log2(most)) + 1)]
        # All images may take a little more than the first: then there is a smaller setting.
        around = [share * size for size in sizes for share in (0.9, 1)]
        sweeps = []
        for name in (name for name in BASELINES if name in self.config.baselines):
            if why := codecs.missing(name):
                self.skipped[name] = why
            else:
                within = around if name == "thumbnail" else [*around, *steps, most]
                if chosen := codecs.best_within(name, pictures, within):
                    sweeps.append(CodecSweep(name, chosen))
                else:
                    self.skipped[name] = f"none of its settings fits {max(within):,.0f} bytes per image"
        return sweeps

    def _declare(self, folder: Path, process: "PartialState", models: list[Tokenizer]) -> None:
        """The tables and sums of this measurement."""
        settings = binding(self.config)
        settings |= {"metrics": [*self.instruments.pairs, *self.instruments.sets], "size": self.size}
        settings |= {"images": len(self.dataset), "names": self.dataset.digest, "device": self.device.type}
        settings |= {"settings": [[sweep.name, *map(str, sweep.settings)] for sweep in self.sweeps]}
        settings |= {"weights": fingerprint(*models), "networks": self.instruments.fingerprint()}
        self.state = State(folder, len(self.dataset), settings, self.dataset.inventory(), process)
        total = sum(len(sweep.settings) for sweep in self.sweeps)
        self.state.add_table("values", "float64", total * len(self.columns))
        self.originals, self.point_features = None, []
        if self.instruments.sets:
            sets = [f"setting-{number}" for number in range(total)]
            self.originals = FeatureSet("originals", self.instruments, self.state, [])
            self.point_features = [FeatureSet(name, self.instruments, self.state, []) for name in sets]

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
            workers=config.workers,
            checkpoint_every=config.checkpoint_every,
            title="rate and distortion",
        )
        return self._result() if first else None

    @torch.no_grad()
    def _measure(self, batch: Batch) -> None:
        levels = batch.images.to(self.device)
        images, columns = levels.float() / 255, []
        if self.originals:
            self.originals.update(levels, batch.indices, self.clock)
        numbers = count()
        for sweep in self.sweeps:
            decoding = sweep(images, batch)
            for _ in sweep.settings:
                with self.clock(sweep.name):
                    decoded, sizes = next(decoding)
                columns.append(sizes.cpu().double())
                for name, instrument in self.instruments.pairs.items():
                    with self.clock(name):
                        columns.append(instrument(decoded, images).cpu().double())
                if self.point_features:
                    features = self.point_features[next(numbers)]
                    features.update(to_levels(decoded), batch.indices, self.clock)
        self.state.write("values", batch.indices, torch.stack(columns, 1))

    # The result ---------------------------------------------------------------------------------------------

    def _result(self) -> Result:
        state, config = self.state, self.config
        kept = state.measured()
        table = state.rows("values").numpy().reshape(len(kept), -1, len(self.columns))
        points, numbers = [], count()
        for sweep in self.sweeps:
            for label, _ in sweep.settings:
                number, metrics = next(numbers), {}
                with self.clock(f"{passes.LAST}intervals"):
                    for column, name in enumerate(self.columns):
                        metrics[name] = interval(table[:, number, column], config.seed)
                if self.point_features:
                    with self.clock(f"{passes.LAST}fid"):
                        metrics |= compare(
                            "fid", self.point_features[number], self.originals, seed=config.seed
                        )
                size = metrics.pop("bytes")["value"]
                decibels = table[:, number, self.columns.index("psnr")]
                mse = float((10 ** (-decibels / 10)).mean())
                points.append(Point(sweep.name, label, sweep.baseline, size, mse, metrics))
        names = [sweep.name for sweep in self.sweeps if not sweep.baseline]
        for metric in list(points[0].metrics):
            if all("skipped" in point.metrics[metric] for point in points):
                self.skipped[metric] = points[0].metrics[metric]["skipped"]
                for point in points:
                    del point.metrics[metric]
        metrics = {}
        for name, reason in self.skipped.items():
            metrics |= skipped(name, reason)
        record = CurvesRecord(
            protocol=self._protocol(),
            n=len(kept),
            seed=config.seed,
            tokenizer=", ".join(names),
            data={"source": self.dataset.source, "kind": self.dataset.kind, "images": len(self.dataset)},
            metrics=metrics,
            warnings=[*warn_of_few(points[0].metrics, len(kept)), *self._lengths_left_out()],
            bad_images=state.unreadable(),
            left_out=self.dataset.left_out_summary(),
            duplicates=state.duplicates(self.dataset.names),
            seconds=state.seconds,
            rate=len(kept) / passes.duration(state),
            points=points,
        )
        return Result(record, lambda: self._pictures(kept.tolist(), record), state)

    def _lengths_left_out(self) -> list[str]:
        """One line per tokenizer that has fewer tokens than some requested lengths."""
        sweeps = [sweep for sweep in self.sweeps if isinstance(sweep, TokenizerSweep) and sweep.too_long]
        return [
            f"{sweep.name} has {sweep.model.num_tokens} tokens: without --lengths "
            f"{', '.join(map(str, sweep.too_long))}"
            for sweep in sweeps
        ]

    def _protocol(self) -> dict[str, Any]:
        config = self.config
        sweeps = [sweep for sweep in self.sweeps if isinstance(sweep, TokenizerSweep)]
        resized = [f"{sweep.name} at {sweep.own}²" for sweep in sweeps if sweep.resized]
        return {
            "images": resizing(self.size),
            "size": self.size,
            "inception": "8-bit, rounded",
            "files": "whole files; settings chosen on the first "
            f"{self.calibrated} images, the best that fit the bytes",
            "batch_size": config.batch_size,
            **ICC_PROFILES,
            **({"resized": ", ".join(resized)} if resized else {}),
            **captions(*(sweep.model for sweep in sweeps)),
            **recorded(config),
        }

    @torch.no_grad()
    def _pictures(self, kept: list[int], record: CurvesRecord) -> list[Picture]:
        """Some images at some lengths of every tokenizer, and codecs at the bytes of the longest."""
        own_points = [point for point in record.points if not point.baseline]
        files = record.matched(max(own_points, key=lambda point: point.bytes)).values()
        kept_ids = [id(point) for point in files if point]
        for sweep in self.sweeps:
            if not sweep.baseline:
                kept_ids += map(
                    id, _spread([point for point in own_points if point.codec == sweep.name], SHOWN)
                )
        pictures = []
        for number in _spread(kept, SHOWN):
            batch, versions = one(self.dataset, number, self.size), []
            images = batch.images.to(self.device).float() / 255
            points = iter(record.points)
            for sweep in self.sweeps:
                for decoded, sizes in sweep(images, batch):
                    if id(point := next(points)) in kept_ids:
                        caption = f"{point.codec}, {point.setting}, {float(sizes[0]):,.0f} bytes"
                        versions.append((caption, to_levels(decoded[0]).cpu()))
            pictures.append(Picture(batch.names[0], batch.images[0], versions))
        return pictures


def _names(models: list[Tokenizer], config: CurvesConfig) -> list[str]:
    """Names of the tokenizers in tables: their labels, or the arguments where two labels are the same."""
    labels = [model.label for model in models]
    if not labels:
        raise ValueError("no tokenizer was named: give --tokenizer NAME, once or more")
    if len(set(labels)) < len(labels) and config.tokenizers:
        labels = list(config.tokenizers)
    _refuse_twice(labels)
    return labels


def _refuse_twice(names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} is there twice: name every tokenizer once")


def _check_choices(labels: list[str], models: list[Tokenizer], config: CurvesConfig) -> None:
    """Raise ValueError for options that no tokenizer takes, before any work."""
    if config.lengths and min(config.lengths) < 1:
        raise ValueError(f"--lengths {min(config.lengths)}: an image has one token at least")
    if config.lengths and not any(model.ordered for model in models):
        raise ValueError(f"--lengths is for tokenizers of variable length; {', '.join(labels)} has none")
    if config.targets and not any(model.adaptive for model in models):
        raise ValueError(f"--target is for adaptive tokenizers (KARL); {', '.join(labels)} is not one")
    has_options = config.steps is not None or config.guidance is not None
    if has_options and not any(model.stochastic for model in models):
        raise ValueError(f"--steps and --guidance are for stochastic decoders; {', '.join(labels)} has none")


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `count` of the values, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]
