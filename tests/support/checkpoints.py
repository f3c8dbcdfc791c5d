"""Checkpoints of a tiny tokenizer: as files, in shards and in the hub client's cache."""

import json

import torch
from safetensors.torch import save_file

MINI = {
    "image_size": 32,
    "patch_size": 8,
    "thumbnail_size": 16,
    "levels": [[3, [4, 4]], [3, [2, 2, 2, 2]]],
    "width": 32,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "heads": 2,
}
CONFIG = {"family": "mini", "config": MINI}


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def cached(cache, repo, files):
    """The hub client's cache as it would be after downloading `files` (name → bytes) of a repository."""
    commit = "0" * 40
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    for name, content in files.items():
        (folder / "snapshots" / commit / name).write_bytes(content)
    return {"cache_dir": cache, "local_files_only": True}


def sharded(state, folder, suffix="safetensors", prefix=""):
    folder.mkdir(exist_ok=True)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    keys, weight_map = list(state), {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"{stem}-0000{number}-of-00002.{suffix}"
        shard = {prefix + key: state[key] for key in part}
        save_file(shard, folder / name) if suffix == "safetensors" else torch.save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder / f"{stem}.{suffix}.index.json"
