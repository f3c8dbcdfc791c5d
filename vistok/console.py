"""What commands share: options, tables on the terminal, and the device that a name means."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

Name = Annotated[
    str, typer.Option("--tokenizer", help="Registry name, hub repository, folder or weights file.")
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="Local weights file or folder for a registry name.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps …")]


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table, 160 characters wide where the output is no terminal."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", show_header=any(header))
    for name in header:
        drawn.add_column(name, overflow="fold", no_wrap=name in ("name", "weights"))
    for row in rows:
        drawn.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(drawn)


def device(name: str) -> "torch.device":
    """The device of that name, or the best there is for "auto"; ValueError for one that cannot be used."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try --device cpu"
        ) from error
    return found
