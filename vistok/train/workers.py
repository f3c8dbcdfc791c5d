"""Worker processes that read pictures: none outlives the process it works for, or ends in a traceback."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.queues import Queue
from typing import Any

from torch.utils.data import DataLoader

LOOK_EVERY = 1.0
"""Seconds between looks at the parent of a forked worker."""


def worker_started(number: int = 0) -> None:
    """Call first in a worker: Ctrl-C is left to the parent, and the worker ends when the parent has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    # A signal to the whole group: torch would report a killed worker while its parent already ends.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    Queue._on_queue_feeder_error = staticmethod(_end_unsent)
    # torch's own watch is for idle workers only, and the server that forks workers lives as long as they do.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_unsent(error: Exception, batch: Any) -> None:
    """End a worker that cannot hand a batch over, as when shared memory is full: its parent waits for it."""
    os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    is_child = os.getppid() == parent.pid
    # Forked siblings keep each other's sentinels open, so a fork also looks at the number of its parent.
    while parent.is_alive() and (not is_child or os.getppid() == parent.pid):
        parent.join(LOOK_EVERY)
    os._exit(1)


def start(loader: DataLoader) -> Iterator[Any]:
    """The loader's iterator; Ctrl-C and SIGTERM wait until its workers have started.

    Half-started workers, and torch's half-made iterator, would end in tracebacks.
    """
    with _signals_deferred(), _interrupts_blocked(loader):
        return iter(loader)


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Raise signals that arrive during the block after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if arrived:
        signal.raise_signal(arrived[0])


@contextmanager
def _interrupts_blocked(loader: DataLoader) -> Iterator[None]:
    """Start processes that do not see Ctrl-C before they have set themselves up."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    context = loader.multiprocessing_context or multiprocessing
    if loader.num_workers and context.get_start_method() != "fork":
        resource_tracker.ensure_running()  # when it starts, it unblocks what is blocked below
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn what torch raises for a worker into one sentence: its own error; OSError if it was killed."""
    try:
        yield
    except (ConnectionResetError, BrokenPipeError, EOFError) as error:  # of the queue to the worker
        raise _ended(str(error)) from error
    except (OSError, ValueError, RuntimeError) as error:
        text = str(error)
        if text.startswith("Caught ") and "in DataLoader worker process" in text:
            last = text.strip().splitlines()[-1]
            raise type(error)(last.removeprefix(f"{type(error).__name__}: ")) from error
        if text.startswith("DataLoader worker"):
            raise _ended(text) from error
        raise


def _ended(reason: str) -> OSError:
    reason = reason.strip().partition("\n")[0].rstrip(". ")
    return OSError(
        f"a process that reads pictures ended before its work was done ({reason}); start again to "
        "continue, with fewer workers, or none, if memory or shared memory (/dev/shm) is short"
    )
