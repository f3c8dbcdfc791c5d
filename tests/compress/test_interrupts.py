"""Interrupts, threads and sessions that have ended."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from oracles import going_on, the_cache
from reducer_matrix import fingerprint
from tiny_vlms import tiny_vlm

from vistok import compress
from vistok.compress import DivPrune, FastV, HiRED, KeyNorm, ToMe

FOLDER = str(Path(compress.__file__).parent)
SESSIONS = {
    "features": lambda: [HiRED()],
    "layers": lambda: [DivPrune(), FastV(k=1), KeyNorm()],
    "tower": lambda: [ToMe()],
}


class InterruptAt:
    """Raise KeyboardInterrupt at the n-th line that runs in vistok.compress, as Ctrl-C may anywhere."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __enter__(self) -> "InterruptAt":
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


def sampled_lines(run, count=80):
    """Places among all the lines that `run` passes in vistok.compress, evenly spread."""
    with InterruptAt(10**9) as counter:
        run()
    total = 10**9 - counter.left
    return sorted({1 + total * i // count for i in range(count)})


@pytest.mark.parametrize("reducers", SESSIONS.values(), ids=SESSIONS)
def test_an_interrupt_while_attaching_leaves_nothing(reducers):
    model, *_ = tiny_vlm("llava")
    clean, interrupted = fingerprint(model), 0

    def attach():
        compress.attach(model, reducers(), keep=0.5).detach()

    for line in sampled_lines(attach):
        session = None
        try:
            with InterruptAt(line):
                session = compress.attach(model, reducers(), keep=0.5)
        except KeyboardInterrupt:
            interrupted += 1
            assert fingerprint(model) == clean, f"line {line} of attaching left something behind"
        if session is not None:
            session.detach()
    assert fingerprint(model) == clean
    assert interrupted > 60


@pytest.mark.parametrize("reducers", SESSIONS.values(), ids=SESSIONS)
def test_an_interrupt_while_detaching_is_made_good_by_detaching_again(reducers):
    model, *_ = tiny_vlm("llava")
    clean, interrupted = fingerprint(model), 0
    for line in sampled_lines(lambda: compress.attach(model, reducers(), keep=0.5).detach(), 10**4)[::3]:
        session = compress.attach(model, reducers(), keep=0.5)
        try:
            with InterruptAt(line):
                session.detach()
        except KeyboardInterrupt:
            interrupted += 1
            session.detach()
            assert fingerprint(model) == clean, f"line {line} of detaching left something behind"
        else:
            break
    assert fingerprint(model) == clean
    assert interrupted > 10


def test_a_signal_while_attaching_leaves_nothing(request):
    model, *_ = tiny_vlm("llava")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    clean, interrupted = fingerprint(model), 0
    random = torch.Generator().manual_seed(0)
    for _ in range(60):
        delay = float(torch.rand(1, generator=random)) * 0.004
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        session = None
        try:
            timer.start()
            session = compress.attach(model, SESSIONS["layers"](), keep=0.5)
            timer.join()  # on a busy machine the signal comes late
            time.sleep(0.02)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            timer.join()
            if session is not None:
                session.detach()
        assert fingerprint(model) == clean
    assert interrupted > 10


def test_a_session_that_has_ended_cannot_be_entered():
    model, *_ = tiny_vlm("llava")
    session = compress.attach(model, DivPrune(), keep=0.5)
    session.detach()
    with pytest.raises(RuntimeError, match="has been detached"), session:
        pass


@torch.no_grad()
@pytest.mark.parametrize("reducer", [DivPrune(), FastV(k=1), KeyNorm()], ids=str)
def test_a_shortened_cache_is_of_no_use_after_its_session(reducer):
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(images=(1,))
    with compress.attach(model, reducer, keep=0.5):
        cache = the_cache(model(**inputs))
        model(input_ids=inputs["input_ids"][:, :1], **going_on(model, cache))
    with pytest.raises(RuntimeError, match="shortened by a reducer that has been detached"):
        model(input_ids=inputs["input_ids"][:, :1], **going_on(model, cache))


@pytest.mark.parametrize("name", ["llava", "llava_next"])
@pytest.mark.parametrize("reducers", SESSIONS.values(), ids=SESSIONS)
def test_a_thread_that_generates_goes_on_as_it_began(name, reducers):
    """Whenever a session comes, a call that has begun ends as it would have without it."""
    model, _, inputs = tiny_vlm(name)
    inputs = inputs(images=(1,))
    settings = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        expected = model.generate(**inputs, **settings)
    modules = [model.model, model.model.vision_tower, *model.model.language_model.layers]
    modules += list(model.model.vision_tower.encoder.layers)
    for module in modules:
        reached, go_on, results = threading.Event(), threading.Event(), []

        def pause(*_, reached=reached, go_on=go_on):
            if not reached.is_set():
                reached.set()
                assert go_on.wait(20)

        def generate(results=results):
            try:
                with torch.no_grad():
                    results.append(model.generate(**inputs, **settings))
            except BaseException as error:
                results.append(error)

        handle = module.register_forward_pre_hook(pause)
        thread = threading.Thread(target=generate)
        thread.start()
        assert reached.wait(20)
        session = compress.attach(model, reducers(), keep=0.5)
        go_on.set()
        thread.join(30)
        handle.remove()
        assert isinstance(results[0], torch.Tensor), results[0]
        assert torch.equal(results[0], expected)
        with torch.no_grad():  # and the next call is reduced
            model.generate(**inputs, **settings)
        assert session.report().images
        session.detach()


@torch.no_grad()
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["prompt", "decode step"])
@pytest.mark.parametrize("reducers", [*SESSIONS.values(), lambda: [KeyNorm()]], ids=[*SESSIONS, "cache"])
def test_a_generation_that_was_broken_off_leaves_no_trace_in_the_next(reducers, where, error):
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(images=(1,))
    text = {name: value[:, -5:] for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "do_sample": False}
    stock = model(**text).logits
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100

    def fail(module, args, kwargs):
        if failing and (where == "prompt") == (args[0].shape[1] > 1):
            raise error("broken off")

    with compress.attach(model, reducers(), keep=0.5):
        expected = model.generate(**inputs, **settings)
        handle = model.model.language_model.layers[2].register_forward_pre_hook(fail, with_kwargs=True)
        failing = True
        with pytest.raises(error):
            model.generate(**inputs, **settings)
        if where == "prompt":
            with pytest.raises(error):
                model(**inputs, labels=labels)
        failing = False
        assert torch.equal(model(**text).logits, stock)
        assert torch.equal(model.generate(**inputs, **settings), expected)
        handle.remove()
