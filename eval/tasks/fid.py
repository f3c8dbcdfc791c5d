"""Compare two sets of images: FID, Inception score, KID, precision and recall of A against B.

Each side is images, or a .npz of statistics (such as ADM's reference files). Images are taken at their own
size, which must be one for all, or resized and cropped to a given one.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import ExifTags, Image

from ...files import check_source
from ...images import MAX_FILE_BYTES
from ..data.dataset import Batch, Dataset, open_dataset
from ..data.sources import Files
from ..engine import passes
from ..engine.decoding import ICC_PROFILES, resizing
from ..engine.instruments import SETS, Instruments, choose
from ..engine.record import Clock, Record
from ..engine.state import State
from ..metrics import feature_sets
from ..metrics.feature_sets import FEW, FeatureSet, compare, warn_of_few
from ..metrics.statistics import Gaussian
from ..options import FidConfig

if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass(frozen=True)
class Result:
    """The record, and the states to delete when all is written."""

    record: Record
    states: list[State]


def run(config: FidConfig, out: Path, device: torch.device) -> Result | None:
    """Compare, keeping the states in `out`/state-a and `out`/state-b; None on all processes but the first.

    Raises ValueError or OSError, before any long work, for sides that cannot be read or compared: no images,
    images of several sizes without `size`, sets of different numbers without `allow_different_counts`, a .npz
    without mu and sigma, absent Inception weights, and the unfinished state of another run.
    """
    metrics = choose(config.metrics, SETS)
    sources = {"a": config.judged, "b": config.real}
    sides = {name: _open(source, config.limit) for name, source in sources.items()}
    datasets = {name: side for name, side in sides.items() if isinstance(side, Dataset)}
    _check_counts(list(datasets.values()), config.allow_different_counts)
    _check_features(sources, sides)
    process, device = passes.join(device)
    instruments = Instruments(metrics if datasets else [], config.files, device)
    if missing := list(instruments.skipped.values()):
        raise FileNotFoundError(missing[0])
    height, width = (config.size,) * 2 if config.size else _common_size(list(datasets.values()))
    measured, first = {}, process.is_main_process
    for name, dataset in datasets.items():
        (other,) = (side for each, side in sides.items() if each != name)
        side = _Side(name, dataset, other, config, (height, width), out, process, instruments)
        first = side.run()
        measured[name] = side
    return _result(config, metrics, {**sides, **measured}, out) if first else None


def _open(source: str, limit: int | None) -> Dataset | Gaussian:
    if Path(source).suffix.lower() == ".npz":
        return Gaussian.load(Path(source).expanduser())
    return open_dataset(source, limit=limit)


# Before any long work ---------------------------------------------------------------------------------------


def _check_counts(datasets: list[Dataset], allowed: bool) -> None:
    counts = [len(dataset) for dataset in datasets]
    if len(set(counts)) > 1 and not allowed:
        raise ValueError(
            f"{datasets[0].source} has {counts[0]:,} images and {datasets[1].source} {counts[1]:,}: FID "
            f"depends on their number; give --limit {min(counts)}, or --allow-different-counts"
        )


def _check_features(sources: dict[str, str], sides: dict[str, Dataset | Gaussian]) -> None:
    widths = {
        name: len(side.mean) if isinstance(side, Gaussian) else feature_sets.FEATURES
        for name, side in sides.items()
    }
    if widths["a"] != widths["b"]:
        texts = " and ".join(f"{sources[name]} of {width}" for name, width in widths.items())
        raise ValueError(
            f"the sides are of different features, {texts}: FID is of the {feature_sets.FEATURES} of "
            "Inception's last pooling layer"
        )


def _common_size(datasets: list[Dataset]) -> tuple[int, int]:
    """Height and width of all images, by their headers; ValueError if there are several."""
    examples_by_size: dict[tuple[int, int], str] = {}
    for dataset in datasets:
        with ThreadPoolExecutor(8) as pool:
            sizes = pool.map(lambda number, dataset=dataset: _size(dataset, number), range(len(dataset)))
            for name, size in zip(dataset.names, sizes, strict=True):
                if size is not None:
                    examples_by_size.setdefault(size, f"{dataset.source}: {name}")
    if len(examples_by_size) > 1:
        texts = [f"{width}×{height} ({name})" for (height, width), name in list(examples_by_size.items())[:3]]
        raise ValueError(
            f"images have {len(examples_by_size)} sizes, such as {' and '.join(texts)}: give --size to "
            "resize and crop"
        )
    return next(iter(examples_by_size), (0, 0))


def _size(dataset: Dataset, number: int) -> tuple[int, int] | None:
    """Height and width of an image as it will be decoded, None for one that cannot be read."""
    try:
        with Image.open(_header(dataset, number)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return image.size if turned else image.size[::-1]
    except Exception:  # decoding will report the error
        return None


def _header(dataset: Dataset, number: int) -> Path | BytesIO:
    """The stream for reading an image's header: of files only the beginning is read."""
    if isinstance(dataset, Files):
        return check_source(Path(dataset.root, dataset.names[number]), limit=MAX_FILE_BYTES)
    return BytesIO(dataset.read(number))


