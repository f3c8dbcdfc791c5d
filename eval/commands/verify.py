"""`vistok verify`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ...commands.console import Device, complain, table
from ...commands.console import device as named_device


def verify(
    cases: Annotated[list[Path], typer.Argument(help="Parity cases, NAME.json.", show_default=False)],
    device: Device = "cpu",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Computation type: float32, float64, bfloat16 or float16.")
    ] = "float32",
) -> None:
    """Compare with recorded outputs of the originals; exit 1 on a miss, 2 on what cannot be built."""
    import torch

    from ..parity.case import CannotBuild
    from ..parity.verify import verify as run

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(
            f"--dtype {dtype} is not a floating type; give float32, float64, bfloat16 or float16"
        )
    missed = unbuilt = 0
    for path in cases:
        start = time.perf_counter()
        try:
            rows = run(path, str(named_device(device)), kind)
        except (CannotBuild, FileNotFoundError) as error:
            complain(f"{path}: {error}")
            unbuilt += 1
            continue
        misses = sum(not row.passed for row in rows)
        missed += misses
        lines = [
            [
                row.name,
                f"{row.count:,}",
                f"{row.error:.0f} unequal" if row.exact else f"{row.error:.2e}",
                row.allowed,
                f"{row.worst:.3f}",
                "ok" if row.passed else "MISS",
            ]
            for row in rows
        ]
        verdict = "all within tolerance" if not misses else f"{misses} of {len(rows)} MISSED"
        title = f"{path.name}: {verdict} ({time.perf_counter() - start:.1f} s)"
        table(title, ["tensor", "values", "largest error", "allowed", "of tolerance", ""], lines)
    raise typer.Exit(2 if unbuilt else 1 if missed else 0)
