"""Where evaluated images come from: folders, tar shards, manifests, hub datasets and lists of files."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ... import hub
from ...commands.console import safe_text
from ...configuration import shorten
from ...extras import needs
from ...files import check_source, looks_like_path
from ...image_files import ImageFolder
from ...images import MAX_FILE_BYTES
from ...train.patterns import expand
from ...train.stored import pictures, read_picture, shard_pictures
from ...train.tar_members import read_member
from .inventory import Inventory

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_ACCEPTED = (
    "a folder of images, image files, tar shards (val-{000..010}.tar, *.tar), a manifest.jsonl, or a hub "
    "dataset (hf://owner/name)"
)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in a fixed order, undecoded; `open_dataset` makes one. It may be sent to worker processes.

    `kind` is "folder", "files", "shards", "manifest" or "hub"; `names` has one name per image, for messages
    and records. `left_out` has the files of folders and the members of shards that are not images, each with
    the reason.
    """

    source: str
    kind: str
    names: Sequence[str]
    left_out: Sequence[tuple[str, str]] = field(default=(), kw_only=True)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        """Digest of all names in order: other images, or another order, give another one."""
        joined = "\n".join(self.names).encode(errors="surrogateescape")  # names of files may not be UTF-8
        return hashlib.sha256(joined).hexdigest()[:16]

    def left_out_summary(self) -> list[dict[str, Any]]:
        """The files left out, for records: for each reason how many, and the first names."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out:
            reasons.setdefault(reason, []).append(name)
        return [
            {"source": self.source, "reason": reason, "count": len(names), "first": names[:3]}
            for reason, names in reasons.items()
        ]

    def inventory(self) -> Inventory:
        """The files of the images, with their current sizes and times of change."""
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """The encoded image at that position. OSError or ValueError if it cannot be read."""
        raise NotImplementedError


def open_dataset(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    split: str | None = None,
    column: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """Find the images of a source without decoding any; `limit` keeps the first of them.

    A folder gives every image in it and its subfolders, by name; shards (uncompressed webdataset tar files,
    with braces and wildcards) theirs in stored order; a manifest is JSON lines with the path of an image
    under "image", relative to the manifest. A hub dataset, `hf://owner/name` or `hf://owner/name:configuration`
    (without the prefix where it does not look like a path here), is downloaded to the hub's cache, one split
    of it; a folder of parquet files is read as one without the hub.
    Several files or folders may be given as a list.

    `column` is the key in a manifest ("image" unless given), the extension in shards that hold several images
    per sample ("seg.png"), the column of a hub dataset; `split` is for hub datasets.

    Raises:
        FileNotFoundError: no such file, folder or hub dataset, or no image in it.
        ValueError: a tar that is compressed or damaged, a manifest line without an image, a hub dataset that
            needs a split or column, an option that does not apply, a limit below 1.
        ImportError, ConnectionError: a hub dataset without the package datasets, or offline.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    if not sources:
        raise ValueError(f"no images were given: give {_ACCEPTED}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: give the number of images to take, 1 or more")
    dataset = _open([os.path.expanduser(os.fspath(each)) for each in sources], split, column)
    return dataset if limit is None else replace(dataset, names=dataset.names[:limit])


def _open(sources: list[str], split: str | None, column: str | None) -> Dataset:
    if len(sources) == 1:
        (source,) = sources
        if os.path.isdir(source):
            return _folder(source, split, column)
        if Path(source).suffix.lower() == ".jsonl":
            _refuse("a manifest", split=split)
            return _manifest(source, column or "image")
        if source.startswith(hub.PREFIX):
            return _hub(source.removeprefix(hub.PREFIX), split, column)
        if _HUB_NAME.fullmatch(source) and not looks_like_path(source):
            return _hub(source, split, column)
    listed = [_files(each) for each in sources]
    files = list(dict.fromkeys(file for each, _ in listed for file in each))
    tars = [file for file in files if _is_tar(file)]
    if len(tars) == len(files):
        _refuse("tar shards", split=split)
        return _shards(_label(sources), files, column)
    if tars:
        raise ValueError(f"{_label(sources)} mixes images and tar files ({tars[0]}): give one kind")
    _refuse("image files", split=split, column=column)
    left_out = [row for _, rows in listed for row in rows]
    return Files(_label(sources), "files", files, root="", left_out=left_out)


def _label(sources: list[str]) -> str:
    """Name of a list of sources for titles and messages."""
    return (
        ", ".join(sources) if len(sources) <= 4 else f"{', '.join(sources[:3])} and {len(sources) - 3} more"
    )


