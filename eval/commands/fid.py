"""`vistok eval fid`."""

from pathlib import Path
from typing import Annotated

import typer

from ...commands.console import Device
from ...commands.console import device as named_device
from ...commands.options import with_options
from ..options import FidConfig
from .shared import Html, check_out, show


@with_options(FidConfig)
def fid(
    config: FidConfig,
    out: Annotated[Path, typer.Option("--out", help="Folder for JSON and report.")] = Path("fid"),
    device: Device = "auto",
    html: Html = True,
) -> None:
    """FID, Inception score, KID, precision and recall of images A against B; either may be a .npz with mu and
    sigma, such as ADM's reference files.

    A killed run continues when it is started again. Several processes: `accelerate launch -m vistok.cli eval
    fid …`.
    """
    from ..engine.record import write
    from ..report import records
    from ..tasks.fid import run

    check_out(out, "fid.json", "report.html", "statistics-a.npz", "statistics-b.npz", html=html)
    result = run(config, out, named_device(device))
    if result is None:
        return
    write(out / "fid.json", result.record)
    if html:
        records.write_fid(out / "report.html", result.record)
    for state in result.states:
        state.remove()
    show(result.record, records.tables(result.record), out, html)
