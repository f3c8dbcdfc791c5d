"""Paths with braces and wildcards, and the files that they stand for."""

import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..commands.console import safe_text

MOST_PATHS = 100_000
"""Paths that the braces of one pattern may stand for."""
LONGEST = 300
"""Characters of a path in a message."""
_DIGITS = 18


def expand(pattern: str) -> list[str]:
    """The files that a path with braces and wildcards stands for, in order.

    Raises:
        FileNotFoundError: one of its paths matches no file.
        ValueError: a range in braces counts down, or the braces stand for more than 100,000 paths.
    """
    paths = list(dict.fromkeys(itertools.islice(_braces(pattern), MOST_PATHS + 1)))
    if len(paths) > MOST_PATHS:
        raise ValueError(
            f"{_shown(pattern)} stands for more than {MOST_PATHS:,} paths: write a shorter range, or a "
            "wildcard (*)"
        )
    files = [[path] if os.path.isfile(path) else _matches(path) for path in paths]
    missing = [path for path, found in zip(paths, files, strict=True) if not found]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise FileNotFoundError(
            f"no file {', '.join(map(_shown, missing[:5]))}{more}: {_shown(pattern)} stands for "
            f"{len(paths)} path(s)"
        )
    return list(itertools.chain.from_iterable(files))


def _shown(path: str) -> str:
    """A path as messages show it: on one line and not endless."""
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


def _braces(pattern: str) -> Iterator[str]:
    """`a{00..02}` to a00, a01, a02; `{x,y}` to x, y; leftmost innermost brace first."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    for part in _parts(match[1], pattern):
        yield from _braces(pattern[: match.start()] + part + pattern[match.end() :])


def _parts(inside: str, pattern: str) -> Iterator[str]:
    bounds = re.fullmatch(rf"(\d{{1,{_DIGITS}}})\.\.(\d{{1,{_DIGITS}}})", inside)
    if bounds is None:
        yield from inside.split(",")
        return
    first, last = bounds.groups()
    if int(first) > int(last):
        raise ValueError(f"{_shown(pattern)} counts down: write {{{last}..{first}}}")
    for number in range(int(first), int(last) + 1):
        yield str(number).zfill(len(first))
