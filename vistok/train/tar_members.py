"""The pictures in webdataset tar files, without unpacking them."""

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from typing_extensions import Self

from ..files import check_source
from ..images import MAX_FILE_BYTES, image_extensions

LARGEST_HEADER = 2**20
"""Bytes of a member's extended header; tarfile reads it into memory."""
EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class Member(NamedTuple):
    """A picture in a tar file: its name, and where in the file its bytes are."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True)
class TarPictures:
    """The pictures of a tar file in its order, and the names of members of samples without a picture."""

    pictures: list[Member]
    left_out: list[str]


class _Header(tarfile.TarInfo):
    """Refuses extended headers of a size that no name needs."""

    def _proc_member(self, tar: tarfile.TarFile) -> Self:
        if self.type in EXTENDED and self.size > LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)


def find_pictures(path: str | Path) -> TarPictures:
    """Look through a tar file for members that Pillow decodes, by their endings.

    Raises:
        OSError: it is not an ordinary file, or cannot be read.
        ValueError: it is not an uncompressed tar, or is cut off or damaged.
    """
    size = check_source(path).stat().st_size
    accepted, pictures, others = image_extensions(), [], []
    try:
        with tarfile.open(path, "r:", tarinfo=_Header) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.size < 0 or member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name!r} has {member.size:,} bytes, more than the file")
                if Path(member.name).suffix.lower() in accepted:
                    pictures.append(Member(member.name, member.offset_data, member.size))
                else:
                    others.append(member.name)
                tar.members.clear()  # tarfile keeps every header otherwise
            end = tar.offset
    except (tarfile.TarError, OverflowError, ValueError) as error:
        raise ValueError(
            f"{path} is not a whole, uncompressed tar file ({error}): "
            "fetch it again, or unpack .tar.gz to .tar"
        ) from error
    # tarfile takes a cut or damaged header for the end of the file; a real end is marked by a block of zeros.
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"{path} is cut off or damaged at byte {end}: fetch it again")
    samples = {_sample(member.name) for member in pictures}
    return TarPictures(pictures, [name for name in others if _sample(name) not in samples])


def read_member(path: str, offset: int, length: int) -> bytes:
    """The bytes of a member. ValueError for one too large for a picture."""
    if length > MAX_FILE_BYTES:
        raise ValueError(f"it has {length:,} bytes; pictures are read up to {MAX_FILE_BYTES:,}")
    with open(path, "rb") as file:  # anew: worker processes must not share an offset
        file.seek(offset)
        return file.read(length)


def left_out_line(names: list[str], shards: int) -> str | None:
    """One line on members of samples that have no picture, None if there are none."""
    if not names:
        return None
    endings: dict[str, int] = {}
    for name in names:
        suffix = Path(name).suffix.lower() or "no ending"
        endings[suffix] = endings.get(suffix, 0) + 1
    first = sorted(endings.items(), key=lambda item: -item[1])[:4]
    kinds = ", ".join(f"{count:,} × {suffix}" for suffix, count in first)
    more = ", …" if len(endings) > len(first) else ""
    return (
        f"left out {len(names):,} members of {shards} tar file{'s' * (shards != 1)}, as their samples have "
        f"no picture that Pillow reads: {kinds}{more} ({names[0]}{', …' if len(names) > 1 else ''})"
    )


def _sample(name: str) -> str:
    """The name that the members of one sample share: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
