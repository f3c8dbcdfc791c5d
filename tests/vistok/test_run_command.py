"""Whatever ends a command is one line and an exit status; text of others harms no terminal and no table."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

from vistok import Tokens
from vistok.commands.console import safe_text

pytestmark = pytest.mark.slow

PHOTO = Path(str(files("vistok.assets"))) / "chelsea.jpg"
VISTOK = [sys.executable, "-m", "vistok.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def vistok(*arguments, **options):
    command = [*VISTOK, *map(str, arguments)]
    options = {"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": 120} | options
    return subprocess.run(command, **options)


# ---- text of others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï 猫 🐈", "plain ünï 猫 🐈"),
        ("\x1b[31mred\a", r"\x1b[31mred\x07"),
        ("two\nlines\r\tand a tab", r"two\nlines\r\tand a tab"),
        ("\udcff\u202egnp.exe", r"\udcff\u202egnp.exe"),
        ("a[/b].png [red] :smile:", "a[/b].png [red] :smile:"),
    ],
)
def test_control_characters_are_shown_escaped_and_all_else_as_it_is(text, shown):
    assert safe_text(text) == shown


NAMES = ["a[/b].png", "[red]c.png", "d\x1b[2Je.png", "f\ng.png", os.fsdecode(b"h\xff.png"), ":smile:.png"]


def test_any_file_name_goes_through_every_command(tmp_path):
    folder = tmp_path / "in"
    (folder / "a[").mkdir(parents=True)
    for name in NAMES:
        Image.open(PHOTO).resize((64, 64)).save(folder / name.replace("/", "]"), format="PNG")
    (folder / "[bold]broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = vistok("reconstruct", folder, "--out", tmp_path / "out", "--tokens", 1)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    record = json.loads((tmp_path / "out" / "reconstructions.json").read_text())
    assert len(record["images"]) == len(NAMES)
    printed = done.stdout + done.stderr
    assert "\x1b[2J" not in printed and "[red]c.png" in printed and "a[]b].png" in printed
    assert r"d\x1b[2Je.png" in printed and r"f\ng.png" in printed and ":smile:.png" in printed
    assert "skipped" in done.stderr and "[bold]broken.png" in done.stderr
    (folder / "[bold]broken.png").unlink()
    done = vistok("encode", folder, "-o", tmp_path / "a.vtok")
    assert done.returncode == 0 and done.stderr == "" and r"f\ng.png" in done.stdout
    done = vistok("decode", tmp_path / "a.vtok", "-o", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "back").iterdir())
    assert len(names) == len(NAMES) and all(name.isprintable() for name in names)


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "--colour"], "No such option"),
        (["enkode"], "No such command 'enkode'"),
        (["encode", "a.png"], "Missing option"),
        (["reconstruct", "a.png", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["eval", "fid", "a", "b", "--seed", "-5"], "Invalid value for '--seed'"),
    ],
)
def test_a_usage_error_is_one_line_and_status_2(arguments, message):
    done = vistok(*arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert "--help" in done.stderr


FAILING = """
import sys
from vistok import registry
def broken(): raise KeyError("somewhere deep")
registry.entries = broken
from vistok.cli import main
sys.argv = ["vistok", *sys.argv[1:]]
main()
"""


def failing(*arguments, **environment):
    command = [sys.executable, "-c", FAILING, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **environment})


def test_an_unexpected_error_is_one_line_that_names_the_way_to_its_traceback():
    done = failing("list")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "unexpected error, KeyError: 'somewhere deep'" in done.stderr and "--debug" in done.stderr


def test_debug_shows_the_traceback():
    for done in (failing("list", "--debug"), failing("--debug", "list"), failing("list", VISTOK_DEBUG="1")):
        assert done.returncode == 1 and "Traceback" in done.stderr and "in broken" in done.stderr


def test_help_names_debug_and_the_bare_command_shows_help():
    assert "--debug" in vistok("--help").stdout
    done = vistok()
    assert done.returncode == 2 and "reconstruct" in done.stdout + done.stderr


# ---- signals and pipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0.3, 0.6, 1.0, 1.5, 2.0])
def test_ctrl_c_in_the_first_seconds_leaves_no_traceback(tmp_path, delay):
    command = [*VISTOK, "reconstruct", *[str(PHOTO)] * 300, "--out", "out", "--batch-size", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cleans_up(tmp_path, number, status):
    command = [*VISTOK, "reconstruct", *[str(PHOTO)] * 1000, "--out", "out", "--batch-size", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True)
    for _ in range(600):
        if len(list(tmp_path.glob("out/*.png"))) > 2:
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err and not list(tmp_path.glob("out/.*"))


TURNED_INTO_OTHERS = """
import signal, sys
from vistok import registry
number = signal.Signals[sys.argv[1]]
def entries():
    try: signal.raise_signal(number)
    except BaseException: raise EOFError("a worker's pipe is closed")
registry.entries = entries
from vistok.cli import main
sys.argv = ["vistok", "list"]
main()
"""
AT_EXIT = """
import atexit, signal, sys
from vistok.cli import main
number = signal.Signals[sys.argv[1]]
sys.argv = ["vistok", "--help"]
atexit.register(lambda: signal.raise_signal(number))
main()
"""


@pytest.mark.parametrize("script", [TURNED_INTO_OTHERS, AT_EXIT])
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_decides_the_status_whatever_it_interrupts(script, name, status):
    """Libraries turn what a signal raises into their own errors; others come while the interpreter exits."""
    command = [sys.executable, "-c", script, name]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode == status and not done.stderr.strip()


def test_an_end_of_input_that_nobody_asked_for_is_an_error():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            FAILING.replace('KeyError("somewhere deep")', 'EOFError("of a pipe")'),
            "list",
        ],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 1 and "unexpected error, EOFError: of a pipe" in done.stderr


@pytest.mark.parametrize("arguments", [["list", "--json"], ["info", "vistok-mini"], ["--help"]])
def test_a_closed_pipe_is_quiet(arguments):
    process = subprocess.Popen([*VISTOK, *arguments], env=ENVIRONMENT, stdout=-1, stderr=-1, text=True)
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    assert err == ""


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("arguments", "status"), [(["encode", PHOTO, "-o", "a.vtok"], 0), (["info", "x"], 1)]
)
def test_closed_streams_change_no_result(tmp_path, closed, arguments, status):
    line = f"{shlex.join(map(str, [*VISTOK, *arguments]))} {closed}"
    done = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=60
    )
    assert done.returncode == status and "Traceback" not in done.stderr
    if status == 0:
        assert len(Tokens.load(tmp_path / "a.vtok")) == 1 and done.stderr == ""


def test_a_full_disk_behind_a_redirection_is_one_line():
    with open("/dev/full", "w") as full:
        done = vistok("list", "--json", stdout=full, capture_output=False, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no room" in done.stderr


def test_letters_that_a_terminal_lacks_are_escaped():
    done = vistok("info", "titok-l32", env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == ""
