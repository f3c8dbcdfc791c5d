"""Imported only by the server that forks workers: workers of an ended parent print no traceback."""

import sys
from multiprocessing import process
from pathlib import Path
from types import TracebackType

GONE = (FileNotFoundError, EOFError, ConnectionError)
"""Errors of a starting worker whose parent's semaphores and pipes are gone."""


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    last = trace
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    file = Path(last.tb_frame.f_code.co_filename) if last is not None else Path()
    if not (issubclass(kind, GONE) and file.parent == Path(process.__file__).parent):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _report
