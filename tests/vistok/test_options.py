"""Commands, configurations and records from the fields of one dataclass."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from vistok.commands.options import Setting, binding, recorded, with_options


@dataclass(frozen=True)
class Files:
    weights: Annotated[Path | None, typer.Option("--weights")] = None


@dataclass(frozen=True)
class Config:
    name: Annotated[str, typer.Argument()]
    sizes: Annotated[tuple[int, ...], typer.Option("--size")] = (4, 8)
    names: Annotated[
        tuple[str, ...] | None,
        typer.Option("--names"),
        Setting(text=str | None, parse=lambda text: None if text is None else tuple(text.split(","))),
    ] = None
    steps: Annotated[int | None, typer.Option("--steps"), Setting(recorded=True)] = None
    ratios: Annotated[tuple[float, ...] | None, typer.Option("--ratio")] = None
    workers: Annotated[
        int,
        typer.Option("--workers"),
        Setting(text=int | None, parse=lambda n: n or 7, default=None, loose=True),
    ] = 1
    files: Annotated[Files, Setting(loose=True)] = field(default_factory=Files)


def run(*arguments):
    """The configuration and the other option that a command line gives."""
    calls, app = [], typer.Typer()

    @app.command()
    @with_options(Config)
    def command(config: Config, out: Annotated[Path, typer.Option("--out")] = Path("out")) -> None:
        """Does nothing."""
        calls.append((config, out))

    result = CliRunner().invoke(app, list(arguments))
    return calls[0] if calls else result


def test_a_command_line_gives_the_configuration_of_python():
    config, out = run("x", "--workers", "1")
    assert (config, out) == (Config("x"), Path("out"))


def test_every_kind_of_field_is_read():
    line = [
        "x",
        "--size",
        "1",
        "--size",
        "2",
        "--names",
        "a,b",
        "--steps",
        "3",
        "--ratio",
        "0.5",
        "--weights",
        "w.pt",
        "--out",
        "here",
    ]
    config, out = run(*line)
    expected = Config("x", (1, 2), ("a", "b"), 3, (0.5,), 7, Files(Path("w.pt")))
    assert (config, out) == (expected, Path("here"))


def test_the_command_line_may_have_another_default():
    assert run("x")[0].workers == 7 and Config("x").workers == 1


@pytest.mark.parametrize("line", [(), ("x", "--steps", "many"), ("x", "--unknown", "1")])
def test_what_does_not_fit_is_a_usage_error(line):
    assert run(*line).exit_code == 2


def test_records_take_what_was_given_and_states_what_must_stay():
    config = Config("x", steps=3, workers=5, files=Files(Path("w")))
    assert recorded(config) == {"steps": 3} and recorded(Config("x")) == {}
    assert binding(config) == {"name": "x", "sizes": (4, 8), "names": None, "steps": 3, "ratios": None}