# The passes -------------------------------------------------------------------------------------------------


class _Side:
    """The features of one set of images, and the pass that computes them."""

    def __init__(
        self,
        name: str,
        dataset: Dataset,
        other: Dataset | Gaussian,
        config: FidConfig,
        size: tuple[int, int],
        out: Path,
        process: "PartialState",
        instruments: Instruments,
    ) -> None:
        self.dataset, self.config, self.size = dataset, config, size
        settings = {
            "source": dataset.source,
            "images": len(dataset),
            "names": dataset.digest,
            "size": size,
            "metrics": instruments.sets,
            "networks": instruments.fingerprint(),
            "batch_size": config.batch_size,
            "device": instruments.device.type,
            "statistics": other.digest if isinstance(other, Gaussian) else None,
        }
        folder, inventory = out / f"state-{name}", dataset.inventory()
        self.state = State(folder, len(dataset), settings, inventory, process)
        self.features = FeatureSet(name, instruments, self.state, instruments.sets, judged=name == "a")
        self.state.open()
        self.clock = Clock(self.state.seconds, instruments.device)

    def run(self) -> bool:
        """Pass over the images; return whether this is the first process, which has the results of all."""
        config, short = self.config, min(self.size)
        return passes.run(
            self.state,
            self.dataset,
            self._measure,
            self.clock,
            size=short or 1,
            batch_size=config.batch_size,
            crop=config.size is not None or len(set(self.size)) == 1,
            workers=config.workers,
            checkpoint_every=config.checkpoint_every,
            title=f"features of {self.dataset.source}",
        )

    def _measure(self, batch: Batch) -> None:
        self.features.update(batch.images, batch.indices, self.clock)

    @property
    def count(self) -> int:
        """Images that were read."""
        return len(self.state.measured())


def _result(config: FidConfig, names: list[str], sides: dict[str, _Side | Gaussian], out: Path) -> Result:
    images = {name: side for name, side in sides.items() if isinstance(side, _Side)}
    judged, real = (side.features if isinstance(side, _Side) else side for side in sides.values())
    counts = {name: side.count for name, side in sides.items()}
    seconds: dict[str, float] = {}
    for side in images.values():
        for stage, spent in side.state.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    clock, metrics = Clock(seconds, torch.device("cpu")), {}
    options = {"seed": config.seed, "kid_subset_size": config.kid_subset_size}
    for name in names:
        with clock(f"{passes.LAST}{name}"):
            metrics |= compare(name, judged, real, **options)
    if config.save_statistics:
        for name, side in images.items():
            side.features.statistics.save(out / f"statistics-{name}.npz")
    spent = sum(passes.duration(side.state) for side in images.values())
    record = Record(
        protocol=_protocol(config),
        n=counts["a"],
        seed=config.seed,
        tokenizer=None,
        data={
            "a": {"source": config.judged, "n": counts["a"]},
            "b": {"source": config.real, "n": counts["b"]},
        },
        metrics=metrics,
        warnings=_warnings(metrics, counts["a"], counts["b"]),
        bad_images=[row for side in images.values() for row in side.state.unreadable()],
        left_out=[row for side in images.values() for row in side.dataset.left_out_summary()],
        duplicates=[group for side in images.values() for group in side.state.duplicates(side.dataset.names)],
        seconds=seconds,
        rate=sum(side.count for side in images.values()) / spent if spent else None,
    )
    return Result(record, [side.state for side in images.values()])


def _warnings(metrics: dict[str, dict[str, object]], judged: int | None, real: int | None) -> list[str]:
    if judged and real and judged != real:
        counts = f"A has {judged:,} images and B {real:,}"
        differing = [f"{counts}: FID depends on both numbers, compare it with others of the same two"]
    else:
        differing = []
    return differing + warn_of_few(metrics, min(filter(None, (judged, real)), default=FEW))


def _protocol(config: FidConfig) -> dict[str, object]:
    return {
        "images": resizing(config.size) if config.size else "at their own size",
        "features": "InceptionV3 of torch-fidelity, 2048",
        "batch_size": config.batch_size,
        **ICC_PROFILES,
    }
