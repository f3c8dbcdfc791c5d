"""The commands of `vistok eval`, one file each."""

import typer

from .fid import fid
from .lengths import lengths
from .recon import recon
from .reducers import reducers
from .speed import speed
from .tokens import tokens
from .vlm import vlm

app = typer.Typer(no_args_is_help=True, help="Measure tokenizers, reducers and vision-language models.")
for command in (recon, tokens, fid, vlm, speed, reducers, lengths):
    app.command()(command)
