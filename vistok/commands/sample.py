"""`vistok sample`."""

from pathlib import Path
from typing import Annotated

import typer

from .batches import Batch, count_images, load_named, progress
from .console import Device, Weights, say


def sample(
    generator: Annotated[
        str,
        typer.Argument(
            help="Registry name (`vistok list --generators`), folder, weights file or hub repository.",
            show_default=False,
        ),
    ],
    classes: Annotated[
        list[int],
        typer.Option("--class", min=0, help="Class to draw; may be given several times.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the PNGs.")] = Path("samples"),
    count: Annotated[int, typer.Option("--n", min=1, help="Pictures per class.")] = 4,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**63 - 1, help="Picture n of a class depends on this alone.")
    ] = 0,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="The published value by default; 0: the likeliest.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="Strength of the class, by default as published."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Forward passes, where the generator takes a number.")
    ] = None,
    weights: Weights = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Decodes the tokens: a name, or a path to local weights."),
    ] = None,
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """Draw new pictures of classes with a generator of tokens, and write them as PNGs."""
    import torch

    from ..generate import load
    from ..images import to_pil
    from .console import device as named_device
    from .picture_names import picture_paths, save_picture

    names = [f"class{each:04d}-{number:04d}" for each in classes for number in range(count)]
    paths = picture_paths(out, names)
    model = load(generator, device=named_device(device), weights=weights)
    name = tokenizer or model.config.tokenizer
    if name is None:
        raise ValueError(f"{model.label} does not name the tokenizer of its tokens; give --tokenizer")
    values = {"temperature": temperature, "guidance": guidance, "steps": steps}
    settings = {key: value for key, value in values.items() if value is not None}
    model.check_settings(settings)
    model.check_condition(classes)
    seeds = torch.randint(2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    jobs = [(each, number) for each in classes for number in seeds]
    decoder = load_named(name, device)
    model.check_tokenizer(decoder)
    for start in progress(range(0, len(jobs), batch_size), "sample"):
        batch = jobs[start : start + batch_size]
        random = [torch.Generator().manual_seed(number) for _, number in batch]
        tokens = model.sample([each for each, _ in batch], generator=random, **settings)
        for picture, path in zip(decoder.decode(tokens).cpu(), paths[start:], strict=False):
            save_picture(to_pil(picture)[0], path)
    say(f"{count_images(len(jobs))} in {out}")
