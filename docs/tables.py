"""Write the tables of README.md and docs/ from the registries (`python docs/tables.py`).

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is a key of `TABLES`. With
`--check` nothing is written, and the exit status is 1 where a table is not what the registries give. Tables
of `TRIED` take longer: they are written anew where the names in them are not those of the registries, and
with `--all`.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vistok.compress.families import known_families
from vistok.compress.registry import reducers as all_reducers
from vistok.eval.commands import catalog
from vistok.generate.registry import GENERATORS
from vistok.plugins import plugins

ROOT = Path(__file__).parents[1]
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- table: (?P<name>[^>]*) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL)
PLUGINS = ("vistok.tokenizers", "vistok.generators", "vistok.reducers", "vistok.metrics", "vistok.scorers")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, with a line break after its last row."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def linked(text: str) -> str:
    """A text whose arXiv numbers are links; – where it is empty."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text) or "–"


@cache
def _tokenizers() -> list[dict[str, Any]]:
    return catalog._tokenizers()[2]


def tokenizers() -> str:
    """Every tokenizer, with its paper and what was compared."""
    rows = [
        [
            f"`{row['name']}`",
            row["tokens"],
            row["bits per image"],
            row["codebook"],
            row["rFID"],
            f"{row['parameters']:g}",
            row["license"],
            linked(row["paper"]),
            row["compared"] or "–",
        ]
        for row in _tokenizers()
    ]
    columns = [
        "name",
        "tokens",
        "bits per image",
        "codes per token",
        "rFID",
        "M parameters",
        "licence of the weights",
    ]
    return markdown([*columns, "paper", "compared with the original"], rows)


def tokenizer_families() -> str:
    """One tokenizer per family: the first that was compared with the original, or else the first."""
    chosen: dict[str, dict[str, Any]] = {}
    for row in _tokenizers():
        family = row["family"]
        if family not in chosen or row["verified"] > chosen[family]["verified"]:
            chosen[family] = row
    rows = [
        [
            f"`{row['name']}`",
            row["tokens"],
            row["bits per image"],
            row["rFID"],
            _short(row["license"]),
            row["verified"],
        ]
        for row in chosen.values()
    ]
    return markdown(["name", "tokens", "bits per image", "rFID", "licence", "verified"], rows)


def _short(licence: str) -> str:
    return re.split(r"[;,]| \(", licence)[0]


def reducers() -> str:
    """Every reducer, with its paper, what was compared and what was measured (docs/measured.json)."""
    measured = json.loads((ROOT / "docs" / "measured.json").read_text(encoding="utf-8"))
    columns = {
        "accuracy": "{:.1f}",
        "accuracy at 0.1": "{:.1f}",
        "grounding": "{:.0f}",
        "milliseconds": "{:.1f}",
    }
    rows = []
    for row in catalog._reducers()[2]:
        own = measured.get(row["name"], {})
        figures = [style.format(own[name]) if name in own else "–" for name, style in columns.items()]
        compared_with = row["compared"] or "–"
        name = f"`{row['name']}`"
        rows.append([name, row["stage"], row["what it does"], linked(row["paper"]), *figures, compared_with])
    header = ["name", "stage", "what it does", "paper", "accuracy at 0.25", "at 0.1", "grounding at 0.25"]
    return markdown([*header, "ms per image", "compared with the original"], rows)


def reducers_by_stage() -> str:
    """The names of all reducers, stage by stage; ✓ behind those that were compared with the original."""
    stages: dict[str, list[str]] = {}
    for row in catalog._reducers()[2]:
        stages.setdefault(row["stage"], []).append(f"`{row['name']}`{' ✓' if row['verified'] else ''}")
    order = [stage for stage in ("pixels", "vision", "features", "layer", "cache") if stage in stages]
    return markdown(["stage", "reducers"], [[stage, ", ".join(stages[stage])] for stage in order])


def listed(rows_of: Callable[[], tuple[str, list[str], list[dict[str, Any]]]]) -> str:
    """A table of `vistok list` with all of its columns."""
    _, columns, rows = rows_of()
    quoted = {columns[0], "option"}
    cells = [[f"`{row[column]}`" if column in quoted else row[column] for column in columns] for row in rows]
    return markdown(columns, cells)


def families() -> str:
    """Every family of vision-language models, as tried on a tiny random model of each."""
    _, columns, rows = catalog._families()
    for row in rows:
        row["model types"] = ", ".join(f"`{name}`" for name in row["model types"].split(", "))
    return markdown(columns, [[row[column] for column in columns] for row in rows])


def compared(rows_of: Callable[[], Iterable[tuple[str, str]]]) -> str:
    """The names that were compared with the original, and how closely they agree."""
    rows = [[f"`{name}`", digits] for name, digits in rows_of() if digits]
    return markdown(["name", "agreement"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "tokenizers": tokenizers,
    "tokenizers, one per family": tokenizer_families,
    "reducers": reducers,
    "reducers by stage": reducers_by_stage,
    "metrics": lambda: listed(catalog._metrics),
    "generators": lambda: listed(catalog._generators),
    "generators, compared": lambda: compared(
        lambda: [(entry.name, entry.verified) for entry in GENERATORS.entries().values()]
    ),
    "reducers, compared": lambda: compared(
        lambda: [(name, kind.verified) for name, kind in all_reducers().items()]
    ),
}


# Tables that a trial of some seconds makes, with the names that they must hold.
TRIED: dict[str, tuple[Callable[[], str], Callable[[], list[str]]]] = {
    "model families": (families, known_families),
}


def updated(text: str, everything: bool = False) -> str:
    """A page with its tables made anew; those of `TRIED` where their names are others, or all (`everything`).

    Raises ValueError for a table that is not known.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name in TRIED:
            make, names = TRIED[name]
            stale = sorted(re.findall(r"`([^`]+)`", match[0])) != names()
            return match[1] + "\n" + make() + "\n" + match["end"] if stale or everything else match[0]
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; there are {', '.join([*TABLES, *TRIED])}")
        return match[1] + "\n" + TABLES[name]() + "\n" + match["end"]

    return BLOCK.sub(table, text)


def main(arguments: Sequence[str]) -> int:
    """Write the tables, or compare them; returns the exit status."""
    if arguments not in ([], ["--check"], ["--all"]):
        print("usage: python docs/tables.py [--check | --all]", file=sys.stderr)
        return 2
    if added := sorted(name for group in PLUGINS for name in plugins(group)):
        print(
            f"the tables are of vistok alone; uninstall the plug-ins {', '.join(added)} first",
            file=sys.stderr,
        )
        return 2
    stale, check = [], arguments == ["--check"]
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if (new := updated(text, arguments == ["--all"])) != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(f"{'stale tables in' if check else 'wrote'} {', '.join(stale)}", file=sys.stderr)
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
