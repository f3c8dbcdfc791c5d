"""The state of a pass over images on disk: resumable to the bit, mergeable across processes.

Values of single images go to memory-mapped tables, at the row of their image, so the table does not depend on
which process writes it or how often. Sums (statistics, histograms) are kept by each process and saved now and
then, with the number of batches they cover; a killed run continues after that batch.
"""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from ...files import atomic_write, check_target
from ...lock import NAME as LOCK
from ...lock import FolderLock
from ...saved import read_state
from ..data.inventory import Inventory

if TYPE_CHECKING:
    from accelerate import PartialState

DIGEST = 16
"""Bytes of an image's digest that are kept."""
AGAIN = "delete that folder to start again, or give another --out"


class Accumulator(Protocol):
    """Sums over images that are saved, restored and added up."""

    def state_dict(self) -> dict[str, Any]:
        """The sums, as tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""

    def merge(self, other: Self) -> None:
        """Add the sums of other images."""


S = TypeVar("S", bound=Accumulator)
SETTINGS, FILES = "settings.json", "files.jsonl"
OF_FILES = ("files", "names", "images", "settings")
"""Settings that may differ when the files do; the last are those chosen on the first images."""


class State:
    """The tables, sums and position of one pass over `count` images, in a folder that all processes share.

    `settings` is what two runs must have in common to be the same run, `inventory` the files of the images.
    Tables and sums are declared first; `open` then makes them or continues from those of a killed run.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        settings: Mapping[str, Any],
        inventory: Inventory,
        process: "PartialState",
    ) -> None:
        self.folder, self.count, self.process = folder, count, process
        self.settings = json.loads(json.dumps(settings)) | {"files": inventory.digest}
        self.inventory = inventory
        self._lock = FolderLock(folder)
        self.done = 0
        """Batches that this process has finished."""
        self.bad: list[tuple[int, str, str]] = []
        self.seconds: dict[str, float] = {}
        self._layout: dict[str, tuple[str, int]] = {}
        self._tables: dict[str, np.memmap] = {}
        self._accumulators: dict[str, Accumulator] = {}
        self.add_table("digests", "uint8", DIGEST)

    def add_table(self, name: str, dtype: str, width: int) -> None:
        """Declare a table [count, width]."""
        self._layout[name] = (dtype, width)

    def add(self, name: str, accumulator: S) -> S:
        """Declare sums."""
        self._accumulators[name] = accumulator
        return accumulator

    # Beginning ----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make what is missing and continue what is there.

        Raises ValueError if the folder holds the state of other settings, files, versions or number of
        processes, or something else, if the state is damaged, if the disk is too full, and if it is not the
        same folder for all processes; OSError if another run is using it.
        """
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the folder for another process; what was not saved is lost."""
        self._lock.release()

    def _open(self) -> None:
        check_target(self.folder, folder=True)
        if self.process.is_main_process and self.folder.is_dir():
            self._refuse_foreign()
            self._lock.acquire()
        self._refuse_another_run()
        self.process.wait_for_everyone()  # no process writes before all have checked
        if self.process.is_main_process:
            self._create()
        self.process.wait_for_everyone()
        for name, (dtype, width) in self._layout.items():
            self._tables[name] = table = self._table(name)
            if (table.dtype, table.shape) != (np.dtype(dtype), (self.count, width)):
                self._damaged(f"{name}.npy is {table.dtype} {list(table.shape)}")
        path = self._sums(self.process.process_index)
        if path.exists():
            self._restore(self._saved(path))

    def _table(self, name: str) -> np.memmap:
        try:
            return np.lib.format.open_memmap(self._path(name), "r+")
        except FileNotFoundError as error:
            raise ValueError(
                f"process {self.process.process_index} does not see {self._path(name)}, which the first "
                "one made: put --out on a disk that all processes share"
            ) from error
        except ValueError as error:
            self._damaged(f"{name}.npy: {error}")

    def _saved(self, path: Path) -> dict[str, Any]:
        """The saved state of this process, checked."""
        try:
            saved = read_state(path)
        except ValueError as error:
            self._damaged(str(error))
        kinds = {"done": int, "bad": list, "seconds": dict, "sums": dict}
        if any(not isinstance(saved.get(name), kind) for name, kind in kinds.items()):
            self._damaged(f"{path.name} does not hold {', '.join(kinds)}")
        if saved["sums"].keys() != self._accumulators.keys():
            self._damaged(f"{path.name} holds the sums of {', '.join(saved['sums']) or 'nothing'}")
        return saved

    def _restore(self, saved: dict[str, Any]) -> None:
        self.done, self.bad, self.seconds = saved["done"], saved["bad"], saved["seconds"]
        for name, accumulator in self._accumulators.items():
            try:
                accumulator.load_state_dict(saved["sums"][name])
            except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
                self._damaged(f"the sums of {name}: {error}")

    def _damaged(self, what: str) -> NoReturn:
        raise ValueError(f"{self.folder} holds a damaged state ({what}): {AGAIN}")

    def _identity(self) -> dict[str, Any]:
        versions = f"vistok {version('vistok')}, torch {torch.__version__}"
        return {**self.settings, "processes": self.process.num_processes, "versions": versions}

    def _refuse_foreign(self) -> None:
        """Raise ValueError if the folder holds other files than a state's: it is deleted at the end."""
        if foreign := sorted(path.name for path in self.folder.iterdir() if not _is_own(path)):
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise ValueError(
                f"{self.folder} is where the state of an evaluation goes, and it holds {foreign[0]}{more}, "
                "which is not part of one: give another --out, or move that away"
            )

    def _refuse_another_run(self) -> None:
        path, expected = self.folder / SETTINGS, self._identity()
        if not path.exists():
            if next(self.folder.glob("process-*.pt"), None):
                self._damaged(f"without {SETTINGS}")
            return
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            self._damaged(f"{SETTINGS}: {error}")
        if not isinstance(earlier, dict):
            self._damaged(f"{SETTINGS} is not a JSON object")
        different = [name for name in {**earlier, **expected} if earlier.get(name) != expected.get(name)]
        by_files = OF_FILES if "files" in different else ()
        changes = [
            f"{name} was {_short(earlier.get(name))} and is now {_short(expected.get(name))}"
            for name in different
            if name not in by_files
        ]
        if changes:
            raise ValueError(
                f"{self.folder} holds an unfinished run with other settings ({'; '.join(changes)}): finish "
                "it as it was begun, give another --out, or delete that folder"
            )
        if different:
            raise ValueError(
                f"{self.folder} holds an unfinished run of images that have changed since then "
                f"({self._changes_of_files()}): {AGAIN}"
            )

    def _changes_of_files(self) -> str:
        try:
            earlier = Inventory.load(self.folder / FILES)
        except (OSError, ValueError, TypeError):
            earlier = None
        return (earlier and self.inventory.changes(earlier)) or "other names, sizes or times of change"

    def _create(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        missing = {name: spec for name, spec in self._layout.items() if not self._path(name).exists()}
        if missing and next(self.folder.glob("process-*.pt"), None):
            self._damaged(f"{next(iter(missing))}.npy is gone")
        needed = sum(np.dtype(dtype).itemsize * width * self.count for dtype, width in missing.values())
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise ValueError(
                f"{self.folder} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left: "
                "choose another --out, or leave is, kid and pr out of --metrics"
            )
        for name, (dtype, width) in missing.items():
            with atomic_write(self._path(name)) as aside:
                _write_zeros(aside, np.dtype(dtype), (self.count, width))
        if not (self.folder / SETTINGS).exists():
            self.inventory.save(self.folder / FILES)
            with atomic_write(self.folder / SETTINGS) as aside:
                aside.write_text(json.dumps(self._identity(), indent=2) + "\n", encoding="utf-8")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _sums(self, rank: int) -> Path:
        return self.folder / f"process-{rank}.pt"

    # While running ------------------------------------------------------------------------------------------

    def write(self, name: str, images: Tensor, values: Tensor) -> None:
        """Set the rows of these images (int64 [B]) to values [B, width]."""
        self._tables[name][images.numpy()] = values.cpu().numpy()

    def mark(self, images: Tensor, digests: Sequence[bytes]) -> None:
        """Note that these images were measured, and what they are."""
        content = b"".join(digest[:DIGEST] for digest in digests)
        self._tables["digests"][images.numpy()] = np.frombuffer(content, np.uint8).reshape(-1, DIGEST)

    def refuse(self, bad: Sequence[tuple[int, str, str]]) -> None:
        """Note images that could not be read: number, name, reason."""
        self.bad += bad
        self._tables["digests"][[number for number, _, _ in bad]] = 0

    def save(self) -> None:
        """Save everything up to now, so that a later run continues here."""
        for table in self._tables.values():
            table.flush()
        with atomic_write(self._sums(self.process.process_index)) as aside:
            sums = {name: each.state_dict() for name, each in self._accumulators.items()}
            torch.save({"done": self.done, "bad": self.bad, "seconds": self.seconds, "sums": sums}, aside)

    # When done ----------------------------------------------------------------------------------------------

    def merge(self) -> bool:
        """Save, wait for all processes and add up their sums in the first one; whether this is that one."""
        self.save()
        self.process.wait_for_everyone()
        if not self.process.is_main_process:
            return False
        for rank in range(1, self.process.num_processes):
            saved = self._saved(self._sums(rank))
            self.bad += saved["bad"]
            for name, seconds in saved["seconds"].items():
                self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            for name, accumulator in self._accumulators.items():
                other = copy.deepcopy(accumulator)
                other.load_state_dict(saved["sums"][name])
                accumulator.merge(other)
        self.bad.sort()
        return True

    def measured(self) -> np.ndarray:
        """Numbers of the images that were measured, int64 [n], in order."""
        return self._tables["digests"].any(1).nonzero()[0]

    def rows(self, name: str, chunk: int = 4096) -> Tensor:
        """A table without the rows of unreadable images, [n, width]; still on disk, however large."""
        kept, table = self.measured(), self._tables[name]
        if len(kept) == self.count:
            return torch.from_numpy(table)
        shape = (len(kept), table.shape[1])
        with atomic_write(self._path(f"{name}-measured")) as aside:
            _write_zeros(aside, table.dtype, shape)
        compact = np.lib.format.open_memmap(self._path(f"{name}-measured"), "r+")
        for start in range(0, len(kept), chunk):
            compact[start : start + chunk] = table[kept[start : start + chunk]]
        return torch.from_numpy(compact)

    def unreadable(self) -> list[dict[str, Any]]:
        """The images that could not be read, and why."""
        return [{"index": index, "name": name, "reason": reason} for index, name, reason in self.bad]

    def duplicates(self, names: Sequence[str]) -> list[list[str]]:
        """Names of images whose pixels are equal, one list per group."""
        groups: dict[bytes, list[str]] = {}
        for number in self.measured().tolist():
            groups.setdefault(self._tables["digests"][number].tobytes(), []).append(names[number])
        return [group for group in groups.values() if len(group) > 1]

    def remove(self) -> None:
        """Delete the folder once the results are written; other files in it stay."""
        self._tables.clear()
        self.close()
        for path in self.folder.iterdir():
            if _is_own(path):
                path.unlink()
        with suppress(OSError):  # not empty
            self.folder.rmdir()


def _write_zeros(path: Path, dtype: np.dtype, shape: tuple[int, int], chunk: int = 1 << 22) -> None:
    """Write a .npy file of zeros; a disk that fills up later under a memory map would end the process."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    size = dtype.itemsize * shape[0] * shape[1]
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, size, chunk):
            file.write(bytes(min(chunk, size - start)))


def _is_own(path: Path) -> bool:
    """Whether a file in the folder is part of a state, or a temporary file of `atomic_write`."""
    names = ("*.npy", "process-*.pt", SETTINGS, FILES, LOCK, ".vistok-*.tmp")
    return any(fnmatch(path.name, name) for name in names) and not path.is_dir()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
