"""The share of the bare model's speed that is left when images are read and decoded beside it:
`python -m vistok.eval.speed.pipeline`."""

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import Tensor

from ...files import atomic_write
from ...loading import load
from ...tokenizer import Tokenizer
from ..data.dataset import Dataset, batches, cores, decode, open_dataset, worker_count
from .paired import Took, in_turn, ratios, seconds, spread, timed

BAR = 0.85
HEADER = ["", "images/s, median (min–max)", "CPU ms per image", "of the bare model, median (min–max)", "bar"]


@dataclass
class PipelineSpeed:
    """Paired passes over the same images: preloaded tensors, then files through `batches`.

    `decoding` is reading and decoding one image in this process; `first_batch_seconds` the wait for the first
    batch when workers start for the first time and import torch.
    """

    title: str
    count: int
    bare: list[Took] = field(default_factory=list)
    pipeline: list[Took] = field(default_factory=list)
    decoding: Took = field(default_factory=lambda: Took(0, 0))
    first_batch_seconds: float = 0.0

    @property
    def ratios(self) -> list[float]:
        """Images/s of the pipeline over those of the bare model, pair by pair."""
        return ratios(seconds(self.bare), seconds(self.pipeline))

    @property
    def ceiling(self) -> float:
        """The ratio when the model alone keeps all cores busy: its computation over that with decoding."""
        model = median(took.cpu_seconds for took in self.bare)
        return model / (model + self.count * self.decoding.cpu_seconds)

    @property
    def passed(self) -> bool:
        """Whether the median ratio reaches the bar."""
        return median(self.ratios) >= BAR

    def table(self) -> list[list[str]]:
        """Table rows in the columns of HEADER."""
        rows = []
        for name, passes in (("preloaded", self.bare), ("pipeline", self.pipeline)):
            rates = [self.count / took.seconds for took in passes]
            computed = 1e3 * median(took.cpu_seconds for took in passes) / self.count
            rate = spread(rates, ".1f")
            rows.append([name, rate, f"{computed:.2f}", "", ""])
        rows[1][3] = spread(self.ratios, ".1%")
        rows[1][4] = f"{BAR:.0%} {'ok' if self.passed else 'MISSED'}"
        rate, computed = 1 / self.decoding.seconds, 1e3 * self.decoding.cpu_seconds
        rows.append(["decoding alone, one process", f"{rate:.1f}", f"{computed:.2f}", "", ""])
        return rows

    def record(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return {
            "title": self.title,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cores": cores(),
            "images": self.count,
            "preloaded": [took._asdict() for took in self.bare],
            "pipeline": [took._asdict() for took in self.pipeline],
            "decoding_an_image": self.decoding._asdict(),
            "ratio": self.ratios,
            "ceiling": self.ceiling,
            "bar": BAR,
            "first_batch_seconds": self.first_batch_seconds,
        }


@torch.no_grad()
def measure(
    model: Tokenizer, dataset: Dataset, *, batch_size: int = 32, workers: int = 1, repeats: int = 5
) -> PipelineSpeed:
    """Time whole passes of encode + decode, preloaded and through `batches` in turn, after one of each.

    A pass of the pipeline includes starting its workers. ValueError if no image can be read.
    """
    model.require_modality("image", "this measurement takes")
    size = model.image_size
    preloaded = [batch.images for batch in batches(dataset, size, batch_size, workers=0)]
    count = sum(map(len, preloaded))
    if not count:
        raise ValueError(f"none of the {len(dataset)} images of {dataset.source} can be read")
    where = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    title = f"{model.label} on {model.device}{where}, {cores()} cores; {count} images at {size}² from "
    title += f"{dataset.source}, batch {batch_size}, {workers} worker{'s' * (workers != 1)}"
    speed = PipelineSpeed(title, count)

    def pipeline() -> None:
        with closing(batches(dataset, size, batch_size, workers=workers)) as read:
            _pass(model, (batch.images for batch in read))

    _, first = timed(lambda: next(batches(dataset, size, batch_size, workers=workers)))
    speed.first_batch_seconds = first.seconds
    took = in_turn({"preloaded": lambda: _pass(model, preloaded), "pipeline": pipeline}, repeats)
    speed.bare, speed.pipeline = took["preloaded"], took["pipeline"]
    some = range(min(len(dataset), 200))
    _, decoding = timed(lambda: [_decode(dataset, index, size) for index in some])
    speed.decoding = decoding.per(len(some))
    return speed


def _pass(model: Tokenizer, images: Iterable[Tensor]) -> None:
    """Reconstruct batches of uint8 images; the results are copied to the CPU, so a GPU has finished."""
    for batch in images:
        if len(batch):
            model.reconstruct(batch.to(model.device).float() / 255).cpu()


def _decode(dataset: Dataset, index: int, size: int) -> None:
    try:
        decode(dataset.read(index), size)
    except (OSError, ValueError):  # counted when the images were preloaded
        return


@contextmanager
def _generated(count: int, width: int) -> Iterator[Path]:
    """A folder of JPEGs, 4:3 and `width` wide: procedural scenes and crops of photographs in turn."""
    from ...train.data import Mixture, Photos, Scenes

    pictures = Mixture([Scenes(width), Photos(width)], [1, 1])
    with tempfile.TemporaryDirectory(prefix="vistok-pipeline-") as folder:
        for index in range(count):
            picture = Image.fromarray(pictures.sample(index)[: width * 3 // 4])
            picture.save(Path(folder, f"{index:05}.jpg"), quality=90)
        yield Path(folder)


def main(
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="Registry name or weights.")] = "vistok-mini",
    data: Annotated[
        str | None, typer.Option("--data", help="Images; by default JPEGs that are made for the run.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images per pass.")] = 512,
    width: Annotated[
        int, typer.Option(min=16, help="Width in pixels of the JPEGs that are made, 4:3.")
    ] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per batch.")] = 32,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode; by default one per core, up to eight.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of paired passes.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice by default.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, …")] = "cpu",
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write.")] = None,
) -> None:
    """Measure images/s of encode + decode from files against preloaded tensors, paired in one run."""
    from rich.console import Console
    from rich.table import Table

    if threads:
        torch.set_num_threads(threads)
    model = load(tokenizer, device=device)
    with _generated(images, width) if data is None else nullcontext(data) as source:
        workers = worker_count(workers)
        options = {"batch_size": batch_size, "workers": workers, "repeats": repeats}
        speed = measure(model, open_dataset(source, limit=images), **options)
    table = Table(*HEADER, title=speed.title, title_justify="left")
    for row in speed.table():
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"where the model alone keeps all cores busy, no pipeline exceeds {speed.ceiling:.1%}")
    print(f"first batch after the first start of workers: {speed.first_batch_seconds:.2f} s, once per run")
    if out:
        with atomic_write(out) as aside:
            aside.write_text(json.dumps(speed.record(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
