"""Find and read weights: hub, folder or file; safetensors or weights-only pickle; strict about every key."""

import argparse
import fnmatch
import hashlib
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import hub
from .files import atomic_write, check_source
from .statedict import StateDict, average_without_names, choices

CONFIG_NAME = "config.json"
WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin")
INDEX_NAMES = tuple(f"{name}.index.json" for name in WEIGHTS_NAMES)
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
MAX_CONFIG_BYTES = 2**24
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_KEYS = 5  # keys in messages

_logger = logging.getLogger("vistok")


@dataclass(frozen=True)
class Located:
    """A weights file (or index of shards) on this machine and the config.json that came with it, if any."""

    weights: Path
    config: dict[str, Any] | None


def locate(source: str | Path) -> Located:
    """Find the weights in a local folder (config.json + weights) or a weights file. Raises FileNotFoundError
    that names what is missing."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = [path / name for name in (*WEIGHTS_NAMES, *INDEX_NAMES) if (path / name).is_file()]
        files += sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p not in files)
        if not files:
            raise FileNotFoundError(
                f"{path} holds no weights; expected {' or '.join(WEIGHTS_NAMES)}, their index.json and "
                f"shards, or one file ending in {', '.join(SUFFIXES)}"
            )
        if len(files) > 1 and files[0].name not in (*WEIGHTS_NAMES, *INDEX_NAMES):
            raise ValueError(
                f"{path} holds several weights files ({', '.join(p.name for p in files)}); name one"
            )
        return Located(files[0], read_config(path / CONFIG_NAME) if (path / CONFIG_NAME).is_file() else None)
    if not path.exists():
        raise FileNotFoundError(
            f"no file or folder {path}; give a weights file ({', '.join(SUFFIXES)}) or its folder"
        )
    beside = path.parent / CONFIG_NAME
    # A config.json belongs to the conventional file names beside it, not to any file that shares the folder.
    conventional = path.name in (*WEIGHTS_NAMES, *INDEX_NAMES)
    return Located(check_source(path), read_config(beside) if conventional and beside.is_file() else None)


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
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def get(name: str) -> Path:
        # Once the hub could not be reached only the cache is asked.
        offline = local_files_only or isinstance(problem, LocalEntryNotFoundError)
        return hub.get_file(repo, name, revision=revision, cache_dir=cache_dir, local_files_only=offline)

    names = [file] if file else [WEIGHTS_NAMES[0], INDEX_NAMES[0], WEIGHTS_NAMES[1], INDEX_NAMES[1]]
    weights = problem = None
    for name in names:
        try:
            path = get(name)
            for shard in _shards(path) if name in INDEX_NAMES else ():
                get(shard)
            weights = path
            break
        # The client raises many kinds of error for "no network", "no such repository" and "gated".
        except Exception as error:
            problem = problem or error
            if not isinstance(error, EntryNotFoundError):  # another file name will not help
                break
    if weights is None:
        tried = file or " or ".join(WEIGHTS_NAMES)
        raise FileNotFoundError(
            f"could not get {tried} of the hub repository {repo!r}: it is not in the local "
            f"cache and was not downloaded ({type(problem).__name__}). Download it on a machine with "
            f"internet and pass its path: load(..., weights='path/to/{names[0]}')"
        ) from problem
    try:
        config = get(CONFIG_NAME)
    except EntryNotFoundError:  # raw weight repositories have none; the keys then identify the model
        return Located(weights, None)
    return Located(weights, read_config(config))


def read_config(path: Path) -> dict[str, Any]:
    """A config.json as a dictionary; ValueError if it is not one."""
    config = _read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; a configuration is a JSON object")
    return config


def _read_json(path: Path) -> Any:
    path = check_source(path, limit=MAX_CONFIG_BYTES)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from error
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be a configuration; fetch it again") from None


# Reading ----------------------------------------------------------------------------------------------------


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by key, on the CPU: the first of `read_choices`, its values checked."""
    choice = read_choices(path)[0]
    check_values(choice.tensors, path)
    return choice.tensors


