"""Find and read weights: hub, folder or file; safetensors or weights-only pickle; strict about every key."""

import argparse
import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import atomic_write

CONFIG_NAME = "config.json"
WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Located:
    """A weights file on this machine and the config.json that came with it, if any."""

    weights: Path
    config: dict[str, Any] | None


def locate(source: str | Path) -> Located:
    """A local folder (config.json + weights) or weights file. Raises FileNotFoundError saying what is
    missing."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = [path / name for name in WEIGHTS_NAMES if (path / name).is_file()]
        found += sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p not in found)
        if not found:
            raise FileNotFoundError(
                f"{path} holds no weights; expected {' or '.join(WEIGHTS_NAMES)}, or one file ending in "
                f"{', '.join(SUFFIXES)}"
            )
        if len(found) > 1 and found[0].name not in WEIGHTS_NAMES:
            raise ValueError(
                f"{path} holds several weights files ({', '.join(p.name for p in found)}); name one"
            )
        return Located(found[0], read_config(path / CONFIG_NAME) if (path / CONFIG_NAME).is_file() else None)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file or folder {path}; give a weights file ({', '.join(SUFFIXES)}) or its folder"
        )
    beside = path.parent / CONFIG_NAME
    # A config.json belongs to the conventional file names beside it, not to any file that shares the folder.
    return Located(path, read_config(beside) if path.name in WEIGHTS_NAMES and beside.is_file() else None)


def fetch(
    repo: str,
    file: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Located:
    """Weights and config.json of a hub repository, from the local cache when they are there.

    Raises FileNotFoundError naming the repository, the file and the option that takes a local path when the
    hub cannot be reached and nothing is cached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def get(name: str) -> Path:
        # Once the hub could not be reached only the cache is asked: the client retries for long, every file.
        offline = local_files_only or isinstance(problem, LocalEntryNotFoundError)
        found = hf_hub_download(repo, name, revision=revision, cache_dir=cache_dir, local_files_only=offline)
        return Path(found)

    names = [file] if file else list(WEIGHTS_NAMES)
    weights = problem = None
    for name in names:
        try:
            weights = get(name)
            break
        # The client raises many kinds of error for "no network", "no such repository" and "gated".
        except Exception as error:
            problem = problem or error
            if not isinstance(error, EntryNotFoundError):  # another file name will not help
                break
    if weights is None:
        raise FileNotFoundError(
            f"could not get {' or '.join(names)} of the hub repository {repo!r}: it is not in the local "
            f"cache and the hub did not give it ({type(problem).__name__}). Download it on a machine with "
            f"internet and pass its path: load(..., weights='path/to/{names[0]}')"
        ) from problem
    try:
        config = get(CONFIG_NAME)
    except EntryNotFoundError:  # raw weight repositories have none; the keys then tell the architecture
        return Located(weights, None)
    return Located(weights, read_config(config))


def read_config(path: Path) -> dict[str, Any]:
    """A config.json as a dictionary; ValueError if it is not one."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; a configuration is a JSON object")
    return config


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by key, on the CPU.

    Safetensors, or a pickle restricted to tensors and plain containers (never arbitrary objects). Wrappers
    such as {"state_dict": …}, {"model": …} or {"model_state_dict": …} are opened, an average of weights
    ({"ema": …}) before the weights themselves. Raises ValueError for truncated, corrupt or unsafe files.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} does not end in {', '.join(SUFFIXES)}; give a weights file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file ({error}); "
                "fetch it again"
            ) from error
    try:
        # Training scripts pickle their parsed arguments beside the weights: a Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated zip, foreign pickle, forbidden global: torch raises many kinds
        raise ValueError(
            f"{path} cannot be read as plain tensors ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}). It is truncated, or a pickle with more than weights in "
            "it, which is refused because unpickling runs code; convert it to safetensors where you trust it."
        ) from error
    for wrapper in ("state_dict", "model_state_dict", "ema", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    plain = isinstance(state, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    )
    if not plain:
        raise ValueError(
            f"{path} holds no state dict (a mapping of names to tensors); found {type(state).__name__}"
        )
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = torch.float32,
    ignore: Iterable[str] = (),
    source: str | Path = "the checkpoint",
) -> None:
    """Put `state` into `module`, floating tensors cast to `dtype`; a ValueError lists every key that misfits.

    Keys matching a pattern of `ignore` (training statistics) may be in only one of the two.
    """
    patterns, wanted = tuple(ignore), module.state_dict()

    def counts(key: str) -> bool:
        return not any(fnmatch.fnmatch(key, pattern) for pattern in patterns)

    problems = [f"missing    {k} {list(v.shape)}" for k, v in wanted.items() if k not in state and counts(k)]
    problems += [f"unexpected {k} {list(v.shape)}" for k, v in state.items() if k not in wanted and counts(k)]
    problems += [
        f"misshapen  {k}: checkpoint {list(state[k].shape)}, model {list(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit this {type(module).__name__} ({len(problems)} keys). Check that the name "
            "or config is that of these weights.\n  " + "\n  ".join(problems)
        )
    cast = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in state.items() if k in wanted}
    module.load_state_dict(cast, strict=False, assign=True)


def save(folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors into `folder`, each aside first and then renamed."""
    from safetensors.torch import save_file

    folder, text = Path(folder), json.dumps(config, indent=2) + "\n"
    with atomic_write(folder / WEIGHTS_NAMES[0]) as path:
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in state.items()}, path, metadata={"format": "pt"}
        )
    with atomic_write(folder / CONFIG_NAME) as path:
        path.write_text(text, encoding="utf-8")
