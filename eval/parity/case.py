"""A parity case: recorded outputs of an original implementation, and how to rebuild what made them.

A case stores no weights. Every tensor of the checkpoint is a function of its key, its shape and a seed
(`fill`), so `<case>.json` with `<case>.safetensors` pins a model of any published size in a small file.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

Outputs = Iterator[tuple[str, Tensor]]


class CannotBuild(ValueError):
    """The case asks for something this version does not have; the message says what."""


def fill(key: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Float32 tensor of `shape`, the same on every machine for one (key, shape, seed).

    Matrices and kernels: normal with standard deviation 1/sqrt(product of all dimensions but the first).
    Vectors: 1 + 0.1 n for keys ending in weight, gamma or scale, 1 + |n| for running_var, else 0.02 n.
    Scalars 0.5; counters of batches 0.
    """
    shape = tuple(shape)
    if key.endswith("num_batches_tracked") or not shape:
        return torch.full(shape, 0.0 if key.endswith("num_batches_tracked") else 0.5)
    digest = hashlib.sha256(f"{seed}:{key}:{','.join(map(str, shape))}".encode()).digest()
    # The rule is defined on NumPy's legacy generator, whose stream is frozen.
    noise = np.random.RandomState(int.from_bytes(digest[:4], "big")).standard_normal(shape)
    if len(shape) > 1:
        noise /= math.sqrt(math.prod(shape[1:]))
    elif key.endswith("running_var"):
        noise = 1 + np.abs(noise)
    elif key.endswith(("weight", "gamma", "scale")):
        noise = 1 + 0.1 * noise
    else:
        noise = 0.02 * noise
    return torch.from_numpy(noise.astype(np.float32))


