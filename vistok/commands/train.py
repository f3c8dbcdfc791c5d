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
    """Train what a recipe describes; run again to continue.

    Several processes: `accelerate launch -m vistok.cli`.
    """
    from ..files import check_target

    folder = check_target(output or Path("runs") / config.stem, folder=True)

    from ..train.loop import train as run
    from ..train.objectives import objective_class
    from ..train.recipe import read

    settings = read(config)
    model = run(settings, folder, steps=steps)
    load = objective_class(settings).loaded_by.format(repr(str(model)))
    say(f"model: {model}{load and f' ({load})'}; log: {folder / 'log.jsonl'}")
