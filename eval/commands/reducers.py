"""`vistok eval reducers`."""

from pathlib import Path
from typing import Annotated

import typer

from ...commands.console import Device, table
from ...commands.console import device as named_device
from .shared import check_json_target, write_json


def reducers(
    repeats: Annotated[int, typer.Option(min=1, help="Number of paired runs.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write.")] = None,
) -> None:
    """Measure the speed of token reducers: selection against plain code, prefill against the shortened
    prompt."""
    from ...compress import DivPrune, UniformGrid
    from ..speed import prefill, selection

    if out:
        check_json_target(out)

    selected = selection.run(repeats, threads)
    table(selected.title, selection.HEADER, selected.table())
    read = prefill.run(
        [UniformGrid(), DivPrune()], repeats=repeats, threads=threads, device=str(named_device(device))
    )
    table(read.title, prefill.HEADER, read.table())
    if out:
        write_json(out, {"selection": selected.record(), "prefill": read.record()})
