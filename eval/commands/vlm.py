"""`vistok eval vlm`."""

from pathlib import Path
from typing import Annotated

import typer

from ...commands.console import Device, note, say, table
from ...commands.console import device as named_device
from ...commands.options import with_options
from ..options import VlmConfig
from .shared import Html, check_out


@with_options(VlmConfig)
def vlm(
    config: VlmConfig,
    out: Annotated[Path, typer.Option("--out", help="Folder for JSON and report.")] = Path("vlm"),
    device: Device = "auto",
    html: Html = True,
) -> None:
    """Measure what token reducers cost a vision-language model in accuracy and spare in computation, beside
    the full model and four baselines.

    A killed run continues when it is started again. Several processes: `accelerate launch -m vistok.cli eval
    vlm …`.
    """
    from ..engine.record import write
    from ..report.vlm import tables, write_vlm
    from ..tasks.vlm import run

    check_out(out, "vlm.json", "report.html", html=html)
    result = run(config, out, named_device(device))
    if result is None:
        return
    write(out / "vlm.json", result.record)
    if html:
        write_vlm(out / "report.html", result)
    result.state.remove()
    for each in tables(result.record):
        table(each.title, each.header, each.rows)
        if each.note:
            print(each.note)
    for warning in result.record.warnings:
        note(warning)
    say(f"{out}: {'JSON and report.html' if html else 'JSON'}")