def _files(pattern: str) -> tuple[list[str], list[tuple[str, str]]]:
    """One element of a list: a file, the images of a folder, or the files of a pattern; and the files of a
    folder that were left out."""
    if os.path.isdir(pattern):
        folder = pictures(pattern)
        return [str(path) for path in folder.images], _reasons(folder)
    if os.path.lexists(pattern):
        check_source(pattern)
        return [pattern], []
    if any(character in pattern for character in "{*?["):
        return expand(pattern), []
    raise FileNotFoundError(f"there is no file or folder {pattern}: give {_ACCEPTED}")


def _reasons(folder: ImageFolder) -> list[tuple[str, str]]:
    return [(str(path), reason) for path, reason in folder.left_out]


def _is_tar(path: str) -> bool:
    return ".tar" in [suffix.lower() for suffix in Path(path).suffixes] or path.lower().endswith(".tgz")


def _refuse(kind: str, **options: str | None) -> None:
    """Raise ValueError for an option that would be ignored."""
    for name, value in options.items():
        if value is not None:
            homes = {"split": "hub datasets", "column": "manifests, tar shards and hub datasets"}
            raise ValueError(f"{name}={value!r} does not apply to {kind}: it is for {homes[name]}")


# Files on disk ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Files(Dataset):
    """Image files; names are paths relative to `root`."""

    root: str

    def inventory(self) -> Inventory:
        """The images."""
        return Inventory.take(self.names, self.root)

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        return read_picture(Path(self.root, self.names[index]))


def _folder(root: str, split: str | None, column: str | None) -> Dataset:
    try:
        folder = pictures(root)
    except FileNotFoundError as error:
        if next(Path(root).rglob("*.parquet"), None):
            return _rows(root, table_of(root, root, None, split), column)
        if next(Path(root).glob("*.tar"), None):
            raise FileNotFoundError(f"{error}; it holds tar files: give '{Path(root, '*.tar')}'") from None
        raise
    _refuse("a folder of images", split=split, column=column)
    names = [path.relative_to(root).as_posix() for path in folder.images]
    return Files(root, "folder", names, root, left_out=_reasons(folder))


