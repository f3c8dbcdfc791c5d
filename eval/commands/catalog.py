"""`vistok list` and `vistok info`."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...commands.console import table

if TYPE_CHECKING:
    from ...catalog import Entry
    from ...quantizers import Quantizer
    from ...tokenizer import Tokenizer

# Width of a licence's name, so that a row fits in 80 columns; `vistok info` has the whole text.
_LICENCE = 14


def list_(
    reducers: Annotated[bool, typer.Option("--reducers", help="List token reducers.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="List evaluation metrics.")] = False,
    families: Annotated[
        bool, typer.Option("--families", help="List vision-language model families.")
    ] = False,
    generators: Annotated[bool, typer.Option("--generators", help="List generators.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List tokenizers with tokens, bits, rFID and licence; or reducers, metrics, model families,
    generators."""
    kinds: dict[str, tuple[bool, Callable[[], tuple[str, list[str], list[dict[str, Any]]]]]] = {
        "--reducers": (reducers, _reducers),
        "--metrics": (metrics, _metrics),
        "--families": (families, _families),
        "--generators": (generators, _generators),
    }
    chosen = [name for name, (selected, _) in kinds.items() if selected]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} are different lists; give one of them")
    title, columns, rows = (kinds[chosen[0]][1] if chosen else _tokenizers)()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    header = ["✓" if column == "verified" else column for column in columns]
    table(title, header, [[str(row[column]) for column in columns] for row in rows])


def _tokenizers() -> tuple[str, list[str], list[dict[str, Any]]]:
    from ...registry import entries, families

    rows = []
    for entry in entries().values():
        model = families()[entry.family].outline(**entry.config)
        rows.append(
            asdict(entry)
            | {
                "tokens": _choice(model).replace("up to", "≤"),
                "bits per image": _bits(model),
                "rFID": f"{entry.figures['rFID']:g}" if "rFID" in entry.figures else "–",
                "licence": _short(entry.license),
                "verified": "✓" if entry.verified else "",
                "compared": entry.verified,
                "codebook": _codebook(model.quantizer),
            }
        )
    title = f"{len(rows)} tokenizers (✓: compared with the original); more of one: vistok info NAME"
    return title, ["name", "tokens", "bits per image", "rFID", "licence", "verified"], rows


def _generators() -> tuple[str, list[str], list[dict[str, Any]]]:
    from ...generate.registry import GENERATORS

    rows = [
        {
            "name": entry.name,
            "writes tokens of": entry.config["tokenizer"] or "–",
            "M parameters": f"{entry.parameters:g}",
            "gFID": f"{entry.figures['gFID']:g}" if "gFID" in entry.figures else "–",
            "licence": _short(entry.license),
            "verified": "✓" if entry.verified else "",
        }
        for entry in GENERATORS.entries().values()
    ]
    columns = ["name", "writes tokens of", "M parameters", "gFID", "licence", "verified"]
    return f"{len(rows)} generators", columns, rows


def _reducers() -> tuple[str, list[str], list[dict[str, Any]]]:
    from ...compress.registry import reducers

    rows = [
        {
            "name": name,
            "stage": kind.stage.value,
            "what it does": kind.summary,
            "paper": kind.paper,
            "verified": "✓" if kind.verified else "",
            "compared": kind.verified,
        }
        for name, kind in reducers().items()
    ]
    columns = ["name", "stage", "what it does", "paper", "verified"]
    return f"{len(rows)} reducers for compress.attach", columns, rows


def _metrics() -> tuple[str, list[str], list[dict[str, Any]]]:
    from ..metrics.metric import metrics

    rows = [
        {
            "name": metric.name,
            "metric": metric.label,
            "unit": metric.unit,
            "better": metric.better or "",
            "option": metric.option
            if metric.option.startswith("-")
            else f"--metrics {metric.option or name}",
            "needs": metric.needs,
        }
        for name, metric in metrics().items()
    ]
    return f"{len(rows)} metrics", ["name", "unit", "better", "option", "needs"], rows


