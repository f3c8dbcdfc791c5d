"""What a killed evaluation continues with: only what has not changed, and only its own folder."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from evaluated import save, scenes
from torch import nn

from vistok.eval.data.inventory import Inventory
from vistok.eval.engine.instruments import fingerprint
from vistok.eval.options import CurvesConfig, FidConfig, ReconConfig
from vistok.eval.tasks import fid, rate_distortion, reconstruction
from vistok.lock import FolderLock

pytestmark = pytest.mark.slow

pytest_plugins = ["quick_inception"]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return save(scenes(6, 64), tmp_path / "images")


def recon(folder, out):
    config = ReconConfig("vistok-mini", (str(folder),), metrics=("psnr",), batch_size=2, workers=0)
    return reconstruction.run(dataclass_with(config, checkpoint_every=1), out, CPU)


def dataclass_with(config, **changes):
    return type(config)(**{**config.__dict__, **changes})


def curves(folder, out):
    config = CurvesConfig(("vistok-mini",), (str(folder),), metrics=("psnr",), lengths=(1, 4))
    config = dataclass_with(config, baselines=("JPEG",), batch_size=2, workers=0, checkpoint_every=1)
    return rate_distortion.run(config, out, CPU)


def distance(folder, out):
    config = FidConfig(str(folder), str(folder), metrics=("fid",), batch_size=2, workers=0)
    return fid.run(dataclass_with(config, checkpoint_every=1), out, CPU)


RUNS = {
    "recon": (recon, reconstruction._Reconstruction, "state"),
    "tokens": (curves, rate_distortion._Curves, "state"),
    "fid": (distance, fid._Side, "state-a"),
}


@pytest.fixture(params=RUNS)
def killed(request, folder, tmp_path, quick_inception, monkeypatch):
    """A command, its arguments, and the folder of its state after two of three batches."""
    run, kind, state = RUNS[request.param]
    measure, done = kind._measure, []

    def measure_or_end(self, batch):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(measure(self, batch))

    with monkeypatch.context() as patched:
        patched.setattr(kind, "_measure", measure_or_end)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "out")
    return run, (folder, tmp_path / "out"), tmp_path / "out" / state


# ---- files that have changed -------------------------------------------------------------------------------


def test_a_changed_image_is_named_and_its_features_are_not_used(killed):
    run, (folder, out), state = killed
    changed = folder / "01.png"
    shutil.copy(folder / "05.png", changed)
    with pytest.raises(ValueError, match=r"images that have changed since then \(1 changed \(01.png\)\)"):
        run(folder, out)
    assert (state / "settings.json").is_file()  # what is refused is left alone


def test_new_and_absent_images_are_counted(killed):
    run, (folder, out), _ = killed
    for number in range(4):
        shutil.copy(folder / "05.png", folder / f"new-{number}.png")
    (folder / "00.png").unlink()
    message = r"4 new \(new-0.png, new-1.png, new-2.png, …\), 1 gone \(00.png\).*delete that folder .* --out"
    with pytest.raises(ValueError, match=message):
        run(folder, out)


def test_a_file_of_equal_size_written_later_is_another_file(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"one")
    before = Inventory.take(["a.png"], str(tmp_path))
    file.write_bytes(b"two")
    os.utime(file, ns=(0, before.files["a.png"][1] + 1))
    now = Inventory.take(["a.png"], str(tmp_path))
    assert now.digest != before.digest and now.changes(before) == "1 changed (a.png)"
    before.save(tmp_path / "files.jsonl")
    assert Inventory.load(tmp_path / "files.jsonl") == before


def test_names_that_are_not_text_are_kept_in_an_inventory(tmp_path):
    name = os.fsdecode(b"\xff\n.png")
    Path(tmp_path, name).write_bytes(b"x")
    inventory = Inventory.take([name, "gone.png"], str(tmp_path))
    inventory.save(tmp_path / "files.jsonl")
    assert Inventory.load(tmp_path / "files.jsonl") == inventory and inventory.files["gone.png"] is None


def test_every_single_weight_counts():
    layer = nn.Linear(100, 100)
    before = fingerprint(layer)
    with torch.no_grad():
        layer.weight[37, 41] += 1e-3
    assert fingerprint(layer) != before
    assert fingerprint(layer.bfloat16()) != fingerprint(layer.half())


def test_other_statistics_do_not_continue_a_run(folder, tmp_path, quick_inception, monkeypatch):
    config = FidConfig(str(folder), str(folder), metrics=("fid",), save_statistics=True, workers=0)
    fid.run(config, tmp_path / "whole", CPU)
    reference = tmp_path / "reference.npz"
    shutil.copy(tmp_path / "whole" / "statistics-b.npz", reference)
    against = dataclass_with(config, real=str(reference), save_statistics=False)
    fid.run(against, tmp_path / "out", CPU)
    few = dataclass_with(config, limit=3)
    fid.run(few, tmp_path / "few", CPU)
    shutil.copy(tmp_path / "few" / "statistics-b.npz", reference)
    with pytest.raises(ValueError, match=r"other settings .*statistics was"):
        fid.run(against, tmp_path / "out", CPU)


# ---- damaged states ----------------------------------------------------------------------------------------


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _overwrite(path):
    content = bytearray(path.read_bytes())
    middle = content.index(b"sums") if b"sums" in content else len(content) // 2
    content[middle : middle + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)


DAMAGES = {
    "settings cut": lambda state: _cut(state / "settings.json"),
    "settings empty": lambda state: (state / "settings.json").write_bytes(b""),
    "settings of another kind": lambda state: (state / "settings.json").write_text("[]"),
    "settings gone": lambda state: (state / "settings.json").unlink(),
    "sums cut": lambda state: _cut(state / "process-0.pt"),
    "sums empty": lambda state: (state / "process-0.pt").write_bytes(b""),
    "sums overwritten": lambda state: _overwrite(state / "process-0.pt"),
    "sums of another kind": lambda state: torch.save([1], state / "process-0.pt"),
    "other sums": lambda state: torch.save(
        {"done": 1, "bad": [], "seconds": {}, "sums": {"x": {}}}, state / "process-0.pt"
    ),
    "table cut": lambda state: _cut(state / "digests.npy"),
    "table empty": lambda state: (state / "digests.npy").write_bytes(b""),
    "table gone": lambda state: (state / "digests.npy").unlink(),
}


@pytest.mark.parametrize("killed", ["recon"], indirect=True)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_one_sentence_and_a_way_on(killed, damage):
    run, arguments, state = killed
    DAMAGES[damage](state)
    with pytest.raises(ValueError, match=r"damaged state \(.*delete that folder to start again") as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    shutil.rmtree(state)
    assert run(*arguments).record.n == 6


# ---- whose folder it is ------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_not_deleted(folder, tmp_path):
    precious = tmp_path / "out" / "state" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(ValueError, match=r"it holds thesis.txt, which is not part of one"):
        recon(folder, tmp_path / "out")
    assert precious.read_text() == "mine"


def test_what_others_put_into_the_folder_meanwhile_stays(folder, tmp_path):
    result = recon(folder, tmp_path / "out")
    (tmp_path / "out" / "state" / "notes.txt").write_text("mine")
    result.state.remove()
    assert [path.name for path in (tmp_path / "out" / "state").iterdir()] == ["notes.txt"]


HOLD = """
import sys, time
from pathlib import Path
from vistok.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the state's folder."""
    state = tmp_path / "out" / "state"
    state.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(state)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_the_folder_is_refused_until_the_first_has_died(folder, tmp_path, holder):
    with pytest.raises(OSError, match=rf"state is in use by process {holder.pid} on .*another folder"):
        recon(folder, tmp_path / "out")
    holder.kill()
    holder.wait()
    assert recon(folder, tmp_path / "out").record.n == 6


