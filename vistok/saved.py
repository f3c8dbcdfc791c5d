"""Read states that this package saved with `torch.save`, after checking that they are whole."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch


def read_state(path: Path) -> dict[str, Any]:
    """The dictionary in a file of `torch.save`, tensors on the CPU.

    Raises ValueError, in one line, for a file that is cut off, damaged or holds something else: torch itself
    does not notice values that were overwritten.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (name := archive.testzip()) is not None:
                raise ValueError(f"{path} is damaged: the values of {name} are not those that were saved")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise ValueError(str(error).partition("\n")[0]) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is cut off or damaged ({_first_line(error)})") from error
    except MemoryError:
        raise
    except Exception as error:  # a foreign pickle: torch raises many kinds
        raise ValueError(f"{path} is not a state that vistok saved ({_first_line(error)})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a state that vistok saved: it holds a {type(state).__name__}")
    return state


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
