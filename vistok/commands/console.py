"""Shared parts of the commands: options, text and tables on the terminal, and devices by name."""

import logging
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

DEFAULT_TOKENIZER = "vistok-mini"
TOKENIZER = typer.Option(
    "--tokenizer", help="Registry name, folder, weights file, or hub repository hf://owner/name."
)
WEIGHTS = typer.Option("--weights", help="Local weights file or folder for a registry name.")
Name = Annotated[str, TOKENIZER]
Weights = Annotated[Path | None, WEIGHTS]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps …")]


# Text -------------------------------------------------------------------------------------------------------


def safe_text(text: object) -> str:
    r"""Text from outside (file names, captions, error messages) made safe for a terminal, on one line.

    Control characters, line ends, marks that reverse the direction of writing and bytes that are not UTF-8
    are shown escaped, as \x1b or \n.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in str(text)
    )


def say(text: object) -> None:
    """Print text from outside as one safe line."""
    print(safe_text(text))


def note(text: object) -> None:
    """Print a note to the user as one yellow line on stderr."""
    typer.secho(safe_text(text), fg="yellow", err=True)


def complain(text: str) -> None:
    """Print an error in red on stderr, as one line."""
    typer.secho(safe_text(text), fg="red", err=True)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: Any = None,
) -> None:
    """Show a UserWarning as one line, any other warning with the line of code that raised it."""
    text = str(message)
    if category is not UserWarning:
        text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    note(f"warning: {text}")


class LogLines(logging.Handler):
    """Shows the library's log records as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        note(record.getMessage())


def decibels(psnr: float) -> str:
    """The PSNR of one image as text: "31.20 dB", or "exact" for an image that came back exactly."""
    return "exact" if math.isinf(psnr) else f"{psnr:.2f} dB"


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table of plain text, 160 characters wide where the output is not a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    sheet = Table(title=Text(safe_text(title)), title_justify="left", show_header=any(header))
    for name in header:
        sheet.add_column(Text(safe_text(name)), overflow="fold", no_wrap=name in ("name", "weights"))
    for row in rows:
        sheet.add_row(*(Text(safe_text(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(sheet)


# Devices ----------------------------------------------------------------------------------------------------


def device(name: str) -> "torch.device":
    """The device of that name, or the best there is for "auto"; ValueError for one that cannot be used."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        result = torch.device(name)
        torch.empty(0, device=result)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try --device cpu"
        ) from error
    if result.type == "meta":
        raise ValueError("--device meta has no values; try --device cpu")
    return result
