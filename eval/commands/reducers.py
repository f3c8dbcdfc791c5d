"""`vistok eval reducers`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ...commands.console import Device, note, table
from ...commands.console import device as named_device
from ..options import REDUCERS
from ..options import names as names_in_list
from .shared import check_json_target, write_json


def reducers(
    every: Annotated[
        bool, typer.Option("--all", help="What each method costs and saves per image, for a 7B model.")
    ] = False,
    names: Annotated[str | None, REDUCERS] = None,
    keep: Annotated[float, typer.Option(help="With --all: the share of visual tokens kept.")] = 0.25,
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="With --all: visual tokens of a picture: 36, 144, 576 or 2880; repeatable."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of paired runs.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write.")] = None,
) -> None:
    """Measure the speed of token reducers: selection against plain code, prefill against the shortened
    prompt; with --all, whether each method pays."""
    if out:
        check_json_target(out)
    if every:
        record = _net_gain(names, keep, tokens or [576, 2880], repeats, threads, str(named_device(device)))
    elif names or tokens or keep != 0.25:
        raise ValueError("--reducers, --keep and --tokens belong to --all; add it, or leave them out")
    else:
        record = _speed(repeats, threads, str(named_device(device)))
    if out:
        write_json(out, record)


def _speed(repeats: int, threads: int, device: str) -> dict[str, Any]:
    """Print selection against plain code and prefill against the shortened prompt; returns the record."""
    from ...compress import DivPrune, UniformGrid
    from ..speed import merging, prefill, selection

    selected = selection.run([*selection.comparisons(), *merging.comparisons()], repeats, threads)
    table(selected.title, selection.HEADER, selected.table())
    record = {"selection": selected.record()}
    for name, keeps, width in (("prefill", (0.5, 0.25, 0.1), 384), ("prefill_wide", (0.1,), 1024)):
        read = prefill.run(
            [UniformGrid(), DivPrune()], keeps, repeats=repeats, threads=threads, device=device, width=width
        )
        table(read.title, prefill.HEADER, read.table())
        record[name] = read.record()
    return record


def _net_gain(
    names: str | None, keep: float, tokens: list[int], repeats: int, threads: int, device: str
) -> dict[str, Any]:
    """Print what each method costs and saves, and where it cannot pay; returns the record."""
    from ...compress.reducer import fraction_or_count
    from ...compress.registry import comparable_reducers, reducer_by_name
    from ..speed import net_gain

    fraction_or_count(keep)
    known = (*net_gain.PICTURES, net_gain.TILED)
    if not set(tokens) <= set(known):
        raise ValueError(f"--tokens are {tokens}; they are of {', '.join(map(str, known))}")
    chosen = names_in_list(names) or comparable_reducers()
    result = net_gain.run(
        {name: reducer_by_name(name) for name in chosen},
        keep,
        repeats=repeats,
        threads=threads,
        device=device,
        progress=lambda text: typer.echo(f"measuring {text}", err=True),
    )
    table(result.title, net_gain.HEADER, result.table(tokens))
    for name, reason in result.failures.items():
        note(f"{name} is not in the table: {reason}")
    for warning in result.warnings(tokens):
        note(warning)
    return result.record()
