"""Files are whole or not there, and only ordinary files are written over."""

import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from vistok import Tokens, load
from vistok.eval.data.sources import open_dataset
from vistok.files import atomic_write, check_target
from vistok.images import load_image
from vistok.train.recipe import read as read_training_file


def write(path, text="new"):
    with atomic_write(path) as aside:
        aside.write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkdir, "a folder"),
        (os.mkfifo, "a named pipe"),
        (lambda path: os.symlink("/nowhere", path), "a symbolic link"),
        (lambda path: os.symlink(os.path.abspath(__file__), path), "a symbolic link"),
        (lambda path: socket.socket(socket.AF_UNIX).bind(os.fspath(path)), "a socket"),
    ],
)
def test_what_is_not_an_ordinary_file_is_refused_by_name_and_stays(tmp_path, monkeypatch, make, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    make("target")
    before = os.lstat("target")
    for attempt in (check_target, write):
        with pytest.raises(OSError, match=rf"^target is {kind}, .*; name "):
            attempt("target")
    assert (os.lstat("target").st_ino, os.lstat("target").st_mode) == (before.st_ino, before.st_mode)
    assert names(tmp_path) == ["target"]


def test_a_device_is_refused():
    with pytest.raises(OSError, match=r"/dev/null is a device"):
        write("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_read_only_file_is_refused_and_stays(tmp_path):
    (tmp_path / "kept.txt").write_text("old")
    (tmp_path / "kept.txt").chmod(0o444)
    with pytest.raises(PermissionError, match=r"kept.txt is read-only; name another file"):
        write(tmp_path / "kept.txt")
    assert (tmp_path / "kept.txt").read_text() == "old"


def test_files_and_folders_are_not_taken_for_each_other(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(NotADirectoryError, match=r"file is a file, and a folder is needed"):
        check_target(tmp_path / "file", folder=True)
    for deeper in ("file/new.png", "file/sub/new.png"):
        with pytest.raises(NotADirectoryError, match=r"file is not a folder"):
            write(tmp_path / deeper)
    assert check_target(tmp_path / "new" / "deep", folder=True) == tmp_path / "new" / "deep"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "a\nb", "[red]"])
def test_names_of_any_length_and_letters_are_written(tmp_path, name):
    write(tmp_path / name)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", ["n" * 256, "a\0b"])
def test_names_that_cannot_be_are_refused_in_one_sentence(tmp_path, name):
    with pytest.raises(OSError, match="; name another"):
        check_target(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux only")
def test_an_error_of_the_folder_names_the_target_and_no_temporary_file():
    with pytest.raises(OSError, match=r"^/proc/a\.json cannot be written|folder /proc is not writable"):
        write(Path("/proc/a.json"))


def test_a_git_lfs_pointer_is_named_whatever_was_expected_in_its_place(tmp_path):
    for read in (load, Tokens.load, load_image, read_training_file, open_dataset):
        names = {load: "a.pt", Tokens.load: "a.vtok", load_image: "a.png", open_dataset: "a.tar"}
        path = tmp_path / names.get(read, "a.yaml")
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
        with pytest.raises(
            ValueError, match=rf"{path.name} is .*a git-lfs pointer in place of .*git lfs pull"
        ):
            read(path)


@contextmanager
def full_disk():
    """No file may grow beyond 4096 bytes in here, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "save",
    [
        lambda path: path.write_bytes(bytes(10_000)),
        lambda path: torch.save(torch.zeros(10_000), path),
        lambda path: __import__("safetensors.torch").torch.save_file({"a": torch.zeros(10_000)}, path),
    ],
    ids=["write", "torch.save", "safetensors"],
)
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, save):
    write(tmp_path / "file", "old")
    with (
        full_disk(),
        pytest.raises(OSError, match=r"^no room to write .*file \(disk full") as caught,
        atomic_write(tmp_path / "file") as aside,
    ):
        save(aside)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == ["file"]


WRITER = """
import sys, time
from vistok.files import atomic_write
with atomic_write(sys.argv[1]) as path:
    path.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_files_of_killed_processes_are_removed_and_those_of_live_ones_stay(tmp_path):
    writers = []
    for _ in range(2):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "target")]
        writers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert writers[-1].stdout.readline() == "writing\n"
    killed, alive = writers
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tmp_path / ".someone-elses.tmp").write_text("")
    (tmp_path / ".vistok-0123456789ab-1-0a1b2c3d.tmp").write_text("of another machine")
    write(tmp_path / "mine")
    left = names(tmp_path)
    assert {".someone-elses.tmp", ".vistok-0123456789ab-1-0a1b2c3d.tmp", "mine"} < set(left)
    assert sum(f"-{killed.pid}-" in name for name in left) == 0
    assert sum(f"-{alive.pid}-" in name for name in left) == 1
    alive.kill()
    alive.wait()


def test_an_interrupt_leaves_no_temporary_file(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "target")]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert writer.stdout.readline() == "writing\n"
    time.sleep(0.1)
    writer.send_signal(signal.SIGINT)
    writer.wait()
    assert names(tmp_path) == []
