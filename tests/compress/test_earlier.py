"""Finding the calls that run when a session is attached."""

import gc
import sys

import pytest
import torch
from tiny_vlms import tiny_vlm

from vistok import compress
from vistok.compress.earlier import EarlierCalls


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_while_frames_are_read_and_the_collector_stays_as_it_was(enabled, monkeypatch):
    """A finaliser that waits for the interpreter's lock of threads would never get it."""
    states, current_frames = [], sys._current_frames

    def watched():
        states.append(gc.isenabled())
        return current_frames()

    monkeypatch.setattr(sys, "_current_frames", watched)
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        EarlierCalls([torch.nn.Linear(1, 1)])
        assert states == [False] and gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_attaching_reads_frames_by_that_way_only(monkeypatch):
    model, _, _ = tiny_vlm("llava")
    calls, current_frames = [], sys._current_frames

    def watched():
        calls.append(gc.isenabled())
        return current_frames()

    monkeypatch.setattr(sys, "_current_frames", watched)
    with compress.attach(model, "uniformgrid", keep=0.5):
        pass
    assert calls and not any(calls)
