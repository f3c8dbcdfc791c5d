"""What a pass over images leaves on disk while it runs: resumable to the bit, mergeable across processes.

Values of single images go to memory-mapped tables, at the row of their image: whoever writes them, however
often, the table is the same. Sums (statistics, histograms) are kept by each process and written aside now and
then, with the number of batches they cover; a killed run continues after that batch.
"""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from ..files import atomic_write

DIGEST = 16
"""Bytes of an image's digest that are kept."""


class Accumulator(Protocol):
    """Sums over images that are saved, restored and added up."""

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what was saved, exactly."""

    def merge(self, other: Self) -> None:
        """Add the sums of other images."""


S = TypeVar("S", bound=Accumulator)


class State:
    """The tables, sums and position of one pass over `count` images, in a folder that all processes share.

    `settings` is what two runs must have in common to be the same run. Tables and sums are declared first;
    `open` then makes them or takes up what a killed run left.
    """

    def __init__(self, folder: Path, count: int, settings: Mapping[str, Any], process: PartialState) -> None:
        self.folder, self.count, self.process = folder, count, process
        self.settings = json.loads(json.dumps(settings))
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

        Raises ValueError if the folder holds the state of other settings, of another number of processes or
        of other versions, if its disk is too full, and if it is not the same folder for all processes.
        """
        self._refuse_another_run()
        self.process.wait_for_everyone()  # nobody writes before everybody has looked
        if self.process.is_main_process:
            self._create()
        self.process.wait_for_everyone()
        for name in self._layout:
            try:
                self._tables[name] = np.lib.format.open_memmap(self._path(name), "r+")
            except FileNotFoundError as error:
                raise ValueError(
                    f"process {self.process.process_index} does not see {self._path(name)}, which the first "
                    "one made: put --out on a disk that all processes share"
                ) from error
        path = self._sums(self.process.process_index)
        if path.exists():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self.done, self.bad, self.seconds = saved["done"], saved["bad"], saved["seconds"]
            for name, accumulator in self._accumulators.items():
                accumulator.load_state_dict(saved["sums"][name])

    def _identity(self) -> dict[str, Any]:
        versions = f"vistok {version('vistok')}, torch {torch.__version__}"
        return {**self.settings, "processes": self.process.num_processes, "versions": versions}

    def _refuse_another_run(self) -> None:
        path, wanted = self.folder / "settings.json", self._identity()
        if not path.exists():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        changes = [
            f"{name} was {_short(found.get(name))} and is now {_short(wanted.get(name))}"
            for name in {**found, **wanted}
            if found.get(name) != wanted.get(name)
        ]
        if changes:
            raise ValueError(
                f"{self.folder} holds an unfinished run with other settings ({'; '.join(changes)}): finish "
                "it as it was begun, give another --out, or delete that folder"
            )

    def _create(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = {name: spec for name, spec in self._layout.items() if not self._path(name).exists()}
        needed = sum(np.dtype(dtype).itemsize * width * self.count for dtype, width in missing.values())
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise ValueError(
                f"{self.folder} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left: "
                "choose another --out, or leave is, kid and pr out of --metrics"
            )
        for name, (dtype, width) in missing.items():
            with atomic_write(self._path(name)) as aside:
                table = np.lib.format.open_memmap(aside, "w+", np.dtype(dtype), (self.count, width))
                table[:] = 0  # takes the room now: a disk that fills up later would end the process
                table.flush()
        with atomic_write(self.folder / "settings.json") as aside:
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
        found = b"".join(digest[:DIGEST] for digest in digests)
        self._tables["digests"][images.numpy()] = np.frombuffer(found, np.uint8).reshape(-1, DIGEST)

    def refuse(self, bad: Sequence[tuple[int, str, str]]) -> None:
        """Note images that could not be read: number, name, reason."""
        self.bad += bad
        self._tables["digests"][[number for number, _, _ in bad]] = 0

    def save(self) -> None:
        """Write everything up to now, so that a later run continues here."""
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
            saved = torch.load(self._sums(rank), map_location="cpu", weights_only=True)
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
        compact = np.lib.format.open_memmap(self._path(f"{name}-measured"), "w+", table.dtype, shape)
        for start in range(0, len(kept), chunk):
            compact[start : start + chunk] = table[kept[start : start + chunk]]
        return torch.from_numpy(compact)

    def unreadable(self) -> list[dict[str, Any]]:
        """The images that could not be read, and why."""
        return [{"index": index, "name": name, "reason": reason} for index, name, reason in self.bad]

    def duplicates(self, names: Sequence[str]) -> list[list[str]]:
        """Names of images whose pixels are equal, a group each."""
        groups: dict[bytes, list[str]] = {}
        for number in self.measured().tolist():
            groups.setdefault(self._tables["digests"][number].tobytes(), []).append(names[number])
        return [group for group in groups.values() if len(group) > 1]

    def remove(self) -> None:
        """Delete the folder: the results are written."""
        self._tables.clear()
        shutil.rmtree(self.folder)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
