"""Draw the curves and write the tables of docs/testbeds.md from results of `vistok eval vlm`.

python docs/testbeds.py scenes-vlm=runs/eval-vlm/vlm.json scenes-qwen=runs/eval-qwen/vlm.json

Figures of each reducer go to docs/measured.json, from which `python docs/tables.py` takes columns; times come
from `vistok eval reducers --all --out FILE`, given as speed=FILE.
"""

import json
import re
import sys
from pathlib import Path

from vistok.eval.report.vlm import charts
from vistok.eval.tasks.vlm.record import Row, VlmRecord

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "testbeds.md"
MEASURED = ROOT / "docs" / "measured.json"
TOKENS = 576  # visual tokens of the picture for which milliseconds are stated


def load(path: Path) -> VlmRecord:
    """The record in a JSON file of `vistok eval vlm`."""
    values = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**row) for row in values["rows"]]
    names = VlmRecord.__dataclass_fields__
    return VlmRecord(**{name: values[name] for name in names if name in values} | {"rows": rows})


def table(record: VlmRecord) -> str:
    """Accuracy in percent of every setting, one column per budget; ▼ is below downsampling of that budget."""
    keeps = sorted({row.keep for row in record.rows[1:] if row.keep < 1}, reverse=True)
    header = ["setting", *(f"{keep:g}" for keep in keeps), *(f"grounding at {keep:g}" for keep in keeps[1:2])]
    full = record.rows[0]
    lines = [header, ["---"] * len(header)]
    value, grounding = full.score["value"], full.categories["grounding"]["value"]
    lines.append(["**full model**", *[f"**{100 * value:.1f}**"] * len(keeps), f"{100 * grounding:.0f}"])
    names = dict.fromkeys((row.name, row.positions) for row in record.rows[1:])
    for name, positions in names:
        by_keep = {row.keep: row for row in record.rows[1:] if (row.name, row.positions) == (name, positions)}
        cells = [_cell(by_keep.get(keep)) for keep in keeps]
        second = by_keep.get(keeps[1]) if len(keeps) > 1 else None
        cells.append(
            "–"
            if second is None or second.refused
            else f"{100 * second.categories['grounding']['value']:.0f}"
        )
        label = name if positions == "keep" else f"{name}, {positions}"
        any_row = next(iter(by_keep.values()))
        lines.append([f"*{label}*" if any_row.baseline else label, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(row: Row | None) -> str:
    if row is None or row.refused:
        return "–"
    over = any(not each["fits"] for each in row.native)
    return f"{100 * row.score['value']:.1f}{' ▼' * row.loses_to_downsampling}{' (more tokens)' * over}"


def accuracies(record: VlmRecord) -> dict[str, dict[str, float]]:
    """Percent by reducer: "accuracy" at 0.25, "accuracy at 0.1" and "grounding" at 0.25."""
    figures: dict[str, dict[str, float]] = {}
    for row in record.rows[1:]:
        if row.refused or row.positions != "keep" or "+" in row.name:
            continue
        value = round(100 * row.score["value"], 1)
        if row.keep == 0.25:
            grounding = round(100 * row.categories["grounding"]["value"])
            figures.setdefault(row.name, {}).update({"accuracy": value, "grounding": grounding})
        elif row.keep == 0.1:
            figures.setdefault(row.name, {})["accuracy at 0.1"] = value
    return figures


def times(path: Path) -> dict[str, dict[str, float]]:
    """Milliseconds per image by reducer, in tower and method, from `vistok eval reducers --all`."""
    figures = {}
    for each in json.loads(path.read_text(encoding="utf-8"))["reducers"]:
        own = next(size for size in each["sizes"] if size["tokens"] == TOKENS)
        figures[each["name"]] = {"milliseconds": round(1e3 * (own["tower"] + own["reducer"]), 1)}
    return figures


def update(figures: dict[str, dict[str, float]]) -> None:
    """Write figures of reducers beside the others in docs/measured.json."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    for name, own in figures.items():
        measured[name] = {**measured.get(name, {}), **own}
    MEASURED.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Write the pictures, the page and the figures."""
    text = PAGE.read_text(encoding="utf-8")
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        if name == "speed":
            update(times(Path(path)))
            continue
        record = load(Path(path))
        if name == "scenes-vlm":
            update(accuracies(record))
        figure = charts(record)[0].figure
        figure.savefig(ROOT / "assets" / f"{name}.png", dpi=110, bbox_inches="tight")
        block = re.compile(rf"(<!-- results: {name} -->\n).*?(<!-- end of results -->)", re.DOTALL)
        if len(block.findall(text)) != 1:
            sys.exit(f"{PAGE} needs one place for the results of {name}")
        start, end = block.search(text).span(2)[0], block.search(text).span(1)[1]
        text = f"{text[:end]}\n{table(record)}\n{text[start:]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
