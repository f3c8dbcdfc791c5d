"""What stops or damages a training run: kills, full disks, other runs; each is one sentence and a way on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from vistok.train import recipe
from vistok.train.loop import train

pytestmark = pytest.mark.slow

CONFIG = {
    "tokenizer": {
        "name": "mini",
        "image_size": 32,
        "patch_size": 8,
        "thumbnail_size": 8,
        "levels": [[2, [8, 8]], [2, [4, 4, 4]]],
        "width": 32,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "heads": 2,
    },
    "data": {"sources": [{"kind": "scenes"}]},
    "steps": 4,
    "batch_size": 2,
    "precision": "no",
    "optimizer": {"learning_rate": 1e-3, "warmup": 0},
    "workers": 0,
    "log_every": 1,
    "validate_every": 100,
    "checkpoint_every": 2,
}
STARTED = []
LIMITED = """
import resource, sys
from vistok.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with checkpoints at two and four."""
    output = tmp_path_factory.mktemp("finished") / "run"
    run(output)
    return output


@pytest.fixture
def output(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def config_file(folder, **changes):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def run(output, **changes):
    output.parent.mkdir(exist_ok=True)
    return train(recipe.read(config_file(output.parent, **changes)), output, progress=False)


def rows(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def state(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(autouse=True)
def none_left():
    """End what a failed test leaves running."""
    yield
    for process in STARTED:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    STARTED.clear()


def command(folder, *arguments, limit=None, **changes):
    """`vistok train` in a group of processes of its own."""
    program = ["-c", LIMITED, str(limit)] if limit else ["-m", "vistok.cli"]
    process = subprocess.Popen(
        [sys.executable, *program, "train", str(config_file(folder, **changes)), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    STARTED.append(process)
    return process


def processes_of(group):
    """The processes that are left of a group."""
    listed = subprocess.run(["ps", "-eo", "pgid=,pid=,stat="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [pid for pgid, pid, status in rows if int(pgid) == group and not status.startswith("Z")]


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


# ---- damaged files -----------------------------------------------------------------------------------------


def _zeros(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)


def _change(path, change):
    content = state(path)
    change(content)
    torch.save(content, path)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros in the middle": _zeros,
    "text": lambda path: path.write_text("hello"),
    "a list": lambda path: torch.save([1, 2], path),
    "without optimizer": lambda path: _change(path, lambda content: content.pop("optimizer")),
    "another shape": lambda path: _change(
        path, lambda content: content["ema"].update({next(iter(content["ema"])): torch.zeros(3)})
    ),
    "another moment": lambda path: _change(
        path, lambda content: content["optimizer"][0]["state"][0].update(exp_avg=torch.zeros(3))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(output, finished, damage):
    assert state(output / "checkpoint-previous.pt")["step"] == 2
    DAMAGES[damage](output / "checkpoint.pt")
    with pytest.warns(UserWarning, match=r"checkpoint.pt .*going on from .*checkpoint-previous.pt, step 2"):
        run(output)
    assert rows(output) == rows(finished)
    both = [state(folder / "checkpoint.pt")["ema"] for folder in (output, finished)]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_a_run_killed_while_it_keeps_the_earlier_checkpoint_leaves_no_file_of_it(output, finished):
    """Then both names are of one file, and renaming one to the other would leave both."""
    os.replace(output / "checkpoint-previous.pt", output / "checkpoint.pt")
    os.link(output / "checkpoint.pt", output / "checkpoint-previous.pt")
    run(output)
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in finished.iterdir())
    assert state(output / "checkpoint-previous.pt")["step"] == 2 and rows(output) == rows(finished)


def test_without_a_whole_checkpoint_one_sentence_has_a_way_on(output):
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        DAMAGES["cut"](output / name)
    with pytest.raises(ValueError, match=r"no checkpoint .* can be used: .*Delete the checkpoints") as error:
        run(output)
    assert "\n" not in str(error.value)
    for path in output.glob("*.pt"):
        path.unlink()
    assert run(output).is_dir()


@pytest.mark.parametrize(
    "damage",
    [
        lambda log: log + b'{"step": 9, "lo',
        lambda log: log[:-1],
        lambda log: log.replace(b"\n", b"\n\n"),
    ],
)
def test_a_log_that_a_kill_cut_is_mended_silently(output, finished, damage, recwarn):
    log = output / "log.jsonl"
    log.write_bytes(damage(log.read_bytes()))
    run(output)
    assert rows(output) == rows(finished)
    assert not [warning for warning in recwarn if "damaged" in str(warning.message)]


@pytest.mark.parametrize("line", [b"\0" * 40, b"[1]", b'{"step": "two"}', b"\xff\xfe", b'{"loss": 1}'])
def test_a_damaged_log_is_kept_aside_and_the_run_goes_on(output, finished, line):
    log = output / "log.jsonl"
    first, rest = log.read_bytes().split(b"\n", 1)
    log.write_bytes(first + b"\n" + line + b"\n" + rest)
    damaged = log.read_bytes()
    with pytest.warns(UserWarning, match=r"1 damaged line.*log-damaged.jsonl"):
        run(output)
    assert rows(output) == rows(finished)
    assert (output / "log-damaged.jsonl").read_bytes() == damaged


# ---- whose folder it is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log.jsonl", "model/model.safetensors", "samples/mine.png"])
def test_what_another_program_wrote_is_not_written_over(tmp_path, name):
    precious = tmp_path / "run" / name
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(ValueError, match=r"holds (log.jsonl|model|samples) and no checkpoint"):
        run(tmp_path / "run")
    assert precious.read_text() == "mine"


def test_a_run_killed_before_its_first_checkpoint_begins_again(output):
    for path in output.glob("*.pt"):
        path.unlink()
    assert run(output).is_dir()


def test_another_configuration_is_refused_by_the_keys_that_differ(output):
    other = {"learning_rate": 2e-3, "warmup": 0}
    with pytest.raises(
        ValueError, match=r"another run \(its configuration differs in optimizer.learning_rate"
    ):
        run(output, optimizer=other)
    (output / "run.json").unlink()  # checkpoints hold it too
    with pytest.raises(ValueError, match=r"differs in optimizer.learning_rate\)"):
        run(output, optimizer=other)


def test_a_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(OSError, match="is a file, and a folder is needed"):
        run(tmp_path / "run")


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_dead(tmp_path):
    output = tmp_path / "run"
    first = command(tmp_path, "-o", str(output), steps=100_000)
    wait_for((output / "log.jsonl").exists)
    settings = recipe.read(config_file(tmp_path, steps=100_000))
    with pytest.raises(OSError, match=f"{output} is in use by process {first.pid} on "):
        train(settings, output, steps=2, progress=False)
    first.kill()
    first.communicate()
    assert train(settings, output, steps=2, progress=False).is_dir()


# ---- kills and full disks ----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux lists them")
@pytest.mark.parametrize("sources", [{"kind": "scenes"}, {"kind": "photos"}])
def test_workers_die_with_their_killed_parent(tmp_path, sources):
    output = tmp_path / "run"
    data = {"sources": [sources]}
    running = command(tmp_path, "-o", str(output), steps=100_000, workers=2, data=data)
    wait_for((output / "log.jsonl").exists)
    assert len(processes_of(running.pid)) >= 3
    running.kill()
    running.communicate()
    wait_for(lambda: not processes_of(running.pid), seconds=10)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux lists them")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["at the start", "while training"])
def test_interrupts_leave_no_traceback_worker_or_temporary_file(tmp_path, number, when):
    output = tmp_path / "run"
    running = command(tmp_path, "-o", str(output), steps=100_000, workers=2, checkpoint_every=2)
    wait_for((output / ("run.json" if when == "at the start" else "checkpoint.pt")).exists)
    os.killpg(running.pid, number)
    _, errors = running.communicate(timeout=30)
    assert running.returncode not in (0, None) and "Traceback" not in errors
    wait_for(lambda: not processes_of(running.pid), seconds=10)
    assert not list(output.glob(".vistok-*"))


def test_a_killed_worker_is_one_sentence(tmp_path):
    output = tmp_path / "run"
    running = command(tmp_path, "-o", str(output), steps=100_000, workers=1)
    wait_for((output / "checkpoint.pt").exists)
    (worker,) = [int(pid) for pid in processes_of(running.pid) if int(pid) != running.pid]
    os.kill(worker, signal.SIGKILL)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 1 and "Traceback" not in errors
    assert "ended before its work was done" in errors and "start again to continue" in errors


def test_pictures_that_none_can_be_read_are_one_sentence(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no picture")
    data = {"sources": [{"kind": "folder", "path": str(tmp_path / "photos")}]}
    running = command(tmp_path, "-o", str(tmp_path / "run"), workers=1, data=data)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 1 and "Traceback" not in errors
    assert "vistok: none of the 1 pictures can be read" in errors


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint(output):
    before = (output / "checkpoint.pt").read_bytes()
    limit = len(before) // 2
    running = command(output.parent, "-o", str(output), "--steps", "6", limit=limit, checkpoint_every=1)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 1 and "Traceback" not in errors
    assert "no room to write" in errors and "free some space" in errors
    assert (output / "checkpoint.pt").read_bytes() == before
    assert not list(output.glob(".vistok-*"))
