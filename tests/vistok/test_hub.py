"""Downloads, against a small server that answers as the hub does."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from checkpoints import MINI, sharded

from vistok import create, load

pytestmark = pytest.mark.slow

COMMIT = "0" * 40
EACH = """
import sys, vistok, vistok.eval.data.sources
for source in sys.argv[1].split():
    try: {call}(source)
    except Exception as error: print(type(error).__name__, error, file=sys.stderr)
"""
SCRIPT = """
import sys, torch, vistok
model = vistok.load(sys.argv[1])
torch.save(model.state_dict(), sys.argv[2])
"""


@pytest.fixture(scope="module")
def mini():
    torch.manual_seed(0)
    return create("mini", **MINI).eval()


@pytest.fixture
def hub():
    """Repository → folder of its files, served; `hub.asked` lists the paths that were asked for."""
    asked, repositories = [], {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            asked.append(self.path)
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                repo = "/".join(parts[2:4])
                known = repo in repositories
                body = json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode()
                error = {} if known else {"X_Error_Code": "RepoNotFound"}
                return self.answer(200 if known else 404, body, Content_Type="application/json", **error)
            file = repositories.get("/".join(parts[:2]), Path("nowhere")) / parts[-1]
            if not file.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            body = file.read_bytes()
            return self.answer(200, body, ETag=f'"{hash(body) & 0xFFFFFFFF:x}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.asked, server.repositories = asked, repositories
    yield server
    server.shutdown()


def run(hub, source, folder, script=SCRIPT):
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", script, source, str(folder / "state.pt")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode == 0 and script is SCRIPT:
        return torch.load(folder / "state.pt"), done.stderr
    return None, done.stderr


def equal(state, model):
    return all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_repository_is_announced_once_downloaded_and_then_read_from_the_cache(hub, mini, tmp_path):
    mini.save_pretrained(tmp_path / "repo")
    hub.repositories["someone/mini"] = tmp_path / "repo"
    state, err = run(hub, "hf://someone/mini", tmp_path)
    assert equal(state, mini) and err.count("downloading from the Hugging Face hub") == 1
    hub.asked.clear()
    state, err = run(hub, "hf://someone/mini", tmp_path)
    assert equal(state, mini) and "downloading" not in err and not hub.asked


def test_shards_are_downloaded_by_their_index(hub, mini, tmp_path):
    hub.repositories["someone/large"] = sharded(mini.state_dict(), tmp_path / "repo").parent
    state, err = run(hub, "hf://someone/large", tmp_path)
    assert state is not None and equal(state, mini), err


def test_nothing_is_asked_for_a_name_without_the_prefix(hub, mini, tmp_path):
    mini.save_pretrained(tmp_path / "repo")
    names = ("someone/mini", "runs/mini", "data/val")
    for name in names:
        hub.repositories[name] = tmp_path / "repo"
    _, err = run(hub, " ".join(names), tmp_path, EACH.format(call="vistok.load"))
    assert err.count("FileNotFoundError") == len(names) == len(err.splitlines())
    assert not hub.asked


OPEN = EACH.format(call="vistok.eval.data.sources.open_dataset")


def test_a_mistyped_path_of_pictures_is_not_asked_of_the_hub(hub, tmp_path):
    (tmp_path / "flowers").mkdir()
    names = ("data/val", "flowers/vall", "./a/b", "a/b.tar.gz", "a/b.jpeg")
    _, err = run(hub, " ".join(names), tmp_path, OPEN)
    assert not hub.asked
    for name, line in zip(names, err.splitlines(), strict=True):
        assert f"FileNotFoundError there is no file or folder {name}" in line
    _, err = run(hub, "hf://data/val hf://a/b/c", tmp_path, OPEN)
    assert "ValueError hf://a/b/c is not a hub dataset; give hf://owner/name" in err
    assert "/api/datasets/data/val" in hub.asked


def test_a_repository_that_does_not_exist_is_named(hub, tmp_path):
    state, err = run(hub, "hf://nobody/nothing", tmp_path)
    assert state is None and "'nobody/nothing'" in err and "RepositoryNotFoundError" in err


def test_nothing_is_asked_where_the_network_is_off(mini, offline):
    with pytest.raises(FileNotFoundError, match="'someone/mini'"):
        load("hf://someone/mini")
