"""`vistok verify`: our implementation against recorded outputs of the original.

Each recorded tensor is recomputed from the case's own configuration, weights rule and inputs, and compared
within the case's tolerances. Indices and bits must be equal, except where the original itself was undecided
(a recorded margin below the stated threshold). In half precision tolerances are 16 machine epsilons of the
tensor's largest value, and 9 of 10 indices must agree.
"""

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from .parity.case import CannotBuild, Case

FAMILIES = ("titok", "karl", "prune", "reduce", "instella", "flextok", "eval")


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
    """Run one case; one row a recorded tensor.

    Raises FileNotFoundError for missing files and CannotBuild for a family, configuration or recorded tensor
    that this version does not know.
    """
    case = Case.open(path, device, dtype)
    family = case.data["family"]
    if family not in FAMILIES:
        raise CannotBuild(
            f"{case.path.name} is of family {family!r}; this version verifies {', '.join(FAMILIES)}"
        )
    adapter = import_module(f".parity.{family}", __package__)
    rows = []
    with torch.inference_mode(False), torch.no_grad():
        for name, ours in adapter.run(case):
            if name not in case.tensors:
                raise CannotBuild(f"{case.path.name}: the adapter computed {name!r}, which was not recorded")
            rows.append(compare(case, name, ours))
    if unseen := sorted(set(case.tensors) - {row.name for row in rows} - case.read):
        raise CannotBuild(
            f"{case.path.name}: recorded tensors that this version does not compute: {', '.join(unseen)}"
        )
    return rows


def compare(case: Case, name: str, ours: Tensor) -> Row:
    """Our tensor against the recorded one, by the case's tolerances."""
    recorded = case.tensors[name]
    ours = ours.detach().cpu()
    if ours.shape != recorded.shape:
        shapes = f"shape {list(ours.shape)}, recorded {list(recorded.shape)}"
        return Row(name, recorded.numel(), False, float("inf"), float("inf"), shapes, False)
    half = case.dtype.itemsize < 4
    if name in case.data.get("tensor_exact", ()) or not recorded.is_floating_point():
        unequal = ours.to(torch.int64) != recorded.to(torch.int64)
        decided = _decided(case, name)
        wrong = int((unequal & decided).sum())
        quota = recorded.numel() // 10 if half else 0
        allowed = (
            f"equal where {case.data['exact_where'][name]}"
            if name in case.data.get("exact_where", {})
            else "equal"
        )
        if half:
            allowed = "9 of 10 equal"
        return Row(name, recorded.numel(), True, float(wrong), wrong / max(quota, 1), allowed, wrong <= quota)
    difference = (ours.double() - recorded.double()).abs()
    if half:
        atol, rtol = (
            16 * torch.finfo(case.dtype).eps * float(recorded.abs().max()) if recorded.numel() else 0.0,
            0.0,
        )
    else:
        atol, rtol = _tolerance(case, name)
    limit = atol + rtol * recorded.double().abs()
    error = float(difference.max()) if difference.numel() else 0.0
    excess = torch.where(difference == 0, 0.0, difference / limit)
    worst = float(excess.max()) if excess.numel() else 0.0
    passed = bool((difference <= limit).all())  # NaN fails
    return Row(name, recorded.numel(), False, error, worst, f"{atol:.1e} + {rtol:.1e}·|x|", passed)


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
    found = re.fullmatch(r"\s*(\S+)\s*>\s*([-+.eE\d]+)\s*", rule)
    if not found or found[1] not in case.tensors:
        raise CannotBuild(f"{case.path.name}: cannot read the rule {rule!r} for {name}")
    return (case.tensors[found[1]] > float(found[2])).reshape(recorded.shape)
