"""One process per folder: a lock that ends with its process, however that ends."""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
_held: dict[str, "FolderLock"] = {}  # by path: the locks of this process
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


def _drop_locks() -> None:
    """Drop the locks in a forked process; they belong to its parent."""
    for lock in _held.values():
        os.close(lock._handle)
        lock._handle = None
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_locks)


class FolderLock:
    """A lock on a folder, kept in its file `.lock`, that one process can hold at a time.

    The operating system ends it with the process. Where the file system has no such locks, the file is made
    exclusively and holds process id and host; what a dead process of this host left there is taken over.
    Within one process the latest object that acquires the lock holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock; nothing happens if this object holds it. The folder must exist.

        Raises OSError when another run holds it, or the folder cannot be written.
        """
        key = os.path.realpath(self.path)
        if (holder := _held.get(key)) not in (None, self):
            self._handle, holder._handle = holder._handle, None
        while self._handle is None:
            self._handle = self._locked() if fcntl else self._exclusive()
        _held[key] = self

    def release(self) -> None:
        """Release the lock and remove its file; nothing happens if it is not held."""
        if self._handle is not None:
            with suppress(OSError):  # the folder may be gone
                self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None
            _held.pop(os.path.realpath(self.path), None)

    def _locked(self) -> int | None:
        """The open lock file; None if its last owner removed it meanwhile."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.path.exists(self.path) and os.path.samestat(os.stat(self.path), os.fstat(handle))
            if current:
                os.ftruncate(handle, 0)
                os.write(handle, _own_name())
                return handle
        except BlockingIOError:
            owner = os.read(handle, 200).decode(errors="replace")
            os.close(handle)
            raise self._in_use(owner) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in _UNSUPPORTED:
                raise
            with suppress(OSError):
                if not self.path.stat().st_size:
                    self.path.unlink()
            return self._exclusive()
        os.close(handle)
        return None

    def _exclusive(self) -> int | None:
        """The lock file, made by this process; None if a dead owner's file was removed."""
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            with suppress(FileNotFoundError):
                owner = self.path.read_text(encoding="utf-8", errors="replace")
                if not _is_dead(owner):
                    raise self._in_use(owner) from None
                self.path.unlink()
            return None
        os.write(handle, _own_name())
        return handle

    def _in_use(self, owner: str) -> OSError:
        return OSError(
            f"{self.path.parent} is in use by {owner or 'another run'}: wait until that run ends, or name "
            f"another folder; if it runs no longer, delete {self.path}"
        )


def _own_name() -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()}".encode()


def _is_dead(owner: str) -> bool:
    """Whether an owner is a process of this host that has ended."""
    words = owner.split()
    if len(words) != 4 or words[3] != socket.gethostname() or not words[1].isdecimal() or os.name == "nt":
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