def _families() -> tuple[str, list[str], list[dict[str, Any]]]:
    """One row per class of models, from a trial on a tiny random model of each `model_type`."""
    from ...compress.families import known_families
    from ...compress.tiny.trial import tried

    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for trial in map(tried, known_families()):
        row = rows.setdefault(
            (trial.family, *trial.stages, trial.layout, trial.reason),
            {
                "family": trial.family,
                "model types": "",
                "stages": ", ".join(trial.stages) or "–",
                "layout": "–" if not trial.stages else "known" if trial.layout else "not known",
                "reason": trial.reason,
            },
        )
        row["model types"] += f"{', ' if row['model types'] else ''}{trial.model_type}"
    works = sum(row["stages"] != "–" for row in rows.values())
    title = f"{works} of {len(rows)} families of vision-language models take reducers"
    listed = sorted(rows.values(), key=lambda row: (row["stages"] == "–", row["family"].lower()))
    return title, ["family", "model types", "stages", "layout", "reason"], listed


def _short(licence: str) -> str:
    first = licence.split(";")[0].split(",")[0].split(" (")[0]
    return first if len(first) <= _LICENCE else first[: _LICENCE - 1] + "…"


def _choice(model: "Tokenizer") -> str:
    """Tokens per image, as text."""
    if model.adaptive:
        return f"up to {model.num_tokens}"
    return f"1–{model.num_tokens}" if model.ordered else str(model.num_tokens)


def _bits(model: "Tokenizer") -> str:
    """Bits per image at full length; – for continuous tokens."""
    quantizer = model.quantizer
    if quantizer.kind == "bits":
        return f"{model.num_tokens * len(quantizer.rows):,}"
    if quantizer.codebook_sizes is None:
        return "–"
    return f"{model.num_tokens * sum((size - 1).bit_length() for size in quantizer.codebook_sizes):,}"


def _codebook(quantizer: "Quantizer") -> str:
    if quantizer.kind == "bits":
        return f"{len(quantizer.rows)} bits"
    sizes = quantizer.codebook_sizes
    return "continuous" if sizes is None else "×".join(f"{size:,}" for size in sizes)


def info(
    name: Annotated[str, typer.Argument(help="Registry name, folder or weights file.", show_default=False)],
) -> None:
    """Show a tokenizer: configuration, weights, licence, paper; of a file also which of its weights load."""
    from ...bounded_build import empty_weights
    from ...files import looks_like_path
    from ...loading import create, load
    from ...registry import entries, unknown_name

    if name in entries():
        facts = _published_facts(entries()[name])
        with empty_weights():
            model = create(name)
    elif looks_like_path(name):
        model = load(name)  # logs which weights of the file it takes
        facts = {"family": model.family, "weights": name, "name": model.name or "none"}
    else:
        raise ValueError(unknown_name(name))
    facts |= {
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        **({} if model.modality == "shape" else {model.modality: f"{model.image_size}×{model.image_size}"}),
        "tokens": _choice(model)
        + (", as many as an image needs for a target error" if model.adaptive else "")
        + (", any prefix decodes" if model.ordered else ""),
        "codebook": _codebook(model.quantizer),
    }
    table(name, ["", ""], [[key, value] for key, value in facts.items()])
    print(json.dumps(asdict(model.config), indent=2))


def _published_facts(entry: "Entry") -> dict[str, str]:
    file = entry.file or "no weights are published"
    where = f"{entry.repo} ({file})" if entry.repo else f"shipped with vistok ({file})"
    return {
        "family": entry.family,
        "paper": entry.paper,
        "paper figures": ", ".join(f"{k} {v:g}" for k, v in entry.figures.items()) or "none",
        "weights": where,
        "verified": entry.verified or "no output of the original was recorded for this size",
        "licence": entry.license,
        "notes": entry.notes or "none",
    }
