"""One pass over a dataset, by one process or several, that continues after a kill."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ...extras import needs
from ...train.workers import worker_errors
from ..data.dataset import Batch, Dataset, batches
from .record import Clock
from .state import State

if TYPE_CHECKING:
    from accelerate import PartialState

LAST = "last: "
"""Prefix of the names of stages that come after the pass."""


def join(device: torch.device) -> tuple["PartialState", torch.device]:
    """This process's rank among those of `accelerate launch` or `torchrun`, and its device.

    Alone it is the only process, on `device`; one of several takes the accelerator of its number where
    `device` is of that type.
    """
    with needs("accelerate", "eval", "evaluation"):
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

    on_cpu = device.type == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    # A process may be done long before another; the default of half an hour would end the run there.
    process = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
    if process.num_processes > 1 and (on_cpu or process.device.type == device.type):
        device = process.device
    return process, device


def run(
    state: State,
    dataset: Dataset,
    measure: Callable[[Batch], None],
    clock: Clock,
    *,
    size: int,
    batch_size: int,
    crop: bool = True,
    multiple: int = 1,
    workers: int = 1,
    checkpoint_every: int = 50,
    title: str = "evaluate",
) -> bool:
    """Call `measure` with this process's batches, from the position in `state` on, and merge; True in the
    first.

    `measure` gets readable images only; the others are noted in the state. Raises ValueError when no image at
    all could be read.
    """
    process = state.process
    share = {"rank": process.process_index, "world_size": process.num_processes}
    count = -(-len(dataset) // (batch_size if crop else 1))
    own = len(range(share["rank"], count, share["world_size"]))
    visible = process.is_main_process and sys.stderr.isatty()
    bar = tqdm(desc=title, total=own, initial=state.done, delay=1.0, leave=False, disable=not visible)
    read = batches(
        dataset,
        size,
        batch_size,
        crop=crop,
        multiple=multiple,
        workers=workers,
        start=state.done,
        **share,
    )
    with ExitStack() as on_failure, worker_errors(), bar, closing(read):
        on_failure.callback(state.close)
        for batch in _timed(read, clock):
            state.refuse(batch.bad)
            if len(batch.images):
                measure(batch)
                state.mark(batch.indices, batch.digests)
            state.done += 1
            bar.update()
            if state.done % checkpoint_every == 0:
                with clock("state on disk"):
                    state.save()
        first = state.merge()
        if first and not len(state.measured()):
            _, name, reason = state.bad[0]
            state.remove()
            raise ValueError(
                f"none of the {len(dataset)} images of {dataset.source} can be read: {name}: {reason}"
            )
        on_failure.pop_all()
    return first


def duration(state: State) -> float:
    """Seconds of a process in the pass, the mean over processes; what was added up afterwards is left out."""
    spent = sum(seconds for stage, seconds in state.seconds.items() if not stage.startswith(LAST))
    return spent / state.process.num_processes


def _timed(read: Iterator[Batch], clock: Clock) -> Iterator[Batch]:
    while True:
        with clock("waiting for images"):
            batch = next(read, None)
        if batch is None:
            return
        yield batch
