"""Run a command line; every error ends in one line and an exit status, not in a traceback."""

import atexit
import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

DEBUG = "VISTOK_DEBUG"
_USAGE, _INTERRUPTED, _TERMINATED = 2, 130, 143


class _Stop:
    """The signal that asked the process to end, if any."""

    def __init__(self) -> None:
        self.status: int | None = None

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        self.status = _INTERRUPTED
        self.end_import(frame)
        raise KeyboardInterrupt

    def end_import(self, frame: FrameType | None) -> None:
        """End at once during an import: libraries catch what is raised there, and the work would go on."""
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                os._exit(self.status or 1)
            frame = frame.f_back

    def terminate(self, number: int, frame: FrameType | None) -> None:
        self.status = _TERMINATED
        self.end_import(frame)
        raise SystemExit(_TERMINATED)  # files are cleaned up as after Ctrl-C


def run_command(app: Callable[..., Any], arguments: list[str]) -> int:
    """Run a typer application and return the exit status of the process.

    0, or what the command chose; 1 for errors and 2 for usage errors, each one line on stderr; 130 after
    Ctrl-C and 143 after SIGTERM. With `--debug` anywhere, or VISTOK_DEBUG=1, errors show their traceback.
    """
    debug = os.environ.get(DEBUG, "") not in ("", "0") or "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    stop, previous = _Stop(), {}
    for number, handler in ((signal.SIGINT, stop.interrupt), (signal.SIGTERM, stop.terminate)):
        with contextlib.suppress(ValueError):  # not in the main thread
            previous[number] = signal.signal(number, handler)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: a file opened later must not take its place
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # characters that the terminal does not have appear escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _flushed(_status(app, arguments, debug, stop))
        return status if stop.status is None else stop.status
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        atexit.register(_end_quietly)


def _end_quietly() -> None:
    """Make signals end the process at once from here on: all output is written."""
    for number, status in ((signal.SIGINT, _INTERRUPTED), (signal.SIGTERM, _TERMINATED)):
        with contextlib.suppress(ValueError):
            signal.signal(number, lambda number, frame, status=status: os._exit(status))


def _status(app: Callable[..., Any], arguments: list[str], debug: bool, stop: _Stop) -> int:
    import typer

    try:
        returned = app(arguments, standalone_mode=False)
        return returned if isinstance(returned, int) else 0
    except SystemExit as error:
        if isinstance(error.code, str):
            return _report(error.code, 1)
        return error.code or 0
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of the output is gone, as with `| head`
        _discard_output()
        return 1
    except _parsing_errors() as error:
        return _usage(error)
    except BaseException as error:
        if stop.status is not None:  # libraries turn interrupts into other errors, as of their worker's pipe
            return stop.status
        if isinstance(error, typer.Abort) and error.__cause__ is not None:  # typer's form of an EOFError
            error = error.__cause__
        if debug:
            traceback.print_exception(error)
            return 1
        return _report(_sentence(error), 1)


def _parsing_errors() -> type[Exception]:
    """The base of errors in the command line: typer's own since 0.27, before that click's."""
    import typer

    return getattr(typer, "TyperException", typer.BadParameter.__mro__[2])


def _usage(error: Any) -> int:
    """A mistake in the command line: one line, or the help of a command that was given nothing."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return _USAGE
    command = context.command_path if context is not None else "vistok"
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    return _report(f"{message.rstrip('.')}; see {command} --help", getattr(error, "exit_code", _USAGE))


def _sentence(error: BaseException) -> str:
    """An error as a sentence for the user; unexpected ones name the option that shows the traceback."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.strerror:
        return f"no room on the disk{f' of {error.filename}' * bool(error.filename)}; free some space"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}; check the path"
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)) and str(error):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "not enough memory; give a smaller --batch-size, smaller images or another --device"
    text = str(error).strip().partition("\n")[0]
    return (
        f"unexpected error, {type(error).__name__}{': ' * bool(text)}{text}; please report it with the "
        f"traceback that --debug (or {DEBUG}=1) shows"
    )


def _report(message: str, status: int) -> int:
    from .console import complain

    with contextlib.suppress(OSError):
        complain(f"vistok: {message}")
    return status


def _flushed(status: int) -> int:
    """Flush what was printed; a reader that is gone is not an error to print."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return status or 1
    except (OSError, ValueError) as error:  # a full disk behind a redirection, or a closed stream
        _discard_output()
        return _report(f"the output cannot be written ({error})", 1)
    return status


def _discard_output() -> None:
    """Discard what is still in the buffer, so that the interpreter's last flush raises nothing."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
