"""`vistok tune`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...commands.console import Device, say, table
from ...commands.console import device as named_device
from ...commands.options import with_options
from ..options import TuneConfig
from .shared import check_out

if TYPE_CHECKING:
    from ..tasks.tune import TuneRecord
    from ..tasks.vlm import Row


@with_options(TuneConfig)
def tune(
    config: TuneConfig,
    out: Annotated[Path, typer.Option("--out", help="Folder for the JSON.")] = Path("tune"),
    device: Device = "auto",
) -> None:
    """Find the cheapest token reducer of a vision-language model that loses at most a given accuracy.

    A killed run continues when it is started again.
    """
    from ..engine.record import write
    from ..tasks.tune import run

    check_out(out, "tune.json")
    result = run(config, out, named_device(device))
    write(out / "tune.json", result.record)
    result.state.remove()
    _show(result.record)
    say(f"{out}: JSON")


def _show(record: "TuneRecord") -> None:
    """Print the finalists and the line to paste, or that no setting qualifies."""
    header = ["setting", "loss in points (95%)", "prefill GFLOPs", "visual tokens per layer"]
    timed = any(row.speed for row in record.finalists)
    rows = [_cells(row) + ([_milliseconds(row)] if timed else []) for row in record.finalists]
    title = f"{record.model} on {record.data}: {record.confirmed:,} questions that no choice was made by"
    table(title, [*header, *(["first token ms"] if timed else [])], rows)
    refused = sum(each.refused is not None for each in record.candidates)
    print(
        f"{len(record.candidates) - refused} settings searched on {record.searched:,} questions"
        + (f", {refused} could not run (see the JSON)" if refused else "")
    )
    print(conclusion(record))


def conclusion(record: "TuneRecord") -> str:
    """What to use, as lines of text whose first is Python to paste, or that no setting qualifies."""
    allowed = f"{100 * record.max_loss:g} points"
    lines = []
    if record.chosen is None:
        able = [row for row in record.finalists[1:] if row.python]
        nearest = min(able, key=lambda row: row.loss["value"], default=None)
        lines.append(f"No reducer qualifies: each of the last {len(able)} loses more than {allowed}.")
        if nearest is not None:
            lines.append(f"The smallest loss: {nearest.python}  # {_loss(nearest)} points")
    else:
        row = record.row(record.chosen)
        full = record.finalists[0]
        lines += [
            row.python,
            f"# loses {_loss(row)} points with {100 * row.flops / full.flops:.0f}% of the prefill FLOPs",
        ]
        if row.loss["high"] > record.max_loss:
            lines.append(
                f"# the interval reaches beyond the allowed {allowed}; more questions (--count) narrow it"
            )
    if record.cheaper_native is not None:
        row = record.row(record.cheaper_native)
        setting = ", ".join(dict.fromkeys(each["setting"] for each in row.native))
        lines.append(
            f"The processor's own setting ({setting}) qualifies and costs less: it loses {_loss(row)} points "
            f"with {row.flops / 1e9:.3g} GFLOPs, and no reducer is needed."
        )
    return "\n".join(lines)


def _cells(row: "Row") -> list[str]:
    tokens = "–" if row.tokens_per_layer is None else f"{row.tokens_per_layer:,.1f}"
    return [row.label, _loss(row), f"{row.flops / 1e9:,.3g}", tokens]


def _milliseconds(row: "Row") -> str:
    if row.speed is None:
        return "–"
    speedup = f" ({row.speed['first_token_speedup']:.2f}×)" if row.name != "full model" else ""
    return f"{1e3 * row.speed['first_token_seconds']:,.1f}{speedup}"


def _loss(row: "Row") -> str:
    return " ".join(
        [f"{100 * row.loss['value']:.1f}", f"({100 * row.loss['low']:.1f} – {100 * row.loss['high']:.1f})"]
    )