def _manifest(path: str, key: str) -> Dataset:
    names = []
    check_source(path, limit=MAX_FILE_BYTES)
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    names.append(_image_of_line(line, key, f"{path}, line {number}"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): give JSON lines in UTF-8") from error
    if not names:
        raise FileNotFoundError(f'{path} names no image: give one line {{"{key}": "photo.jpg"}} per image')
    root = Path(path).parent
    if not any(os.path.isfile(Path(root, name)) for name in names):
        raise FileNotFoundError(
            f"none of the {len(names)} images of {path} is there, the first should be "
            f"{safe_text(Path(root, names[0]))[:300]}: paths are relative to the manifest"
        )
    return Files(path, "manifest", names, str(root))


def _image_of_line(line: str, key: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{where} is not JSON ({error}): give {{"{key}": "photo.jpg"}}') from error
    name = row.get(key) if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        keys = f"it is {line.strip()[:40]}"
        if isinstance(row, dict):
            keys = f"its keys are {shorten(', '.join(row)).strip(chr(39))}"
        raise ValueError(
            f'{where} has no path under "{key}" ({keys}): give {{"{key}": "photo.jpg"}}, or name the key as '
            "column"
        )
    return name


@dataclass(frozen=True, eq=False)
class Shards(Dataset):
    """Members of tar files, read in place; names are `shard.tar:member`."""

    files: list[str]
    places: np.ndarray  # int64 [N, 3]: shard, offset and length in bytes

    def inventory(self) -> Inventory:
        """The shards."""
        return Inventory.take(self.files)

    def read(self, index: int) -> bytes:
        """The member's bytes."""
        shard, offset, length = self.places[index].tolist()
        return read_member(self.files[shard], offset, length)


def _shards(source: str, files: list[str], extension: str | None) -> Dataset:
    names, places, left_out = [], [], []
    for shard, (file, members) in enumerate(zip(files, shard_pictures(files), strict=True)):
        left_out += [
            (f"{file}:{name}", "a member of a sample without a picture") for name in members.left_out
        ]
        for name, *place in members.pictures:
            if extension is None or name.endswith("." + extension.removeprefix(".")):
                names.append(f"{file}:{name}")
                places.append((shard, *place))
    if not names:
        accepted = "png, jpg, webp, …" if extension is None else f"column {extension!r}"
        raise FileNotFoundError(f"no image ({accepted}) in {source}")
    return Shards(source, "shards", names, files, np.array(places, dtype=np.int64), left_out=left_out)


# The hub ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows(Dataset):
    """One column of a `datasets.Dataset`; names are `source:split:row`."""

    table: Any
    column: str

    def inventory(self) -> Inventory:
        """The files of the cache, which `datasets` names after what they were made of."""
        return Inventory.take([file["filename"] for file in self.table.cache_files])

    def read(self, index: int) -> bytes:
        """The encoded image of the row."""
        value = self.table[index][self.column]
        if isinstance(value, dict):  # an Image feature that is not decoded
            inside, path = value["bytes"], value["path"]
            value = read_picture(path) if inside is None and path else inside
        if not isinstance(value, bytes):
            raise ValueError(f"the row holds no image under {self.column!r}")
        return value


def _hub(source: str, split: str | None, column: str | None) -> Dataset:
    return _rows(source, hub_table(source, split, accepted=_ACCEPTED), column)


def hub_table(source: str, split: str | None, *, accepted: str) -> Any:
    """One split of a hub dataset `owner/name` or `owner/name:configuration` as a `datasets.Dataset`.

    One quick request checks whether the hub has it, because `datasets` retries for long. `accepted` is what
    messages list instead.

    Raises:
        FileNotFoundError: the hub has no such dataset, or it is gated.
        ConnectionError: the hub cannot be reached.
        ValueError: not a name, or a split that is not there.
        OSError, ImportError: as `table_of`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if not _HUB_NAME.fullmatch(source):
        raise ValueError(f"{hub.PREFIX}{source} is not a hub dataset; give {hub.PREFIX}owner/name")
    repository, _, configuration = source.partition(":")
    try:
        HfApi().dataset_info(repository, timeout=10)
    except RepositoryNotFoundError as error:  # gated ones too
        raise FileNotFoundError(
            f"there is no file or folder {source}, and the hub gives no dataset {repository!r} "
            f"({type(error).__name__}): give {accepted}; for a gated dataset log in with hf auth login"
        ) from error
    except Exception as error:  # the client raises many kinds for "no network"
        raise ConnectionError(
            f"there is no file or folder {source}, and as a dataset it cannot be fetched: the hub cannot be "
            f"reached ({type(error).__name__}). Where there is internet, run hf download {repository} "
            "--repo-type dataset --local-dir FOLDER, and give FOLDER"
        ) from error
    hub.announce(f"datasets/{repository}")
    return table_of(source, repository, configuration or None, split)


def table_of(source: str, path: str, configuration: str | None, split: str | None) -> Any:
    """One split of the dataset at `path`, a folder of parquet files or a hub repository, as a
    `datasets.Dataset`; `source` is its name in messages.

    Raises:
        OSError: it cannot be read as a dataset.
        ValueError: a split that is not there, or none given where there are several.
        FileNotFoundError: the split has no rows.
        ImportError: without the package datasets.
    """
    with needs("datasets", "eval", f"the hub dataset {source}"):
        import datasets
    try:
        builder = datasets.load_dataset_builder(path, configuration)
        files = builder.config.data_files
        splits = [str(name) for name in files or builder.info.splits or ()]
    except Exception as error:  # datasets raises many kinds
        raise OSError(f"{source} cannot be read as a dataset: {error}") from error
    split = _choose("split", split, splits, splits, source)
    # Only this split's files: without naming them every split would be downloaded.
    own = {split: list(files[split])} if files else None
    try:
        table = datasets.load_dataset(path, configuration, split=split, data_files=own)
    except Exception as error:
        raise OSError(f"{source}, split {split}, cannot be read: {error}") from error
    if not len(table):
        raise FileNotFoundError(f"{source}, split {split}, has no rows")
    return table


def _rows(source: str, table: Any, column: str | None) -> Dataset:
    import datasets

    images = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    column = _choose("column", column, images, list(table.features), source)
    table = table.select_columns([column])
    if column in images:
        table = table.cast_column(column, datasets.Image(decode=False))
    names = [f"{source}:{table.split}:{row}" for row in range(len(table))]
    return Rows(source, "hub", names, table, column)


def _choose(what: str, name: str | None, fitting: list[str], there: list[str], source: str) -> str:
    """The requested one, or the only one that fits."""
    if name in there:
        return name
    if name is None and len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(there) or "none"
    problem = f"has no {what} {name!r}" if name else f"has {len(fitting)} {what}s that may hold the images"
    raise ValueError(f"{source} {problem}: name the {what}, one of {listed}")
