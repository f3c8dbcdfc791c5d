"""`vistok verify`: vistok's implementation against recorded outputs of the original.

Each recorded tensor is recomputed from the case's own configuration, weights rule and inputs, and compared
within the case's tolerances. Indices and bits must be equal, except where the original itself was undecided
(a recorded margin below the stated threshold). In half precision tolerances are 16 machine epsilons of the
tensor's largest value, and 9 of 10 indices must agree.
"""

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

import torch
from torch import Tensor

from .case import CannotBuild, Case
from .fields import exact_names

MOST_AROUND_ZERO = 1e-2
"""The largest absolute tolerance of a tensor that is zero everywhere."""


def adapter(family: str, case: Case) -> ModuleType:
    """The module of this folder that runs cases of a family, which it has in its `FAMILIES`.

    Raises CannotBuild for a family that no module has, and ModuleNotFoundError when one that could not be
    imported may have it.
    """
    known, absent = [], None
    for info in iter_modules(import_module(__package__).__path__):
        try:
            module = import_module(f".{info.name}", __package__)
        except ModuleNotFoundError as error:  # an extra that this family may not need
            absent = absent or error
            continue
        if family in (families := getattr(module, "FAMILIES", ())):
            return module
        known += families
    if absent is not None:
        raise absent
    raise case.refusal(f"family is {family!r}; this version verifies {', '.join(known)}")


@dataclass(frozen=True)
class Row:
    """The comparison of one recorded tensor. `error` is the largest absolute difference, or the number of
    unequal entries of an exact tensor; `worst` is the largest ratio of a difference to its own tolerance."""

    name: str
    count: int
    exact: bool
    error: float
    worst: float
    allowed: str
    passed: bool


def verify(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Row]:
    """Run one case; one row per recorded tensor.

    A tensor that the json names and the recording lacks is a row that did not pass. Raises FileNotFoundError
    for missing files and CannotBuild, in one line, for a family, configuration or recorded tensor that this
    version does not have.
    """
    case = Case.open(path, device, dtype)
    family = case.data["family"]
    module = adapter(family, case)
    case.check()
    if lacking := _lacking(case):
        return lacking
    rows = {}
    try:
        with torch.inference_mode(False), torch.no_grad():
            for name, output in module.run(case):
                if name in case.tensors:
                    rows[name] = compare(case, name, output)
                elif case.is_named(name):
                    rows[name] = _lacks(case, name)
    except CannotBuild:
        raise
    except Exception as error:  # whatever error a model or an adapter raises, the case is refused
        raise case.refusal(f"it cannot be run: {_reason(case, error)}") from error
    if unknown := sorted(set(case.tensors) - set(rows) - case.read):
        raise case.refusal(f"recorded tensors that this version does not compute: {', '.join(unknown)}")
    if not rows:
        raise case.refusal("every recorded tensor is an input, so there is nothing to compare")
    return list(rows.values())


def _reason(case: Case, error: Exception) -> str:
    """Why an adapter stopped, in one line."""
    message = str(error) or "no reason was given"
    reason = message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"
    if isinstance(error, AttributeError) and case.unnamed:
        reason += f"; its state_dict names no weights of {', '.join(sorted(case.unnamed))}"
    return reason


def _lacking(case: Case) -> list[Row]:
    """A row for every tensor that the json names and the recording lacks or has in another shape."""
    rows = [_lacks(case, name) for name in sorted(exact_names(case.data) - set(case.tensors))]
    for name, entry in case.data.get("shapes", {}).items():
        shape = entry[-1] if entry and isinstance(entry[-1], list) else entry
        if name in case.tensors and list(case.tensors[name].shape) != shape:
            recorded = f"recorded {list(case.tensors[name].shape)}, the json states {shape}"
            rows.append(_missed(name, case.tensors[name].numel(), recorded))
    return rows


def _lacks(case: Case, name: str) -> Row:
    return _missed(name, 0, f"missing from {case.path.with_suffix('.safetensors').name}")