def read_choices(path: str | Path) -> list[StateDict]:
    """The state dicts of a weights file or index of shards, on the CPU; see `vistok.statedict.choices`.

    Safetensors, or a pickle restricted to tensors and plain containers (never arbitrary objects).

    Raises:
        ValueError: truncated, corrupt or unsafe files, and those without a state dict.
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        content: Any = _read_shards(path)
    else:
        content = _read_file(path)
    if nameless := average_without_names(content):
        _logger.warning("%s: its average %r has no names; loading the weights themselves", path, nameless)
    states = choices(content)
    if not states:
        keys = f" with {', '.join(map(repr, list(content)[:_MAX_KEYS]))}" if isinstance(content, dict) else ""
        raise ValueError(
            f"{path} holds no state dict (a mapping of names to tensors); found {type(content).__name__}"
            f"{keys}"
        )
    return states


def _read_file(path: Path) -> Any:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} does not end in {', '.join(SUFFIXES)}; give a weights file")
    check_source(path)
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
    _check_zip(path)
    try:
        # Training scripts pickle their parsed arguments beside the weights: a Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated zip, foreign pickle, forbidden global: torch raises many kinds
        raise ValueError(
            f"{path} cannot be read as plain tensors ({_reason(error)}): it is truncated, or a pickle with "
            "more than weights in it, which is refused because unpickling runs code; fetch it again, or "
            "convert it to safetensors where you trust it"
        ) from error
    _check_extent(content, path)
    return content


def _reason(error: Exception) -> str:
    """Torch's error on a file in one line, without its advice to run what is in the file."""
    if isinstance(error, pickle.UnpicklingError):
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        return f"it holds a {name[1]}" if name else "it is not a pickle of tensors"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(": ")


def _check_zip(path: Path) -> None:
    """Refuse an archive whose members would unpack to more bytes than the file has."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):  # an older pickle, or what torch will refuse
        return
    if unpacked > path.stat().st_size:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes and claims to unpack to {unpacked:,}; weights are "
            "stored uncompressed: save it again with torch.save, or fetch it again"
        )


def _check_extent(content: Any, path: Path) -> None:
    """Refuse tensors that are larger than the file: views that repeat few numbers many times."""
    stack: list[Any] = [content]
    total, limit = 0, 4 * path.stat().st_size + 2**20
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size() if value.layout == torch.strided else 0
        elif isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, (list, tuple)):
            stack += value
    if total > limit:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes and its tensors would take {total:,}; fetch it again"
        )


def digest(path: Path) -> str:
    """SHA-256 of a weights file, or of the shards of an index one after another, in hexadecimal digits."""
    files = [path.parent / name for name in _shards(path)] if path.name.endswith(".index.json") else [path]
    total = hashlib.sha256()
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()


def _shards(index: Path) -> list[str]:
    """The file names of an index of shards, each of them a plain name."""
    content = _read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map from keys to shards; fetch it again")
    names = sorted({name if isinstance(name, str) else repr(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or Path(name).suffix not in SUFFIXES:
            raise ValueError(
                f"{index} names a shard {name!r}; shards are weights files beside the index: fetch it again"
            )
    return names


def _read_shards(index: Path) -> dict[str, Any]:
    """The tensors of all shards, which are those that the index names."""
    names = _shards(index)
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(
            f"{index} names {len(names)} shards and {len(missing)} are not beside it (first {missing[0]}); "
            "fetch them too"
        )
    content: dict[str, Any] = {}
    for name in names:
        shard = _read_file(index.parent / name)
        if not isinstance(shard, dict):
            raise ValueError(f"{index.parent / name} holds a {type(shard).__name__}, not tensors by key")
        content |= shard
    if lost := [key for key in _read_json(index)["weight_map"] if key not in content]:
        raise ValueError(
            f"{index} names {len(lost)} tensors that its shards do not hold (first {lost[0]}); fetch it again"
        )
    return content


def check_values(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ValueError naming the first tensor that is not plain finite numbers in memory."""
    for key, value in state.items():
        problem = None
        if value.is_meta:
            problem = "has no values (it is on the meta device)"
        elif value.layout != torch.strided:
            problem = f"is stored as {str(value.layout).removeprefix('torch.')}"
        elif value.is_quantized or value.is_complex():
            problem = f"has the dtype {value.dtype}"
        elif value.is_floating_point() and value.dtype not in _DTYPES:
            problem = f"has the dtype {value.dtype}, which needs a scale"
        elif value.is_floating_point() and not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            raise ValueError(
                f"{source}: {key} holds NaN or infinity ({count:,} of {value.numel():,} values); such "
                "weights give no pictures: fetch or train them again"
            )
        if problem:
            raise ValueError(
                f"{source}: {key} {problem}; weights are dense tensors of numbers: convert them with "
                ".to_dense(), .dequantize() or .float() and save again"
            )


