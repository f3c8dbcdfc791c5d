"""`vistok eval speed`."""

from pathlib import Path
from typing import Annotated

import typer

from ...commands.console import Device, say, table
from ...commands.console import device as named_device
from .shared import Html, check_out


def speed(
    tokenizer: Annotated[list[str], typer.Option("--tokenizer", help="Registry name; repeat for several.")],
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Images per batch; repeat for several.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of paired runs.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice by default.")
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="Also time torch.compile.")] = False,
    device: Device = "auto",
    out: Annotated[Path, typer.Option("--out", help="Folder for JSON and report.")] = Path("speed"),
    html: Html = True,
) -> None:
    """Measure images/s of encoding and decoding, peak memory and parameters, over batch sizes, against a
    straightforward implementation, paired in one run."""
    import torch

    from ...registry import entries, families, unknown_name
    from ..engine.record import write
    from ..report.speed import write_speed
    from ..speed.tokenizers import HEADER, measure

    check_out(out, "speed.json", "report.html", html=html)
    if unknown := [name for name in tokenizer if name not in {**entries(), **families()}]:
        raise ValueError(unknown_name(unknown[0]))
    if threads:
        torch.set_num_threads(threads)
    speeds = []
    for name in tokenizer:
        for size in sorted(set(batch_size or [8])):
            speeds.append(measure(name, size, repeats, named_device(device), compiled=compile_))
            table(speeds[-1].title, HEADER, speeds[-1].table())
            measured = {"protocol": {"repeats": repeats, "weights": "fresh"}, "n": repeats, "seed": 0}
            write(out / "speed.json", {**measured, "results": [each.record() for each in speeds]})
    if html:
        write_speed(out / "report.html", speeds, repeats)
    say(f"{out}: {'JSON and report.html' if html else 'JSON'}")
