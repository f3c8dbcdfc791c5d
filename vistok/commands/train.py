"""`vistok train`."""

from pathlib import Path
from typing import Annotated

import typer

from .console import say


def train(
    config: Annotated[
        Path, typer.Argument(help="YAML file; assets/vistok-mini.yaml is one.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run folder; runs/<config name> otherwise.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Stop at this step.")] = None,
) -> None:
    """Train a tokenizer; run again to continue. Several processes: `accelerate launch -m vistok.cli`."""
    from ..files import check_target

    folder = check_target(output or Path("runs") / config.stem, folder=True)

    from ..train.loop import train as run
    from ..train.recipe import read

    settings = read(config)
    model = run(settings, folder, steps=steps)
    say(f"model: {model} (vistok.load({str(model)!r})); log: {folder / 'log.jsonl'}")
