"""`vistok eval tokens`."""

from pathlib import Path
from typing import Annotated

import typer

from ...commands.console import Device
from ...commands.console import device as named_device
from ...commands.options import with_options
from ..options import CurvesConfig
from .shared import check_out, show


@with_options(CurvesConfig)
def tokens(
    config: CurvesConfig,
    out: Annotated[Path, typer.Option("--out", help="Folder for JSON, plot and report.")] = Path(
        "rate-distortion"
    ),
    device: Device = "auto",
    html: Annotated[
        bool, typer.Option("--html/--no-html", help="Write report.html and rate_distortion.png.")
    ] = True,
) -> None:
    """Measure quality by bytes: every length of one or several tokenizers, beside thumbnail, JPEG, WebP and
    AVIF at the same bytes, with rate–FID where Inception's weights are.

    A killed run continues when it is started again. Several processes: `accelerate launch -m vistok.cli eval
    tokens …`.
    """
    from ..engine.record import write
    from ..report import curves
    from ..tasks.rate_distortion import run

    check_out(out, "rate_distortion.json", "rate_distortion.png", "report.html", html=html)
    result = run(config, out, named_device(device))
    if result is None:
        return
    write(out / "rate_distortion.json", result.record)
    if html:
        curves.chart(result.record, "psnr").save(out / "rate_distortion.png")
        curves.write_curves(out / "report.html", result)
    result.state.remove()
    show(result.record, curves.tables(result.record), out, html)
