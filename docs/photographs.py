"""Collect free photographs to train on: `python docs/photographs.py DEBS photographs`.

They come from Debian packages (bookworm), which need no installation:

    cd DEBS && apt-get download gcompris-qt-data lomiri-wallpapers-16.04 lomiri-wallpapers-20.04

`assets/photographs.jsonl` lists package, version, file, author, licence, source and SHA-256 of
each picture; a file with another digest is refused. Most are inside Qt resource files (`archive.rcc:member`).
Pictures are written as PNGs with short sides of at most 512 pixels. Needs `dpkg-deb`.
"""

import argparse
import hashlib
import io
import json
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

LIST = Path(__file__).parents[1] / "assets" / "photographs.jsonl"
SHORT_SIDE = 512
ZLIB, FOLDER, ZSTD = 1, 2, 4  # flags of an entry
MOST_BYTES = 2**28  # of an unpacked entry


def read_rcc(data: bytes) -> dict[str, bytes]:
    """The files of a Qt binary resource (format 1 to 3) by path.

    Raises ValueError for other data, Zstandard entries and offsets that lie outside.
    """
    try:
        magic, version, tree, contents, names = struct.unpack_from(">4s4I", data)
        if magic != b"qres" or not 1 <= version <= 3:
            raise ValueError(
                f"it starts with {magic!r} and version {version}; a Qt resource has b'qres', 1 to 3"
            )
        return dict(_entries(data, tree, contents, names, 14 if version == 1 else 22))
    except (struct.error, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"damaged Qt resource: {error}") from error


def _entries(data: bytes, tree: int, contents: int, names: int, size: int) -> Iterator[tuple[str, bytes]]:
    """Walk the tree from its root, a folder without a name; each node is `size` bytes."""
    stack, visited = [(0, "")], set()
    while stack:
        node, path = stack.pop()
        if node in visited:
            raise ValueError(f"damaged Qt resource: node {node} is in two folders")
        visited.add(node)
        name_at, flags, first, second = struct.unpack_from(">IHII", data, tree + node * size)
        if node:
            (length,) = struct.unpack_from(">H", data, names + name_at)
            start = names + name_at + 6  # after the length and a hash
            path = f"{path}/{data[start : start + 2 * length].decode('utf-16-be')}".removeprefix("/")
        if flags & FOLDER:
            stack += [(child, path) for child in range(second, second + first)]
        elif flags & ZSTD:
            raise ValueError(f"{path} is compressed by Zstandard, which this script does not read")
        else:
            (length,) = struct.unpack_from(">I", data, contents + second)
            start = contents + second + 4
            content = data[start : start + length]
            if len(content) != length:
                raise ValueError(f"damaged Qt resource: {path} ends after its file")
            yield path, _inflated(content[4:], path) if flags & ZLIB else content


def _inflated(content: bytes, path: str) -> bytes:
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(content, MOST_BYTES)
    if unpacker.unconsumed_tail:
        raise ValueError(f"{path} unpacks to more than {MOST_BYTES:,} bytes")
    return unpacked


def listed_files(folder: Path, rows: list[dict[str, str]]) -> Iterator[tuple[dict[str, str], bytes]]:
    """The listed files of the unpacked package in `folder`, their digests checked."""
    archives: dict[str, dict[str, bytes]] = {}
    for row in rows:
        file, _, member = row["file"].partition(":")
        if member and file not in archives:
            archives[file] = read_rcc((folder / file).read_bytes())
        content = archives[file][member] if member else (folder / file).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != row["sha256"]:
            raise ValueError(
                f"{row['file']} has the SHA-256 {digest}, not {row['sha256']}; fetch {row['package']} "
                f"{row['version']}"
            )
        yield row, content


def write_picture(content: bytes, path: Path) -> None:
    """Write a picture as a PNG whose short side is at most 512 pixels."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    scale = min(1.0, SHORT_SIDE / min(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.LANCZOS).save(path)


def main() -> None:
    """Unpack the packages that the list names and write its pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", type=Path, help="folder of the downloaded .deb files")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in LIST.read_text(encoding="utf-8").splitlines()]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for package in dict.fromkeys(row["package"] for row in rows):
        package_rows = [row for row in rows if row["package"] == package]
        files = sorted(arguments.packages.glob(f"{package}_*.deb"))
        if len(files) != 1:
            parser.error(f"{arguments.packages} holds {len(files)} files {package}_*.deb; it takes one")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["dpkg-deb", "-x", str(files[0]), folder], check=True)
            for row, content in listed_files(Path(folder), package_rows):
                write_picture(content, arguments.out / f"{row['name']}.png")


if __name__ == "__main__":
    main()