# Fitting ----------------------------------------------------------------------------------------------------


def misfits(module: nn.Module, state: Mapping[str, Tensor], ignore: Iterable[str] = ()) -> list[list[str]]:
    """Lines on keys that are missing, unexpected and misshapen, of each kind; all empty when `state` fits.

    Keys matching a pattern of `ignore` (training statistics) may be in only one of the two.
    """
    patterns, expected = tuple(ignore), module.state_dict()

    def counts(key: str) -> bool:
        return not any(fnmatch.fnmatch(key, pattern) for pattern in patterns)

    return [
        [f"missing {k} {list(v.shape)}" for k, v in expected.items() if k not in state and counts(k)],
        [f"unexpected {k} {list(v.shape)}" for k, v in state.items() if k not in expected and counts(k)],
        [
            f"misshapen {k}: checkpoint {list(state[k].shape)}, model {list(v.shape)}"
            for k, v in expected.items()
            if k in state and state[k].shape != v.shape
        ],
    ]


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = torch.float32,
    ignore: Iterable[str] = (),
    source: str | Path = "the checkpoint",
) -> None:
    """Put `state` into `module`, floating tensors cast to `dtype`.

    Raises:
        ValueError: keys that misfit (the first five of `misfits`, and how many there are of each kind),
            values as `check_values`, integers where the model has floats and the reverse, and values that
            `dtype` cannot hold.
    """
    kinds = misfits(module, state, ignore)
    if any(kinds):
        counts = ", ".join(f"{len(kind):,} {kind[0].split()[0]}" for kind in kinds if kind)
        in_turn = [line for lines in zip_longest(*kinds) for line in lines if line is not None]
        first = "; ".join(in_turn[:_MAX_KEYS]) + ("; …" if len(in_turn) > _MAX_KEYS else "")
        raise ValueError(
            f"{source} does not fit this {type(module).__name__} ({counts}: {first}); check that the name or "
            "config is that of these weights"
        )
    expected = module.state_dict()
    check_values({key: value for key, value in state.items() if key in expected}, source)
    cast = {}
    for key, like in expected.items():
        if key in state:
            cast[key] = _cast(key, state[key], like, dtype, source)
    module.load_state_dict(cast, strict=False, assign=True)


def _cast(key: str, value: Tensor, like: Tensor, dtype: torch.dtype | None, source: str | Path) -> Tensor:
    if value.is_floating_point() != like.is_floating_point():
        raise ValueError(
            f"{source}: {key} has the dtype {value.dtype}, the model {like.dtype} there; quantized weights "
            "are not read: give the original ones"
        )
    if not (dtype and value.is_floating_point()) or value.dtype == dtype:
        return value
    cast = value.to(dtype)
    if not bool(cast.isfinite().all()):
        largest = float(value.abs().max())
        raise ValueError(f"{source}: {key} has values up to {largest:.4g}, too large for {dtype}")
    return cast


def save(folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors into `folder`, each through a temporary file."""
    from safetensors.torch import save_file

    folder, text = Path(folder), json.dumps(config, indent=2) + "\n"
    with atomic_write(folder / WEIGHTS_NAMES[0]) as path:
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in state.items()}, path, metadata={"format": "pt"}
        )
    with atomic_write(folder / CONFIG_NAME) as path:
        path.write_text(text, encoding="utf-8")
