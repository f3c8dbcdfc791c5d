"""Tokenizers by name: with fresh weights (`create`) or with trained ones (`load`)."""

from pathlib import Path
from typing import Any

from .registry import TOKENIZERS
from .tokenizer import Tokenizer


def create(name_or_family: str, **config: Any) -> Tokenizer:
    """Build a tokenizer with fresh weights.

    A registry name gives the published configuration, changed by `config`; a family name takes the whole
    configuration, either as the family's own fields or in the original's nested form
    (`create("titok", **json.load(open("config.json")))`). The state dict has the published checkpoint's keys.
    Raises ValueError for names, fields and values that do not exist.
    """
    return TOKENIZERS.create(name_or_family, **config)


def load(
    source: str | Path,
    *,
    device: Any = None,
    dtype: Any = None,
    weights: str | Path | None = None,
    **options: Any,
) -> Tokenizer:
    """Load a tokenizer with its weights, in eval mode.

    `source`: a registry name (`vistok list`), a hub repository written `hf://owner/name`, a folder with
    config.json and model.safetensors (or shards with their index), or one weights file (.safetensors, or a
    weights-only pickle .bin/.pt/.pth). `weights` replaces the registry's hub file by a local file or folder.
    `dtype` is a floating dtype or its name ("bfloat16"). Further options: `config` (for a file without one),
    `revision`, `cache_dir`, `local_files_only`.

    Of a training checkpoint that also holds an average of the weights (EMA, SWA) the average is loaded, and
    a log line reports it; so does one for every download.

    Raises:
        FileNotFoundError: weights are neither local nor cached and the hub cannot be reached.
        ValueError: missing, unexpected or misshapen keys (the first of each and their number), weights with
            NaN or infinity, a configuration that the file cannot fill.
    """
    return TOKENIZERS.load(Tokenizer, source, device=device, dtype=dtype, weights=weights, **options)
