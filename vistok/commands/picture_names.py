"""Names of the pictures a command writes: inside its folder, each different, no file of others replaced."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..files import check_target

SOFTWARE = "vistok"  # what the pictures' "Software" field holds
_LONGEST = 200  # bytes of a name, which leaves room for a number and the ending


def picture_paths(folder: Path, names: Iterable[str], *, replace_own: bool = False) -> list[Path]:
    """A path `folder/….png` for every name, in order; equal ones are numbered (photo.png, photo-2.png).

    Of a name that is a path the folders are kept, and nothing leads out of `folder`: roots, drives, `..` and
    control characters are removed.

    Raises:
        OSError: a picture of that name is there already (with `replace_own`: and is not one that vistok
            wrote), or it cannot be written.
    """
    folder = check_target(folder, folder=True)
    root, paths = folder.resolve(), []
    numbers: dict[str, int] = {}  # of each name in use, the last number given for it
    for name in names:
        place = PurePosixPath(*_parts(name))
        path = folder / place.with_name(f"{place.name}.png")
        first = str(path).casefold()
        while str(path).casefold() in numbers:
            numbers[first] += 1
            path = folder / place.with_name(f"{place.name}-{numbers[first]}.png")
        numbers[str(path).casefold()] = 1
        if not path.parent.resolve().is_relative_to(root):
            raise OSError(f"{path.parent} is a link that leads out of {folder}; name another folder")
        check_picture_target(path, replace_own=replace_own)
        paths.append(path)
    return paths


def _parts(name: str) -> list[str]:
    """The folders and the stem of a name, each safe as a file name."""
    parts = [_safe_part(part) for part in name.replace("\\", "/").split("/")]
    parts = [part for part in parts if part.strip(". ")] or ["picture"]
    stem, dot, ending = parts[-1].rpartition(".")
    if dot and stem and len(ending) <= 5:
        parts[-1] = stem
    return [_cut(part) for part in parts[-8:]]


def _safe_part(part: str) -> str:
    return "".join(
        "_" if not character.isprintable() or character in ':*?"<>|' else character for character in part
    )


def _cut(part: str) -> str:
    return part.encode()[:_LONGEST].decode(errors="ignore")


def check_picture_target(path: Path, *, replace_own: bool) -> None:
    """Raise OSError unless nothing is there, or (with `replace_own`) a picture that this package wrote."""
    check_target(path)
    if path.exists() and not (replace_own and _is_own(path)):
        own = " that vistok did not write" if replace_own else ""
        raise FileExistsError(f"{path} is there already{own}; name another folder, or move it away")


def _is_own(path: Path) -> bool:
    """Whether a picture was written by this package."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == SOFTWARE
    except Exception:  # Pillow raises nearly anything on another kind of file
        return False


def save_picture(picture: "object", path: Path) -> None:
    """Write a PIL image as a PNG that carries this package's mark, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    from ..files import atomic_write

    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    with atomic_write(path) as aside:
        picture.save(aside, format="PNG", pnginfo=mark)
