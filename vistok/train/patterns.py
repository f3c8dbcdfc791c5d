"""Paths with braces and wildcards, and the files that they stand for."""

import glob
import itertools
import math
import os
import re
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand

from ..commands.console import safe_text

MOST_PATHS = 100_000
"""Paths that the braces of one pattern may stand for."""
LONGEST = 300
"""Characters of a path in a message."""
_DIGITS = 18  # of a number in a range
_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.-?(\d+))?")


def expand(pattern: str) -> list[str]:
    """The files that a path with braces and wildcards stands for, in order.

    Braces are those of bash: `{000..010}`, `{0..10..2}`, `{a..c}` and `{x,y}`, also inside each other.

    Raises:
        FileNotFoundError: one of its paths matches no file.
        ValueError: a brace has no partner, or the braces stand for more than 100,000 paths.
    """
    if os.path.isfile(pattern):
        return [pattern]
    if _number_of_paths(pattern) > MOST_PATHS:
        raise ValueError(
            f"{_short(pattern)} stands for more than {MOST_PATHS:,} paths: write a shorter range, or a "
            "wildcard (*)"
        )
    try:
        paths = list(dict.fromkeys(braceexpand(pattern, escape=False)))
    except UnbalancedBracesError as error:
        raise ValueError(
            f"{_short(pattern)} is not a file, and as a pattern it has a brace without its partner: write "
            "ranges as {000..010} and choices as {a,b}"
        ) from error
    files = [[path] if os.path.isfile(path) else _matches(path) for path in paths]
    missing = [path for path, matches in zip(paths, files, strict=True) if not matches]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise FileNotFoundError(
            f"no file {', '.join(map(_short, missing[:5]))}{more}: {_short(pattern)} stands for "
            f"{len(paths)} path(s)"
        )
    return list(itertools.chain.from_iterable(files))


def _short(path: str) -> str:
    """A path as messages show it: on one line and shortened."""
    text = safe_text(path)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _matches(path: str) -> list[str]:
    """The files that match wildcards, sorted; `**` does not follow links to folders, which may go round."""
    parts = Path(path).parts
    first = next((number for number, part in enumerate(parts) if glob.has_magic(part)), None)
    if first is None:
        return []
    base, rest = Path(*parts[:first]), parts[first:]
    if "**" not in rest:
        return sorted(filter(os.path.isfile, glob.glob(path)))
    matches = [match for match in base.glob(str(Path(*rest))) if match.is_file()]
    hidden = len(base.parts)
    return sorted(str(each) for each in matches if not any(p.startswith(".") for p in each.parts[hidden:]))


def _number_of_paths(pattern: str) -> int:
    """How many paths the braces stand for, counted from the innermost outwards; equal ones count each."""
    while (group := _INNERMOST.search(pattern)) is not None:
        bounds = _RANGE.fullmatch(group[1])
        number = _length(*bounds.groups()) if bounds else sum(map(_product, group[1].split(",")))
        pattern = f"{pattern[: group.start()]}\0{number}\0{pattern[group.end() :]}"
    return _product(pattern)


def _length(first: str, last: str, step: str | None) -> int:
    if max(len(first), len(last)) > _DIGITS:
        return MOST_PATHS + 1
    places = [ord(bound) if bound.isalpha() else int(bound) for bound in (first, last)]
    return abs(places[1] - places[0]) // max(1, int(step or 1)) + 1


def _product(counted: str) -> int:
    return math.prod(map(int, re.findall("\0([0-9]+)\0", counted)))
