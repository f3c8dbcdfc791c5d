"""Images in memory, as a data set that worker processes can import."""

from dataclasses import dataclass
from pathlib import Path

from vistok.eval.data.dataset import Dataset


@dataclass(frozen=True, eq=False)
class Memory(Dataset):
    """Images in memory that note which of them were read, in files: other processes read them too."""

    contents: list[bytes]
    notes: Path | None = None

    def read(self, index):
        if self.notes is not None:
            (self.notes / str(index)).touch()
        return self.contents[index]

    def noted(self):
        return {int(path.name) for path in self.notes.iterdir()}


def in_memory(contents, notes=None):
    return Memory("memory", "files", [f"picture {index}" for index in range(len(contents))], contents, notes)
