"""`vistok list` and `vistok info`."""

import json
import sys
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated

import typer

from ...commands.console import note, table

if TYPE_CHECKING:
    from ...quantizers import Quantizer
    from ...registry import Entry
    from ...tokenizer import Tokenizer


def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """All tokenizers with their hub repository, licence and paper figures."""
    from dataclasses import asdict

    from ...bounded_build import empty_weights
    from ...loading import create
    from ...registry import entries

    tokenizers = entries()
    if as_json:
        print(json.dumps([asdict(entry) for entry in tokenizers.values()], indent=2))
        return
    rows, hints = [], set()
    for entry in tokenizers.values():
        try:
            with empty_weights():
                model = create(entry.name)
            tokens, codebook = _choice(model), _codebook(model.quantizer)
        except ModuleNotFoundError as error:
            tokens = codebook = "needs an extra"
            hints.add(str(error))
        rows.append(
            [
                entry.name,
                tokens,
                codebook,
                f"{entry.parameters:g}",
                ", ".join(f"{k} {v:g}" for k, v in entry.figures.items()),
                entry.license,
                entry.verified or "–",
                entry.repo or "shipped with vistok",
            ]
        )
    header = ["name", "tokens", "codebook", "M params", "paper figures", "licence", "verified", "weights"]
    # A narrow terminal has no room for figures, digits and where weights are; `info` shows all three.
    narrow = sys.stdout.isatty() and get_terminal_size().columns < 130
    shown = (0, 1, 2, 3, 5) if narrow else range(len(header))
    title = f"{len(rows)} tokenizers (verified: largest errors against recorded outputs of the original)"
    table(title, [header[i] for i in shown], [[row[i] for i in shown] for row in rows])
    for hint in sorted(hints):
        note(hint)


def _choice(model: "Tokenizer") -> str:
    """How many tokens an image has."""
    if model.adaptive:
        return f"up to {model.num_tokens}"
    return f"1–{model.num_tokens}" if model.ordered else str(model.num_tokens)


def _codebook(quantizer: "Quantizer") -> str:
    if quantizer.kind == "bits":
        return f"{len(quantizer.embed)} bits"
    sizes = quantizer.codebook_sizes
    return "continuous" if sizes is None else "×".join(f"{size:,}" for size in sizes)


def info(
    name: Annotated[str, typer.Argument(help="Registry name, folder or weights file.", show_default=False)],
) -> None:
    """One tokenizer: configuration, weights, licence, paper; of a file also which of its weights load."""
    from dataclasses import asdict

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
        "image": f"{model.image_size}×{model.image_size}",
        "tokens": _choice(model)
        + (", as many as an image needs for a target error" if model.adaptive else "")
        + (", any prefix decodes" if model.ordered else ""),
        "codebook": _codebook(model.quantizer),
    }
    table(name, ["", ""], [[key, value] for key, value in facts.items()])
    print(json.dumps(asdict(model.config), indent=2))


def _published_facts(entry: "Entry") -> dict[str, str]:
    where = f"{entry.repo} ({entry.file})" if entry.repo else f"shipped with vistok ({entry.file})"
    return {
        "family": entry.family,
        "paper": entry.paper,
        "paper figures": ", ".join(f"{k} {v:g}" for k, v in entry.figures.items()) or "none",
        "weights": where,
        "verified": entry.verified or "no output of the original was recorded for this size",
        "licence": entry.license,
        "notes": entry.notes or "none",
    }