def _missed(name: str, count: int, reason: str) -> Row:
    return Row(name, count, False, float("inf"), float("inf"), reason, False)


def compare(case: Case, name: str, output: Tensor) -> Row:
    """Compare vistok's tensor with the recorded one, by the case's tolerances and the rounding of recordings
    in half precision."""
    recorded = case.tensors[name]
    output = output.detach().cpu()
    if output.shape != recorded.shape:
        shapes = f"shape {list(output.shape)}, recorded {list(recorded.shape)}"
        return _missed(name, recorded.numel(), shapes)
    exact = not recorded.is_floating_point() and name not in case.data.get("tensor_atol", {})
    if exact or name in case.data.get("tensor_exact", ()):
        return _compare_exactly(case, name, output)
    largest = float(recorded.abs().max()) if recorded.numel() else 0.0
    if case.dtype.itemsize < 4:
        atol, rtol = 16 * torch.finfo(case.dtype).eps * largest, 0.0
    else:
        atol, rtol = _tolerance(case, name)
        if recorded.is_floating_point() and recorded.dtype.itemsize < 4:
            # The recording itself is rounded by up to half a step.
            rtol += torch.finfo(recorded.dtype).eps / 2
        if atol >= (largest or MOST_AROUND_ZERO):
            raise case.refusal(
                f"the tolerance {atol:g} of {name} is not below its largest value {largest:g}, so that "
                "anything would pass"
            )
    difference = (output.double() - recorded.double()).abs()
    limit = atol + rtol * recorded.double().abs()
    error = float(difference.max()) if difference.numel() else 0.0
    excess = torch.where(difference == 0, 0.0, difference / limit)
    worst = float(excess.max()) if excess.numel() else 0.0
    passed = bool((difference <= limit).all())  # NaN fails
    return Row(name, recorded.numel(), False, error, worst, f"{atol:.1e} + {rtol:.1e}·|x|", passed)


def _compare_exactly(case: Case, name: str, output: Tensor) -> Row:
    recorded, half = case.tensors[name], case.dtype.itemsize < 4
    unequal = output.to(torch.int64) != recorded.to(torch.int64)
    wrong = int((unequal & _decided(case, name)).sum())
    quota = recorded.numel() // 10 if half else 0
    rules = case.data.get("exact_where", {})
    allowed = "9 of 10 equal" if half else f"equal where {rules[name]}" if name in rules else "equal"
    return Row(name, recorded.numel(), True, float(wrong), wrong / max(quota, 1), allowed, wrong <= quota)


def _tolerance(case: Case, name: str) -> tuple[float, float]:
    """Absolute and relative tolerance; `tensor_atol` holds names or beginnings of names."""
    table = case.data.get("tensor_atol", {})
    fitting = [key for key in table if name.startswith(key)]
    atol = table[max(fitting, key=len)] if fitting else case.data.get("atol", 0.0)
    return float(atol), float(case.data.get("rtol", 0.0))


def _decided(case: Case, name: str) -> Tensor:
    """Where an exact tensor must be equal: everywhere, or where `exact_where` ("margin > 1e-4") holds."""
    recorded = case.tensors[name]
    rule = case.data.get("exact_where", {}).get(name)
    if rule is None:
        return torch.ones_like(recorded, dtype=torch.bool)
    match = re.fullmatch(r"\s*(\S+)\s*>\s*([-+.eE\d]+)\s*", rule)
    if not match or match[1] not in case.tensors:
        raise case.refusal(f"cannot read the rule {rule!r} for {name}")
    margin = case.tensors[match[1]]
    if margin.numel() != recorded.numel():
        raise case.refusal(f"{match[1]} has {margin.numel()} entries and {name} {recorded.numel()}")
    decided = (margin > float(match[2])).reshape(recorded.shape)
    if 2 * int(decided.sum()) < decided.numel():
        raise case.refusal(f"the rule {rule!r} leaves more than half of {name} uncompared")
    return decided
