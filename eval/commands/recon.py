"""`vistok eval recon`."""

from pathlib import Path
from typing import Annotated

import typer

from ...commands.console import Device
from ...commands.console import device as named_device
from ...commands.options import with_options
from ..options import ReconConfig
from .shared import Html, check_out, show


@with_options(ReconConfig)
def recon(
    config: ReconConfig,
    out: Annotated[Path, typer.Option("--out", help="Folder for JSON and report.")] = Path("recon"),
    device: Device = "auto",
    html: Html = True,
) -> None:
    """Measure a tokenizer's reconstructions: PSNR, SSIM, LPIPS, rFID, pFID, KID, codebook use and more.

    A killed run continues when it is started again. Several processes: `accelerate launch -m vistok.cli eval
    recon …`, with one --out that all can access.
    """
    from ..engine.record import write
    from ..report import records
    from ..tasks.reconstruction import run

    check_out(out, "reconstruction.json", "report.html", html=html)
    result = run(config, out, named_device(device))
    if result is None:
        return
    write(out / "reconstruction.json", result.record)
    if html:
        records.write_reconstruction(out / "report.html", result)
    result.state.remove()
    show(result.record, records.tables(result.record), out, html)
