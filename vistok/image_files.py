"""Which files are images: the formats that the installed Pillow decodes, by name or by content."""

import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

# Pillow recognises these and cannot decode them by itself.
_STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_HEAD = 64  # bytes from which the kind of a file is recognised
_HIDDEN = ("._", ".DS_Store", ".vistok-")  # what file systems and unfinished writes leave in folders
_SENTENCES = (
    (b"version https://git-lfs", "a git-lfs pointer in place of the picture; run git lfs pull"),
    (b"\x93NUMPY", "a NumPy array; load it with numpy.load and give the array to vistok.to_tensor"),
    (b"%PDF", "a PDF document; save its pages as pictures"),
    (b"\xff\x0a", "a JPEG XL image; pip install pillow-jxl-plugin"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image; pip install pillow-jxl-plugin"),
    (b"<svg", "an SVG drawing; convert it to PNG"),
    (b"<?xml", "an XML or SVG file; convert drawings to PNG"),
    (b"<!doctype html", "a web page in place of the picture; download it again"),
    (b"<html", "a web page in place of the picture; download it again"),
)


@cache
def _formats() -> frozenset[str]:
    """Pillow's names of the formats it decodes here, those of installed plug-ins included."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401  (registers itself)
    return frozenset(Image.OPEN) - _STUBS


@cache
def image_extensions() -> frozenset[str]:
    """Endings of image files, lower case with their dot, that the installed Pillow decodes."""
    formats = _formats()
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in formats)


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether a file is taken for an image: by its ending, else by its content.

    Nothing is decoded. Folders, pipes, devices and files that cannot be read are not images.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        if Path(path).suffix.lower() in image_extensions():
            return True
        return _has_image_content(path)
    except OSError:
        return False


def _has_image_content(path: str | os.PathLike[str]) -> bool:
    head = _head(path)
    # Formats without a signature (TGA) would accept nearly anything.
    likely = [name for name in _formats() if _accepts(name, head)]
    if not likely:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=likely):
                return True
        except Image.DecompressionBombError:
            return True
        except Exception:  # Pillow's plug-ins raise nearly anything on another kind of file
            return False


def _accepts(name: str, head: bytes) -> bool:
    accept = Image.OPEN[name][1]
    with suppress(Exception):  # some read further than the head of a short file
        return accept is not None and accept(head) is True
    return False


def _head(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEAD)


def why_not_image(path: str | os.PathLike[str]) -> str | None:
    """What a file that is not an image holds and what to do about it, or None for other files."""
    suffix = Path(path).suffix.lower()
    head = _head(path)
    if not head:
        return "an empty file; fetch it again"
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        return None if "HEIF" in _formats() else "a HEIC photograph; pip install pillow-heif"
    for start, sentence in _SENTENCES:
        if head.lower().startswith(start.lower()):
            return None if "JXL" in _formats() and "JPEG XL" in sentence else sentence
    if suffix in (".csv", ".tsv"):
        return "a table; give the pictures that it names, or their folder"
    if suffix in (".pkl", ".pickle"):
        return "a pickle, which is never opened because that runs code; give the pictures themselves"
    if suffix == ".npz":
        return "NumPy arrays; load them with numpy.load and give the arrays to vistok.to_tensor"
    return None


# Folders ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFolder:
    """The images below a folder, sorted by path, and the files that are not images with the reason."""

    root: Path
    images: list[Path]
    left_out: list[tuple[Path, str]]

    def left_out_line(self) -> str | None:
        """One line on what was left out and why, or None when nothing was."""
        if not self.left_out:
            return None
        reasons: dict[str, list[Path]] = {}
        for path, reason in self.left_out:
            reasons.setdefault(reason, []).append(path)
        parts = []
        for reason, paths in sorted(reasons.items(), key=lambda item: -len(item[1])):
            names = ", ".join([path.name for path in paths[:2]] + ["…"] * (len(paths) > 2))
            parts.append(f"{len(paths)} × {reason} ({names})")
        files = f"{len(self.left_out)} file{'s' * (len(self.left_out) != 1)}"
        return f"left out {files} of {self.root}: {'; '.join(parts)}"


def list_images(root: str | os.PathLike[str]) -> ImageFolder:
    """Find the images in a folder and its subfolders, linked ones included, each folder once.

    Raises:
        OSError: a folder cannot be listed.
    """
    root, images, left_out = Path(root), [], []
    for path in _files_below(root):
        if path.name.startswith(_HIDDEN):
            continue
        if is_image(path):
            images.append(path)
        else:
            left_out.append((path, _reason(path)))
    return ImageFolder(root, sorted(images), sorted(left_out))


def _files_below(root: Path) -> Iterator[Path]:
    """Every file below a folder; links to folders are followed, and no folder is entered twice."""
    entered = {_identity(root)}
    for parent, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        fresh = [(folder, _identity(Path(parent, folder))) for folder in sorted(folders)]
        folders[:] = _first_of_each(fresh, entered)
        yield from (Path(parent, name) for name in names)


def _first_of_each(
    folders: Iterable[tuple[str, tuple[int, int]]], entered: set[tuple[int, int]]
) -> list[str]:
    first = []
    for name, identity in folders:
        if identity not in entered:
            entered.add(identity)
            first.append(name)
    return first


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _raise(error: OSError) -> None:
    raise error


def _reason(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            return "not an ordinary file"
        reason = why_not_image(path)
    except FileNotFoundError:
        return "a link to nothing"
    except OSError as error:
        return f"not readable ({error.strerror})"
    if reason is not None:
        return reason
    return f"not an image ({path.suffix.lower()})" if path.suffix else "not an image"
