"""Reducers by name."""

from importlib import import_module

from .reducer import Reducer

METHODS = {
    "averagepool": "average_pool.AveragePool",
    "divprune": "divprune.DivPrune",
    "downsample": "downsample.Downsample",
    "fastervlm": "fastervlm.FasterVLM",
    "fastv": "fastv.FastV",
    "globalcom2": "globalcom2.GlobalCom2",
    "hired": "hired.HiRED",
    "keynorm": "key_norm.KeyNorm",
    "pitome": "pitome.PiToMe",
    "prumerge": "prumerge.PruMerge",
    "pyramiddrop": "pyramiddrop.PyramidDrop",
    "random": "random.Random",
    "tome": "tome.ToMe",
    "transprune": "transprune.TransPrune",
    "uniformgrid": "uniform_grid.UniformGrid",
    "visionzip": "visionzip.VisionZip",
}


def list_reducers() -> list[str]:
    """The names that `attach` takes."""
    return sorted(METHODS)


def reducer_class(name: str) -> type[Reducer]:
    """The class behind a name. Raises ValueError, with the nearest names, for others."""
    path = METHODS.get(name.lower().replace("-", "").replace("_", "").replace("²", "2"))
    if path is None:
        from difflib import get_close_matches

        close = get_close_matches(name.lower(), METHODS, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"no reducer is called {name!r}{hint} Known: {', '.join(list_reducers())}")
    module, attribute = path.split(".")
    return getattr(import_module(f".methods.{module}", __package__), attribute)


def reducer_by_name(name: str) -> Reducer:
    """A reducer with the paper's settings."""
    return reducer_class(name)()
