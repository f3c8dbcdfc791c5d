"""Check that all parts of vistok come from one checkout."""

from pathlib import Path


def check_checkout(file: str, part: str) -> None:
    """Raise ImportError unless `file`, the `__init__.py` of the part "compress" or "eval", belongs to this
    vistok: an editable install of one checkout can meet the vistok folder of another on the import path."""
    own, folder = Path(__file__).resolve().parent, Path(file).resolve().parent
    if folder not in (own / part, own.parent / part):
        raise ImportError(
            f"vistok comes from {own}, but vistok.{part} from {folder}; install one of them with `pip "
            "install -e .` in its checkout, and do not put the other on PYTHONPATH"
        )