@dataclass
class Case:
    """One case, opened: its json, its recorded tensors, and where to run it."""

    path: Path
    data: dict[str, Any]
    tensors: dict[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    read: set[str] = field(default_factory=set)

    @classmethod
    def open(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "Case":
        """Read `path` (.json) and the .safetensors beside it. Raises FileNotFoundError or CannotBuild."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        arrays = path.with_suffix(".safetensors")
        for file in (path, arrays):
            if not file.is_file():
                raise FileNotFoundError(
                    f"no file {file}; a case is NAME.json with NAME.safetensors beside it"
                )
        try:
            data, tensors = json.loads(path.read_text(encoding="utf-8")), load_file(arrays)
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise CannotBuild(f"{path} with {arrays.name} cannot be read: {error}") from error
        if not isinstance(data, dict) or not {"family", "tensors"} <= set(data):
            raise CannotBuild(f"{path} is not a parity case: it has no family and tensors")
        return cls(path, data, tensors, torch.device(device), dtype)

    @property
    def seed(self) -> int:
        """Seed of the filled weights."""
        return int(self.data.get("seed", 0))

    # Weights ------------------------------------------------------------------------------------------------

    def build(self, make: Callable[[], M], prefix: str = "") -> M:
        """The module that `make` constructs, filled under its published keys, in eval mode on the case's
        device.

        `prefix` selects the part of the case's `state_dict` that belongs to this module (`owner:`). Raises
        CannotBuild when keys or shapes differ from the published ones.
        """
        keep = tuple(self.data.get("keep", ()))
        try:
            if keep:
                module = make()
            else:
                from accelerate import init_empty_weights

                with init_empty_weights(include_buffers=False):
                    module = make()
        except (ValueError, KeyError, TypeError) as error:
            raise CannotBuild(f"{self.path.name}: this configuration cannot be built: {error}") from error
        state = module.state_dict()
        self._check_keys(state, prefix)
        module.load_state_dict(self.filled(state), assign=not keep)
        return module.to(self.device, self.dtype).eval()

    def filled(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of `state` with every floating tensor filled, scaled and overridden as the case says."""
        keep, scale = tuple(self.data.get("keep", ())), self.data.get("scale", {})
        overrides = self.data.get("overrides", {})

        def one(item: tuple[str, Tensor]) -> Tensor:
            key, value = item
            if key in overrides:
                return torch.tensor(overrides[key], dtype=torch.float32).reshape(value.shape)
            if not value.is_floating_point() or any(part in key for part in keep):
                return value
            filled = fill(key, value.shape, self.seed)
            for part, factor in scale.items():
                if part in key:
                    filled *= factor
            return filled

        # NumPy draws without holding the interpreter's lock, so threads help.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(state, pool.map(one, state.items()), strict=True))

    def _check_keys(self, state: Mapping[str, Tensor], prefix: str) -> None:
        published = {
            key.removeprefix(prefix): list(shape)
            for key, (_, shape) in self.data.get("state_dict", {}).items()
            if key.startswith(prefix)
        }
        ours = {key: list(value.shape) for key, value in state.items()}
        if published and ours != published:
            different = sorted(k for k in ours.keys() | published.keys() if ours.get(k) != published.get(k))
            lines = [f"{key}: ours {ours.get(key)}, published {published.get(key)}" for key in different[:20]]
            raise CannotBuild(f"{self.path.name}: {len(different)} keys differ:\n  " + "\n  ".join(lines))

    # Inputs -------------------------------------------------------------------------------------------------

    def images(self) -> Tensor:
        """The batch of test pictures of the case's recipe: tiled textures, blocky brightness, noise; [B, 3,
        H, W]."""
        recipe = self.data["inputs"]["images"]
        batch, height, width = (int(recipe[name]) for name in "BHW")
        random = np.random.RandomState(int(recipe["S"]))
        tile = (random.random_sample((batch, 3, 16, 16)) < 0.5).astype(np.float64)
        brightness = 0.2 + 0.8 * random.random_sample((batch, 3, 4, 4))
        picture = np.tile(tile, (1, 1, height // 16, width // 16)) * np.kron(
            brightness, np.ones((1, 1, height // 4, width // 4))
        )
        picture += 0.1 * (random.random_sample((batch, 3, height, width)) - 0.5)
        picture = np.clip(picture, 0, 1).astype(np.float32)
        if "sum" in recipe and not math.isclose(
            float(picture.astype(np.float64).sum()), recipe["sum"], rel_tol=1e-6
        ):
            raise CannotBuild(f"{self.path.name}: the image recipe gave another picture than was recorded")
        return self.place(torch.from_numpy(picture))

    def draw(self, text: str) -> "np.random.RandomState":
        """The NumPy generator that a description names, as `RandomState(103)`."""
        found = re.search(r"RandomState\((\d+)\)", text)
        if not found:
            raise CannotBuild(f"{self.path.name}: no RandomState(seed) in {text!r}")
        return np.random.RandomState(int(found[1]))

    def recorded(self, name: str) -> Tensor:
        """A recorded tensor used as an input, on the case's device (floats in its dtype)."""
        self.read.add(name)
        return self.place(self.tensors[name])

    def place(self, value: Tensor) -> Tensor:
        """A tensor on the case's device, floats in its dtype."""
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    # Descriptions -------------------------------------------------------------------------------------------

    def description(self, name: str) -> str:
        """What the json says of a recorded tensor, by its name or the longest pattern ("enc.*", "dec.upN")
        for it."""
        table = self.data["tensors"]
        if name in table:
            return table[name]
        patterns = [
            p for p in table if re.fullmatch(re.escape(p).replace(r"\*", ".*").replace("N", r"\d+"), name)
        ]
        return table[max(patterns, key=len)] if patterns else ""

    def subsample(self, name: str, value: Tensor, default: str = "") -> Tensor:
        """The part of `value` that was recorded: the first [slices] in the description, or in `default`."""
        for text in (self.description(name), default):
            for found in re.findall(r"\[([-:.,\d\s]*:[-:.,\d\s]*)\]", text):
                return value[tuple(_axis(part.strip()) for part in found.split(","))]
        return value


def _axis(text: str) -> Any:
    if text == "...":
        return ...
    return slice(*(int(part) if part else None for part in text.split(":"))) if ":" in text else int(text)
