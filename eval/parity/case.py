"""A parity case: recorded outputs of an original implementation, and how to rebuild its model and inputs.

A case stores no weights. Every tensor of the checkpoint is a function of its key, its shape and a seed
(`fill`), so `<case>.json` with `<case>.safetensors` pins a model of any published size in a small file.
"""

import ast
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

from ...bounded_build import empty_weights
from ...configuration import shorten
from .fields import CannotBuild, check_fields, check_size, is_numbered, whole
from .meta import build_within, remove_unfilled

__all__ = ["CannotBuild", "Case", "Outputs", "fill"]

M = TypeVar("M", bound=nn.Module)

DRAWS = ("uniform", "standard_normal", "random_sample", "normal", "randint")
Outputs = Iterator[tuple[str, Tensor]]


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
    """Recorded tensors that were inputs."""
    unnamed: set[str] = field(default_factory=set)
    """Parts of the model whose weights the case does not name."""

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
            data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
            tensors = load_file(arrays)
        except (ValueError, RecursionError, SafetensorError) as error:
            raise CannotBuild(f"{path} with {arrays.name} cannot be read: {error}") from error
        if not isinstance(data, dict) or not isinstance(data.get("family"), str) or "tensors" not in data:
            raise CannotBuild(f"{path} is not a parity case: it has no family and tensors")
        return cls(path, data, tensors, torch.device(device), dtype)

    def check(self) -> None:
        """Raise CannotBuild for a field of another type than it takes, and for a case without tensors."""
        check_fields(self.path.name, self.data)

    @property
    def seed(self) -> int:
        """Seed of the filled weights; CannotBuild if the case has none."""
        seed = self.data.get("seed")
        if seed is None:
            raise self.refusal("it fills weights, but has no seed")
        return seed

    @property
    def config(self) -> dict[str, Any]:
        """The configuration; CannotBuild if it is not a mapping."""
        config = self.data.get("config", {})
        if not isinstance(config, dict):
            raise self.refusal("config is a list; this case takes a mapping")
        return config

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the published weights that the case names."""
        return tuple(self.data.get("state_dict", {}))

    def refusal(self, reason: str) -> CannotBuild:
        """The error for this case, to be raised."""
        return CannotBuild(f"{self.path.name}: {' '.join(reason.split())}")

    def check_stated(self, what: str, value: Any, stated: Any, tolerance: float = 0.0) -> None:
        """Raise CannotBuild unless `value` equals what the case states, to an absolute `tolerance`."""
        equal = abs(value - stated) <= tolerance if tolerance else value == stated
        if not equal:
            raise CannotBuild(f"{self.path.name}: {what} is {value}; the case states {stated}")

    def check_config(self, name: str, value: Any) -> None:
        """Raise CannotBuild unless `value` equals the entry of that name, where the case has one."""
        self.check_stated(name, value, self.data["config"].get(name, value))

    def records(self, *patterns: str) -> bool:
        """Whether one of the regular expressions matches the whole name of a recorded tensor."""
        return any(re.fullmatch(pattern, name) for pattern in patterns for name in self.tensors)

    # Weights ------------------------------------------------------------------------------------------------

    def build(self, make: Callable[[], M], prefix: str = "", part: Callable[[str], str] | None = None) -> M:
        """The module that `make` constructs, filled under its published keys, in eval mode on the case's
        device.

        `prefix` selects the part of the case's `state_dict` that belongs to this module (`owner:`). `part`
        gives the part of the module that a key belongs to: a case may leave out whole parts, which the module
        then does not have. Raises CannotBuild when keys or shapes differ from the
        published ones; nothing is allocated before that is known.
        """
        published = self._published(prefix)
        try:
            state = build_within(make, published).state_dict()
            self._check_keys(state, published, part)
            with empty_weights():
                module = make()
            own = {key: value for key, value in module.state_dict().items() if key in published}
            if any(value.is_meta for key, value in own.items() if self._is_kept(key)):
                module = make()
                own = {key: value for key, value in module.state_dict().items() if key in published}
        except CannotBuild as error:
            raise self.refusal(str(error)) from error
        except (ValueError, KeyError, TypeError, AssertionError, RuntimeError) as error:
            raise self.refusal(f"this configuration cannot be built: {error}") from error
        module.load_state_dict(self.filled(own), strict=False, assign=True)
        remove_unfilled(module)
        return module._apply(self.place).eval()

    def _is_kept(self, key: str) -> bool:
        keep = self.data.get("keep", ())
        if isinstance(keep, dict):
            raise self.refusal("keep is a mapping; this case takes a list of parts of keys")
        return any(part in key for part in keep)

    def filled(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of `state` with every floating tensor filled, scaled and overridden as the case states."""
        scale, overrides, seed = self.data.get("scale", {}), self.data.get("overrides", {}), self.seed

        def one(item: tuple[str, Tensor]) -> Tensor:
            key, value = item
            if key in overrides:
                values = torch.tensor(overrides[key], dtype=torch.float32)
                if values.numel() != value.numel():
                    raise self.refusal(f"overrides of {key} has {values.numel()} values, not {value.numel()}")
                return values.reshape(value.shape)
            if not value.is_floating_point() or self._is_kept(key):
                return value
            filled = fill(key, value.shape, seed)
            for part, factor in scale.items():
                if part in key:
                    filled *= factor
            return filled

        # NumPy draws without holding the interpreter's lock, so threads help.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(state, pool.map(one, state.items()), strict=True))

    def _published(self, prefix: str) -> dict[str, list[int]]:
        """Shapes of the keys that the case names under a prefix; CannotBuild if there are none."""
        table = self.data.get("state_dict", {})
        if any(isinstance(entry, dict) for entry in table.values()):
            raise self.refusal(f"its state_dict holds one table for each of {', '.join(table)}; one is taken")
        shapes = {
            key.removeprefix(prefix): shape for key, (_, shape) in table.items() if key.startswith(prefix)
        }
        if not shapes:
            where = f" that begin with {prefix!r}" if prefix else ""
            raise self.refusal(f"its state_dict names no weights{where}; list their keys, dtypes and shapes")
        return shapes

    def _check_keys(
        self,
        state: Mapping[str, Tensor],
        published: Mapping[str, list[int]],
        part: Callable[[str], str] | None,
    ) -> None:
        shapes = {key: list(value.shape) for key, value in state.items()}
        if part is not None:
            named = {part(key) for key in published}
            self.unnamed |= {part(key) for key in shapes} - named
            shapes = {key: shape for key, shape in shapes.items() if part(key) in named}
        if shapes != published:
            different = sorted(
                k for k in shapes.keys() | published.keys() if shapes.get(k) != published.get(k)
            )
            listed = [
                f"{key}: ours {shapes.get(key)}, published {published.get(key)}" for key in different[:20]
            ]
            raise CannotBuild(f"{len(different)} keys differ: " + "; ".join(listed))

    # Inputs -------------------------------------------------------------------------------------------------

    def input(self, name: str, kind: type = str) -> Any:
        """The recipe of an input: text, or with `kind` dict a mapping; CannotBuild if there is none."""
        inputs = self.data.get("inputs")
        value = inputs.get(name) if isinstance(inputs, dict) else None
        if not isinstance(value, kind):
            form = {dict: "a mapping", list: "a list", str: "text"}[kind]
            raise self.refusal(
                f"inputs has {name} as {shorten(value)}; this version takes its recipe as {form}"
            )
        return value

    def images(self) -> Tensor:
        """The batch of test pictures of the case's recipe: tiled textures, blocky brightness, noise; [B, 3,
        H, W]."""
        if "images" in self.tensors:
            return self.recorded("images")
        recipe = self.input("images", dict)
        if not isinstance(recipe.get("recipe", ""), str):
            raise self.refusal(f"the recipe of images is {shorten(recipe['recipe'])}; it is text")
        batch = whole(self.path.name, recipe, "B", 1, 4096)
        height, width = (whole(self.path.name, recipe, side, 16, 2**16) for side in "HW")
        if height % 16 or width % 16:
            raise self.refusal(f"images are {height}×{width}; the recipe takes multiples of 16")
        check_size(self.path.name, "images", (batch, 3, height, width))
        random = np.random.RandomState(whole(self.path.name, recipe, "S", 0, 2**32 - 1))
        tile = (random.random_sample((batch, 3, 16, 16)) < 0.5).astype(np.float64)
        brightness = 0.2 + 0.8 * random.random_sample((batch, 3, 4, 4))
        picture = np.tile(tile, (1, 1, height // 16, width // 16)) * np.kron(
            brightness, np.ones((1, 1, height // 4, width // 4))
        )
        picture += 0.1 * (random.random_sample((batch, 3, height, width)) - 0.5)
        picture = np.clip(picture, 0, 1).astype(np.float32)
        total = recipe.get("sum", float(picture.astype(np.float64).sum()))
        if not isinstance(total, int | float) or not math.isclose(
            float(picture.astype(np.float64).sum()), total, rel_tol=1e-6
        ):
            raise self.refusal("the image recipe gave another picture than was recorded")
        return self.place(torch.from_numpy(picture))

    def array(self, name: str) -> Tensor:
        """A stored tensor, or the one of the recipe "np.random.RandomState(seed).method(arguments)"."""
        if name in self.tensors:
            return self.recorded(name)
        recipe = self.input(name)
        match = re.search(rf"RandomState\(\d+\)\.({'|'.join(DRAWS)})\((.*?)\)(\.|,|;|\s|$)", recipe)
        if not match:
            raise self.refusal(f"cannot read the recipe {shorten(recipe)} of input {name!r}")
        arguments = ast.literal_eval(f"({match[2]},)")
        shape = next((each for each in arguments if isinstance(each, tuple)), ())
        check_size(self.path.name, f"input {name}", shape)
        values = np.asarray(getattr(self.draw(recipe), match[1])(*arguments))
        whole_numbers = match[1] == "randint"
        return self.place(torch.from_numpy(values.astype(np.int64 if whole_numbers else np.float32)))

    def draw(self, text: str) -> "np.random.RandomState":
        """The NumPy generator that a description names, as `RandomState(103)`."""
        match = re.search(r"RandomState\((\d+)\)", text)
        if not match or int(match[1]) >= 2**32:
            raise self.refusal(f"no RandomState(seed) with a seed below 2**32 in {shorten(text)}")
        return np.random.RandomState(int(match[1]))

    def normal(self, text: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise from the generator that a description names, float32 on the case's device."""
        check_size(self.path.name, "noise", shape)
        values = self.draw(text).standard_normal(shape)
        return torch.from_numpy(values.astype(np.float32)).to(self.device)

    def recorded(self, name: str) -> Tensor:
        """A recorded tensor used as an input, on the case's device (floats in its dtype)."""
        if name not in self.tensors:
            raise self.refusal(f"it needs the recorded tensor {name!r} as an input, which is not there")
        self.read.add(name)
        return self.place(self.tensors[name])

    def place(self, value: Tensor) -> Tensor:
        """A tensor on the case's device, floats in its dtype."""
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    # Descriptions -------------------------------------------------------------------------------------------

    def description(self, name: str) -> str:
        """The json's description of a recorded tensor, by its name or the longest pattern ("enc.*",
        "dec.upN") for it."""
        table = self.data["tensors"]
        if name in table:
            return table[name]
        patterns = [
            p for p in table if re.fullmatch(re.escape(p).replace(r"\*", ".*").replace("N", r"\d+"), name)
        ]
        return table[max(patterns, key=len)] if patterns else ""

    def is_named(self, name: str) -> bool:
        """Whether the json states that a tensor of this name is recorded.

        It lists the names under shapes; without that list, a name with a number is stated by "eval_k" too.
        """
        shapes = self.data.get("shapes", {})
        if name in self.data["tensors"] or name in shapes:
            return True
        return not shapes and any(is_numbered(key, name) for key in self.data["tensors"])

    def subsample(self, name: str, value: Tensor, default: str = "") -> Tensor:
        """The part of `value` that was recorded: all, if that has its shape; else the first [slices] in the
        description, or in `default`."""
        if name in self.tensors and self.tensors[name].shape == value.shape:
            return value
        for text in (self.description(name), default):
            for slices in re.findall(r"\[([-:.,\d\s]*:[-:.,\d\s]*)\]", text):
                return value[tuple(_axis(part.strip()) for part in slices.split(","))]
        return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that a case may hold")


def _axis(text: str) -> Any:
    if text == "...":
        return ...
    return slice(*(int(part) if part else None for part in text.split(":"))) if ":" in text else int(text)
