"""Helpers of the evaluation commands: check and write outputs, and print a record."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...commands.console import note, say, table
from ...files import atomic_write, check_target

if TYPE_CHECKING:
    from ..engine.record import Record
    from ..report.page import Table

Html = Annotated[bool, typer.Option("--html/--no-html", help="Write report.html.")]


def check_out(out: Path, *names: str, html: bool = False) -> None:
    """Raise OSError now for files that could not be written after the work, and ImportError for reports that
    could not be drawn."""
    check_target(out, folder=True)
    for name in names:
        check_target(out / name)
    if html:
        from ..report.charts import require

        require()


def show(record: "Record", tables: "list[Table]", out: Path, html: bool) -> None:
    """Print the tables, what was skipped, warnings, and where the files are."""
    from ..report.records import skipped

    for each in tables:
        table(each.title, each.header, each.rows)
    for names, reason in (row for each in skipped(record) for row in each.rows):
        note(f"skipped {names}: {reason}")
    for warning in record.warnings:
        note(warning)
    if record.bad_images:
        first = record.bad_images[0]
        note(f"{len(record.bad_images)} unreadable, the first {first['name']}: {first['reason']}")
    if record.duplicates:
        note(f"{len(record.duplicates)} images occur more than once")
    if record.rate:
        spent = sorted(record.seconds.items(), key=lambda stage: -stage[1])
        total = sum(seconds for _, seconds in spent)
        shares = ", ".join(f"{seconds / total:.0%} {stage}" for stage, seconds in spent[:4])
        print(f"{record.rate:.1f} images/s; of the time {shares}")
    say(f"{out}: {'JSON and report.html' if html else 'JSON'}")


def check_json_target(path: Path) -> None:
    """Raise OSError unless a record can be written there; only JSON files are overwritten."""
    check_target(path)
    if path.exists():
        with path.open("rb") as file:
            if file.read(64).lstrip()[:1] not in (b"{", b"[", b""):
                raise FileExistsError(f"{path} is there already and is not JSON; name another with --out")


def write_json(path: Path, record: Any) -> None:
    """Write a record as JSON, whole or not at all."""
    from ..engine.record import as_json

    with atomic_write(path) as aside:
        aside.write_text(as_json(record), encoding="utf-8")