def test_without_locks_a_dead_owner_is_taken_over_and_a_living_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("vistok.lock.fcntl", None)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock, host = FolderLock(tmp_path), os.uname().nodename
    for owner in (f"process {os.getppid()} on {host}", f"process {dead.pid} on elsewhere", "?"):
        lock.path.write_text(owner)
        with pytest.raises(OSError, match=r"in use by .*delete"):
            lock.acquire()
    lock.path.write_text(f"process {dead.pid} on {host}")
    lock.acquire()
    assert lock.path.read_text() == f"process {os.getpid()} on {host}"
    lock.release()
    assert not lock.path.exists()


def test_settings_hold_the_digest_of_files(folder, tmp_path):
    recon(folder, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "state" / "settings.json").read_text())
    time.sleep(0.01)
    (folder / "00.png").touch()
    assert settings["files"] != Inventory.take(sorted(os.listdir(folder)), str(folder)).digest


# ---- as a command ------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from vistok.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main()
"""


def command(limit, *arguments):
    """`vistok eval` that can write files of so many bytes only."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), "eval", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_afterwards(folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["recon", "--tokenizer", "vistok-mini", "--data", str(folder), "--metrics", "psnr"]
    arguments += ["--out", str(out), "--workers", "0", "--no-html", "--checkpoint-every", "1"]
    full = command(500, *arguments)
    assert full.returncode == 1 and "Traceback" not in full.stderr
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("vistok: ")]
    assert "no room to write" in line and "free some space" in line
    assert not list(out.rglob(".vistok-*"))
    assert command(1 << 30, *arguments).returncode == 0 and (out / "reconstruction.json").is_file()


@pytest.mark.slow  # torch looks for ended workers every five seconds
def test_workers_that_cannot_hand_a_batch_over_are_one_sentence(folder, tmp_path):
    """Shared memory is full too: torch would print a traceback and wait for the batch for ever."""
    arguments = ["recon", "--tokenizer", "vistok-mini", "--data", str(folder), "--metrics", "psnr"]
    full = command(8192, *arguments, "--out", str(tmp_path / "out"), "--workers", "1", "--no-html")
    assert full.returncode == 1 and "Traceback" not in full.stderr
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("vistok: ")]
    assert "a process that reads pictures ended" in line and "/dev/shm" in line


@pytest.mark.parametrize(
    ("command_name", "name"),
    [("recon", "reconstruction.json"), ("tokens", "rate_distortion.png"), ("fid", "fid.json"), ("speed", "")],
)
def test_what_cannot_be_written_is_refused_before_the_work(folder, tmp_path, command_name, name):
    target = tmp_path / "out" / name
    if name:
        target.mkdir(parents=True)
    else:
        target.write_text("mine")
    given = {
        "recon": ["--tokenizer", "vistok-mini", "--data", str(folder)],
        "tokens": [str(folder)],
        "fid": [str(folder), str(folder)],
        "speed": ["--tokenizer", "vistok-mini"],
    }[command_name]
    done = command(1 << 30, command_name, *given, "--out", str(tmp_path / "out"))
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert str(target) in done.stderr and "folder" in done.stderr
