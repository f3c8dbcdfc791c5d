"""The folder of a training run: which run it holds, which process uses it, its checkpoints and its log."""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_write, check_target
from ..lock import FolderLock
from ..saved import read_state

RUN, CHECKPOINT, PREVIOUS, LOG = "run.json", "checkpoint.pt", "checkpoint-previous.pt", "log.jsonl"
SAMPLES, MODEL = "samples", "model"
KEYS = ("identity", "step", "model", "ema", "optimizer")


class RunFolder:
    """One run's folder; `identity` is what two runs must share to be the same run."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self._log = path / LOG

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Use the folder for a block, alone among processes.

        Raises ValueError when it holds another run or something else, OSError when another process uses it or
        it cannot be written.
        """
        check_target(self.path, folder=True)
        for name in (RUN, CHECKPOINT, PREVIOUS, LOG):
            check_target(self.path / name)
        for name in (SAMPLES, MODEL):
            check_target(self.path / name, folder=True)
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.path)
        lock.acquire()
        try:
            self._refuse_another_run()
            yield
        finally:
            lock.release()

    def _refuse_another_run(self) -> None:
        path = self.path / RUN
        try:
            self.check_identity(json.loads(path.read_text(encoding="utf-8")))
            return
        except FileNotFoundError:
            self._refuse_foreign()
        except (json.JSONDecodeError, UnicodeDecodeError):
            pass  # checkpoints hold the identity too
        with atomic_write(path) as aside:
            aside.write_text(json.dumps(self.identity, indent=2) + "\n", encoding="utf-8")

    def _refuse_foreign(self) -> None:
        """Raise ValueError for files that this run would write over, without a checkpoint beside them."""
        files = [name for name in (LOG, MODEL, SAMPLES) if (self.path / name).exists()]
        if files and not self.has_checkpoint():
            raise ValueError(
                f"{self.path} holds {', '.join(files)} and no checkpoint that this run could continue from; "
                "choose a new output folder, or move them away"
            )

    def check_identity(self, identity: Any) -> None:
        """Raise ValueError that names what differs if this is the identity of another run."""
        different = list(_differences(identity, self.identity))
        if different:
            more = f" and {len(different) - 4} more" if len(different) > 4 else ""
            raise ValueError(
                f"{self.path} holds another run (its configuration differs in {', '.join(different[:4])}"
                f"{more}); choose a new output folder"
            )

    # Checkpoints --------------------------------------------------------------------------------------------

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint, whole or not."""
        return any((self.path / name).exists() for name in (CHECKPOINT, PREVIOUS))

    def restore(self, load: Callable[[dict[str, Any]], None]) -> None:
        """Give the latest checkpoint that is whole to `load`, which raises if it does not fit.

        A warning names one that was passed over. Raises ValueError when none can be used, and for a
        checkpoint of another run.
        """
        problems: list[str] = []
        for path in (self.path / name for name in (CHECKPOINT, PREVIOUS)):
            if not path.exists():
                continue
            try:
                state = read_state(path)
                if missing := [key for key in KEYS if key not in state]:
                    raise ValueError(f"{path} is not a checkpoint of training: it lacks {', '.join(missing)}")
                identity = json.loads(state["identity"])
            except (ValueError, TypeError) as error:
                problems.append(str(error))
                continue
            self.check_identity(identity)
            try:
                load(state)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = str(error).strip().partition("\n")[0]
                problems.append(f"{path} does not fit this run ({type(error).__name__}: {reason})")
                continue
            if problems:
                warnings.warn(f"{problems[0]}; going on from {path}, step {state['step']}", stacklevel=2)
            return
        raise ValueError(
            f"no checkpoint in {self.path} can be used: {'; '.join(problems)}. Delete the checkpoints to "
            "begin again, or choose a new output folder"
        )

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint; the one before it is kept, in case the disk damages this one."""
        path, previous = self.path / CHECKPOINT, self.path / PREVIOUS
        state = {"identity": json.dumps(self.identity, sort_keys=True), **state}
        with atomic_write(path) as aside:
            torch.save(state, aside)
            if path.exists():
                _add_name(path, previous)

    # The log ------------------------------------------------------------------------------------------------

    def open_log(self, step: int) -> None:
        """Drop the rows of steps after `step`, which will be written again.

        A kill can cut the last line. Of a log with other damage a copy is kept, and a warning names it.
        """
        try:
            content = self._log.read_bytes()
        except FileNotFoundError:
            return
        lines = [line for line in content.split(b"\n") if line.strip()]
        rows = [_row(line) for line in lines]
        if damaged := rows[:-1].count(None) + (b"\0" in lines[-1] if lines else 0):
            copy = self._log.with_name("log-damaged.jsonl")
            with atomic_write(copy) as aside:
                aside.write_bytes(content)
            warnings.warn(
                f"{self._log} has {damaged} damaged line{'s' * (damaged != 1)}, which are left out from now "
                f"on; the file as it was is {copy}",
                stacklevel=2,
            )
        kept = [
            line for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] <= step
        ]
        with atomic_write(self._log) as aside:
            aside.write_bytes(b"".join(line + b"\n" for line in kept))

    def log(self, row: Mapping[str, float]) -> None:
        """Add a row."""
        try:
            with self._log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
        except OSError as error:
            raise type(error)(
                f"{self._log} cannot be written ({error.strerror}); fix that, and start again to continue "
                "from the last checkpoint"
            ) from error


def _row(line: bytes) -> dict[str, Any] | None:
    """A row of the log, None for what is not one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _add_name(path: Path, name: Path) -> None:
    """Give a file a second name, replacing what had it."""
    beside = name.with_name(f".{name.name}.link")
    with suppress(FileNotFoundError):
        beside.unlink()
    try:
        os.link(path, beside)
        os.replace(beside, name)
        beside.unlink(missing_ok=True)  # of two names of one file, renaming leaves both
    except OSError:  # file systems without links: for a moment there is only the earlier one
        os.replace(path, name)


def _differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Keys, with dots between levels, under which two configurations differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if key not in one or key not in other:
                yield f"{where}{key}"
            else:
                yield from _differences(one[key], other[key], f"{where}{key}.")
    elif one != other:
        yield where.rstrip(".") or "everything"
