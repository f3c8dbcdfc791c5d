"""Write files whole or not at all, and never in place of what is not an ordinary file."""

import errno
import hashlib
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Writers in C++ and Rust report a full disk only in words.
_FULL_WORDS = (
    "No space left",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed writing",
    "inline_container.cc",  # how torch.save reports it, with "unexpected pos"
)

LFS_POINTER = b"version https://git-lfs"
"""First bytes of the small text file that git-lfs keeps in place of a file that was not fetched."""
_LARGEST_POINTER = 1024  # bytes

_open_names: set[str] = set()  # temporary files that this process is writing now
_swept: set[tuple[int, Path]] = set()  # (pid, folder) pairs whose stale temporary files were removed


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write to a temporary file in the target's folder; it replaces the target only if the block succeeds.

    Missing folders are made. The file is on the disk when the block ends. Temporary files that dead processes
    of this machine left in the folder are removed.

    Raises:
        OSError: as `check_target`, and in one sentence when the disk is full.
    """
    path = check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    aside = path.parent / f"{_prefix()}{os.getpid()}-{secrets.token_hex(4)}.tmp"
    _open_names.add(aside.name)
    try:
        _create(aside, path)
        yield aside
        with suppress(FileNotFoundError):
            aside.chmod(stat.S_IMODE(path.stat().st_mode))
        _flush(aside)
        os.replace(aside, path)
        _flush(path.parent)
    except Exception as error:
        if getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS):
            raise _full_disk(path, error) from error
        raise
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        _open_names.discard(aside.name)


def _create(aside: Path, path: Path) -> None:
    try:
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise type(error)(f"{path} cannot be written ({error.strerror}); name another place") from error


def check_target(path: str | Path, *, folder: bool = False) -> Path:
    """Return the path if a file (`folder`: a folder of files) can be written there; call before long work.

    A file's target is an ordinary, writable file or does not exist; a folder's is a folder or does not exist.
    Nothing is made.

    Raises:
        OSError: another kind of thing is there (a folder, link, device, pipe), it or its folder is read-only,
            or a folder on the way to it is a file.
    """
    path = Path(path).expanduser()
    try:
        mode = path.stat().st_mode if folder else path.lstat().st_mode
    except FileNotFoundError:
        mode = None
        if path.is_symlink():
            raise FileExistsError(f"{path} is a link to nothing; remove it, or name another folder") from None
    except NotADirectoryError:
        mode = None  # a file on the way to it, named below
    except ValueError as error:
        raise OSError(f"{str(path)!r} cannot be the name of a file ({error}); name another") from error
    except OSError as error:
        raise type(error)(f"{path} cannot be written ({error.strerror}); name another place") from error
    if folder:
        if mode is not None and not stat.S_ISDIR(mode):
            raise NotADirectoryError(f"{path} is a file, and a folder is needed; name a folder or a new name")
        _check_folder(path)
        return path
    if mode is not None and not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "not an ordinary file")
        error = IsADirectoryError if stat.S_ISDIR(mode) else FileExistsError
        what = "name a file in it" if stat.S_ISDIR(mode) else "name an ordinary file or a new name"
        raise error(f"{path} is {kind}, which is not written over; {what}")
    if mode is not None and not (mode & 0o222 and os.access(path, os.W_OK)):
        raise PermissionError(f"{path} is read-only; name another file, or make it writable (chmod u+w)")
    _check_folder(path.parent)
    return path


def check_source(path: str | Path, *, limit: int | None = None) -> Path:
    """Return the path of an ordinary file (or a link to one) of at most `limit` bytes; call before reading.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: a folder, device, pipe or socket is there, or it is not readable.
        ValueError: the file is larger, or a git-lfs pointer.
    """
    path = Path(path).expanduser()
    try:
        status = path.stat()
    except FileNotFoundError:
        what = "is a link to nothing" if path.is_symlink() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; check the path") from None
    except ValueError as error:
        raise OSError(f"{str(path)!r} cannot be the name of a file ({error}); check the path") from error
    except OSError as error:
        raise type(error)(f"{path} cannot be read ({error.strerror}); check the path") from error
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{path} is a folder, and a file is needed; name a file in it")
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not an ordinary file")
        raise OSError(f"{path} is {kind}, which is not read from; give an ordinary file")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path} is not readable for you; make it so (chmod u+r), or give a copy")
    if status.st_size <= _LARGEST_POINTER:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{path} is a git-lfs pointer in place of the file; run git lfs pull")
    if limit is not None and status.st_size > limit:
        raise ValueError(f"{path} has {status.st_size:,} bytes; files of this kind are read up to {limit:,}")
    return path


def _check_folder(folder: Path) -> None:
    """Raise OSError unless files can be made in this folder, which may have to be made itself."""
    existing = folder.absolute()
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(
            f"{existing} is not a folder, so {folder} cannot be made; name another place"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"the folder {existing} is not writable for you; name another place")


def _full_disk(path: Path, error: Exception) -> OSError:
    full = OSError(
        f"no room to write {path} (disk full, or over a quota or size limit), which was left as it was; free "
        "some space or name another place"
    )
    full.errno = error.errno if isinstance(error, OSError) else errno.ENOSPC
    return full


def _flush(path: Path) -> None:
    """Flush a file or folder from memory to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a target that its owner may write but not read
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot flush folders
            raise
    finally:
        os.close(handle)


@cache
def _prefix() -> str:
    """Prefix of this machine's temporary files; processes in other process namespaces have another."""
    try:
        processes = os.readlink("/proc/self/ns/pid")  # containers may share a host name and a disk
    except OSError:
        processes = ""
    machine = hashlib.sha256(f"{socket.gethostname()} {processes}".encode()).hexdigest()[:12]
    return f".vistok-{machine}-"


def _sweep(folder: Path) -> None:
    """Remove what dead processes of this machine left in a folder, once per process and folder."""
    key = (os.getpid(), folder.absolute())
    if key in _swept:
        return
    _swept.add(key)
    with os.scandir(folder) as entries:
        stale = [entry for entry in entries if entry.name.startswith(_prefix()) and _is_stale(entry.name)]
    for entry in stale:
        with suppress(OSError):
            os.unlink(entry.path)


def _is_stale(name: str) -> bool:
    pid = name.removeprefix(_prefix()).partition("-")[0]
    if not (name.endswith(".tmp") and pid.isdecimal()):
        return False
    if int(pid) == os.getpid():
        return name not in _open_names
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


# Names ------------------------------------------------------------------------------------------------------

_FOLDERS = (
    *("assets", "checkpoint", "checkpoints", "ckpt", "ckpts", "data", "dataset", "datasets", "exp", "images"),
    *("experiments", "log", "logs", "models", "out", "output", "outputs", "photos", "results", "runs", "tmp"),
    *("train", "val", "test", "weights", "work"),
)
_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".jsonl", ".yaml", ".yml", ".txt", ".csv"),
    *(".tar", ".tgz", ".gz", ".zip", ".npz", ".npy", ".parquet", ".vtok", ".png", ".jpg", ".jpeg", ".webp"),
)


def looks_like_path(source: str) -> bool:
    """Whether text names a file or folder here, there or not, rather than a registry name or hub repository.

    It does if it exists, starts with `.`, `/` or `~`, has more than one separator, a file's ending, or a
    first part that exists here as a folder or is a usual folder's name (runs/…, data/…).
    """
    if "://" in source:
        return False
    if source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1:
        return True
    if Path(source).suffix.lower() in _SUFFIXES or os.path.lexists(source):
        return True
    first, separator, _ = source.partition("/")
    return bool(separator) and (first in _FOLDERS or Path(first).is_dir())
