"""The command line `vistok …`: adds the commands. Only this module imports from eval."""

import sys

try:
    import logging
    import warnings
    from typing import Annotated

    import typer

    from .commands.console import LogLines, show_warning
    from .commands.run_command import run_command
    from .commands.sample import sample
    from .commands.tokens import decode, encode
    from .commands.train import train
    from .eval.commands import app as eval_app
    from .eval.commands.catalog import info, list_
    from .eval.commands.demo import demo
    from .eval.commands.reconstruct import reconstruct
    from .eval.commands.tune import tune
    from .eval.commands.verify import verify
except KeyboardInterrupt:  # Ctrl-C during the imports
    sys.exit(130)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Visual tokens: images to few tokens and back.",
    pretty_exceptions_enable=False,
)
for command in (demo, list_, info, reconstruct, encode, decode, sample, train, tune, verify):
    app.command(command.__name__.rstrip("_"))(command)
app.add_typer(eval_app, name="eval")


def main() -> None:
    """Run the command line: every error is one line on stderr and an exit status (see `run_command`)."""
    logger, handler = logging.getLogger("vistok"), LogLines()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            status = run_command(app, sys.argv[1:])
    finally:
        logger.removeHandler(handler)
    sys.exit(status)


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, also after a command.")
    ] = False,
) -> None:
    """Visual tokens: images to few tokens and back."""


if __name__ == "__main__":
    main()
